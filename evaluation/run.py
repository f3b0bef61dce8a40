"""The grid: every prompt of every task through every policy, dense first, recorded as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

from ..runtime.engine import Engine
from .filler import Filler
from .prompts import Prompt
from .protocol import Contender, Counts, ask, read_context
from .records import KEY, Key, Records
from .tasks import TASKS, make_prompt
from .text_loss import NAME as TEXT_LOSS
from .text_loss import Window, text_loss, windows
from .tokens import Tokenizer
from .wordings import Wording

DENSE = "dense"
_SEEDS_A_RUN = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        tasks: names of tasks, "text-loss" among them if wanted.
        lengths: tokens of context, question and answer together.
        depths: shares of the context; tasks without a depth get as many prompts as the others.
        samples: prompts for each task, length and depth.
        seed: of the prompts.
        stride: tokens that are scored in each window of the text loss.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    stride: int

    def __post_init__(self) -> None:
        for name in ("tasks", "lengths", "depths"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"{name}: give at least one, and none twice, got {list(given)}")
        unknown = [task for task in self.tasks if task not in (*TASKS, TEXT_LOSS)]
        if unknown:
            raise ValueError(
                f"unknown task {unknown[0]!r}; known: {', '.join([*TASKS, TEXT_LOSS])}"
            )
        if not 1 <= self.samples < _SEEDS_A_RUN // len(self.depths):
            raise ValueError(f"samples is {self.samples}; give at least 1, below a million in all")
        if not all(0.0 <= depth <= 1.0 for depth in self.depths):
            raise ValueError(f"depths {list(self.depths)}: each is a share of the context, 0 to 1")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths {[*self.lengths]}: each is a number of tokens, at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give a whole number of at least 0")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def items(self) -> list[Item]:
        """Every prompt; a part of the list, from the front, is spread over the whole grid."""
        found = []
        for task in self.tasks:
            deep = task in TASKS and TASKS[task].deep
            for length in self.lengths:
                for i, depth in enumerate(self.depths):
                    for n in range(self.samples):
                        sample = n if deep else n * len(self.depths) + i
                        found.append(Item(task, length, depth if deep else None, sample, n))
        return sorted(found, key=lambda item: item.rank)


@dataclass(frozen=True)
class Item:
    """One prompt of the grid; `rank` says how early it is asked."""

    task: str
    length: int
    depth: float | None
    sample: int
    rank: int

    def key(self, policy: str) -> Key:
        return (self.task, self.length, self.depth, self.sample, policy)


@dataclass(frozen=True)
class Source:
    """What prompts are made of.

    Attributes:
        text: what the text loss is taken on; None: there is none.
    """

    tokenizer: Tokenizer
    wording: Wording
    filler: Filler
    text: str | None

    @cached_property
    def text_tokens(self) -> list[int]:
        return self.tokenizer.encode(self.text or "")


def skips(contender: Contender, length: int) -> bool:
    """Whether a policy has anything to skip in prompts of that length."""
    exact = contender.reads_all_below
    return exact is not None and length > exact


def prepare(plan: Plan, source: Source, contenders: Sequence[Contender]) -> None:
    """Refuse, before anything is run, what cannot be asked.

    Raises:
        ValueError: no "dense" first, two policies of one name, a policy that reads everything, at
            every layer or at every length, a length the model cannot hold, or a task that does not
            fit one.
    """
    names = [contender.name for contender in contenders]
    if names[:1] != [DENSE] or len(set(names)) != len(names):
        raise ValueError(f"policies {names}: {DENSE!r} comes first and each has a name of its own")
    for contender in contenders:
        longest = max(plan.lengths)
        if contender.limit is not None and longest > contender.limit:
            raise ValueError(
                f"a length of {longest} tokens is above the context of {contender.limit} that the "
                "model can hold; give shorter --lengths, or, if --max-context set it, a larger one"
            )
        if contender.name == DENSE:
            continue
        if contender.reads_all_below is None:
            raise ValueError(
                f"policy {contender.name!r} keeps all {len(contender.layouts)} attentions dense: "
                "there is nothing to compare; give it a budget, and fewer dense layers"
            )
        if not any(skips(contender, length) for length in plan.lengths):
            raise ValueError(
                f"policy {contender.name!r} reads everything up to {contender.reads_all_below} "
                f"tokens, and the lengths are {list(plan.lengths)}: it has nothing to skip; give a "
                "longer length or a smaller budget"
            )
    for task in plan.tasks:
        for length in plan.lengths:
            _make(plan, source, Item(task, length, plan.depths[0], 0, 0))


def run(
    plan: Plan,
    source: Source,
    contenders: Sequence[Contender],
    records: Records,
    advance: Callable[[Item, str], None] = lambda item, policy: None,
) -> None:
    """Ask what `records` does not hold yet, and record each answer when it is there.

    Args:
        advance: told of each prompt and policy that was run.

    Raises:
        ReadTooMuch: a policy read what its memory does not allow; what was recorded stays.
    """
    askers = {contender.name: cache(contender.make) for contender in contenders}
    hosts = readers(contenders)
    reading = {host.name: cache(host.make) for host in hosts.values()}
    for item in plan.items():
        made: Prompt | Window | None = None
        held: set[str] = set()
        for contender in contenders:
            if contender.name != DENSE and not skips(contender, item.length):
                continue
            if item.key(contender.name) in records.done:
                continue
            made = made or _make(plan, source, item)
            host = hosts[contender.name].name
            reader = reading[host]()
            if host not in held:
                read_context(reader, made.read if isinstance(made, Window) else made.context)
                held.add(host)
            asker = askers[contender.name]()
            records.add(_ask(contender, asker, reader, source.tokenizer, item, made))
            advance(item, contender.name)


def readers(contenders: Sequence[Contender]) -> dict[str, Contender]:
    """Who reads the context for whom, by name: memories that hold alike share one dense read."""
    richest = sorted(
        contenders, key=lambda c: -sum(len(layout.memory.fields) for layout in c.layouts)
    )
    return {
        contender.name: next(host for host in richest if host.serves(contender))
        for contender in contenders
    }


def expected(plan: Plan, contenders: Sequence[Contender]) -> Iterator[tuple[Item, Contender]]:
    """What `run` goes through."""
    for item in plan.items():
        for contender in contenders:
            if contender.name == DENSE or skips(contender, item.length):
                yield item, contender


def _make(plan: Plan, source: Source, item: Item) -> Prompt | Window:
    if item.task == TEXT_LOSS:
        if source.text is None:
            raise ValueError(f"task {TEXT_LOSS}: there is no text for it; give files with --text")
        count = plan.samples * len(plan.depths)
        start = source.tokenizer.start
        return windows(source.text_tokens, start, item.length, plan.stride, count)[item.sample]
    return make_prompt(
        TASKS[item.task],
        item.length,
        item.depth or 0.0,
        plan.seed * _SEEDS_A_RUN + item.sample,
        tokenizer=source.tokenizer,
        wording=source.wording,
        filler=source.filler,
    )


def _ask(
    contender: Contender,
    engine: Engine,
    reader: Engine,
    tokenizer: Tokenizer,
    item: Item,
    made: Prompt | Window,
) -> dict[str, Any]:
    started = time.perf_counter()
    record: dict[str, Any] = dict(zip(KEY, item.key(contender.name), strict=True))
    counts: Counts
    if isinstance(made, Window):
        loss = text_loss(contender, engine, reader, made, tokenizer)
        record |= {"nats": loss.nats, "text_bytes": loss.text_bytes}
        record["prompt_tokens"] = len(made.context) + len(made.scored)
        counts = loss.counts
    else:
        answered = ask(contender, engine, reader, made, tokenizer)
        record |= {"score": answered.score, "written": list(answered.written)}
        record |= {"prompt_tokens": made.tokens, "depth_in_tokens": made.depth}
        counts = answered.counts
    return record | counts.to_json() | {"seconds": round(time.perf_counter() - started, 4)}
