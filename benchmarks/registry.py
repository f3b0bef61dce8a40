"""What a benchmark is, what it may be told, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .rules import Bar, last_level_cache

KERNELS = ("generated", "reference")
QUICK_CACHE = 128 << 10


@dataclass(frozen=True)
class Settings:
    """What the command line sets.

    Attributes:
        quick: small sizes, seconds in all: shows that it runs, proves no figure.
        contexts: lengths to measure at; None: the benchmark's own.
        rounds: turns of each contender.
        kernels: "generated", or "reference" for the operations without kernels.
        min_context: of scout; None: its budget.
    """

    quick: bool = False
    contexts: tuple[int, ...] | None = None
    rounds: int = 9
    kernels: str = "generated"
    min_context: int | None = None

    @property
    def cache(self) -> int:
        """Bytes of the cache to rotate past; a pretended one where no figure is to be proven."""
        return QUICK_CACHE if self.quick else last_level_cache()

    def load(self) -> Any:
        """Gives the C++ kernel of each spec; None: the references run."""
        if self.kernels == "reference":
            return None
        from .. import codegen

        return lambda specs: codegen.load(specs, "cpu")


@dataclass(frozen=True)
class Column:
    """One column of a benchmark's table."""

    head: str
    text: Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Outcome:
    """What a benchmark measured: rows of figures, how to show them, and the bars they are held to.

    Attributes:
        setting: sizes and options that the figures hold for.
        left_out: what was asked for and not measured, with the reason.
    """

    rows: list[dict[str, Any]]
    columns: tuple[Column, ...]
    bars: list[Bar]
    setting: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Benchmark:
    """A named measurement; `run` is imported when it is asked for."""

    name: str
    what: str
    run: Callable[[Settings], Outcome]


def figure(value: float) -> float:
    """A figure to four digits: more would claim what no timing knows."""
    return float(f"{value:.4g}")


def _attention_step(settings: Settings) -> Outcome:
    from .attention_step import run

    return run(settings)


def _memories(settings: Settings) -> Outcome:
    from .memories import run

    return run(settings)


def _linear(settings: Settings) -> Outcome:
    from .linear import run

    return run(settings)


def _state(settings: Settings) -> Outcome:
    from .state import run

    return run(settings)


def _decode(settings: Settings) -> Outcome:
    from .decode import run

    return run(settings)


def _backend(settings: Settings) -> Outcome:
    from .backend import run

    return run(settings)


def _compile_time(settings: Settings) -> Outcome:
    from .compile_time import run

    return run(settings)


def _onnx(settings: Settings) -> Outcome:
    from .onnx import run

    return run(settings)


def _aoti(settings: Settings) -> Outcome:
    from .aoti import run

    return run(settings)


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("attention-step", "one decode step of attention, by context", _attention_step),
        Benchmark("memories", "one decode step under every memory, and its room", _memories),
        Benchmark("state", "a fixed-size state: steps, a layer by context, prefill", _state),
        Benchmark("linear", "one token through 16-bit linear layers", _linear),
        Benchmark("decode", "one token through a 32-layer Llama, by context", _decode),
        Benchmark("backend", "the same through torch.compile over a StaticCache", _backend),
        Benchmark("aoti", "one token through an AOTInductor package and its engine", _aoti),
        Benchmark("onnx", "one decode step of attention under onnxruntime", _onnx),
        Benchmark("compile-time", "module to running engine, 32 layers", _compile_time),
    )
}


def find(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ValueError: there is none; the known ones are listed.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
