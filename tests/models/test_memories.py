"""Every memory beside dense and scout: against its own reference, and where it must be dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_case import SCALE, drive, drive_state, exact, in_calls, sequences
from tolerance import assert_close_to_float64, rounding_band
from torch import Tensor

from memcompile.models.memory import (
    HeavyHitter,
    Hierarchical,
    Hybrid,
    Policy,
    Quest,
    Recent,
    heavy_hitter,
    hierarchical,
    scout,
    window,
)
from memcompile.models.memory import state as state_of
from memcompile.models.memory.spec import Memory
from memcompile.models.memory.state import state_weights

some = settings(max_examples=6, deadline=None)

SMALL: dict[str, Policy] = {
    "window": Recent(window=16, sinks=8, page_size=8),
    "quest": Quest(budget=32, page_size=8, dense_layers=0),
    "heavy-hitter": HeavyHitter(budget=40, page_size=8, sinks=8, window=8, dense_layers=0),
    "hierarchical": Hierarchical(24, (8, 16, 64), 8, 8, dense_layers=0),
    "hierarchical, one score": Hierarchical(24, (8, 32), 8, 16, dense_layers=0, score="mean"),
    "hierarchical, summaries": Hierarchical(0, (8, 16, 64), 8, 8, dense_layers=0),
    "hierarchical, dropped": Hierarchical(0, (8, 16, 64), 8, 8, keep=False, dense_layers=0),
    "hybrid": Hybrid(window=10, page_size=8),
    "hybrid, gated delta": Hybrid(window=10, page_size=8, decay="gate", write="delta"),
    "hybrid, decay": Hybrid(window=16, page_size=8, decay="constant", feature_map="elu"),
}


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMCOMPILE_POISON", "1")
        yield


def memory_of(name: str) -> Memory:
    return SMALL[name].memory(1, 0)


def split(memory: Memory, tokens: int, cuts: list[int], batch: int) -> list[list[int]]:
    """Calls as an engine makes them: where pages are evicted by account, none crosses a page."""
    more = range(0, tokens, memory.page_size) if memory.account else ()
    return in_calls(tokens, [c for c in {*cuts, *more} if c], batch)


cuts = st.lists(st.integers(1, 100), max_size=4)


@pytest.mark.parametrize("name", SMALL)
@some
@given(cuts=cuts, read=st.sampled_from(("dense", "policy")), group=st.sampled_from((1, 3)))
def test_chunked_is_token_by_token_within_a_mode(
    name: str, cuts: list[int], read: str, group: int
) -> None:
    tokens, memory = sequences(2, 100, torch.float64, group), memory_of(name)
    one = drive(memory, tokens, split(memory, 100, cuts, 2), read)
    two = drive(memory, tokens, [[1, 1]] * 100, read)
    assert_close_to_float64(one, two, two, reduction=100 * 6)


@pytest.mark.parametrize("name", SMALL)
def test_ragged_rows_are_as_if_alone(name: str) -> None:
    tokens, memory = sequences(3, 120, torch.float64), memory_of(name)
    calls = [[30, 0, 7], [2, 60, 1], [0, 1, 1], [20, 3, 1], [8, 0, 8], [1, 4, 5], [9, 1, 40]]
    if memory.account:  # rows enter pages at different times: an engine goes token by token there
        calls = [[int(n > i) for n in call] for call in calls for i in range(max(call))]
    together = drive(memory, tokens, calls, dense=1)
    for b in range(3):
        alone = drive(
            memory,
            tuple(x[b : b + 1] for x in tokens),  # type: ignore[arg-type]
            [[call[b]] for call in calls if call[b]],
            dense=int(calls[0][b] > 0),
        )
        rows = slice(0, sum(call[b] for call in calls))
        assert_close_to_float64(
            together[b, :, rows], alone[0, :, rows], alone[0, :, rows], reduction=120 * 6
        )


def reference(name: str, tokens: tuple[Tensor, ...], at: int) -> Tensor:
    """One token's output, by the memory's own reference."""
    memory = memory_of(name)
    q, k, v = (x[0] for x in tokens)
    one = {"window": window, "quest": scout}.get(name, hierarchical)
    made: Tensor = one.reference(q[:, at], k[:, : at + 1], v[:, : at + 1], memory, SCALE)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("name", [n for n in SMALL if n.startswith(("window", "quest", "hier"))])
def test_a_read_is_its_reference_without_pages(name: str) -> None:
    tokens, memory = sequences(1, 300, torch.float32), memory_of(name)
    got = drive(memory, tokens, in_calls(300, [7, 64, 65, 129], 1))[0]
    rows = [0, 8, *range(20, 300, 7), 299]
    plain = torch.stack([reference(name, tokens, at) for at in rows], 1)
    assert_close_to_float64(got[:, rows], plain, plain.double(), reduction=300 * 6)
    # And it is no dense read in disguise.
    apart = got.double() - exact(tokens, torch.float64)[0]
    band = rounding_band(torch.float32, 300 * 6) * float(got.abs().max())
    assert float(apart[:, 200:].abs().max()) > 100 * band


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("dense", [0, 90])
def test_heavy_hitters_are_their_reference(dense: int, decay: float) -> None:
    tokens = sequences(1, 160, torch.float32, group=2)
    memory = HeavyHitter(40, 8, 8, 8, decay, dense_layers=0).memory(0, 0)
    calls = [[dense]] if dense else []
    calls += [[stop - start] for start, stop in zip(
        range(dense, 160), range(dense + 1, 161), strict=True)]  # fmt: skip
    got, state = drive_state(memory, tokens, calls, dense=int(dense > 0))
    q, k, v = (x[0] for x in tokens)
    plain = heavy_hitter.reference(q, k, v, memory, SCALE, dense)
    assert_close_to_float64(got[0], plain, plain.double(), reduction=160 * 6)
    table = next(iter(state._tables.values()))
    assert ((table.host >= 0).sum(-1) == memory.budget_pages).all()
    assert state.pages_evicted == 2 * (160 // 8 - memory.budget_pages)
    if decay < 1:  # a plain sum favours what has been there longest, for every head alike
        assert not torch.equal(table.table[0, 0] >= 0, table.table[0, 1] >= 0)


DENSE_WITH_ROOM: dict[str, Policy] = {
    "window": Recent(window=150, sinks=0, page_size=8),
    "quest": Quest(budget=160, page_size=8, dense_layers=0),
    "heavy-hitter": HeavyHitter(budget=160, page_size=8, sinks=8, window=8, dense_layers=0),
    "all refined": Hierarchical(150, (8, 16, 64), 8, 8, dense_layers=0),
    "levels of one token": Hierarchical(0, (1,), 0, 0, dense_layers=0),
    "one token, refined": Hierarchical(9, (1,), 1, 5, dense_layers=0),
    "hybrid": Hybrid(window=150, page_size=8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DENSE_WITH_ROOM)
def test_with_room_for_everything_it_is_dense(name: str, dtype: torch.dtype) -> None:
    tokens, memory = sequences(2, 150, dtype), DENSE_WITH_ROOM[name].memory(1, 0)
    got = drive(memory, tokens, split(memory, 150, [31, 32], 2))
    assert_close_to_float64(
        got, exact(tokens, dtype), exact(tokens, torch.float64), reduction=150 * 6
    )


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("hier")])
def test_summaries_are_exact_where_a_groups_keys_are_one(name: str) -> None:
    q, k, v = sequences(2, 300, torch.float32)
    k = k[:, :, ::64].repeat_interleave(64, 2)[:, :, :300]
    tokens, memory = (q, k, v), memory_of(name)
    got = drive(memory, tokens, in_calls(300, [50], 2))
    truth, plain = exact(tokens, torch.float64), exact(tokens, torch.float32)
    assert_close_to_float64(got, plain, truth, reduction=300 * 6)


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("hybrid")])
@pytest.mark.parametrize("read", ["dense", "policy"])
def test_a_state_is_the_whole_sequence_at_once(name: str, read: str) -> None:
    tokens, memory = sequences(2, 90, torch.float32), memory_of(name)
    make = torch.Generator().manual_seed(1)
    weights = {
        name: weight + 0.3 * torch.randn(weight.shape, generator=make)
        for name, weight in state_weights(memory, 6, 2, 6).items()
    }
    got = drive(memory, tokens, in_calls(90, [1, 2, 40], 2), read, weights=weights)
    whole, truth = (
        state_of.attention(*(x.to(dtype) for x in tokens), memory, weights, SCALE)
        for dtype in (torch.float32, torch.float64)
    )
    assert_close_to_float64(got, whole, truth, reduction=90 * 6)
    alone = exact(tokens, torch.float64, window=memory.own_window)
    assert float((truth - alone)[:, :, 30:].abs().max()) > 0.01 * float(truth.abs().max())


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("hybrid")])
def test_every_weight_of_a_state_has_its_gradient(name: str) -> None:
    tokens, memory = sequences(1, 30, torch.float64, group=2), memory_of(name)
    weights = {k: w.double().requires_grad_() for k, w in state_weights(memory, 4, 2, 6).items()}

    def loss(**changed: Tensor) -> Tensor:
        return state_of.attention(*tokens, memory, {**weights, **changed}, SCALE).square().sum()

    loss().backward()
    for name_, weight in weights.items():
        assert weight.grad is not None
        at = int(weight.grad.abs().argmax())
        step = 1e-5
        moved = []
        for sign in (1, -1):
            flat = weight.detach().flatten().clone()
            flat[at] += sign * step
            moved.append(loss(**{name_: flat.view_as(weight)}).detach())
        slope = (moved[0] - moved[1]) / (2 * step)
        found = weight.grad.flatten()[at]
        assert float(found.abs()) > 0, name_
        assert float((slope - found).abs()) < 1e-4 * float(found.abs() + slope.abs()), name_


KEPT: dict[str, dict[str, Any]] = {
    "window": {"exact": 1 + 2 + 1},
    "hierarchical, dropped": {"exact": 1 + 1 + 1},
}


@pytest.mark.parametrize("name", KEPT)
def test_what_no_later_query_reads_is_freed(name: str) -> None:
    tokens, memory = sequences(2, 600, torch.float32), memory_of(name)
    _, before = drive_state(memory, tokens, [[500, 500]], "dense")
    calls = [[500, 500], *[[1, 1]] * 100]
    _, after = drive_state(memory, tokens, calls, dense=1)
    held = after._tables[after.layouts[0].table_key].host >= 0
    assert (held.sum(-1) == KEPT[name]["exact"]).all()
    assert not before.forgot
    assert after.forgot
    assert after.pages_evicted == 2 * 2 * (600 // 8 - KEPT[name]["exact"])
    pools = [pools[0] for pools in (before._pools[0], after._pools[0])]
    assert len(pools[1][0]) * 8 < len(pools[0][0])  # the memory is given back, not only unused
    streamed = drive_state(memory, tokens, [[20, 20]] * 30)[1]
    assert streamed.memory_bytes() < before.memory_bytes() / 2


@pytest.mark.parametrize("name", ["heavy-hitter", "hybrid", "window"])
def test_what_was_given_up_does_not_come_back(name: str) -> None:
    tokens, memory = sequences(1, 130, torch.float32), memory_of(name)
    _, state = drive_state(memory, tokens, split(memory, 130, [100], 1))
    fork = state.fork()
    why = {"hybrid": "a keeps a state", "heavy-hitter": "a keeps an account"}
    with pytest.raises(ValueError, match=why.get(name, "slid out of a window of 17")):
        state.rewind([60])
    assert state.position == fork.position == [130]
    for one, two in zip(state.tensors(), fork.tensors(), strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))
    state.rewind([0])
    assert state.position == [0]
    again = drive_state(memory, tokens, [[9]])[1]
    for one, two in zip(state.layouts[0].rows(), again.layouts[0].rows(), strict=True):
        assert one == two
    assert not any(bool(held.any()) for held in state.tensors()[-len(state.layouts[0].rows()) :]
                   if memory.state)  # fmt: skip
