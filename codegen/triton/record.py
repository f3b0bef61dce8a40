"""What a launcher does, as data: found by calling it with stand-ins for tensors.

A generated module's launcher is the one place that says which kernels a spec launches, on which
grids, with which arguments, and what is allocated between them. Here it runs over tensors that have
named sizes and no memory; what it allocates and launches is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch

from ...models.memory.parts import field_width
from ..spec import KernelSpec, NotCovered
from . import shapes
from .sizes import Size, evaluate

Extent = Size | int
_AXES = ("batch", "head", "row")
# Sizes that a kernel is compiled for: a launch plan holds for one of them.
FIXED = {"summaries": "list_pages", "among": "candidates"}
INTEGERS = (
    *("page_table", "record_table", "child_table", "pages", "candidates"),
    *("position", "lengths"),
)
_OF_THE_SPEC = (
    *("query", "key", "value", "key_pages", "value_pages", "page_values"),
    *(f"{pool}_{name}" for pool in ("index", "children") for name in ("mean", "std", "min", "max")),
    *(f"{pool}_{name}" for pool in ("index", "children") for name in ("radius", "value_mean")),
)


class StandIn:
    """A tensor of named sizes, without memory.

    Attributes:
        name: an argument's; what is allocated is named after what takes it.
        allocated: whether it is no argument.
        strided: whether its strides are passed on, so that any will do.
    """

    def __init__(
        self, tape: Tape, name: str, dtype: torch.dtype, shape: tuple[Extent, ...]
    ) -> None:
        self.tape, self.name, self.dtype, self.shape = tape, name, dtype, shape
        self.allocated = not name
        self.strided = False

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> Extent:
        total: Extent = 1
        for extent in self.shape:
            total = extent * total if isinstance(total, int) else total * extent
        return total

    def stride(self, axis: int) -> Extent:
        if axis == len(self.shape) - 1 and len(self.shape) > 3:
            return 1
        self.strided = True
        # A tensor of one axis has one number for each head.
        return Size("name", f"{self.name}_{_AXES[axis] if len(self.shape) > 1 else 'head'}")

    def is_contiguous(self) -> bool:
        return True

    def contiguous(self) -> StandIn:
        return self

    def clone(self, memory_format: Any = None) -> StandIn:
        made = self.tape.allocate(self.shape, self.dtype)
        self.tape.steps.append(Copy(self, made))
        return made

    def new_empty(self, shape: Any, dtype: torch.dtype | None = None) -> StandIn:
        return self.tape.allocate(tuple(shape), dtype or self.dtype)

    def new_full(self, shape: Any, value: float, dtype: torch.dtype | None = None) -> StandIn:
        return self.tape.allocate(tuple(shape), dtype or self.dtype, value)


@dataclass(frozen=True)
class Allocate:
    """Memory that a launch needs, or that is returned; `value` fills it, None leaves it."""

    tensor: StandIn
    value: float | None = None


@dataclass(frozen=True)
class Copy:
    source: StandIn
    target: StandIn


@dataclass(frozen=True)
class Launched:
    """One launch.

    Attributes:
        kernel: the kernel's function in the module.
        grid: three extents.
        arguments: what each parameter of the kernel gets that is no constant, in order: a tensor,
            a size, a number, or the name of an argument of the operator.
        constants: its compile-time constants, with `warps` and `stages` as launched.
    """

    kernel: str
    grid: tuple[Extent, Extent, Extent]
    arguments: dict[str, StandIn | Extent | str]
    constants: dict[str, int]
    warps: int
    stages: int


@dataclass(frozen=True)
class Condition:
    """`size` is at most `most`, or above it."""

    size: Extent
    most: int
    holds: bool

    def text(self, division: str = "//", name: Callable[[str], str] = str) -> str:
        size = self.size.text(division, name) if isinstance(self.size, Size) else str(self.size)
        return f"{size} {'<=' if self.holds else '>'} {self.most}"


@dataclass(frozen=True)
class Plan:
    """What a launcher does where `conditions` hold, in order.

    Attributes:
        derived: sizes that are computed from others, by name, in order.
        fixed: sizes that the plan holds for alone.
        arguments: tensors and names of numbers, in the operator's order.
        returns: tensors, in the order of `spec.returns`.
    """

    spec: KernelSpec
    conditions: tuple[Condition, ...]
    derived: dict[str, Size]
    fixed: dict[str, int]
    arguments: tuple[StandIn | tuple[str, str], ...]
    steps: tuple[Allocate | Copy | Launched, ...]
    returns: tuple[StandIn, ...]

    @property
    def launches(self) -> list[Launched]:
        return [step for step in self.steps if isinstance(step, Launched)]

    def sizes(self, given: Mapping[str, int]) -> dict[str, int]:
        """Given sizes with those that are derived from them and those that are fixed."""
        known = {**given, **self.fixed}
        for name, formula in self.derived.items():
            known[name] = formula.value(known)
        return known

    def holds(self, given: Mapping[str, int]) -> bool:
        """Whether the plan is right for the sizes, no earlier one being so."""
        if any(given.get(name, value) != value for name, value in self.fixed.items()):
            return False
        known = self.sizes(given)
        return all(
            (evaluate(condition.size, known) <= condition.most) is condition.holds
            for condition in self.conditions
        )


@dataclass
class Tape:
    """What one run of a launcher did, and how it decided."""

    ahead: list[bool]
    steps: list[Allocate | Copy | Launched] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    derived: dict[str, Size] = field(default_factory=dict)

    def allocate(
        self, shape: tuple[Extent, ...], dtype: torch.dtype, value: float | None = None
    ) -> StandIn:
        made = StandIn(self, "", dtype, shape)
        self.steps.append(Allocate(made, value))
        return made

    def decide(self, size: Extent, most: int) -> bool:
        """Whether `size` is at most `most`: as given beforehand, and so at first."""
        if isinstance(size, int):
            return size <= most
        at = len(self.conditions)
        holds = self.ahead[at] if at < len(self.ahead) else True
        self.conditions.append(Condition(size, most, holds))
        return holds

    def split_count(self, *given: Any) -> Extent:
        split: Any = shapes.split_count(*given)
        if not isinstance(split, Size):
            return int(split)
        self.derived["splits"] = split
        named = Size("name", "splits")
        return 1 if self.decide(named, 1) else named

    def wrap(self, kernel: Any) -> Any:
        """In the place of `torch.library.wrap_triton`."""
        return _Wrapped(self, kernel)


class _Wrapped:
    def __init__(self, tape: Tape, kernel: Any) -> None:
        self.tape, self.kernel = tape, kernel

    def __getitem__(self, grid: tuple[Extent, ...]) -> Callable[..., None]:
        def launch(*given: Any, num_warps: int, num_stages: int, **constants: int) -> None:
            names = [name for name in self.kernel.arg_names if name not in constants]
            arguments = dict(zip(names, given, strict=True))
            for name, value in arguments.items():
                if isinstance(value, StandIn) and value.allocated:
                    value.name = name.removeprefix("p_")  # what the last that takes it calls it
            first, second, third = (*grid, 1, 1)[:3]
            wide = (first, second, third)
            self.tape.steps.append(
                Launched(
                    self.kernel.__name__, wide, arguments, dict(constants), num_warps, num_stages
                )
            )

        return launch


def plans(spec: KernelSpec, made: ModuleType, width: int | None = None) -> list[Plan]:
    """What the launcher of a spec's module does, for every way in which it can decide.

    Args:
        made: the module (see `load.module`).
        width: entries of the lists it reads, for a spec that is compiled for them (`fixed_size`).

    Returns:
        plans to be tried in their order: the first whose conditions hold is right.

    Raises:
        NotCovered: the launcher does more than launch kernels.
        ValueError: a width is missing.
    """
    if spec.backward:
        raise NotCovered(f"{spec.name}: gradients are made of more than kernels")
    fixed = fixed_size(spec)
    if fixed and width is None:
        raise ValueError(f"{spec.name} is compiled for the width of its lists; give {fixed}")
    found: list[Plan] = []
    open_paths: list[list[bool]] = [[]]
    while open_paths:
        tape = Tape(open_paths.pop())
        plan = _run(spec, made, tape, {fixed: width} if fixed and width is not None else {})
        found.append(plan)
        decided = [condition.holds for condition in plan.conditions]
        # Where it decided by itself, it can decide otherwise, the latest first.
        for at in range(len(tape.ahead), len(decided)):
            open_paths.append([*decided[:at], not decided[at]])
    return found


def fixed_size(spec: KernelSpec) -> str:
    """The size that a spec's kernels are compiled for, or nothing."""
    return next((name for flag, name in FIXED.items() if getattr(spec, flag)), "")


def _run(spec: KernelSpec, made: ModuleType, tape: Tape, fixed: dict[str, int]) -> Plan:
    launcher = getattr(made, spec.op)
    replaced = {
        "wrap_triton": tape.wrap,
        "known_at_most": tape.decide,
        "split_count": tape.split_count,
    }
    recording = FunctionType(launcher.__code__, {**vars(made), **replaced}, launcher.__name__)
    given: list[Any] = []
    arguments: list[StandIn | tuple[str, str]] = []
    for kind, name in spec.arguments:
        if kind in ("int", "float"):
            # A number that is given; where it sizes what is allocated, it is a size as well.
            given.append(Size("name", name) if kind == "int" else name)
            arguments.append((kind, name))
            continue
        dtype, shape = tensor(spec, name)
        shape = tuple(fixed.get(str(x), x) if isinstance(x, Size) else x for x in shape)
        stand_in = StandIn(tape, name, dtype, shape)
        given.append(stand_in)
        arguments.append(stand_in)
    result = recording(*given)
    returned = () if result is None else result if isinstance(result, tuple) else (result,)
    for stand_in, name in zip(returned, spec.returns, strict=True):
        stand_in.name = name
    _name_apart(tape)
    return Plan(
        spec,
        tuple(tape.conditions),
        tape.derived,
        fixed,
        tuple(arguments),
        tuple(tape.steps),
        tuple(returned),
    )


def _name_apart(tape: Tape) -> None:
    """No two tensors have one name."""
    seen: set[str] = set()
    for step in tape.steps:
        if isinstance(step, Allocate):
            while step.tensor.name in seen:
                step.tensor.name += "_"
            seen.add(step.tensor.name)


def tensor(spec: KernelSpec, name: str) -> tuple[torch.dtype, tuple[Extent, ...]]:
    """Dtype and shape, in named sizes, of a tensor among a spec's arguments."""
    kv_heads, rows, batch = (Size("name", size) for size in ("kv_heads", "rows", "batch"))
    heads: Extent = kv_heads * spec.group
    dtype = torch.float32
    if name in INTEGERS:
        dtype = torch.int32
    elif name in _OF_THE_SPEC:
        dtype = spec.torch_dtype

    def size(of: str) -> Size:
        return Size("name", of)

    row = (batch, kv_heads, rows)
    # Pages lie in a pool; or each head's behind the other's, one for each column.
    pool: tuple[Extent, ...] = (size("pool_pages"),)
    if spec.contiguous:
        pool = (batch, kv_heads, size("table_pages"))
    fixed: dict[str, tuple[Extent, ...]] = {
        "query": (batch, heads, rows, spec.key_dim),
        "key": (*row, spec.key_dim),
        "value": (*row, spec.value_dim),
        "key_pages": (*pool, spec.page_size, spec.key_dim),
        "value_pages": (*pool, spec.page_size, spec.value_dim),
        "bias": (*pool, spec.page_size),
        "page_table": (batch, kv_heads, size("columns" if spec.fold else "table_pages")),
        "record_table": (batch, kv_heads, size("record_columns")),
        "child_table": (batch, kv_heads, size("child_columns")),
        "pages": (*row, size("list_pages")),
        "candidates": (*row, size("candidates")),
        "page_logits": (batch, heads, rows, size("table_pages")),
        "page_values": (*pool, spec.value_dim),
        "page_bias": (*pool, 1),
        "position": (batch,),
        "lengths": (batch,),
        "decay": (kv_heads,) if spec.decay == "constant" else row,
        "beta": row,
        "state": (batch, kv_heads, spec.key_dim, spec.value_dim),
        "norm": (batch, kv_heads, spec.key_dim),
    }
    if name in fixed:
        return dtype, fixed[name]
    kind, _, of = name.partition("_")
    if kind in ("index", "children"):
        if spec.fold:
            pool = (size("groups" if kind == "index" else "children"),)
        elif spec.record_table:
            pool = (size("records"),)
        return dtype, (*pool, field_width(of, spec.key_dim, spec.value_dim))
    if spec.op == "combine":
        read = (batch, size("heads"), rows)
        return dtype, (*read, spec.value_dim) if name.startswith("out") else read
    raise NotCovered(f"{spec.op}: the shape of {name} is not known")
