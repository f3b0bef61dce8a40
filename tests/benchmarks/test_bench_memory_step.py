"""The step that is timed computes what an engine computes, and its bytes are counted right."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_float64

from memcompile.benchmarks import attention_step
from memcompile.benchmarks.attention_step import FORMS, SCOUT, Shape, dense_form, floor_bytes, ours
from memcompile.benchmarks.memory_step import fill, reads_dense
from memcompile.benchmarks.registry import Settings
from memcompile.models.memory import dense, preset, scout
from memcompile.runtime.memory_state import MemoryState

SHAPE = Shape(heads=6, kv_heads=2, dim=8, page_size=8, dtype=torch.float32)
SMALL = {"budget": 32, "sinks": 8, "window": 8, "dense_layers": 0}


def tokens_of(pool: torch.Tensor, table: torch.Tensor, count: int) -> torch.Tensor:
    """[Hkv, count, D] of the one sequence that a memory holds."""
    return pool[table[0].long()].flatten(1, 2)[:, :count]


@pytest.mark.parametrize("tokens", [5, 32, 33, 77, 128])
@pytest.mark.parametrize("name", ["dense", "scout"])
def test_a_step_equals_the_plain_reference(name: str, tokens: int) -> None:
    options = SMALL if name == "scout" else {}
    policy = ours(name, SHAPE, tokens, None, 1, **options)
    inputs = policy.inputs[0]
    out = policy.step.run(*inputs)
    query, key, _, position, _, table, keys, values = inputs[:8]
    assert position.tolist() == [tokens - 1]
    keys, values = (tokens_of(pool, table, tokens) for pool in (keys, values))
    assert torch.equal(keys[:, -1], key[0, :, 0]), "the new token was not written"
    memory = preset(name, page_size=8, **options).memory(0, 0)
    given = (query[0, :, 0], keys, values)

    def plain(dtype: torch.dtype) -> torch.Tensor:
        """The scout's pages are chosen by the float32 reference; dense reads them all."""
        if name == "scout" and not reads_dense(memory, tokens - 1):
            return scout.reference(*given, memory, SHAPE.scale).to(dtype)
        group = SHAPE.heads // SHAPE.kv_heads
        wide = (given[0], *(x.repeat_interleave(group, 0) for x in given[1:]))
        q, k, v = (x.to(dtype) for x in wide)
        weights = (SHAPE.scale * torch.einsum("hd,hmd->hm", q, k)).softmax(-1)
        return torch.einsum("hm,hmd->hd", weights, v)

    assert_close_to_float64(
        out[0, :, 0], plain(torch.float32), plain(torch.float64), reduction=tokens * SHAPE.dim
    )


def test_scout_reads_through_its_policy_only_beyond_its_budget() -> None:
    memory = preset("scout", page_size=8, **SMALL).memory(0, 0)
    assert [reads_dense(memory, p) for p in (0, 31, 32)] == [True, True, False]
    longer = preset("scout", page_size=8, min_context=100, **SMALL).memory(0, 0)
    assert [reads_dense(longer, p) for p in (32, 99, 100)] == [True, True, False]
    short, long = (ours("scout", SHAPE, n, None, 1, **SMALL) for n in (32, 33))
    assert list(short.step.phases(*short.inputs[0])) == ["append_index", "attend"]
    parts = ["append_index", "score_select", "attend"]
    assert list(long.step.phases(*long.inputs[0])) == parts
    assert list(long.step.calls(*long.inputs[0])) == parts
    assert next(call() for call in long.step.calls(*long.inputs[0]).values()) is None


def test_filled_memories_hold_records_of_their_own_pages() -> None:
    memory = preset("scout", page_size=8, **SMALL).memory(0, 0)
    layout = SHAPE.layout(memory)
    state = MemoryState([layout], 2, "cpu", max_context=64)
    fill(state, [64, 24], seed=3)
    assert state.position == [64, 24]
    table, keys, values, *records = state.tensors()
    record = dict(zip(memory.fields, records, strict=True))
    for row, pages in ((0, 8), (1, 3)):
        at = table[row, :, :pages].long()
        assert bool((at >= 0).all())
        assert_close_to_float64(
            record["mean"][at], keys[at].mean(2), keys[at].double().mean(2), reduction=8
        )
        assert_close_to_float64(
            record["value_mean"][at], values[at].mean(2), values[at].double().mean(2), reduction=8
        )


def test_the_dense_forms_agree() -> None:
    query, *_ = SHAPE.sample(0)
    keys, values = (torch.randn(1, 2, 50, 8) for _ in range(2))
    truth = dense.reference(query[0], keys[0], values[0], SHAPE.scale)
    exact = dense.reference(query[0].double(), keys[0].double(), values[0].double(), SHAPE.scale)
    for form in FORMS:
        out = dense_form(form, query, keys, values, SHAPE.scale)
        assert_close_to_float64(out.reshape(6, 1, 8), truth, exact.double(), reduction=50 * 8)


def test_the_floor_counts_each_byte_once() -> None:
    shape = Shape()
    dense_memory = preset("dense").memory(0, 0)
    assert floor_bytes(dense_memory, shape.layout(dense_memory), 131071) == 131072 * 8 * 256 * 2
    memory = preset("scout", **SCOUT).memory(0, 0)
    layout = shape.layout(memory)
    pages = 32 * 64 * 8 * 256 * 2  # keys and values of 32 pages of 64 tokens
    scored = (2047 - 1 - 4) * 8 * 256 * 2  # mean and std of the full pages that compete
    summaries = (2048 - 32) * 8 * (128 * 2 + 4)  # value mean and log count of those that lose
    assert floor_bytes(memory, layout, 131071) == pages + scored + summaries
    assert floor_bytes(memory, layout, 2047) == 2048 * 8 * 256 * 2  # read in full


def test_bars_hold_what_was_measured_and_leave_the_rest_open() -> None:
    policy = {"ms": 1.0, "ms_quartiles": [0.9, 1.1], "times_baseline": 2.0}
    policy |= {"bandwidth_share": 0.6, "times_floor": 1.5}
    rows = [{"context": n, "dense": policy, "scout": policy} for n in (8192, 131072)]
    met = {bar.what: bar.met for bar in attention_step.bars(rows)}
    assert met["dense × baseline at 8192"] is True
    assert met["dense × baseline at 32768"] is None
    assert met["dense × baseline at 131072"] is False
    assert met["dense, part of bandwidth at 131072"] is True
    assert met["scout × baseline at 131072"] is False
    assert met["scout × floor at 131072"] is True
    assert met["scout ÷ dense (upper quartile) at 8192"] is True
    assert [attention_step.verdict(row) for row in rows] == ["met", "2 of 4 MISSED"]
    assert attention_step.verdict({**rows[0], "context": 5}) == "-"
    slower = [{"context": 8192, "dense": policy, "scout": policy | {"ms": 1.2}}]
    met = {bar.what: bar.met for bar in attention_step.bars(slower)}
    assert met["scout ÷ dense (upper quartile) at 8192"] is False


def test_a_quick_run_rotates_every_contender_past_the_cache() -> None:
    settings = Settings(quick=True, rounds=1, kernels="reference", contexts=(256,))
    (row,) = attention_step.run(settings).rows
    names = {*row["timings"], *row["far_behind_ms"]}
    assert {"dense", "scout"} <= set(row["timings"])
    assert {f"{form} {kind}" for form in FORMS for kind in ("ordinary", "huge")} <= names
    for timing in row["timings"].values():
        assert timing["states"] * timing["floor_bytes"] > 4 * settings.cache
    assert row["baseline"] in row["timings"]
    assert row["dense"]["times_baseline"] == row["baseline_ms"] / row["dense"]["ms"]
