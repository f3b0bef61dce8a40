"""Random states and the rows that reach them, poisoned, and what the references make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from tolerance import assert_close_to_float64
from torch import Tensor

import memcompile.models.ops  # noqa: F401 (registers the references)
from memcompile.codegen.spec import KernelSpec, bind

reference = torch.ops.memcompile
NAMES = ("query", "key", "value", "decay", "beta", "lengths", "state", "norm")


@dataclass(frozen=True)
class Shape:
    """Ragged rows of a batch; `rows` is the extent of their axis."""

    lengths: tuple[int, ...] = (5, 0)
    rows: int = 5
    kv_heads: int = 2
    seed: int = 0


def shapes(longest: int) -> st.SearchStrategy[Shape]:
    """Up to three sequences of at most `longest` rows, some without a live one."""

    @st.composite
    def build(draw: st.DrawFn) -> Shape:
        rows = draw(st.integers(1, longest))
        count = draw(st.integers(1, 3))
        lengths = tuple(draw(st.integers(0, rows)) for _ in range(count))
        return Shape(lengths, rows, draw(st.integers(1, 3)), draw(st.integers(0, 2**31)))

    return build()


def lay_out(spec: KernelSpec, shape: Shape) -> dict[str, Any]:
    """Everything `state_step` takes, by name; None where the spec has none. Padding is NaN.

    Keys are of unit length for the delta rule, and features positive for a normalised read: what
    both are meant for.
    """
    make = torch.Generator().manual_seed(shape.seed)
    batch, rows, heads = len(shape.lengths), shape.rows, shape.kv_heads

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=make)

    def drawn(*size: int) -> Tensor:
        return torch.rand(size, generator=make)

    query = normal(batch, rows, heads * spec.group, spec.key_dim).transpose(1, 2)
    key = normal(batch, heads, rows, spec.key_dim)
    if spec.normalised:
        query, key = query.softmax(3), key.softmax(3)
    if spec.delta:
        key = torch.nn.functional.normalize(key, dim=3)
    value = normal(batch, heads, rows, spec.value_dim)
    decay = {"": None, "constant": -0.3 * drawn(heads), "gate": -drawn(batch, heads, rows)}
    beta = drawn(batch, heads, rows) if spec.delta else None
    lengths = torch.tensor(shape.lengths, dtype=torch.int32)
    gone = (torch.arange(rows) >= lengths[:, None])[:, None]
    for rows_of in (query, key, value):
        rows_of.masked_fill_(gone[..., None], torch.nan)
    for gate in (decay["gate"], beta):
        if gate is not None:
            gate.masked_fill_(gone, torch.nan)
    state = normal(batch, heads, spec.key_dim, spec.value_dim)
    norm = 0.1 + drawn(batch, heads, spec.key_dim) if spec.normalised else None
    inputs = [x.to(spec.torch_dtype) for x in (query, key, value)]
    return dict(zip(NAMES, (*inputs, decay[spec.decay], beta, lengths, state, norm), strict=True))


def widened(given: dict[str, Any], dtype: torch.dtype) -> list[Any]:
    """Copies, in order, with floats in `dtype`."""
    return [
        x.to(dtype, copy=True) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in given.values()
    ]


def check(
    spec: KernelSpec, shape: Shape, operator: Any, given: dict[str, Any] | None = None
) -> None:
    """Holds the kernel's results and the state that it leaves to float64, row by row."""
    given = lay_out(spec, shape) if given is None else given
    exact, plain = widened(given, torch.float64), widened(given, torch.float32)
    truth = reference.state_step(*exact)
    eager = getattr(reference, spec.op)(*plain)
    got = operator(*(given[name] for _, name in spec.arguments))
    width = (shape.rows + spec.key_dim) * max(spec.key_dim, spec.value_dim)
    out = eager[0].to(spec.torch_dtype)
    assert_close_to_float64(got[0], out, truth[0], reduction=width)
    # What is kept is float32 whatever the inputs are, and so is what it weighs.
    kept = [(got[1], eager[1], truth[1], True)]
    kept += [(given[n], plain[i], exact[i], False) for i, n in ((6, "state"), (7, "norm"))]
    for actual, rounded, right, logarithm in kept:
        if actual is not None:
            assert_close_to_float64(actual, rounded, right, reduction=width, logarithm=logarithm)


def gradients(spec: KernelSpec, shape: Shape) -> dict[str, Any]:
    """Everything `state_chunk.backward` takes, by name."""
    given = lay_out(spec, shape)
    make = torch.Generator().manual_seed(shape.seed + 1)
    sizes = given["query"].shape[:3]
    gone = (torch.arange(shape.rows) >= given["lengths"][:, None])[:, None].expand(sizes)
    grad_num = torch.randn((*sizes, spec.value_dim), generator=make)
    grad_den = torch.randn(sizes, generator=make)
    grad_num[gone] = grad_den[gone] = torch.nan
    args = [*(given[name] for name in NAMES[:6]), grad_num, grad_den if spec.normalised else None]
    return bind("state_chunk.backward", args)


def check_gradients(spec: KernelSpec, shape: Shape, operator: Any) -> None:
    """Holds the kernel's gradients to those of autograd in float64."""
    given = gradients(spec, shape)
    backward = reference.state_chunk.backward
    truth, eager = (backward(*widened(given, dtype)) for dtype in (torch.float64, torch.float32))
    got = operator(*(given[name] for _, name in spec.arguments))
    width = shape.rows * spec.group * max(spec.key_dim, spec.value_dim)
    for actual, plain, right in zip(got, eager, truth, strict=True):
        assert_close_to_float64(actual, plain, right, reduction=width)
