"""Turns kernel specifications into source and loaded kernels, for the CPU and for GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .spec import KernelSpec, NotCovered, specialise

__all__ = ["KernelSpec", "NotCovered", "load", "path", "specialise"]

TARGETS = {"cpu": "cpp", "cuda": "triton"}


def load(specs: Iterable[KernelSpec], device: str) -> dict[KernelSpec, Any]:
    """Operators of generated kernels: built where they are not cached, loaded and registered.

    Args:
        device: type of the device they run on, a key of TARGETS.

    Returns:
        for each spec its `torch._ops.OpOverload`, with the schema `spec.schema`.

    Raises:
        NotCovered: no target generates for the device.
        codegen.cpp.build.NoCompiler, codegen.cpp.build.BuildFailed: on the CPU.
        ImportError: on a GPU without triton.
    """
    if _target(device) == "cpp":
        from . import cpp

        return cpp.load(specs)
    from . import triton

    return triton.load(specs)


def load_linear() -> Any:
    """The CPU operator `linear(input, weight, bias) -> Tensor` for bfloat16 and float16 weights.

    Raises:
        codegen.cpp.build.NoCompiler, codegen.cpp.build.BuildFailed: it cannot be built.
    """
    from .cpp import linear

    return linear.load()


def path(spec: KernelSpec, device: str) -> Path:
    """The readable file that the kernel was generated into."""
    if _target(device) == "cpp":
        from . import cpp

        return cpp.path(spec)
    from . import triton

    return triton.path(spec)


def _target(device: str) -> str:
    if device not in TARGETS:
        raise NotCovered(f"no kernels are generated for {device!r}; known: {', '.join(TARGETS)}")
    return TARGETS[device]
