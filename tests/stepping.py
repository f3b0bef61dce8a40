"""Run an engine in calls of given sizes and hold its logits against the model's own forward."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tolerance import assert_close_to_float64
from torch import Tensor, nn


def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    """The full forward of a copy, stateless: logits [B, T, V] of tokens int64 [B, T]."""
    parameters = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "position_ids" in parameters:
        options["position_ids"] = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    if "use_cache" in parameters:
        options["use_cache"] = False
    with torch.no_grad():
        out = copy.deepcopy(model)(tokens, **options)
    return out if isinstance(out, Tensor) else out.logits


def random_tokens(
    vocabulary: int, batch: int, length: int, *, seed: int = 0, multiple: int = 1
) -> Tensor:
    """int64 [B, T'], T' the next lower multiple; tokens 0 and 1 occur early and late."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (batch, length - length % multiple), generator=generator)
    for at, token in ((1, 0), (3, 1), (length - 5, 0), (length - 7, 1)):
        if 0 <= at < tokens.shape[1]:
            tokens[batch - 1, at] = token
    return tokens


def calls_of(length: int, *sizes: int) -> list[int]:
    """Call sizes that sum to `length`: `sizes` over and over, the last one cut."""
    calls: list[int] = []
    while (left := length - sum(calls)) > 0:
        calls.append(min(sizes[len(calls) % len(sizes)], left))
    return calls


def odd_calls(length: int, seed: int = 0) -> list[int]:
    """Odd call sizes that sum to `length`, single tokens among them."""
    draw = random.Random(seed)
    return calls_of(length, 7, 1, 5, *(draw.choice((1, 1, 3, 4, 9, 11)) for _ in range(length)))


def pieces(tokens: Tensor, calls: Sequence[int]) -> Iterator[Tensor]:
    assert sum(calls) == tokens.shape[1]
    return iter(tokens.split(list(calls), dim=1))


def stepped(engine: Any, tokens: Tensor, calls: Sequence[int], *, prefill: bool = False) -> Tensor:
    """Logits [B, T, V] of an engine given `tokens` in calls; the first by `prefill` if asked."""
    out = []
    for index, piece in enumerate(pieces(tokens, calls)):
        if prefill and index == 0:
            out.append(engine.prefill(piece, all_logits=True))
        else:
            out.append(engine(piece))
    return torch.cat(out, dim=1)


def assert_logits(model: nn.Module, actual: Tensor, tokens: Tensor, *, start: int = 0) -> None:
    """`actual` holds the forward's logits of tokens[:, start : start + n], as near as eager's."""
    length = tokens.shape[1]
    part = slice(start, start + actual.shape[1])
    truth = forward(copy.deepcopy(model).double(), tokens).double()
    assert_close_to_float64(
        actual, forward(model, tokens)[:, part], truth[:, part], reduction=length
    )
