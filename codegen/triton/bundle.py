"""All that a target needs to run a spec, in a folder of the cache: binaries, assembly, launches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import cache as store
from ..spec import KernelSpec
from . import ptx
from .aot import TORCH_TYPES, CompiledKernel, compile_launch, used
from .blocks import Launch, launches
from .emit import source
from .load import module
from .record import Allocate, Copy, Extent, Launched, Plan, StandIn, plans, tensor
from .sizes import Size

DESCRIPTION = "bundle.json"
_SUFFIXES = {"cuda": (".cubin", ".ptx"), "hip": (".hsaco", ".amdgcn")}
HERE = Path(__file__).parent


def bundle(spec: KernelSpec, target: str, width: int | None = None) -> Path:
    """The folder of a spec's kernels on a target, compiled unless it is there.

    It holds, for each kernel, a binary and its assembly, and `bundle.json`: what the operator takes
    and returns, what is allocated and launched in which case, and each kernel's parameters
    (docs/kernels.md has the format).

    Args:
        width: entries of the lists it reads, for a spec that is compiled for them.

    Raises:
        NotCovered: no template covers the spec on this target.
        ValueError: unknown target.
        ImportError: triton is not installed.
        RuntimeError: kernels were imported for the interpreter (TRITON_INTERPRET=1).
    """
    return store.publish(
        folder_of(spec, target, width), lambda folder: _fill(folder, spec, target, width)
    )


def folder_of(spec: KernelSpec, target: str, width: int | None = None) -> Path:
    """Where `bundle` keeps it: named after everything that it is made from."""
    import triton

    chosen = [
        (role, launch.kernel, launch.constants, launch.warps, launch.stages)
        for role, launch in launches(spec, target).items()
    ]
    made_from = (source(spec, target), target, str(width), json.dumps(chosen))
    key = store.key(*made_from, triton.__version__, compiled_by())
    return store.root() / "binaries" / f"{spec.name}.{target.replace(':', '-')}-{key}"


@cache
def compiled_by() -> str:
    """A hash of the code that decides what a bundle or a plug-in's kernel is."""
    digest = hashlib.sha256()
    for name in ("aot", "bundle", "plugin", "ptx", "record", "shapes", "sizes"):
        digest.update((HERE / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _fill(folder: Path, spec: KernelSpec, target: str, width: int | None) -> None:
    made = module(spec, target)
    known = launches(spec, target)
    found = plans(spec, made, width)
    kernels: dict[str, CompiledKernel] = {}
    variants = []
    for plan in found:
        roles = []
        for launched in plan.launches:
            role, launch = _role(known, launched)
            roles.append(role)
            if role not in kernels:
                kernels[role] = compile_launch(spec, made, role, launch, target)
            _check_types(launched, kernels[role])
        variants.append(_variant(plan, roles))
    description = {
        "name": spec.name,
        "spec": spec.to_json(),
        "target": target,
        "arguments": [_argument(spec, argument) for argument in found[0].arguments],
        "returns": list(spec.returns),
        "variants": variants,
        "kernels": [_kernel(folder, target, kernel) for kernel in kernels.values()],
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _role(known: dict[str, Launch], launched: Launched) -> tuple[str, Launch]:
    """The name of a launch in the table, and the launch as it was made."""
    # What a list is held in is chosen by its width, not by the table.
    held = launched.constants.get("LIST")
    for role, launch in known.items():
        constants = {**launch.constants, "LIST": held} if held else launch.constants
        as_made = replace(launch, constants=constants)
        told = (launched.kernel, launched.constants, launched.warps, launched.stages)
        if told == (launch.kernel, constants, launch.warps, launch.stages):
            return (f"{role}_upto_{held}" if held else role), as_made
    raise RuntimeError(f"{launched} is not in the table of launches: {known}")


def _check_types(launched: Launched, kernel: CompiledKernel) -> None:
    """Holds what the launcher passes to what the kernel was compiled for."""
    names = [name for name, _ in kernel.arguments]
    if names != [*launched.arguments]:
        raise RuntimeError(f"{kernel.entry} takes {names}, and is given {[*launched.arguments]}")
    for name, kind in kernel.arguments:
        given = launched.arguments[name]
        expected = "i32"
        if isinstance(given, StandIn):
            expected = f"*{TORCH_TYPES[str(given.dtype).removeprefix('torch.')]}"
        elif isinstance(given, str):
            expected = "fp32"
        if kind != expected:
            raise RuntimeError(f"{kernel.entry}: {name} is {kind}, and is given {expected}")


def _argument(spec: KernelSpec, argument: StandIn | tuple[str, str]) -> dict[str, Any]:
    if not isinstance(argument, StandIn):
        kind, name = argument
        return {"name": name, "type": {"int": "i32", "float": "fp32"}[kind]}
    written = [name for kind, name in spec.arguments if kind.endswith("!)")]
    # As the spec has it: a size that this plan is for alone keeps its name.
    dtype, shape = tensor(spec, argument.name)
    about = {"name": argument.name, **_tensor(dtype, shape), "written": argument.name in written}
    if argument.strided:
        last = len(argument.shape) - 1
        about["strides"] = [_written(argument.stride(axis)) for axis in range(last + 1)]
    return about


def _tensor(dtype: torch.dtype, shape: tuple[Extent, ...]) -> dict[str, Any]:
    kind = TORCH_TYPES[str(dtype).removeprefix("torch.")]
    return {"type": f"*{kind}", "shape": [_written(extent) for extent in shape]}


def _written(extent: Extent | str) -> int | str:
    return extent.text() if isinstance(extent, Size) else extent


def _variant(plan: Plan, roles: Sequence[str]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    names = iter(roles)
    for step in plan.steps:
        if isinstance(step, Allocate):
            filled = {} if step.value is None else {"filled_with": str(step.value)}
            told = _tensor(step.tensor.dtype, step.tensor.shape)
            steps.append({"allocate": step.tensor.name, **told, **filled})
        elif isinstance(step, Copy):
            steps.append({"copy": step.source.name, "to": step.target.name})
        else:
            steps.append(
                {
                    "launch": next(names),
                    "grid": [_written(extent) for extent in step.grid],
                    "arguments": [
                        value.name if isinstance(value, StandIn) else _written(value)
                        for value in step.arguments.values()
                    ],
                }
            )
    return {
        "when": [condition.text() for condition in plan.conditions],
        "fixed": plan.fixed,
        "derived": {name: formula.text() for name, formula in plan.derived.items()},
        "steps": steps,
    }


def _kernel(folder: Path, target: str, kernel: CompiledKernel) -> dict[str, Any]:
    """Writes a kernel's files; what is to be known of it."""
    vendor = target.split(":")[0]
    binary, assembly = (kernel.role + suffix for suffix in _SUFFIXES[vendor])
    (folder / binary).write_bytes(kernel.binary)
    (folder / assembly).write_text(kernel.assembly, encoding="utf-8")
    parameters: list[dict[str, Any]] = [
        {"name": name, "type": kind}
        | ({"multiple_of": kernel.multiples[name]} if name in kernel.multiples else {})
        for name, kind in kernel.arguments
    ]
    # Behind them Triton's own, to memory that these kernels do not have: null.
    parameters += [{"name": name, "type": "*i8", "null": True} for name in ptx.HIDDEN]
    resources = used(kernel)
    return {
        "role": kernel.role,
        "entry": kernel.entry,
        "binary": binary,
        "assembly": assembly,
        "written_for": kernel.written_for,
        "triton": kernel.triton,
        "parameters": parameters,
        "constants": kernel.launch.constants,
        "warps": kernel.launch.warps,
        "stages": kernel.launch.stages,
        "threads": kernel.threads,
        "shared": kernel.shared,
        "registers": resources["registers"],
        "spilled": resources["stack"],
        "bytes": len(kernel.binary),
    }
