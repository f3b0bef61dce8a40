"""Sequences through one site's memory, write to read, as an engine drives it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memcompile.models.memory.read import eager, emit_read, emit_write
from memcompile.models.memory.site import SiteTensors
from memcompile.models.memory.spec import Memory
from memcompile.models.memory.state import Weights, state_features, state_weights
from memcompile.runtime.memory_state import MemoryState
from memcompile.runtime.site_layout import SiteLayout

SCALE = 0.4
KEY, VALUE = 6, 5


def layout(memory: Memory, dtype: torch.dtype, window: int = 0) -> SiteLayout:
    """A site with two KV heads."""
    features = state_features(memory, KEY) if memory.state else 0
    return SiteLayout("a", 2, KEY, VALUE, dtype, memory, window, features)


def sequences(
    batch: int, tokens: int, dtype: torch.dtype, group: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, 2G, T, 6], key [B, 2, T, 6] and value [B, 2, T, 5]."""
    make = torch.Generator().manual_seed(seed)
    shapes = ((2 * group, 6), (2, 6), (2, 5))
    q, k, v = (
        torch.randn(batch, heads, tokens, width, generator=make, dtype=torch.float64).to(dtype)
        for heads, width in shapes
    )
    return q, k, v


def drive(
    memory: Memory,
    tokens: tuple[Tensor, Tensor, Tensor],
    calls: list[list[int]],
    read: str = "policy",
    window: int = 0,
    *,
    dense: int = 0,
    weights: Weights | None = None,
) -> Tensor:
    """Feeds each row its tokens in `calls` (one length a row); returns all outputs in order.

    Args:
        dense: so many calls at the start read densely.
        weights: of a state; None: those that nothing was fitted to.
    """
    return drive_state(memory, tokens, calls, read, window, dense=dense, weights=weights)[0]


def drive_state(
    memory: Memory,
    tokens: tuple[Tensor, Tensor, Tensor],
    calls: list[list[int]],
    read: str = "policy",
    window: int = 0,
    *,
    dense: int = 0,
    weights: Weights | None = None,
) -> tuple[Tensor, MemoryState]:
    """`drive`, and the state it leaves."""
    query, _, value = tokens
    batch, dtype = query.shape[0], query.dtype
    if memory.state is not None and weights is None:
        weights = state_weights(memory, query.shape[1], 2, KEY)
    state = MemoryState([layout(memory, dtype, window)], batch, "cpu")
    out = query.new_full((*query.shape[:3], value.shape[3]), torch.nan)
    for number, lengths in enumerate(calls):
        mode = "dense" if number < dense else read
        state.reserve(lengths, policy=mode == "policy")
        site, start = SiteTensors.take(memory, state.tensors()), state.position
        site = replace(site, weights=weights or {})
        new = []
        for x in tokens:
            padded = x.new_full((batch, x.shape[1], max(lengths), x.shape[3]), torch.nan)
            for b, n in enumerate(lengths):
                padded[b, :, :n] = x[b, :, start[b] : start[b] + n]
            new.append(padded)
        at = torch.tensor(start, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
        emit_write(eager, memory, site, new[1], new[2], *at)
        got, _ = emit_read(
            eager, memory, site, mode, new[0], *at,
            scale=SCALE, softcap=0.0, window=window, dtype=dtype,
        )  # fmt: skip
        state.advance(lengths)
        for b, n in enumerate(lengths):
            out[b, :, start[b] : start[b] + n] = got[b, :, :n]
            assert not got[b, :, n:].any()
    return out, state


def in_calls(tokens: int, cuts: list[int], batch: int) -> list[list[int]]:
    stops = sorted({cut for cut in cuts if cut < tokens} | {tokens})
    return [[stop - start] * batch for start, stop in zip([0, *stops], stops, strict=False)]


def exact(tokens: tuple[Tensor, ...], dtype: torch.dtype, window: int = 0) -> Tensor:
    """Causal attention over everything, in `dtype`."""
    q, k, v = (x.to(dtype) for x in tokens)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    hidden = (distance < 0) | (distance >= (window or len(distance)))
    logits = (SCALE * q @ k.transpose(2, 3)).masked_fill(hidden, float("-inf"))
    return logits.softmax(-1) @ v
