"""Kernels for GPUs, in Triton: their text, their operators, their compilation ahead of time."""

from .aot import CompiledKernel, compile_for, resources
from .emit import path, source
from .load import launcher, load
from .tune import tune

__all__ = [
    "CompiledKernel",
    "compile_for",
    "launcher",
    "load",
    "path",
    "resources",
    "source",
    "tune",
]
