"""The measure of 16-bit arithmetic: the same network in float32, its 16-bit weights and all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..runtime.engine import Program

HALVES = (torch.float16, torch.bfloat16)
# What may be put down to rounding, in `error_over_eager`.
TYPICAL = 2.0


class InFloat32(TorchDispatchMode):
    """Whatever is computed meanwhile, on the CPU or a GPU, is computed and kept in float32.

    Operations get float32 copies of 16-bit tensors, which live no longer than they: no second
    network is in memory. Does not reach into what was compiled.

    Raises:
        TypeError: a 16-bit tensor would be written to, whose copy the write would be lost with.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given, argument in zip(args, func._schema.arguments, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given, Tensor) and given.dtype in HALVES:
                raise TypeError(f"{func} writes to a {given.dtype} tensor of the network's own")
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))


def _wide(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.float() if given.dtype in HALVES else given
    return torch.float32 if isinstance(given, torch.dtype) and given in HALVES else given


def program_in_float32(program: Program) -> Program:
    """One whose memory is float32, for step graphs that are run `InFloat32`."""
    layouts = tuple(replace(layout, dtype=torch.float32) for layout in program.layouts)
    return replace(program, layouts=layouts)


def farthest(eager: Tensor, exact: Tensor) -> float:
    """How far a logit may be from 16-bit eager's: 8 times as far as eager's are from float32.

    Single tokens are as much as 5 times as far off in one order of rounding as in another.
    """
    exact = exact.double()
    unit = torch.finfo(eager.dtype).eps * float(exact.abs().max())
    return 8 * float((eager.double() - exact).abs().max()) + unit


def error_over_eager(logits: Tensor, eager: Tensor, exact: Tensor) -> float:
    """How many times as far from float32 as eager's are the logits [..., V] of a typical token.

    A geometric mean over tokens: what rounding makes of one token differs widely from network to
    network and token to token, and so does what any mistake makes of it; of right engines this
    mean was 0.9 to 1.5. What rounding can do to a logit that is stored counts for both sides.

    Args:
        eager, exact: what 16-bit eager makes of the same tokens, and eager in float32.
    """
    exact = exact.double()
    unit = torch.finfo(eager.dtype).eps / 4 * exact.square().mean(-1).sqrt()
    mine, eagers = (
        (made.double() - exact).square().mean(-1).sqrt() + unit for made in (logits, eager)
    )
    return float((mine / eagers).log().mean().exp())
