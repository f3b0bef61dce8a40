"""One attention over a cache, from Dynamo's graph to what the references of the memories say."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_float64
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memcompile.compiler import backend
from memcompile.compiler.cached_graph import find, normal_form
from memcompile.compiler.graph_report import reports
from memcompile.models.memory import preset
from memcompile.runtime import cached_run

HEADS, KV, KEY, VALUE = 4, 2, 8, 8
SCALE = KEY**-0.5
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"page_size": 8},
    "scout": {"budget": 40, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 0},
    "quest": {"budget": 32, "page_size": 8, "dense_layers": 0},
    "hierarchical": {"levels": (8, 16), "refine": 16, "sinks": 8, "window": 8, "dense_layers": 0},
    "window": {"sinks": 8, "window": 16, "page_size": 8},
}
uncompensated = {**POLICIES["scout"], "compensate": False, "score": "ball"}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch):
    """Graphs run operation by operation: Inductor has tests of its own."""
    torch._dynamo.reset()
    monkeypatch.setattr(backend, "_compiled", lambda gm, inputs, patches: gm)
    reports(clear=True)
    yield
    torch._dynamo.reset()


def static(q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Tensor):
    """Attention as transformers writes it over a StaticCache."""
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    many = [x.repeat_interleave(HEADS // KV, 1) for x in (keys, values)]
    return scaled_dot_product_attention(q, *many, attn_mask=mask, scale=SCALE)


def growing(q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, mask: Tensor | None):
    """The same over a DynamicCache."""
    keys, values = torch.cat([keys, k], -2), torch.cat([values, v], -2)
    many = [x.repeat_interleave(HEADS // KV, 1) for x in (keys, values)]
    return scaled_dot_product_attention(q, *many, attn_mask=mask, scale=SCALE), keys, values


def compiled(function: Callable[..., Any], policy: str, **more: Any) -> Callable[..., Any]:
    options = {"policy": policy, "kernels": "off", **POLICIES.get(policy, {}), **more}
    dynamic = None if function is growing else False
    return torch.compile(function, backend=backend.memcompile, dynamic=dynamic, options=options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(policy: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """[B = 1, H, 1, Dv] of one query over its keys [1, Hkv, m, D], by the memory's reference."""
    memory = preset(policy, **options).memory(0, 0)
    module = importlib.import_module(f"memcompile.models.memory.{policy}")
    if policy == "dense":
        out = module.reference(q[0], k[0], v[0], SCALE)
        return out[None]
    name = "scout" if policy == "quest" else policy
    module = importlib.import_module(f"memcompile.models.memory.{name}")
    return module.reference(q[0, :, 0], k[0], v[0], memory, SCALE)[None, :, None]


def seen(length: int, start: list[int], last: list[int]) -> Tensor:
    """A mask [B, 1, 1, L] of keys start[b] .. last[b]."""
    key = torch.arange(length)
    rows = [(key >= s) & (key <= e) for s, e in zip(start, last, strict=True)]
    return torch.stack(rows)[:, None, None]


@torch.no_grad()
def check_static(policy: str, length: int, start: list[int], last: int, **more: Any) -> None:
    """One step over a cache that holds random keys up to `last`, garbage behind."""
    torch._dynamo.reset()
    options = {**POLICIES[policy], **more}
    batch = len(start)
    keys, values = normal(batch, KV, length, KEY), normal(batch, KV, length, VALUE, seed=1)
    keys[:, :, last + 1 :] = values[:, :, last + 1 :] = 1e4
    new = [normal(batch, KV, 1, d, seed=2 + i) for i, d in enumerate((KEY, VALUE))]
    q = normal(batch, HEADS, 1, KEY, seed=4)
    mask = seen(length, start, [last] * batch)
    fast = compiled(static, policy, **more)
    got = fast(q, keys, values, *new, torch.tensor([last]), mask)
    assert reports()[-1].rewritten == 1
    assert reports()[-1].calls.policy == 1
    assert torch.equal(keys[:, :, last], new[0][:, :, 0])
    for b, first in enumerate(start):
        one = slice(b, b + 1)
        mine = [x[one, :, first : last + 1] for x in (keys, values)]
        truth = reference(policy, q[one].double(), *(x.double() for x in mine), options).double()
        eager = reference(policy, q[one], *mine, options)
        assert_close_to_float64(got[one], eager, truth, reduction=length * KEY)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("length", "start", "last"),
    [
        (96, [0, 0], 88),
        (96, [0], 87),
        (96, [0, 5], 95),
        (93, [0, 0], 92),
        (90, [3, 0, 11], 80),
        (17, [0], 16),
    ],
)
def test_a_static_cache_is_read_as_the_memory_says(policy, length, start, last) -> None:
    check_static(policy, length, start, last)


def test_a_score_without_compensation() -> None:
    check_static("scout", 96, [0, 0], 90, compensate=False, score="ball")
    check_static("scout", 91, [0, 2], 90, compensate=False, score="box")


@settings(max_examples=20)
@given(
    policy=st.sampled_from(["scout", "hierarchical"]),
    length=st.integers(9, 120),
    start=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    share=st.floats(0, 1),
)
def test_any_length_and_padding(policy: str, length: int, start: list[int], share: float) -> None:
    start = [min(s, length - 1) for s in start]
    last = max(start) + int(share * (length - 1 - max(start)))
    check_static(policy, length, start, last)


@pytest.mark.parametrize("policy", ["scout", "hierarchical", "window"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_growing_cache(policy: str, masked: bool) -> None:
    fast = compiled(growing, policy)
    start = [0, 7] if masked else [0, 0]
    keys, values = normal(2, KV, 70, KEY), normal(2, KV, 70, VALUE, seed=1)
    with torch.no_grad():
        for step in range(20):
            q = normal(2, HEADS, 1, KEY, seed=step + 5)
            new = [normal(2, KV, 1, d, seed=50 + step) for d in (KEY, VALUE)]
            length = keys.shape[2] + 1
            mask = seen(length, start, [length - 1] * 2) if masked else None
            got, keys, values = fast(q, keys, values, *new, mask)
            assert keys.shape[2] == length
            for b, first in enumerate(start):
                one = slice(b, b + 1)
                mine = [x[one, :, first:] for x in (keys, values)]
                given_ = POLICIES[policy]
                truth = reference(policy, q[one].double(), *(x.double() for x in mine), given_)
                eager = reference(policy, q[one], *mine, given_)
                assert_close_to_float64(got[one], eager, truth.double(), reduction=length * KEY)
    calls = [report.calls for report in reports() if report.calls]
    assert sum(c.policy for c in calls) == 20
    # The index goes along with the cache from tensor to tensor.
    assert sum(c.rebuilt for c in calls) == 0


def test_several_queries_see_as_one_by_one() -> None:
    """Rows of a call read as they would token by token, records of pages they fill included."""
    fast = compiled(static, "scout", window=16, budget=48)
    length = 128
    keys, values = normal(1, KV, length, KEY), normal(1, KV, length, VALUE, seed=1)
    q, new = normal(1, HEADS, 12, KEY, seed=3), normal(1, KV, 12, KEY, seed=4)
    at, rows = torch.arange(100, 112), torch.arange(12)
    mask = (torch.arange(length) <= 100 + rows[:, None])[None, None]
    with torch.no_grad():
        at_once = fast(q, keys.clone(), values.clone(), new, new, at, mask)
        one_by_one = [
            fast(q[:, :, i : i + 1], keys, values, *[new[:, :, i : i + 1]] * 2, at[i : i + 1], row)
            for i, row in enumerate(mask.split(1, 2))
        ]
    assert all(report.calls.policy for report in reports())
    steps = torch.cat(one_by_one, 2)
    assert_close_to_float64(at_once, steps, steps.double(), reduction=length * KEY)


def test_more_queries_than_the_window_holds_are_read_densely() -> None:
    fast = compiled(static, "scout", window=8, decode_tokens=64)
    length = 96
    keys, values = normal(1, KV, length, KEY), normal(1, KV, length, VALUE, seed=1)
    q, new = normal(1, HEADS, 12, KEY, seed=3), normal(1, KV, 12, KEY, seed=4)
    mask = (torch.arange(length) <= 80 + torch.arange(12)[:, None])[None, None]
    with torch.no_grad():
        expected = static(q, keys.clone(), values.clone(), new, new, torch.arange(80, 92), mask)
        got = fast(q, keys, values, new, new, torch.arange(80, 92), mask)
    assert torch.equal(got, expected)
    (report,) = reports()
    assert report.calls.why_dense == {"more than 9 tokens at a time": 1}


def hole(length: int) -> Tensor:
    return seen(length, [0], [50]) & (torch.arange(length) != 20)


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (hole(64), "the mask hides keys in the midst of a context"),
        (torch.zeros(1, 1, 1, 64).masked_fill(~hole(64), -1e9), "the mask hides keys in the midst"),
        (torch.full((1, 1, 1, 64), -0.5), "the mask hides keys in the midst"),
        (torch.zeros(1, 1, 1, 64, dtype=torch.bool), "the mask hides keys in the midst"),
    ],
)
def test_a_mask_that_is_no_run_of_keys_is_read_densely(mask: Tensor, why: str) -> None:
    fast = compiled(static, "scout")
    given_ = [normal(1, HEADS, 1, KEY), normal(1, KV, 64, KEY), normal(1, KV, 64, VALUE)]
    new = [normal(1, KV, 1, KEY), normal(1, KV, 1, VALUE), torch.tensor([50])]
    with torch.no_grad():
        expected = static(given_[0], *(x.clone() for x in given_[1:]), *new, mask)
        got = fast(*given_, *new, mask)
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    calls = reports()[-1].calls
    assert (calls.policy, calls.dense) == (0, 1)
    assert why in next(iter(calls.why_dense))


def test_a_cache_that_changes_under_every_call_is_given_up(caplog, monkeypatch) -> None:
    caplog.set_level("INFO", "memcompile")
    fast = compiled(static, "scout")
    monkeypatch.setattr(cached_run, "REST", 3)
    keys, values = normal(1, KV, 96, KEY), normal(1, KV, 96, VALUE)
    mask = seen(96, [0], [90])
    with torch.no_grad():
        for step in range(10):
            keys.copy_(normal(1, KV, 96, KEY, seed=step))
            new = [normal(1, KV, 1, d, seed=step) for d in (KEY, VALUE)]
            args = (*new, torch.tensor([90]), mask)
            q = normal(1, HEADS, 1, KEY, seed=step)
            expected = static(q, keys.clone(), values.clone(), *args)
            got = fast(q, keys, values, *args)
            if 6 <= step < 9:
                assert torch.equal(got, expected)
    calls = reports()[-1].calls
    # The first finds nothing known, five find it changed; three rest, and the last looks again.
    assert (calls.policy, calls.dense) == (7, 3)
    assert "had changed before 5 calls in a row" in next(iter(calls.why_dense))
    assert "reads densely: its caches had changed" in caplog.text


def two(q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Tensor):
    """An attention without a cache before one with, one after it, and both are told apart."""
    before = scaled_dot_product_attention(q, q, q, scale=SCALE)
    out = static(before, keys, values, k, v, at, mask)
    return scaled_dot_product_attention(out, q, q, scale=SCALE)


def test_attentions_without_a_cache_stay_what_they_were() -> None:
    fast = compiled(two, "dense")
    keys, values, q = normal(1, KV, 64, KEY), normal(1, KV, 64, VALUE), normal(1, HEADS, 1, KEY)
    args = (normal(1, KV, 1, KEY), normal(1, KV, 1, VALUE), torch.tensor([40]), seen(64, [0], [40]))
    with torch.no_grad():
        got = fast(q, keys.clone(), values.clone(), *args)
        expected = two(q, keys.clone(), values.clone(), *args)
        wide = [x if x.dtype in (torch.int64, torch.bool) else x.double() for x in args]
        truth = two(q.double(), keys.double(), values.double(), *wide)
    assert_close_to_float64(got, expected, truth, reduction=64 * KEY)
    report = reports()[-1]
    assert (report.attentions, report.rewritten, len(report.declined)) == (3, 1, 2)


def spelled_out(q, keys, values, k, v, at, mask):
    """Attention as matmuls, whose scores are scaled after the mask was added."""
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    many = [x.repeat_interleave(HEADS // KV, 1) for x in (keys, values)]
    scores = (q @ many[0].transpose(2, 3) + mask) * SCALE
    return scores.softmax(-1) @ many[1]


def test_attention_spelled_out_with_a_mask_that_folding_makes() -> None:
    fast = compiled(spelled_out, "dense")
    keys, values, q = normal(1, KV, 64, KEY), normal(1, KV, 64, VALUE), normal(1, HEADS, 1, KEY)
    mask = torch.zeros(1, 1, 1, 64).masked_fill(~seen(64, [0], [40]), -1e9)
    args = (normal(1, KV, 1, KEY), normal(1, KV, 1, VALUE), torch.tensor([40]), mask)
    with torch.no_grad():
        got = fast(q, keys.clone(), values.clone(), *args)
        expected = spelled_out(q, keys.clone(), values.clone(), *args)
        wide = [x if x.dtype == torch.int64 else x.double() for x in args]
        truth = spelled_out(q.double(), keys.double(), values.double(), *wide)
    assert_close_to_float64(got, expected, truth, reduction=64 * KEY)
    assert reports()[-1].rewritten == 1, str(reports()[-1])
    assert reports()[-1].calls.policy == 1


def test_attention_spelled_out_beside_a_size_that_varies() -> None:
    """Dynamo lets the mask's length vary before the cache's."""

    def masked(q, keys, values, k, v, at, seen_keys):
        mask = torch.where(seen_keys[:, None, None, : keys.shape[2]], 0.0, -1e9)
        return spelled_out(q, keys, values, k, v, at, mask)

    given_ = [normal(1, HEADS, 1, KEY), normal(1, KV, 64, KEY), normal(1, KV, 64, VALUE)]
    new = [normal(1, KV, 1, KEY), normal(1, KV, 1, VALUE), torch.tensor([40])]
    shown = torch.arange(70)[None] <= 40
    torch._dynamo.mark_dynamic(shown, 1)
    assert len(found_in(masked, *given_, *new, shown).cached) == 1


class Layer:
    def __init__(self) -> None:
        self.keys, self.values = normal(1, KV, 64, KEY), normal(1, KV, 64, VALUE)


class Cache:
    def __init__(self) -> None:
        self.layers = [Layer() for _ in range(4)]


def test_a_fragment_knows_its_layer_by_its_cache() -> None:
    """A graph break within an attention leaves no module's path."""

    def third(q, cache, k, v, at, mask):
        return static(q, cache.layers[3].keys, cache.layers[3].values, k, v, at, mask)

    args = (normal(1, KV, 1, KEY), normal(1, KV, 1, VALUE), torch.tensor([40]), seen(64, [0], [40]))
    found = found_in(third, normal(1, HEADS, 1, KEY), Cache(), *args)
    assert found.cached[0].site.layer == 3


# --- what is declined ---


def found_in(function: Callable[..., Any], *given_: Any):
    """What the backend finds in a function's graph."""
    kept = []

    def keep(gm, example_inputs):
        kept.append(find(normal_form(gm)))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=keep, dynamic=False)(*given_)
    return kept[0]


def attend(q: Tensor, keys: Tensor, values: Tensor, **more: Any) -> Tensor:
    return scaled_dot_product_attention(q, keys, values, **more)


Q, K, V, NEW = (normal(1, 2, n, 8, seed=n) for n in (1, 40, 40, 1))
AT = torch.tensor([30])
MASK = seen(40, [0], [30])


def not_appended(q, k, v, new):
    return attend(q, k, v)


def only_keys(q, k, v, new):
    k.index_copy_(2, AT, new)
    return attend(q, k, v)


def wrong_axis(q, k, v, new):
    k, v = torch.cat([k, new.expand(1, 2, 40, 8)], 1), torch.cat([v, new.expand(1, 2, 40, 8)], 1)
    return attend(q.repeat(1, 2, 1, 1), k, v), k, v


def in_front(q, k, v, new):
    k, v = torch.cat([new, k], 2), torch.cat([new, v], 2)
    return attend(q, k, v), k, v


def rolled(q, k, v, new):
    k, v = torch.cat([k, new], 2), torch.cat([v, new], 2)
    return attend(q, k, v), k[:, :, 1:], v[:, :, 1:]


def one_cache_for_both(q, k, v, new):
    k.index_copy_(2, AT, new)
    return attend(q, k, k, attn_mask=MASK)


def one_mask_a_head(q, k, v, new):
    k.index_copy_(2, AT, new), v.index_copy_(2, AT, new)
    return attend(q, k, v, attn_mask=MASK.expand(1, 2, 1, 40))


def causal_from_the_left(q, k, v, new):
    k.index_copy_(2, AT, new), v.index_copy_(2, AT, new)
    return attend(q, k, v, is_causal=True)


def two_queries_that_see_all(q, k, v, new):
    new = new.repeat(1, 1, 2, 1)
    k, v = torch.cat([k, new], 2), torch.cat([v, new], 2)
    return attend(q.repeat(1, 1, 2, 1), k, v), k, v


def mask_from_the_cache(q, k, v, new):
    k.index_copy_(2, AT, new), v.index_copy_(2, AT, new)
    return attend(q, k, v, attn_mask=(k[..., 0] > 0)[:, :1, None])


def mask_after_a_write(q, k, v, new):
    view = v[:, :1, :, 0]
    k.index_copy_(2, AT, new), v.index_copy_(2, AT, new)
    return attend(q, k, v, attn_mask=(view > 0)[:, :, None])


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (not_appended, "no cache that the graph appends to"),
        (only_keys, "no cache that the graph appends to"),
        (wrong_axis, "no cache that the graph appends to"),
        (in_front, "no cache that the graph appends to"),
        (rolled, "no cache that the graph appends to"),
        (one_cache_for_both, "not cached alike"),
        (one_mask_a_head, "its mask is [1, 2, 1, 40]; expected one for all heads, [1, 1, 1, 40]"),
        (causal_from_the_left, "is_causal, which over a cache hides the newest keys"),
        (two_queries_that_see_all, "several queries see every key"),
        (mask_from_the_cache, "its mask depends on what the graph writes"),
        (mask_after_a_write, "its mask is read from an input that the graph writes before"),
    ],
)
def test_what_is_no_cached_causal_attention_is_declined(function, why: str) -> None:
    found = found_in(function, Q, K.clone(), V.clone(), NEW)
    assert not found.cached
    (declined,) = found.declined
    assert why in declined.reason
    assert declined.rule == "find_cached"
    assert "test_cached_graph.py" in declined.source


def test_the_line_above_is_not_all_that_is_declined() -> None:
    """The same graphs, written as transformers writes them, are found."""
    found = found_in(static, Q.repeat(1, 2, 1, 1), K.clone(), V.clone(), NEW, NEW, AT, MASK)
    (cached,) = found.cached
    assert (cached.grows, cached.site.heads, cached.site.kv_heads) == (False, 4, 2)
    found = found_in(growing, Q.repeat(1, 2, 1, 1), K, V, NEW, NEW, None)
    assert found.cached[0].grows


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"policy": "hybrid", "state_layers": (0,)}, "keeps a state"),
        ({"policy": "heavy-hitter", "dense_layers": 0}, "keeps an account of attention mass"),
    ],
)
def test_a_policy_that_a_cache_cannot_serve_is_refused(options, why: str) -> None:
    fast = torch.compile(static, backend=backend.memcompile, options=options)
    with torch.no_grad(), pytest.raises(Exception, match=why):
        fast(Q.repeat(1, 2, 1, 1), K.clone(), V.clone(), NEW, NEW, AT, MASK)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"decode_tokens": 0}, "decode_tokens is 0; give a whole number of at least 1"),
        ({"kernels": "all"}, "kernels is 'all'; known: auto, required, off"),
        ({"policy": "scuot"}, "scuot"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], why: str) -> None:
    fast = torch.compile(static, backend=backend.memcompile, options=options)
    with torch.no_grad(), pytest.raises(Exception, match=why):
        fast(Q.repeat(1, 2, 1, 1), K.clone(), V.clone(), NEW, NEW, AT, MASK)
