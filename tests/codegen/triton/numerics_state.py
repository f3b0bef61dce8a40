"""What generated Triton kernels make of a recurrent state, and their gradients, against float64.

`test_numerics.py` runs this file in a process of its own: on a GPU where there is one, otherwise
through Triton's interpreter, which has to be chosen before the first kernel is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import Tensor
from triton_case import by_dtype, dtype_name, run

import memcompile.models.ops  # noqa: F401 (registers the references)
from memcompile.codegen.spec import bind, specialise

reference = torch.ops.memcompile
EVERY_RULE = [
    pytest.param(decay, delta, normalised, id="-".join((decay or "none", rule)))
    for decay in ("", "constant", "gate")
    for delta, normalised, rule in (
        (False, False, "additive"),
        (False, True, "normalised"),
        (True, False, "delta"),
    )
]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that is handed out holds NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """New rows of ragged sequences, and the state they find.

    Attributes:
        lengths: live rows of each sequence; the longest sets n, unless `rows` does.
        alike: every key of a sequence is the same.
    """

    lengths: tuple[int, ...] = (67, 0)
    kv_heads: int = 1
    group: int = 2
    key_dim: int = 24
    value_dim: int = 16
    decay: str = ""
    delta: bool = False
    normalised: bool = False
    dtype: torch.dtype = torch.float32
    rows: int = 0
    alike: bool = False

    @property
    def width(self) -> int:
        """Terms that are summed into an entry, at most."""
        return max(self.lengths) * max(self.key_dim, self.value_dim)

    def arguments(self) -> list[Any]:
        """Those of `state_step`; rows of padding are NaN."""
        make = torch.Generator().manual_seed(0)
        batch, rows, kv, m = len(self.lengths), max(self.lengths), self.kv_heads, self.key_dim
        rows = self.rows or rows

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make)

        def drawn(*shape: int) -> Tensor:
            return torch.rand(shape, generator=make)

        query, key = normal(batch, kv * self.group, rows, m), normal(batch, kv, rows, m)
        if self.normalised:
            query, key = query.softmax(3), key.softmax(3)
        if self.delta:
            key = torch.nn.functional.normalize(key, dim=3)
        if self.alike:
            key = key[:, :, :1].expand_as(key).clone()
        given = [query, key, normal(batch, kv, rows, self.value_dim)]
        decay = {"": None, "constant": -0.2 * drawn(kv), "gate": -0.5 * drawn(batch, kv, rows)}
        beta = drawn(batch, kv, rows) if self.delta else None
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        gone = (torch.arange(rows) >= lengths[:, None])[:, None]
        for x in given:
            x.masked_fill_(gone[..., None], torch.nan)
        for gate in (decay["gate"], beta):
            if gate is not None:
                gate.masked_fill_(gone, torch.nan)
        state = normal(batch, kv, m, self.value_dim)
        norm = drawn(batch, kv, m) if self.normalised else None
        return [*(x.to(self.dtype) for x in given), decay[self.decay], beta, lengths, state, norm]


def copied(arguments: list[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Tensors of their own, in the order their strides have; floats in `dtype`, if given."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.clone().to(dtype) if dtype and x.is_floating_point() else x.clone()

    return [copy(x) for x in arguments]


def launch(op: str, arguments: list[Any]) -> tuple[Tensor, ...]:
    """The kernel's results; what it writes goes into the arguments."""
    spec, _ = specialise(op, arguments)
    results: tuple[Tensor, ...] = run(spec, **bind(op, arguments))
    return results


def hold(op: str, case: Case, arguments: list[Any] | None = None) -> tuple[Tensor, ...]:
    """Runs a kernel, and holds its results and what it leaves to float64, row by row."""
    given = case.arguments() if arguments is None else arguments
    exact, plain = copied(given, torch.float64), copied(given)
    truth = reference.state_step(*exact)
    eager = getattr(reference, op)(*plain)
    got = launch(op, given)
    for part, actual, rounded, true in zip(("out", "lse"), got, eager, truth, strict=True):
        assert actual.dtype == torch.float32
        assert_close_to_float64(
            actual, rounded.to(case.dtype), true, reduction=case.width, logarithm=part == "lse"
        )
    for actual, rounded, true in zip(given[6:], plain[6:], exact[6:], strict=True):
        if actual is not None:
            assert_close_to_float64(actual, rounded.to(case.dtype), true, reduction=case.width)
    return got


def hold_gradients(case: Case, arguments: list[Any] | None = None) -> tuple[Tensor, ...]:
    """Runs the gradients' kernels, and holds their results to float64."""
    given = (case.arguments() if arguments is None else arguments)[:6]
    make = torch.Generator().manual_seed(1)
    batch, heads, rows, _ = given[0].shape
    gone = (torch.arange(rows) >= given[5][:, None])[:, None].expand(-1, heads, -1)
    grads = [torch.randn((batch, heads, rows, case.value_dim), generator=make)]
    grads += [torch.randn((batch, heads, rows), generator=make)] if case.normalised else []
    for grad in grads:
        grad[gone] = torch.nan
    given += [*grads, None][:2]
    truth = reference.state_chunk.backward(*copied(given, torch.float64))
    eager = reference.state_chunk.backward(*copied(given))
    got = launch("state_chunk.backward", given)
    for actual, rounded, true in zip(got, eager, truth, strict=True):
        assert actual.dtype == torch.float32
        assert_close_to_float64(actual, rounded.to(case.dtype), true, reduction=case.width)
    return got


@by_dtype
@pytest.mark.parametrize(("decay", "delta", "normalised"), EVERY_RULE)
def test_a_state_steps(dtype: torch.dtype, decay: str, delta: bool, normalised: bool) -> None:
    rule: dict[str, Any] = dict(decay=decay, delta=delta, normalised=normalised, dtype=dtype)
    hold("state_step", Case(lengths=(3, 1, 0), kv_heads=2, group=3, **rule))


@by_dtype
@pytest.mark.parametrize(("decay", "delta", "normalised"), EVERY_RULE)
def test_a_state_walks_over_chunks(
    dtype: torch.dtype, decay: str, delta: bool, normalised: bool
) -> None:
    hold("state_chunk", Case(decay=decay, delta=delta, normalised=normalised, dtype=dtype))


@by_dtype
@pytest.mark.parametrize(
    ("decay", "delta", "normalised"), [p for p in EVERY_RULE if not p.values[1]]
)
def test_gradients(dtype: torch.dtype, decay: str, delta: bool, normalised: bool) -> None:
    case = Case(decay=decay, normalised=normalised, dtype=dtype)
    hold_gradients(case)


@pytest.mark.parametrize("rule", ["normalised", "delta"])
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "dtype"),
    [(8, 8, torch.float16), (136, 72, torch.float16), (40, 48, torch.float32)],
    ids=lambda given: dtype_name(given) if isinstance(given, torch.dtype) else None,
)
def test_states_cover_dims(key_dim: int, value_dim: int, dtype: torch.dtype, rule: str) -> None:
    case = Case(
        key_dim=key_dim, value_dim=value_dim, decay="gate", dtype=dtype, group=1, lengths=(67,),
        rows=130, **{rule: True},
    )  # fmt: skip
    hold("state_chunk", case)
    if rule == "normalised":
        hold_gradients(case)
    hold("state_step", Case(**{**vars(case), "lengths": (2,), "rows": 3}))


def test_states_take_any_strides() -> None:
    """By token, by feature, a part of something wider; gates by token; states a part as well."""
    case = Case(lengths=(35, 9), decay="gate", delta=True, kv_heads=2)
    given = case.arguments()
    query, key, value, decay, beta, lengths, state, _ = given
    given[0] = query.transpose(1, 2).contiguous().transpose(1, 2)
    given[1] = key.transpose(2, 3).contiguous().transpose(2, 3)
    given[2] = torch.nn.functional.pad(value, (3, 5))[..., 3:-5]
    given[3] = decay.transpose(1, 2).contiguous().transpose(1, 2)
    given[4] = torch.stack((beta, beta), 3)[..., 0]
    for op in ("state_step", "state_chunk"):
        given[6] = torch.stack((state, state), 4)[..., 0]
        assert not any(x.is_contiguous() for x in (*given[:5], given[6]))
        hold(op, case, [*given[:5], lengths, given[6], None])
    case = Case(lengths=(35, 9), decay="gate", normalised=True, kv_heads=2)
    given = case.arguments()
    given[0] = given[0].transpose(2, 3).contiguous().transpose(2, 3)
    given[3] = given[3].transpose(1, 2).contiguous().transpose(1, 2)
    hold_gradients(case, given)
    for op in ("state_step", "state_chunk"):
        given[7] = torch.stack((given[7], given[7]), 3)[..., 0]
        hold(op, case, given)


@pytest.mark.parametrize("rule", ["normalised", "delta"])
def test_rows_may_come_in_any_calls(rule: str) -> None:
    case = Case(lengths=(67, 67), decay="gate", **{rule: True})  # type: ignore[arg-type]
    given = case.arguments()
    exact, plain = copied(given, torch.float64), copied(given)
    truth, eager = reference.state_step(*exact), reference.state_chunk(*plain)
    parts = []
    for op, first, last in (
        ("state_chunk", 0, 41),
        ("state_step", 41, 43),
        ("state_chunk", 43, 67),
    ):
        rows = [x[:, :, first:last] if i < 5 and x is not None else x for i, x in enumerate(given)]
        rows[5] = torch.full((2,), last - first, dtype=torch.int32)
        parts.append(launch(op, rows))
    for at in range(2):
        actual = torch.cat([part[at] for part in parts], 2)
        assert_close_to_float64(
            actual, eager[at], truth[at], reduction=case.width, logarithm=bool(at)
        )
    assert_close_to_float64(given[6], plain[6], exact[6], reduction=case.width)


def test_keys_may_be_alike() -> None:
    """The chunk's triangle is all ones then: its powers are enormous, its inverse is not."""
    case = Case(delta=True, alike=True)
    given = case.arguments()
    given[4] = torch.ones_like(given[4])
    hold("state_chunk", case, given)


@pytest.mark.parametrize("rule", ["normalised", "delta"])
def test_what_decays_to_nothing_leaves_the_rest_exact(rule: str) -> None:
    case = Case(decay="gate", **{rule: True})  # type: ignore[arg-type]
    given = case.arguments()
    given[3][:, :, 20] = -1e6
    given[3][:, :, 50] = -torch.inf
    hold("state_step", case, copied(given))
    hold("state_chunk", case, copied(given))
    if rule == "normalised":
        hold_gradients(case, given)


def test_a_read_that_nothing_weighs_is_none() -> None:
    """z . q <= 0 is no sum of weights; features are whole, so that it is exact."""
    case = Case(lengths=(40,), normalised=True)
    given = case.arguments()
    make = torch.Generator().manual_seed(2)
    for i in (0, 1, 7):
        given[i] = torch.randint(-2, 3, given[i].shape, generator=make).float()
    for op in ("state_step", "state_chunk"):
        out, lse = hold(op, case, copied(given))
        nothing = lse == -torch.inf
        assert 0 < nothing.sum() < nothing.numel()
        assert (out[nothing] == 0).all()
