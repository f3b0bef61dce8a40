"""`memcompile bench`: the time of a decode step through a policy, beside the dense read of it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.memory import preset
from ..runtime.engine import Engine
from ..runtime.filling import fill
from .bench_result import FILLS, OTHER, SAME, Bench, Point, Seconds
from .package import Package, read
from .progress import doing
from .report import bytes_of, size_of
from .settings import kernels as kernels_setting

CONTEXTS = (1024, 4096, 16384, 65536)
_WARM = 2
# Of the memory that is free, so that a measurement never sends the machine to its swap.
_SHARE = 2


@dataclass(frozen=True)
class Given:
    """What the command line said, beside the folder.

    Attributes:
        contexts: tokens before and with the one that a step writes; None: those of `CONTEXTS` that
            the model and the machine's memory have room for.
        rounds: steps that are timed at a context, policy and dense in turn.
        prefill: tokens of a prefill of an empty memory.
        fill: a key of `FILLS`.
    """

    contexts: tuple[int, ...] | None = None
    rounds: int = 15
    prefill: int = 512
    fill: str = "random"
    seed: int = 0
    kernels: str | None = None

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise ValueError(f"fill {self.fill!r}; known: {', '.join(FILLS)}")
        least = self.rounds + _WARM + 1
        for context in self.contexts or ():
            if context < least:
                raise ValueError(
                    f"a context of {context} tokens has no room for {_WARM} steps to warm up and "
                    f"{self.rounds} to time; give at least {least}, or fewer rounds"
                )


def measure(folder: Path, given: Given, command: str) -> Bench:
    """Times decode steps of the engine in `folder`.

    A step is one token of one sequence: the whole model. Steps through the policy and dense ones
    alternate, so that what disturbs the machine meets both.

    Args:
        command: what was typed.

    Raises:
        FileNotFoundError, ValueError: the folder cannot be opened, or a context is given for which
            the model or the machine has no room.
    """
    package = read(folder)
    with doing("compile"):
        ours = _engine(package, package.preset, given.kernels)
    layouts = ours._program.layouts
    exact = all(layout.memory.exact for layout in layouts)
    theirs = ours.fork()
    if not exact:
        plain = preset("dense", page_size=layouts[0].memory.page_size)
        with doing("compile dense"):
            theirs = _engine(package, plain, given.kernels)
    contexts, notes = _contexts(given, ours, theirs)
    tokens = min(given.prefill, ours.limit or given.prefill)
    with doing(f"prefill of {tokens} tokens"):
        prefill = _prefill(ours, tokens, given.seed)
    points = []
    for context in contexts:
        with doing(f"steps at {size_of(context)} tokens"):
            points.append(_measure_at(ours, theirs, context, given))
    weights = [*package.captured.program.state_dict.values()]
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    cache = _last_cache()
    largest = max(point.policy_bytes for point in points) + weight_bytes
    if ours._program.device.type == "cpu" and largest < 4 * cache:
        notes.append(
            f"a step of the policy goes over {bytes_of(largest)} of weights and memory, under four "
            f"times the last-level cache of {bytes_of(cache)}: some of it may come from there, "
            "where a larger model's does not"
        )
    return Bench(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
        model=package.captured.name,
        policy=package.preset.to_json()["preset"],
        device=str(ours._program.device),
        processor=_processor(ours._program.device),
        threads=torch.get_num_threads(),
        cache_bytes=cache,
        memcompile=__version__,
        torch=torch.__version__,
        kernels=kernels_setting(given.kernels),
        fill=FILLS[given.fill],
        baseline=SAME if exact else OTHER,
        weight_bytes=weight_bytes,
        rounds=given.rounds,
        prefill_tokens=tokens,
        prefill=prefill,
        points=points,
        notes=notes,
    )


def _engine(package: Package, chosen: Any, kernels: str | None) -> Engine:
    from .pipeline import build_captured

    compiled = build_captured(
        package.captured,
        chosen,
        max_context=package.max_context,
        check=False,  # checked when it was compiled
        kernels=kernels,
    )
    return compiled.engine()


def _contexts(given: Given, ours: Engine, theirs: Engine) -> tuple[tuple[int, ...], list[str]]:
    """The contexts to measure, and what was left out of those that nobody asked for.

    Raises:
        ValueError: a context was asked for that there is no room for.
    """
    free = _free_bytes(ours._program.device)
    chosen, notes = [], []
    for context in given.contexts or CONTEXTS:
        why = ""
        held = sum(
            layout.held_bytes(context)
            for engine in (ours, theirs)
            for layout in engine._program.layouts
        )
        if ours.limit is not None and context > ours.limit:
            why = f"the model's context is {ours.limit} ({ours._program.limited_by})"
        elif free is not None and held * _SHARE > free:
            why = (
                f"the two memories would take {bytes_of(held)}, more than half of the "
                f"{bytes_of(free)} that are free"
            )
        if why and given.contexts is not None:
            raise ValueError(f"--contexts {context}: {why}; give a shorter one")
        if why:
            notes.append(f"{size_of(context)} tokens were not measured: {why}")
        else:
            chosen.append(context)
    if not chosen:
        raise ValueError(f"nothing to measure: {notes[0]}; give shorter --contexts")
    return tuple(sorted({*chosen})), notes


def _prefill(engine: Engine, tokens: int, seed: int) -> Seconds:
    runs = []
    for run in range(4):  # the first warms up
        engine.reset()
        drawn = _tokens(engine, tokens, seed + run)
        runs.append(_timed(engine, lambda drawn=drawn: engine.prefill(drawn)))  # type: ignore[misc]
    engine.reset()
    return Seconds.of(runs[1:])


def _measure_at(ours: Engine, theirs: Engine, context: int, given: Given) -> Point:
    """Both read one token after the other; the last one stands at the end of `context`."""
    before = context - given.rounds - _WARM
    if given.fill == "random":
        fill(ours, before, policy=True, seed=given.seed)
        fill(theirs, before, policy=False, seed=given.seed)
    else:
        drawn = _tokens(ours, before, given.seed)
        for engine in (ours, theirs):
            engine.reset()
            engine.prefill(drawn)
    runs: dict[str, list[float]] = {"policy": [], "dense": []}
    calls: dict[str, Callable[[torch.Tensor], Any]] = {"policy": ours, "dense": theirs.prefill}
    started = {}
    tokens = _tokens(ours, given.rounds + _WARM, given.seed + 1).split(1, 1)
    for number, token in enumerate(tokens):
        if number == _WARM:
            started = {"policy": ours.stats().bytes_read, "dense": theirs.stats().bytes_read}
        # Each goes first as often as the other.
        for name in sorted(calls, reverse=bool(number % 2)):
            call = calls[name]
            took = _timed(ours, lambda call=call, token=token: call(token))  # type: ignore[misc]
            if number >= _WARM:
                runs[name].append(took)
    point = Point(
        context,
        Seconds.of(runs["policy"]),
        Seconds.of(runs["dense"]),
        (ours.stats().bytes_read - started["policy"]) / given.rounds,
        (theirs.stats().bytes_read - started["dense"]) / given.rounds,
        ours.stats().resident_bytes,
    )
    for engine in (ours, theirs):
        engine.reset()
    return point


def _timed(engine: Engine, call: Callable[[], Any]) -> float:
    """Seconds that a call takes, the device's work included."""
    device = engine._program.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _tokens(engine: Engine, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(engine._program.vocabulary, (1, count), generator=generator)
    return drawn.to(engine._program.device)


def _free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _last_cache() -> int:
    """Bytes of the processor's last-level cache; 0 where the system does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG])\s*", _text(str(path)))
        sizes += [int(found[1]) * units[found[2]]] if found else []
    return max(sizes)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
