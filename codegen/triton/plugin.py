"""Kernels with the parameters that TensorRT's ahead-of-time plug-ins pass, and no others.

Such a plug-in is one kernel. It is passed the pointers of its inputs, then 32-bit numbers that
follow from shapes, then the pointers of its outputs: no other numbers, no memory beside. So a
kernel is wrapped: what is fixed becomes a constant, strides follow from shapes, and Triton's own
parameters, which nobody would pass, are taken out of the PTX.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import cache as store
from ..spec import KernelSpec, NotCovered
from . import ptx
from .aot import TORCH_TYPES, CompiledKernel, compile_kernel
from .blocks import Launch, launches, table
from .bundle import compiled_by
from .emit import text, write
from .load import imported, module
from .record import Extent, Launched, Plan, StandIn, plans, tensor
from .sizes import Size

# What a kernel is given of it without asking.
SHARED = 48 << 10
_TYPES = {**TORCH_TYPES, "int64": "i64"}


@dataclass(frozen=True)
class Operand:
    """A tensor that a plug-in takes or returns.

    Attributes:
        name: as the plug-in calls it.
        stands_for: the argument or result of the spec's operator; "" where the kernel reads it not.
        dtype: int64 where the operator has an int32 list, too.
        shape: extents, in the names of sizes or as numbers.
    """

    name: str
    stands_for: str
    dtype: torch.dtype
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class Plugin:
    """What a plug-in is made from.

    Attributes:
        name: of the plug-in and of its kernel; a C identifier.
        constants: the numbers that the spec's operator is given.
        known: sizes that are the same in every call.
        width: of its lists, for a spec that is compiled for them.
        columns: pages that the kernel can rank; None: any number.
    """

    name: str
    spec: KernelSpec
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    constants: Mapping[str, int | float]
    known: Mapping[str, int]
    width: int | None = None
    columns: int | None = None


@dataclass(frozen=True)
class PluginKernel:
    """One way to run a plug-in on a target.

    Attributes:
        role: of the launch that it wraps.
        ptx: its text, which takes inputs, `extras` and outputs.
        extras: the sizes that are passed as 32-bit numbers, in order.
        grid: extents in the names of sizes.
        threads, shared: of a program.
    """

    role: str
    ptx: str
    extras: tuple[str, ...]
    grid: tuple[Extent, Extent, Extent]
    threads: int
    shared: int


def plugin_kernels(plugin: Plugin, target: str) -> list[PluginKernel]:
    """The kernels of a plug-in on a target: each does all of it, for any sizes.

    Raises:
        NotCovered: none does.
        ValueError: not a CUDA target; or the PTX is not what is passed.
        ImportError: triton is not installed.
    """
    if not target.startswith("cuda:"):
        raise ValueError(f"TensorRT runs on CUDA; the target is {target!r}")
    return [_kernel(plugin, target, role, one) for role, one in plugin_launches(plugin, target)]


def plugin_launches(plugin: Plugin, target: str) -> list[tuple[str, Launched]]:
    """The launches of a plug-in's spec that do all of it, by their roles; see `plugin_kernels`."""
    spec = plugin.spec
    found: dict[str, Launched] = {}
    known = launches(spec, target)
    for plan in plans(spec, module(spec, target), plugin.width):
        launch = single_launch(plan)
        if launch is None or not _ranks(launch, plugin):
            continue
        role = next(
            role
            for role, told in known.items()
            if (told.kernel, told.warps) == (launch.kernel, launch.warps)
            and told.constants.items() <= {**launch.constants, **_list(told)}.items()
        )
        found.setdefault(role, launch)
        if plugin.columns is not None:
            break  # the narrowest that ranks them all
    if not found:
        raise NotCovered(f"{spec.name}: on {target} it takes more than one launch")
    return [*found.items()]


def _list(told: Launch) -> dict[str, int]:
    """A list's block is chosen by its width, not by the table."""
    return {"LIST": told.constants["LIST"]} if "LIST" in told.constants else {}


def single_launch(plan: Plan) -> Launched | None:
    """The launch of a plan that has one, and allocates what is returned alone, filled by it."""
    allocated = [step for step in plan.steps if not isinstance(step, Launched)]
    returned = {id(tensor) for tensor in plan.returns}
    for step in allocated:
        made = getattr(step, "tensor", None)
        if made is None or id(made) not in returned or getattr(step, "value", None) is not None:
            return None
    return plan.launches[0] if len(plan.launches) == 1 else None


def _ranks(launch: Launched, plugin: Plugin) -> bool:
    return plugin.columns is None or launch.constants.get("PAGES", 0) >= plugin.columns


def _kernel(plugin: Plugin, target: str, role: str, launched: Launched) -> PluginKernel:
    known = known_sizes(plugin)
    extras = extras_of(launched, known)
    launch = Launch(launched.kernel, {}, launched.warps, launched.stages)
    file = wrapped(plugin, target, launched, extras, known)
    pointers = [(f"p_{o.name}", _pointer(o)) for o in (*plugin.inputs, *plugin.outputs)]
    inputs, outputs = pointers[: len(plugin.inputs)], pointers[len(plugin.inputs) :]
    signature = dict([*inputs, *((name, "i32") for name in extras), *outputs])
    text, facts = _compiled(plugin.name, file, signature, launch, target)
    _check(text, plugin, signature)
    grid = tuple(bound(extent, known) for extent in launched.grid)
    whole = (grid[0], grid[1], grid[2])
    return PluginKernel(role, text, extras, whole, facts["threads"], facts["shared"])


def _compiled(
    name: str, file: Path, signature: dict[str, str], launch: Launch, target: str
) -> tuple[str, dict[str, int]]:
    """The PTX of a kernel in a file, and its threads and shared memory; kept in the cache."""
    import triton

    chosen = (launch.warps, launch.stages, signature)
    key = store.key(
        *(file.parent.name, target, json.dumps(chosen), triton.__version__, compiled_by())
    )

    def fill(folder: Path) -> None:
        pointers = {name: 16 for name, kind in signature.items() if kind.startswith("*")}
        kernel = getattr(imported(file), name)
        found: CompiledKernel | None = None
        for stages in range(launch.stages, 0, -1):
            fewer = replace(launch, stages=stages)
            found = compile_kernel(kernel, signature, pointers, fewer, name, target)
            if found.shared <= SHARED:
                break
        assert found is not None
        told = {"threads": found.threads, "shared": found.shared}
        (folder / "kernel.ptx").write_text(ptx.drop_hidden(found.assembly), encoding="utf-8")
        (folder / "kernel.json").write_text(json.dumps(told), encoding="utf-8")

    place = store.root() / "binaries" / f"{name}.{target.replace(':', '-')}-{key}"
    kept = store.publish(place, fill)
    facts: dict[str, int] = json.loads((kept / "kernel.json").read_text(encoding="utf-8"))
    return (kept / "kernel.ptx").read_text(encoding="utf-8"), facts


def extras_of(launched: Launched, known: Mapping[str, Extent]) -> tuple[str, ...]:
    """The sizes that a kernel has to be told, in the order in which it meets them."""
    formulas = [value for value in launched.arguments.values() if isinstance(value, Size)]
    return tuple(dict.fromkeys(name for f in formulas for name in bound(f, known).names))


def _check(text: str, plugin: Plugin, signature: Mapping[str, str]) -> None:
    """Holds the text to what TensorRT passes."""
    entry = ptx.entry(text)
    expected = ["pointer" if kind.startswith("*") else kind for kind in signature.values()]
    kinds = [parameter.kind for parameter in entry.parameters]
    if entry.name != plugin.name or kinds != expected:
        raise ValueError(f"{entry.name} takes {kinds}; {plugin.name} is passed {expected}")


def known_sizes(plugin: Plugin) -> dict[str, Extent]:
    """Sizes and strides by name: what follows from shapes, tensors being contiguous."""
    found: dict[str, Extent] = {**plugin.known, "splits": 1}
    found.update({k: v for k, v in plugin.constants.items() if isinstance(v, int)})
    for operand in plugin.inputs:
        if not operand.stands_for:
            continue
        step: Extent = 1
        _, shape = tensor(plugin.spec, operand.stands_for)
        for axis in range(len(shape) - 1, -1, -1):
            if axis < 3:
                name = f"{operand.stands_for}_{('batch', 'head', 'row')[axis]}"
                found.setdefault(name, step)
            step = shape[axis] * step if isinstance(step, int) else step * shape[axis]
    return found


def bound(value: Extent, known: Mapping[str, Extent]) -> Size:
    """A formula in which what is known stands in place of its name."""
    found = value.bound(known) if isinstance(value, Size) else value
    while isinstance(found, Size) and any(name in known for name in found.names):
        found = found.bound(known)
    return found if isinstance(found, Size) else Size("number", found)


def _pointer(operand: Operand) -> str:
    return f"*{_TYPES[str(operand.dtype).removeprefix('torch.')]}"


def wrapped(
    plugin: Plugin,
    target: str,
    launched: Launched,
    extras: Sequence[str],
    known: Mapping[str, Extent],
) -> Path:
    """The file of the spec's module with one kernel more, which takes what a plug-in is passed."""
    given = {o.stands_for: f"p_{o.name}" for o in (*plugin.inputs, *plugin.outputs)}
    arguments = []
    for value in launched.arguments.values():
        if isinstance(value, StandIn):
            arguments.append(given[value.name])
        elif isinstance(value, str):
            arguments.append(repr(float(plugin.constants[value])))
        else:
            arguments.append(bound(value, known).text())
    lines = [
        *("", "", "@triton.jit", f"def {plugin.name}("),
        *(f"    p_{o.name},{_comment(o)}" for o in plugin.inputs),
        *(f"    {name}," for name in extras),
        *(f"    p_{o.name},{_comment(o)}" for o in plugin.outputs),
        "):",
        f'    """`{launched.kernel}` with the parameters of a TensorRT plug-in."""',
        f"    {launched.kernel}(",
        *(f"        {argument}," for argument in arguments),
        *(f"        {name}={value}," for name, value in launched.constants.items()),
        "    )",
        "",
    ]
    whole = text(plugin.spec, target, table(plugin.spec, target)) + "\n".join(lines)[1:]
    return write(plugin.spec, whole)


def _comment(operand: Operand) -> str:
    dtype = str(operand.dtype).removeprefix("torch.")
    return f"  # {dtype} [{', '.join(map(str, operand.shape))}]"
