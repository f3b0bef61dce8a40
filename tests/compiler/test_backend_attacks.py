"""Caches that a graph writes otherwise than by appending: left dense, never read wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import memcompile
from memcompile.compiler import backend

KV, WIDTH, LENGTH = 2, 8, 64
OPTIONS = {"policy": "scout", "budget": 24, "sinks": 8, "window": 8, "page_size": 8}
OPTIONS |= {"dense_layers": 0, "kernels": "off"}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs run operation by operation, which spares Inductor's seconds."""
    monkeypatch.setattr(backend, "_compiled", lambda gm, inputs, patches: gm)
    torch._dynamo.reset()
    memcompile.graphs(clear=True)
    yield
    torch._dynamo.reset()


class OneLayer(nn.Module):
    """Its keys tell nothing of the tokens before them."""

    def __init__(self, edit: Callable[..., None] | None = None, after: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.edit, self.after = edit, after
        self.embed, self.project = nn.Embedding(61, 32), nn.Linear(32, 64)

    def split(self, tokens: Tensor) -> list[Tensor]:
        x: Tensor = self.project(self.embed(tokens)).unflatten(2, (-1, WIDTH)).transpose(1, 2)
        return list(x.split([4, KV, KV], 1))

    def forward(
        self, tokens: Tensor, keys: Tensor, values: Tensor, at: Tensor, mask: Tensor
    ) -> Tensor:
        q, k, v = self.split(tokens)
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        if self.edit is not None and not self.after:
            self.edit(keys, values)
        out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        if self.edit is not None and self.after:
            self.edit(keys, values)
        return out


class Growing(OneLayer):
    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Any:
        q, k, v = self.split(tokens)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        out = scaled_dot_product_attention(
            q, keys.contiguous().clone(), values.contiguous(), enable_gqa=True
        )
        if self.edit is not None:
            self.edit(keys, values)
        return out, keys, values


def causal(rows: int, first: int) -> Tensor:
    return (torch.arange(LENGTH)[None] <= torch.arange(first, first + rows)[:, None])[None, None]


def caches() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, KV, LENGTH, WIDTH), torch.zeros(1, KV, LENGTH, WIDTH)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="memcompile", options={**OPTIONS, **options})


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(61, (1, 160), generator=torch.Generator().manual_seed(seed))


def read(module: Any, ids: Tensor, cache: Any, p: int, slot: int | None = None) -> Tensor:
    at = torch.tensor([p if slot is None else slot])
    out: Tensor = module(ids[:, p : p + 1], *cache, at, causal(1, min(p, LENGTH - 1)))
    return out.clone()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda keys, values: keys[:, :, 3:7].mul_(-1),
        lambda keys, values: values.view(-1)[5:40].add_(1),
        lambda keys, values: values.mul_(1.01),
    ],
    ids=["slice", "view", "whole"],
)
def test_a_cache_that_is_edited_beside(edit: Any, after: bool) -> None:
    model, ids = OneLayer(edit, after), tokens()
    fast = compiled(model)
    ours, plain = caches(), caches()
    with torch.no_grad():
        for p in range(20, 40):
            assert torch.equal(read(fast, ids, ours, p), read(model, ids, plain, p))
    (graph,) = memcompile.graphs()
    why = ("writes into its cache in another place, too", "no cache that the graph appends to")
    assert not graph.rewritten and any(w in str(graph.declined[0]) for w in why)


def test_a_longer_cache_that_is_edited() -> None:
    model, ids = Growing(lambda keys, values: keys[:, :, 3:7].zero_()), tokens()
    fast, ours = compiled(model), [torch.randn(1, KV, 40, WIDTH)] * 2
    plain = ours
    with torch.no_grad():
        for p in range(4):
            got, *ours = fast(ids[:, p : p + 1], *ours)
            want, *plain = model(ids[:, p : p + 1], *plain)
            assert torch.equal(got, want)


def test_an_attention_over_a_copy_of_the_longer_cache() -> None:
    model, ids = Growing(), tokens()
    fast, exact = compiled(model, budget=1024), copy.deepcopy(model).double()
    held = [torch.randn(1, KV, 40, WIDTH) for _ in range(2)]
    lists = [held, held, [x.double() for x in held]]
    with torch.no_grad():
        for p in range(12):
            one = ids[:, p : p + 1]
            outs = [m(one, *c) for m, c in zip((fast, model, exact), lists, strict=True)]
            lists = [out[1:] for out in outs]
            assert_close_to_float64(*(out[0] for out in outs), reduction=WIDTH)
    assert sum(g.calls.policy for g in memcompile.graphs() if g.calls) == 12


def test_a_ring_is_read_densely_once_it_is_full() -> None:
    """Its rows are written over: records made of them would tell of what was there."""
    model, ids = OneLayer(), tokens()
    fast, ours, plain = compiled(model), caches(), caches()
    with torch.no_grad():
        for p in range(150):
            got = read(fast, ids, ours, p, p % LENGTH)
            want = read(model, ids, plain, p, p % LENGTH)
            # The last slot's turn is an append like any other.
            if p >= LENGTH and p % LENGTH < LENGTH - 1:
                assert torch.equal(got, want)
    (graph,) = memcompile.graphs()
    why = "the graph writes over keys that come before the query's own"
    assert graph.calls.why_dense == {why: 150 - LENGTH - 1}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_filled_anew_with_the_same_last_page(mode: Any) -> None:
    """Where the next call would have been, with other tokens in an early page alone."""
    model, ids = OneLayer(), tokens()
    other = ids.clone()
    other[0, 8:13] = (other[0, 8:13] + 7) % 61
    fast = compiled(model)
    with mode():
        lasts = []
        for texts in ((ids, other), (other,)):
            cache = caches()
            for text in texts:
                rows = 40 + (text is other)
                for x in cache:
                    x.zero_()
                model(text[:, :rows], *cache, torch.arange(rows), causal(rows, 0))
                last = read(fast, text, cache, rows)
            lasts.append(last)
            memcompile.invalidate(list(cache))
    assert torch.equal(*lasts)
