"""Kernels for CPUs: C++ generated from a KernelSpec, built for every instruction set, loaded."""

from .build import BuildFailed, NoCompiler
from .loader import definitions, definitions_library, library, load, path, runtime, source

__all__ = [
    "BuildFailed",
    "NoCompiler",
    "definitions",
    "definitions_library",
    "library",
    "load",
    "path",
    "runtime",
    "source",
]
