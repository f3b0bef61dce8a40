"""Strided text loss: a window's first tokens are context, its last ones are scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..runtime.engine import Engine
from .protocol import Contender, Counts, check, measured
from .tokens import Tokenizer

NAME = "text-loss"
# Query tokens a call: bounds the logits without changing any (selection is for each query).
_CALL = 64


@dataclass(frozen=True)
class Window:
    """Tokens of a text.

    Attributes:
        context: the tokenizer's start included; its last token is the first query.
        scored: predicted one by one, each from the true tokens before it.
    """

    context: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """What is read densely."""
        return self.context[:-1]


@dataclass(frozen=True)
class Loss:
    """What came of one window.

    Attributes:
        nats: mean negative log-likelihood of a scored token.
        text_bytes: UTF-8 bytes of the scored tokens' text.
        counts: what was read.
    """

    nats: float
    text_bytes: int
    counts: Counts


def windows(
    tokens: Sequence[int], start: Sequence[int], length: int, stride: int, count: int
) -> list[Window]:
    """`count` windows of `length` tokens, evenly spread over all that start at a multiple of
    `stride`; with all of them, every token behind the first context is scored once.

    Args:
        tokens: the whole text.
        start: tokens that open every sequence, part of the length.
        stride: tokens scored at the end of a window.

    Raises:
        ValueError: the stride leaves no context, or the text has fewer windows.
    """
    context = length - stride - len(start)
    if stride < 1 or context < 1:
        raise ValueError(
            f"a stride of {stride} leaves no context in a window of {length} tokens; give 1 to "
            f"{length - len(start) - 1}"
        )
    there = (len(tokens) - context) // stride
    if there < count:
        raise ValueError(
            f"the text of {len(tokens)} tokens has {max(0, there)} windows of {length} with a "
            f"stride of {stride}, {count} are asked for; give more text, fewer samples or a "
            "smaller stride"
        )
    return [
        Window(
            (*start, *tokens[i * stride : i * stride + context]),
            tuple(tokens[i * stride + context : i * stride + context + stride]),
        )
        for i in (n * there // count for n in range(count))
    ]


def text_loss(
    contender: Contender, engine: Engine, reader: Engine, window: Window, tokenizer: Tokenizer
) -> Loss:
    """Score the window's end through the policy, behind what `reader` has read of its context.

    Args:
        engine: one of `contender`.
        reader: an engine that holds `window.read` and that `engine` can adopt from.

    Raises:
        ReadTooMuch: see `protocol.check`.
    """
    given = torch.tensor([[window.context[-1], *window.scored[:-1]]])
    wanted = torch.tensor(window.scored)
    nats: list[torch.Tensor] = []
    engine.adopt(reader)

    def run() -> None:
        for queries, targets in zip(given.split(_CALL, 1), wanted.split(_CALL), strict=True):
            logits = engine(queries)[0].float().cpu()  # [n, V]
            nats.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))

    counts = measured(engine, run)
    first = len(window.read)
    counts = replace(counts, pages_allowed=contender.pages_allowed(first, counts.tokens))
    check(contender, first, counts)
    before, after = window.context, (*window.context, *window.scored)
    spanned = _bytes(tokenizer.decode(after)) - _bytes(tokenizer.decode(before))
    return Loss(float(torch.cat(nats).mean()), spanned, counts)


def _bytes(text: str) -> int:
    """UTF-8 bytes; what stands for a part of a character, cut off by a window's edge, is one."""
    return len(text.replace("\ufffd", "?").encode())


def bits_per_byte(nats: float, tokens: int, text_bytes: int) -> float:
    """Nats a token as bits a byte of text."""
    return nats * tokens / (text_bytes * math.log(2))
