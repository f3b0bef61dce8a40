"""Imports generated modules and registers their operators."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..spec import KernelSpec
from .emit import path

NAMESPACE = "memcompile_triton"
_lock = threading.Lock()
_loaded: dict[KernelSpec, torch._ops.OpOverload] = {}


def module(spec: KernelSpec, target: str | None = None) -> ModuleType:
    """The imported module of a spec.

    Raises:
        ImportError: triton is not installed.
    """
    return imported(path(spec, target))


def imported(file: Path) -> ModuleType:
    """A generated file as a module, once a process."""
    name = f"memcompile_generated.{file.parent.name}.{file.stem}"
    if name not in sys.modules:
        found = importlib.util.spec_from_file_location(name, file)
        if found is None or found.loader is None:
            raise ImportError(f"{file} is no Python module")
        made = importlib.util.module_from_spec(found)
        sys.modules[name] = made  # Triton looks kernels up by the name of their module
        try:
            found.loader.exec_module(made)
            if os.environ.get("TRITON_INTERPRET") == "1":
                # torch 2.11 wraps compiled kernels only; 2.13 passes interpreted ones through.
                vars(made).update(wrap_triton=lambda kernel: kernel)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load(specs: Iterable[KernelSpec]) -> dict[KernelSpec, torch._ops.OpOverload]:
    """Operators `memcompile_triton::<spec.name>`, registered on their first request.

    Each is a `triton_op`: torch.compile and AOTInductor see the kernels that it launches. Arguments
    are those of `spec.schema`; the last axis of queries, keys and values, and all of pools, index
    records, position and lengths, must be contiguous.

    Raises:
        ImportError: triton is not installed.
        NotCovered: no template covers a spec on the GPU at hand.
    """
    asked = list(specs)
    with _lock:
        for spec in asked:
            if spec not in _loaded:
                _loaded[spec] = _register(spec)
    return {spec: _loaded[spec] for spec in asked}


def launcher(spec: KernelSpec) -> Callable[..., Any]:
    """The function of a spec's module that launches its kernels, `wrap_triton` around each."""
    found: Callable[..., Any] = getattr(module(spec), spec.op)
    return found


def _register(spec: KernelSpec) -> torch._ops.OpOverload:
    written = [name for kind, name in spec.arguments if kind.endswith("!)")]
    name = f"{NAMESPACE}::{spec.name}"
    torch.library.triton_op(name, launcher(spec), mutates_args=written)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), spec.name).default
    return overload
