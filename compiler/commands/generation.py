"""One sequence from a prompt, token by token, and the figures that come with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..arguments import BadInput
from ..progress import doing
from .text_stream import TextStream

if TYPE_CHECKING:
    from ...runtime.generate import Runner
    from ...runtime.stats import Stats


@dataclass
class Made:
    """What was generated, and what that took.

    Attributes:
        prompt_tokens: tokens read before the first new one.
        ids: the new tokens, the one that ended the text included.
        text: of the tokens; None with --ids.
        ended: "eos", "stop", or "length" where --max-new-tokens did.
        prompt_seconds: until the first new token; `seconds`: from there to the last.
        pages_read, pages_dense, bytes_read, bytes_dense: by all new tokens but the last, and what
            dense reads for the same (see `runtime.engine.Stats`); None where nothing counts them.
    """

    prompt_tokens: int
    ids: list[int]
    text: str | None
    ended: str
    prompt_seconds: float
    seconds: float
    pages_read: int | None = None
    pages_dense: int | None = None
    bytes_read: int | None = None
    bytes_dense: int | None = None

    @property
    def shown(self) -> str:
        return " ".join(map(str, self.ids)) if self.text is None else self.text

    @property
    def tokens_per_second(self) -> float | None:
        """None where one token was generated: it is the prompt's."""
        steps = len(self.ids) - 1
        return steps / self.seconds if steps and self.seconds else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}

    def figures(self) -> str:
        """One line for people."""
        from ..report import bytes_of

        told = [f"{len(self.ids)} written"]
        if (rate := self.tokens_per_second) is not None:
            told.append(f"{rate:.1f} tokens/s")
        if self.bytes_read is not None and self.bytes_dense is not None:
            told.append(
                f"{self.pages_read} of {self.pages_dense} pages and "
                f"{bytes_of(self.bytes_read)} of {bytes_of(self.bytes_dense)} read"
            )
        read = f"{self.prompt_tokens} tokens read in {self.prompt_seconds:.1f} s"
        return f"{read}; {', '.join(told)}"


def generate(
    runner: Runner,
    count: Callable[[], Stats] | None,
    tokens: list[int],
    max_new_tokens: int,
    texts: TextStream | None,
    ends: list[int],
    show: Callable[[str], None],
    **how: Any,
) -> Made:
    """Generates one sequence, and shows each piece as it comes.

    Args:
        count: what `runner` has read so far; None where it does not count.
        ends: tokens that end it.
        how: options of `runtime.generate.stream`.
    """
    import torch

    from ...runtime.generate import stream

    # The last token written is not read again.
    longest = len(tokens) + max_new_tokens - 1
    if runner.limit is not None and longest > runner.limit:
        raise BadInput(
            f"run: a prompt of {len(tokens)} tokens and {max_new_tokens} new ones exceed the "
            f"context of {runner.limit}; give a shorter prompt or fewer --max-new-tokens"
        )
    running = stream(runner, torch.tensor([tokens]), max_new_tokens, eos=ends or None, **how)
    started = time.perf_counter()
    with doing(f"prompt of {len(tokens)} tokens"):
        token = int(next(running))
    prompted = time.perf_counter()
    before = replace(count()) if count is not None else None
    new: list[int] = []
    pieces: list[str] = []

    def put(piece: str) -> None:
        pieces.append(piece)
        show(piece)

    while True:
        new.append(token)
        if texts is None:
            put(f" {token}" if pieces else str(token))
        elif token not in ends:
            put(texts.feed(token))
        if texts is not None and texts.stopped:
            break
        following = next(running, None)
        if following is None:
            break
        token = int(following)
    ended = time.perf_counter()
    why = "eos" if token in ends else "length"
    if texts is not None:
        put(texts.rest())
        why = "stop" if texts.stopped else why
    made = Made(
        len(tokens),
        new,
        None if texts is None else "".join(pieces),
        why,
        prompted - started,
        ended - prompted,
    )
    if count is not None and before is not None:
        after = count()
        made.pages_read = after.pages_read - before.pages_read
        made.pages_dense = after.pages_dense - before.pages_dense
        made.bytes_read = after.bytes_read - before.bytes_read
        made.bytes_dense = after.bytes_dense - before.bytes_dense
    return made
