"""States against the recurrence written out, in float64: row by row, by chunks, and backwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_float64, rounding_band
from torch import Tensor

import memcompile.models.ops  # noqa: F401 (registers the operations)
from memcompile.models.memory import recurrent
from memcompile.models.memory.recurrent import StateRead

ops = torch.ops.memcompile
RULES = [
    pytest.param(decay, rule, id=f"{decay or 'none'}-{rule}")
    for decay in ("", "constant", "gate")
    for rule in ("additive", "normalised", "delta")
]
every_rule = pytest.mark.parametrize(("decay", "rule"), RULES)


def case(
    decay: str,
    rule: str,
    lengths: tuple[int, ...] = (70, 33),
    dtype: torch.dtype = torch.float64,
    dims: tuple[int, int] = (8, 5),
) -> list[Any]:
    """What `state_step` takes: two KV heads, three query heads each, NaN in rows of padding."""
    batch, rows, (m, width) = len(lengths), max(lengths), dims
    query, key = torch.randn(batch, 6, rows, m), torch.randn(batch, 2, rows, m)
    value, state = torch.randn(batch, 2, rows, width), torch.randn(batch, 2, m, width)
    if rule == "normalised":
        query, key = query.exp(), key.exp()
    if rule == "delta":
        key = torch.nn.functional.normalize(key, dim=3)
    gates = {"": None, "constant": -torch.rand(2), "gate": -torch.rand(batch, 2, rows)}
    beta = torch.rand(batch, 2, rows) if rule == "delta" else None
    norm = torch.rand(batch, 2, m) if rule == "normalised" else None
    gone = (torch.arange(rows) >= torch.tensor(lengths)[:, None])[:, None]
    for x in (query, key, value):
        x.masked_fill_(gone[..., None], torch.nan)
    for gate in (gates["gate"], beta):
        if gate is not None:
            gate.masked_fill_(gone, torch.nan)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x.to(dtype) for x in (query, key, value)]
    gates_of = [None if x is None else x.to(wide) for x in (gates[decay], beta)]
    held = [None if x is None else x.to(wide) for x in (state, norm)]
    return [*inputs, *gates_of, torch.tensor(lengths, dtype=torch.int32), *held]


def copied(given: list[Any]) -> list[Any]:
    return [None if x is None else x.clone() for x in given]


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor,
    state: Tensor,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The definition, one row of one head at a time: out, lse, and state and norm afterwards."""
    (batch, heads, rows, _), kv_heads = query.shape, key.shape[1]
    zero, none = query.new_zeros(value.shape[3]), query.new_tensor(-math.inf)
    outs = [[[zero] * rows for _ in range(heads)] for _ in range(batch)]
    lses = [[[none] * rows for _ in range(heads)] for _ in range(batch)]
    states, norms = [], []
    for b in range(batch):
        for h in range(kv_heads):
            s, z = state[b, h], None if norm is None else norm[b, h]
            for i in range(int(lengths[b])):
                k, v = key[b, h, i], value[b, h, i]
                if decay is not None:
                    left = (decay[h] if decay.dim() == 1 else decay[b, h, i]).exp()
                    s, z = left * s, None if z is None else left * z
                write = v if beta is None else beta[b, h, i] * (v - s.T @ k)
                s = s + torch.outer(k, write)
                z = None if z is None else z + k
                for g in range(heads // kv_heads):
                    at = h * (heads // kv_heads) + g
                    q = query[b, at, i]
                    den = q.new_ones(()) if z is None else z @ q
                    if den > 0:
                        outs[b][at][i], lses[b][at][i] = s.T @ q / den, den.log()
            states.append(s)
            norms.append(z)
    out, lse = (
        torch.stack([torch.stack([torch.stack(r) for r in x]) for x in y]) for y in (outs, lses)
    )
    kept = None if norm is None else torch.stack(norms).view(norm.shape)
    return out, lse, torch.stack(states).view(state.shape), kept


def assert_same(got: tuple[Any, ...], want: tuple[Any, ...], terms: int = 70 * 8) -> None:
    for one, other in zip(got, want, strict=True):
        if other is not None:
            assert_close_to_float64(one, other, other, reduction=terms, logarithm=True)


@every_rule
@pytest.mark.parametrize("op", ["state_step", "state_chunk"])
def test_both_operations_are_the_recurrence(op: str, decay: str, rule: str) -> None:
    given = case(decay, rule)
    want = by_hand(*given)
    got = getattr(ops, op)(*given)
    assert_same((*got, *given[6:]), want)
    padding = (torch.arange(70) >= given[5][:, None])[:, None].expand_as(got[1])
    assert (got[0][padding] == 0).all()
    assert (got[1][padding] == -math.inf).all()


@every_rule
@settings(max_examples=10)
@given(chunk=st.integers(1, 75))
def test_chunks_may_have_any_size(decay: str, rule: str, chunk: int) -> None:
    given = case(decay, rule)
    step = copied(given)
    out, _ = ops.state_step(*step)
    norm = given[7] if rule == "normalised" else torch.zeros(2, 2, 8, dtype=torch.float64)
    num, den, state, after = recurrent.chunked(*given[:7], norm, chunk)
    read = num / den[..., None] if rule == "normalised" else num
    live = (torch.arange(70) < given[5][:, None])[:, None, :, None, None]
    read = torch.where(live, read, 0).transpose(2, 3).flatten(1, 2)
    assert_same((read, state, after if rule == "normalised" else None), (out, *step[6:]))


@every_rule
@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, 70), max_size=3), chunks=st.integers(0, 15))
def test_rows_may_come_in_any_calls(decay: str, rule: str, cuts: list[int], chunks: int) -> None:
    given = case(decay, rule, lengths=(70, 70))
    whole, parts = copied(given), []
    want = ops.state_step(*whole)
    bounds = [0, *sorted(cuts), 70]
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        rows = [x[:, :, first:last] if x is not None and x.dim() > 1 else x for x in given[:5]]
        lengths = torch.full((2,), last - first, dtype=torch.int32)
        op = ops.state_chunk if chunks >> i & 1 else ops.state_step
        parts.append(op(*rows, lengths, *given[6:]))
    got = [torch.cat([part[i] for part in parts], 2) for i in range(2)]
    assert_same((*got, *given[6:]), (*want, *whole[6:]))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_precision_stands_by_float64(decay: str, rule: str, dtype: torch.dtype) -> None:
    given = case(decay, rule, dtype=dtype)
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in given]
    truth, step = by_hand(*exact), copied(given)
    eager = (*ops.state_step(*step), *step[6:])
    got = (*ops.state_chunk(*given), *given[6:])
    for one, plain, right in zip(got, eager, truth, strict=True):
        if one is not None:
            assert one.dtype == torch.float32
            assert_close_to_float64(one, plain, right, reduction=70 * 8, logarithm=True)


@pytest.mark.parametrize("op", [ops.state_step, ops.state_chunk], ids=["step", "chunk"])
def test_the_delta_rule_recalls_what_was_written_last(op: Callable[..., Any]) -> None:
    """Orthogonal keys are recalled exactly, and a key that comes again has its value replaced."""
    keys = torch.eye(8, dtype=torch.float64)[[0, 3, 5, 3, 0]]
    values = torch.randn(5, 6, dtype=torch.float64)
    one = torch.ones(1, 1, 5, dtype=torch.float64)
    state = torch.zeros(1, 1, 8, 6, dtype=torch.float64)
    lengths = torch.tensor([5], dtype=torch.int32)
    out, lse = op(
        keys[None, None], keys[None, None], values[None, None], None, one, lengths, state, None
    )
    band = rounding_band(torch.float64, 8)
    assert (out[0, 0] - values).abs().max() <= band * values.abs().max()
    assert (lse == 0).all()
    for key, last in ((0, 4), (3, 3), (5, 2)):
        assert (state[0, 0, key] - values[last]).abs().max() <= band * values.abs().max()


@pytest.mark.parametrize("rule", ["additive", "normalised", "delta"])
def test_what_decays_to_nothing_is_gone_and_harms_nothing(rule: str) -> None:
    given = case("gate", rule, lengths=(70,))
    given[3][:, :, 20], given[3][:, :, 66] = -1e6, -math.inf
    later = [x[:, :, 20:] if x is not None and x.dim() > 2 else x for x in copied(given)[:5]]
    empty = [None if x is None else torch.zeros_like(x) for x in given[6:]]
    want = ops.state_step(*later, torch.tensor([50], dtype=torch.int32), *empty)
    got = ops.state_chunk(*given)
    assert_same((got[0][:, :, 20:], got[1][:, :, 20:], *given[6:]), (*want, *empty))


def test_a_normaliser_that_is_not_positive_reads_nothing() -> None:
    given = case("", "normalised", lengths=(4,))
    given[0], given[7] = given[0].neg(), torch.zeros_like(given[7])
    for op in (ops.state_step, ops.state_chunk):
        out, lse = op(*copied(given))
        assert (out == 0).all()
        assert (lse == -math.inf).all()


def read(given: list[Any], rule: str) -> tuple[Tensor, Tensor]:
    return StateRead.apply(  # type: ignore[no-any-return, no-untyped-call]
        *given[:6], rule == "normalised", ops.state_chunk, ops.state_chunk.backward
    )


@every_rule
def test_gradients_equal_autograd_through_the_definition(decay: str, rule: str) -> None:
    given = case(decay, rule, lengths=(67, 0, 9))
    empty = [None if x is None else torch.zeros_like(x) for x in given[6:]]
    inputs = [x for x in given[:5] if x is not None]
    for x in inputs:
        x.requires_grad_()
    live = (torch.arange(67) < given[5][:, None])[:, None].expand(3, 6, 67)
    weights = (
        torch.randn(3, 6, 67, 5, dtype=torch.float64),
        torch.randn(3, 6, 67, dtype=torch.float64),
    )

    def gradients(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        total = (out * weights[0]).sum() + (torch.where(live, lse, 0) * weights[1]).sum()
        return torch.autograd.grad(total, inputs)

    wanted = gradients(*by_hand(*given[:6], *empty)[:2])
    found = gradients(*read(given, rule))
    for one, other in zip(found, wanted, strict=True):
        assert_close_to_float64(one, other.nan_to_num(0), other.nan_to_num(0), reduction=67 * 8 * 8)


@pytest.mark.parametrize("rule", ["additive", "normalised", "delta"])
def test_gradients_pass_torchs_own_check(rule: str) -> None:
    given = case("gate", rule, lengths=(7,), dims=(3, 2))
    inputs = [x for x in given[:5] if x is not None]

    def out(*values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        rest = iter(values)
        found = read([None if x is None else next(rest) for x in given[:5]] + given[5:], rule)
        return found if rule == "normalised" else found[0]

    assert torch.autograd.gradcheck(out, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_gradients_keep_their_inputs_types() -> None:
    given = case("gate", "normalised", dtype=torch.bfloat16)
    inputs = [x.requires_grad_() for x in given[:4]]
    out, lse = read(given, "normalised")
    (out.sum() + lse[:, :, :33].sum()).backward()
    assert [x.grad.dtype for x in inputs] == [torch.bfloat16] * 3 + [torch.float32]


def test_calls_that_make_no_sense_are_refused() -> None:
    given = case("", "delta")
    for op in (ops.state_step, ops.state_chunk):
        with pytest.raises(ValueError, match="a delta-rule state has no normaliser: given both"):
            op(*given[:7], torch.zeros(2, 2, 8))
        with pytest.raises(ValueError, match="5 query heads cannot share 2 KV heads evenly"):
            op(given[0][:, :5], *given[1:])
