"""A linear layer that reads its weights at memory speed when there are few rows."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

from ..operators import library as operators_library
from . import build, loader

SCHEMA = "linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor"

_lock = threading.Lock()


def library() -> build.Library:
    """What is built: the kernel for every instruction set, and its operator."""
    return _library(build.isas())


@cache
def _library(isas: tuple[str, ...]) -> build.Library:
    kernel, operator = (
        (build.HERE / name).read_text(encoding="utf-8") for name in ("linear.cpp", "linear_op.cpp")
    )
    units = (
        build.Unit("linear.cpp", kernel, isas),
        build.Unit("linear_op.cpp", operator, flags=loader.torch_flags()),
    )
    return build.Library(
        "libmemcompile_linear",
        units,
        link=loader.torch_link(),
        needs=(loader.runtime(),),
        versions=(torch.__version__,),
    )


def load() -> torch._ops.OpOverload:
    """memcompile_cpp::linear(input [..., in], weight [out, in], bias [out] or None) -> [..., out].

    The semantics of torch.nn.functional.linear: one dtype, sums in float32, contiguous result.
    Calls that the kernel does not cover, or is not the faster one for, go to at::linear.

    Raises:
        NoCompiler: it has to be built and there is no compiler.
        BuildFailed: the compiler failed.
    """
    with _lock:
        return _load()


@cache
def _load() -> torch._ops.OpOverload:
    runtime, shared = build.build([loader.runtime(), library()])
    home = operators_library(loader.NAMESPACE)
    if not torch._C._dispatch_has_kernel(f"{loader.NAMESPACE}::linear"):  # of a shipped engine
        home.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{loader.NAMESPACE}::linear", _fake, lib=home)
    torch.ops.load_library(runtime)
    torch.ops.load_library(shared)
    operator: torch._ops.OpOverload = torch.ops.memcompile_cpp.linear.default
    return operator


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))
