"""The quality protocol: the context is read densely, question and answer through the policy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..models.memory.traffic import pages_read
from ..runtime.engine import Engine
from ..runtime.site_layout import SiteLayout
from ..runtime.stats import Stats
from .prompts import Prompt
from .tokens import Tokenizer


class ReadTooMuch(Exception):
    """A policy read what its memory does not allow: figures under its name would be another's."""


@dataclass(frozen=True)
class Contender:
    """A model under one policy.

    Attributes:
        name: the policy and its options, as the user gave them; "dense" is the one to compare with.
        make: a new, empty engine.
        layouts: its attention sites and their memories.
        limit: most tokens it can hold, or None.
    """

    name: str
    make: Callable[[], Engine]
    layouts: tuple[SiteLayout, ...]
    limit: int | None = None

    @property
    def selecting(self) -> list[SiteLayout]:
        """The sites at which pages may be skipped."""
        return [layout for layout in self.layouts if layout.memory.selects]

    @property
    def stateful(self) -> list[SiteLayout]:
        """The sites that hold a state, and read nothing beside it but a window."""
        return [layout for layout in self.layouts if layout.memory.state is not None]

    @property
    def kept_dense(self) -> int:
        """Sites that read every page."""
        return len(self.layouts) - len(self.selecting) - len(self.stateful)

    @property
    def reads_all_below(self) -> int | None:
        """Contexts of up to this many tokens are read in full everywhere; None: all are."""
        exact = [layout.memory.reads_all_below for layout in self.selecting]
        exact += [layout.memory.own_window for layout in self.stateful]
        return min(exact, default=None)

    @property
    def budget(self) -> int | None:
        """Tokens a query reads exactly at the sites that do not read all, the largest of them."""
        pages = [lay.memory.budget_pages * lay.memory.page_size for lay in self.selecting]
        return max([*pages, *(lay.memory.own_window for lay in self.stateful)], default=None)

    def serves(self, other: Contender) -> bool:
        """Whether what this one holds of a context is all that `other` has to hold of it."""
        if self is other:
            return True
        if self.stateful or other.stateful:
            # A state changes what later layers make of the context; its weights are not told here.
            return False
        pairs = zip(self.layouts, other.layouts, strict=False)
        return len(self.layouts) == len(other.layouts) and all(a.serves(b) for a, b in pairs)

    def pages_allowed(self, first: int, tokens: int) -> int:
        """Most pages that queries at `tokens` positions from `first` on may read, over all sites.

        Each query's number follows from the memories alone, whatever the engine counted.
        """
        return sum(
            layout.kv_heads * pages_read(layout.memory, position, window=layout.window)
            for layout in self.layouts
            for position in range(first, first + tokens)
        )


@dataclass(frozen=True)
class Counts:
    """What was read for question and answer, over all sites, KV heads and questions of a prompt.

    Attributes:
        tokens: query tokens.
        pages_read, bytes_read: by the policy, index included.
        pages_dense, bytes_dense: what reading everything would have taken.
        pages_allowed: the most that the memories allow.
        resident_bytes: what the memory took behind the answer, the largest over the questions.
        state_bytes: the states among them.
    """

    tokens: int = 0
    pages_read: int = 0
    pages_dense: int = 0
    bytes_read: int = 0
    bytes_dense: int = 0
    pages_allowed: int = 0
    resident_bytes: int = 0
    state_bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, others = asdict(self), asdict(other)
        summed = {name: mine[name] + others[name] for name in mine}
        # Questions are asked one after another, each of a copy of its own.
        held = {name: max(mine[name], others[name]) for name in ("resident_bytes", "state_bytes")}
        return Counts(**{**summed, **held})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answered:
    """What came of one prompt.

    Attributes:
        score: mean share of the answers that were found, 0 to 1.
        written: the text written for each question.
        counts: what was read.
    """

    score: float
    written: tuple[str, ...]
    counts: Counts


def read_context(engine: Engine, context: Sequence[int]) -> None:
    """Forget everything, then read the context densely."""
    engine.reset()
    if context:
        engine.prefill(torch.tensor([context]))


def ask(
    contender: Contender, engine: Engine, reader: Engine, prompt: Prompt, tokenizer: Tokenizer
) -> Answered:
    """Ask every question of a prompt, through the policy, behind what `reader` has read.

    Args:
        engine: one of `contender`.
        reader: an engine that holds the prompt's context and that `engine` can adopt from. It
            stays as it is; no question sees another.

    Raises:
        ReadTooMuch: see `check`.
    """
    written, scores, counts = [], [], Counts()
    for asked in prompt.asked:
        engine.adopt(reader)
        with_text, read = _write(engine, asked.tokens, asked.room, prompt.end, tokenizer)
        allowed = contender.pages_allowed(len(prompt.context), read.tokens)
        counts += replace(read, pages_allowed=allowed)
        written.append(with_text)
        scores.append(score(with_text, asked.answers, prompt.end, asked.begins))
    check(contender, len(prompt.context), counts)
    return Answered(sum(scores) / len(scores), tuple(written), counts)


def answer(contender: Contender, prompt: Prompt, tokenizer: Tokenizer) -> Answered:
    """Read the context densely, then `ask`."""
    reader = contender.make()
    read_context(reader, prompt.context)
    return ask(contender, contender.make(), reader, prompt, tokenizer)


def measured(engine: Engine, run: Callable[[], None]) -> Counts:
    """What `run` makes the engine read, and what its memory takes then."""
    before = _snapshot(engine.stats())
    run()
    stats = engine.stats()
    read = Counts(*(b - a for a, b in zip(before, _snapshot(stats), strict=True)))
    return replace(read, resident_bytes=stats.resident_bytes, state_bytes=stats.state_bytes)


def check(contender: Contender, context: int, counts: Counts) -> None:
    """Hold the pages that the engine counted against those that the memories allow.

    A policy that runs dense, whatever the reason, reads more than its memory allows as soon as the
    context is above its budget.

    Raises:
        ReadTooMuch: more were read.
    """
    if counts.pages_read <= counts.pages_allowed:
        return
    raise ReadTooMuch(
        f"policy {contender.name!r} read {counts.pages_read} pages for {counts.tokens} tokens "
        f"behind a context of {context}, where dense reads {counts.pages_dense} and its memory "
        f"allows {counts.pages_allowed}; its answers are no evidence for the policy, so the run "
        "ends here"
    )


def score(written: str, answers: Sequence[str], end: str = "", begins: str = "") -> float:
    """The share of `answers` that stand in the first line of `written` as whole words.

    Args:
        end: what an answer ends with; without a newline in it, `written` is one line.
        begins: the word with which the line has to begin; if it does not, nothing counts.
    """
    line = written.lstrip().split("\n")[0] if "\n" in end else written
    if begins and not re.match(rf"\s*{re.escape(begins)}(?!\w)", line):
        return 0.0
    found = [a for a in answers if re.search(rf"(?<!\w){re.escape(a)}(?!\w)", line)]
    return len(found) / len(answers)


def _write(
    engine: Engine, question: Sequence[int], room: int, end: str, tokenizer: Tokenizer
) -> tuple[str, Counts]:
    """Greedy tokens behind `question`, at most `room`; all reads go through the policy."""
    new: list[int] = []

    def run() -> None:
        following = engine(torch.tensor([question]))[:, -1:].argmax(-1)
        new.append(int(following))
        while len(new) < room and not ("\n" in end and _line_is_over(tokenizer.decode(new))):
            following = engine(following)[:, -1:].argmax(-1)
            new.append(int(following))

    counts = measured(engine, run)
    return tokenizer.decode(new), counts


def _line_is_over(text: str) -> bool:
    return "\n" in text.lstrip()


def _snapshot(stats: Stats) -> tuple[int, ...]:
    return (
        sum(stats.tokens.values()),
        stats.pages_read,
        stats.pages_dense,
        stats.bytes_read,
        stats.bytes_dense,
    )
