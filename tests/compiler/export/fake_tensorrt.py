"""TensorRT's plug-in module as far as generated modules use it: what they register is kept, and
sizes are symbols with the operators that the real ones have, and no others."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

DTYPES = {"FP32": "float32", "FP16": "float16", "BF16": "bfloat16", "INT32": "int32"} | {
    "INT64": "int64"
}


class ShapeExpr:
    """A size; other sizes and numbers stand on its right side only."""

    def __init__(self, value: int) -> None:
        self.value = value

    def _with(self, other: Any, made: int) -> ShapeExpr:
        assert isinstance(other, int | ShapeExpr)
        return ShapeExpr(made)

    def __add__(self, other: Any) -> ShapeExpr:
        return self._with(other, self.value + int(value_of(other)))

    def __sub__(self, other: Any) -> ShapeExpr:
        return self._with(other, self.value - int(value_of(other)))

    def __mul__(self, other: Any) -> ShapeExpr:
        return self._with(other, self.value * int(value_of(other)))

    def __floordiv__(self, other: Any) -> ShapeExpr:
        return self._with(other, self.value // int(value_of(other)))


def value_of(size: Any) -> int:
    return int(size.value if isinstance(size, ShapeExpr | SymInt32) else size)


class SymInt32:
    def __init__(self, value: int | ShapeExpr) -> None:
        assert isinstance(value, int | ShapeExpr)
        self.value = value_of(value)


class SymIntExprs:
    @classmethod
    def from_tuple(cls, numbers: list[SymInt32]) -> SymIntExprs:
        assert all(type(number) is SymInt32 for number in numbers)
        made = cls()
        made.numbers = [number.value for number in numbers]
        return made


class KernelLaunchParams:
    grid_x: Any = 1
    grid_y: Any = 1
    grid_z: Any = 1
    block_x: Any = 1
    shared_mem: Any = 0


@dataclass
class Shape:
    """What autotuning sees of a shape that varies."""

    max: tuple[int, ...]
    is_dynamic: bool = True


@dataclass
class TensorDesc:
    shape_expr: tuple[Any, ...]
    dtype: str = ""
    most: tuple[int, ...] | None = None

    @property
    def has_shape(self) -> bool:
        return self.most is not None

    @property
    def shape(self) -> Shape:
        assert self.most is not None
        return Shape(self.most)


@dataclass
class AutoTuneCombination:
    types: str
    formats: str
    tactics: list[int]


@dataclass
class Registered:
    """What was registered for one plug-in."""

    register: Any = None
    autotune: Any = None
    aot: Any = None


@dataclass
class TensorRT:
    plugins: dict[str, Registered] = field(default_factory=dict)

    def entry(self, name: str, kind: str) -> Any:
        def keep(function: Any) -> Any:
            if kind == "register":
                signature = inspect.signature(function)
                kinds = {p.annotation for p in signature.parameters.values()}
                assert kinds == {TensorDesc}, "inputs are descriptors, and say so"
                assert signature.return_annotation is not inspect.Signature.empty
                assert name not in self.plugins
            else:
                of = self.plugins[name].register
                names = [*inspect.signature(of).parameters]
                own = [*inspect.signature(function).parameters]
                assert own == [*names, "outputs", *(["tactic"] if kind == "aot" else [])]
            setattr(self.plugins.setdefault(name, Registered()), kind, function)
            return function

        return keep


@contextmanager
def installed() -> Iterator[TensorRT]:
    """`tensorrt` and `tensorrt.plugin` while the block lasts."""
    made = TensorRT()
    trt, plugin = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    for name in DTYPES.values():
        setattr(trt, name, name)
    told = {
        "TensorDesc": TensorDesc,
        "AutoTuneCombination": AutoTuneCombination,
        "KernelLaunchParams": KernelLaunchParams,
        "SymInt32": SymInt32,
        "SymIntExprs": SymIntExprs,
        "from_shape_expr": lambda shape, dtype: TensorDesc(tuple(shape), dtype),
        "register": lambda name: made.entry(name, "register"),
        "autotune": lambda name: made.entry(name, "autotune"),
        "aot_impl": lambda name: made.entry(name, "aot"),
    }
    vars(plugin).update(told)
    vars(trt)["plugin"] = plugin
    before = {name: sys.modules.get(name) for name in ("tensorrt", "tensorrt.plugin")}
    sys.modules.update({"tensorrt": trt, "tensorrt.plugin": plugin})
    try:
        yield made
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
