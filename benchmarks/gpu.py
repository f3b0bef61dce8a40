"""`python -m memcompile.benchmarks.gpu`: what the generated kernels do on the GPU that is there.

First every kernel against float64, then decode steps against PyTorch's and captured in a graph,
until the time is spent; what was left out is said. Needs torch, triton and numpy.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.memory import preset
from ..models.memory.spec import Memory
from ..runtime.memory_state import SiteLayout
from . import results
from .gpu_numerics import CASES, TINY, Case, check
from .memory_step import Load, MemoryStep, one_site
from .rules import CACHES, TURN_SECONDS, Contender, last_level_cache, measure

MINUTES = 7.0
NUMERICS_SHARE = 0.45  # of the time, before the first figure of speed is due
DTYPES = (torch.bfloat16, torch.float16)
BATCHES = (1, 8, 32)
CONTEXTS = (8192, 32768, 131072)
SCOUT = {"budget": 2048, "sinks": 64, "window": 256, "compensate": True, "dense_layers": 0}
REPLAY_CALLS = 16  # at least, in one captured graph: then its launch hardly counts
COPY_BYTES = 4 << 30
DRY_CACHE = 4 << 10
DRY_KERNELS = ("reference", "cpp", "triton")


@dataclass
class Clock:
    """The time there is, and what it did not suffice for."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    skipped: list[str] = field(default_factory=list)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.started

    def allows(self, what: str, need: float, share: float = 1.0) -> bool:
        """Whether `need` more seconds fit into that share of the time; keeps what was refused."""
        if self.spent + need <= share * self.seconds:
            return True
        self.skipped.append(f"{what}: {self.spent:.0f} of {share * self.seconds:.0f} s were spent")
        return False


@dataclass(frozen=True)
class Place:
    """Where it runs, and with what.

    Attributes:
        load: gives the kernel of each spec; None: the references.
        cache: bytes to rotate past.
        verified: whether the figures are a GPU's.
        dtypes: element types to check; the first is the one that is timed.
    """

    device: torch.device
    load: Load | None
    cache: int
    verified: bool
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, width."""
        return (32, 8, 128) if self.verified else (4, 2, 16)


def gpu_place() -> Place:
    """The GPU with its Triton kernels.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU was found; --dry runs the same lines on the CPU, at small sizes")
    from .. import codegen

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", 0) or last_level_cache()
    return Place(device, partial(codegen.load, device="cuda"), cache, verified=True)


def dry_place(kernels: str) -> Place:
    """The CPU at small sizes, with one of DRY_KERNELS."""
    device = torch.device("cpu")
    if kernels == "cpp":
        from .. import codegen

        load: Load = partial(codegen.load, device="cpu")
        return Place(device, load, DRY_CACHE, verified=False)
    if kernels == "triton":
        # Read when triton is imported. Products of bfloat16 are wrong in its interpreter.
        os.environ["TRITON_INTERPRET"] = "1"
        from ..codegen import triton

        return Place(device, triton.load, DRY_CACHE, verified=False, dtypes=(torch.float16,))
    return Place(device, None, DRY_CACHE, verified=False)


# --- timing ---


class Captured(Contender):
    """A contender whose calls over all states were captured in one graph; times one call.

    Without a graph, on the CPU or where capture is refused, the calls are launched one by one.
    """

    def __init__(self, plain: Contender, device: torch.device, graph: bool = True) -> None:
        super().__init__(plain.name, plain.call, plain.states, plain.floor)
        self.device = device
        least = REPLAY_CALLS if device.type == "cuda" else 1
        self.calls = -(-least // plain.states) * plain.states
        self.graph: Any = None
        self.refused: str | None = None
        for state in range(plain.states):
            plain.call(state)  # compiles, and decides what is tuned at a first call
        if device.type == "cuda" and graph:
            try:
                self.capture()
            except RuntimeError as reason:
                self.refused = str(reason).splitlines()[0]
                torch.cuda.synchronize()

    def all_states(self) -> None:
        for i in range(self.calls):
            self.call(i % self.states)

    def capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.all_states()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.all_states()
        self.graph = graph

    def step(self, clock: Callable[[], float] = time.perf_counter) -> float:
        run = self.all_states if self.graph is None else self.graph.replay
        if self.device.type != "cuda":
            started = clock()
            run()
            return (clock() - started) / self.calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end)) / self.calls


def microseconds(contenders: Sequence[Captured], rounds: int) -> dict[str, float]:
    """Median microseconds of a call, contenders in turns."""
    # What a contender tells is one call's time, a part of the replay's.
    timings = measure(contenders, rounds, turn_seconds=TURN_SECONDS / REPLAY_CALLS)
    return {name: 1e6 * timing.median for name, timing in timings.items()}


def states_needed(floor: int, cache: int) -> int:
    return CACHES * cache // floor + 1


def bandwidth(where: Place, rounds: int) -> float:
    """Bytes a second of a large copy, read and write counted: the ceiling."""
    size = COPY_BYTES if where.verified else 1 << 20
    source = torch.ones(size, dtype=torch.uint8, device=where.device)
    target = torch.empty_like(source)
    copy = Contender("copy", lambda _: target.copy_(source), 1, 2 * size)
    return 1e6 * copy.floor / microseconds([Captured(copy, where.device)], rounds)["copy"]


# --- decode ---


def sdpa_forms() -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]], bool]]:
    """(name, context that forces the backend, whether the group is folded into the query axis)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        kind = getattr(SDPBackend, backend, None)
        if kind is None:
            continue
        short = backend.removesuffix("_ATTENTION").lower()
        for folded in (False, True):
            name = f"sdpa {short} {'folded' if folded else 'gqa'}"
            yield name, partial(sdpa_kernel, kind), folded


def sdpa(query: Tensor, keys: Tensor, values: Tensor, scale: float, folded: bool) -> Tensor:
    """query [B, H, 1, D] over keys and values [B, Hkv, m, D]."""
    if folded:
        query = query.unflatten(1, (keys.shape[1], -1)).squeeze(3)  # [B, Hkv, G, D]
        return F.scaled_dot_product_attention(query, keys, values, scale=scale)
    return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)


def matmul(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The same by two multiplications."""
    folded = query.unflatten(1, (keys.shape[1], -1)).squeeze(3) * scale
    return torch.softmax(folded @ keys.transpose(-1, -2), -1) @ values


def baselines(
    where: Place, query: Tensor, cache: list[tuple[Tensor, Tensor]], scale: float, flex: bool
) -> tuple[list[Captured], dict[str, str]]:
    """What of PyTorch runs here, captured; and why the others do not."""
    found, refused = [], {}
    size = sum(tensor.nbytes for tensor in cache[0])

    def add(name: str, call: Callable[[int], Any], around: Any = nullcontext) -> None:
        try:
            with around():
                found.append(Captured(Contender(name, call, len(cache), size), where.device))
        except Exception as reason:  # a backend may refuse with anything, compilers too
            refused[name] = f"{type(reason).__name__}: {str(reason).splitlines()[0][:120]}"

    def forced_sdpa(forced: Any, folded: bool, i: int) -> Tensor:
        with forced():
            return sdpa(query, *cache[i], scale, folded)

    for name, forced, folded in sdpa_forms():
        add(name, partial(forced_sdpa, forced, folded))
    add("matmul", lambda i: matmul(query, *cache[i], scale))
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = (
            torch.compile(flex_attention, dynamic=False) if where.verified else flex_attention
        )
        add("flex", lambda i: compiled(query, *cache[i], scale=scale, enable_gqa=True))
    return found, refused


def sample(where: Place, batch: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """query, key, value, position and lengths of one new token a sequence."""
    heads, kv_heads, dim = where.heads
    query, key, value = (
        torch.randn(batch, count, 1, dim, device=where.device, dtype=torch.float32).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    position = torch.full((batch,), tokens - 1, dtype=torch.int32, device=where.device)
    return query, key, value, position, torch.ones_like(position)


@dataclass
class Policies:
    """dense and scout over the same memories: what differs is what they read and index."""

    dense: Contender
    scout: Contender
    scout_parts: dict[str, Contender]


def policies(
    where: Place, batch: int, tokens: int, dtype: torch.dtype, scout: dict[str, Any]
) -> Policies:
    """The steps for the last of `tokens` tokens, as `attention-step` takes them on the CPU."""
    from .attention_step import floor_bytes

    _, kv_heads, dim = where.heads

    def layout(memory: Memory) -> SiteLayout:
        return SiteLayout("site", kv_heads, dim, dim, dtype, memory)

    scouts = layout(preset("scout", **scout).memory(0, 0))
    plain = layout(preset("dense", page_size=scouts.memory.page_size).memory(0, 0))
    floors = [batch * floor_bytes(site.memory, site, tokens - 1) for site in (plain, scouts)]
    count = states_needed(floors[1], where.cache)
    held = [
        one_site(scouts, tokens - 1, seed, batch, where.device).tensors() for seed in range(count)
    ]
    new = sample(where, batch, tokens, dtype)
    scale = 1 / math.sqrt(dim)
    dense = MemoryStep(plain, "dense", new, held[0][:3], where.load, scale)
    policy = MemoryStep(scouts, "policy", new, held[0], where.load, scale)
    parts = [policy.calls(*new, *state) for state in held]

    def part(name: str, i: int) -> Any:
        return parts[i][name]()

    each = {name: Contender(name, partial(part, name), count, floors[1]) for name in parts[0]}
    return Policies(
        Contender("dense", lambda i: dense.run(*new, *held[i][:3]), count, floors[0]),
        Contender("scout", lambda i: policy.run(*new, *held[i]), count, floors[1]),
        each,
    )


def needed_bytes(where: Place, batch: int, tokens: int, scout: dict[str, Any]) -> int:
    """Bytes of the largest part of a decode measurement: pools or baseline, whichever is more."""
    _, kv_heads, dim = where.heads
    cache = 2 * batch * tokens * kv_heads * dim * 2
    read = min(cache, 3 * batch * scout["budget"] * kv_heads * dim * 4)
    return cache * max(states_needed(read, where.cache), states_needed(cache, where.cache))


def decode(
    where: Place,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    scout: dict[str, Any],
    rounds: int,
    ceiling: float,
    flex: bool,
) -> dict[str, Any]:
    """The row of one batch and context."""
    _, kv_heads, dim = where.heads
    row: dict[str, Any] = {"batch": batch, "context": tokens}
    shape = (batch, kv_heads, tokens, dim)
    size = 2 * math.prod(shape) * dtype.itemsize
    query = sample(where, batch, tokens, dtype)[0]
    cache = [
        tuple(torch.randn(shape, device=where.device, dtype=dtype) for _ in "kv")
        for _ in range(states_needed(size, where.cache))
    ]
    theirs, refused = baselines(where, query, cache, 1 / math.sqrt(dim), flex)  # type: ignore[arg-type]
    row["torch_us"] = microseconds(theirs, rounds) if theirs else {}
    row["refused"] = refused
    del cache, theirs
    _free(where)
    ours = policies(where, batch, tokens, dtype, scout)
    eager = Captured(
        Contender("eager", ours.scout.call, ours.scout.states, ours.scout.floor),
        where.device,
        graph=False,
    )
    mine = [Captured(plain, where.device) for plain in (ours.dense, ours.scout)]
    row["captured"] = {plain.name: plain.refused or plain.graph is not None for plain in mine}
    timed = microseconds([*mine, eager], rounds)
    parts = [Captured(part, where.device) for part in ours.scout_parts.values()]
    row["parts_us"] = microseconds(parts, rounds)
    best = min(row["torch_us"], key=row["torch_us"].__getitem__, default=None)
    row["baseline"] = best
    row["score_select_us"] = row["parts_us"]["score_select"]
    row["eager_us"] = timed["eager"]
    for plain in (ours.dense, ours.scout):
        took = timed[plain.name]
        row[plain.name] = {
            "us": took,
            "floor_bytes": plain.floor,
            "bandwidth_share": 1e6 * plain.floor / took / ceiling,
            "times_floor": took * ceiling / plain.floor / 1e6,
            "times_baseline": row["torch_us"][best] / took if best else None,
        }
    return row


def replays(where: Place, dtype: torch.dtype, scout: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Whether a captured scout step follows its inputs: position and query changed in place."""
    _, kv_heads, dim = where.heads
    memory = preset("scout", **scout).memory(0, 0)
    layout = SiteLayout("site", kv_heads, dim, dim, dtype, memory)
    state = one_site(layout, tokens, 0, 2, where.device)
    new = sample(where, 2, tokens + 1, dtype)
    held = state.tensors()
    step = MemoryStep(layout, "policy", new, held, where.load, 1 / math.sqrt(dim))
    first = step.run(*new, *held).clone()
    if where.device.type == "cuda":
        step.run(*new, *held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step.run(*new, *held)

        def again() -> Tensor:
            graph.replay()
            return out
    else:

        def again() -> Tensor:
            return step.run(*new, *held)

    same = torch.equal(again(), first)
    new[0].copy_(torch.randn_like(new[0], dtype=torch.float32).to(dtype))
    new[3].sub_(memory.page_size)  # a page earlier
    replayed = again().clone()
    expected = step.run(*new, *held)
    return {
        "same_inputs_same_output": same,
        "changed_inputs_followed": torch.equal(replayed, expected),
        "output_changed": not torch.equal(replayed, first),
    }


def _free(where: Place) -> None:
    if where.device.type == "cuda":
        torch.cuda.empty_cache()


# --- the whole run ---


def gpu(where: Place) -> dict[str, Any]:
    """The GPU's name, driver, clocks and memory."""
    if where.device.type != "cuda":
        return {"name": "none (dry run on the CPU)"}
    properties = torch.cuda.get_device_properties(where.device)
    found: dict[str, Any] = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "L2_bytes": where.cache,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(where.device))),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        found |= dict(zip(asked.split(","), told.stdout.splitlines()[0].split(", "), strict=True))
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        found["driver_version"] = None
    return found


def numerics(
    where: Place, clock: Clock, cases: Sequence[Case], share: float
) -> tuple[list[dict[str, Any]], list[tuple[Case, torch.dtype]]]:
    """Checks of as many cases as that share of the time allows; and those that remain."""
    done, left = [], []
    for case in cases:
        for dtype in where.dtypes:
            if clock.spent > share * clock.seconds:
                left.append((case, dtype))
                continue
            done.append(one_check(where, case, dtype))
    return done, left


def one_check(where: Place, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """A check's row; a kernel that breaks is a failure, not the end of the run."""
    try:
        return check(case, dtype, where.device, where.load)
    except Exception as reason:  # compilers and drivers raise anything
        return {
            "case": case.name,
            "dtype": str(dtype).removeprefix("torch."),
            "kernel": None,
            "error": None,
            "allowed": None,
            "passed": False,
            "raised": f"{type(reason).__name__}: {str(reason)[:300]}",
        }


def run(where: Place, clock: Clock, rounds: int) -> dict[str, Any]:
    """All sections, most important first."""
    contexts: tuple[int, ...] = CONTEXTS
    batches: tuple[int, ...] = BATCHES
    cases: tuple[Case, ...] = CASES
    scout = dict(SCOUT)
    if not where.verified:
        contexts, batches, cases = (96,), (1, 2), TINY
        scout |= {"budget": 64, "sinks": 8, "window": 8, "page_size": 8}
    left_out = [str(dtype).removeprefix("torch.") for dtype in DTYPES if dtype not in where.dtypes]
    if left_out:
        clock.skipped.append(f"{', '.join(left_out)}: Triton's interpreter multiplies it wrongly")
    checks, left = numerics(where, clock, cases, NUMERICS_SHARE)
    ceiling = bandwidth(where, rounds)
    rows: list[dict[str, Any]] = []
    # The longest of the middle first; batch 1 is where others lose.
    middle = contexts[len(contexts) // 2]
    ordered = sorted(
        ((batch, tokens) for batch in batches for tokens in contexts),
        key=lambda pair: (pair[1] != middle, pair[0]),
    )
    graph: dict[str, Any] = {}
    for at, (batch, tokens) in enumerate(ordered):
        what = f"decode at batch {batch}, context {tokens}"
        if at == 1 and clock.allows("captured step", 5):
            graph = _guarded(partial(replays, where, where.dtypes[0], scout, middle))
        if where.device.type == "cuda":
            free = torch.cuda.mem_get_info(where.device)[0]
            if 1.15 * needed_bytes(where, batch, tokens, scout) > free:
                clock.skipped.append(f"{what}: {free >> 30} GiB of memory are free")
                continue
        if clock.allows(what, 25 if where.verified else 0):
            flex = tokens == middle or clock.spent < 0.7 * clock.seconds
            row = _guarded(
                partial(decode, where, batch, tokens, where.dtypes[0], scout, rounds, ceiling, flex)
            )
            rows.append({"batch": batch, "context": tokens, **row})
            _free(where)
    for case, dtype in left:
        if clock.allows(f"numerics of {case.name} in {dtype}", 5):
            checks.append(one_check(where, case, dtype))
    return {
        "verified": where.verified,
        "gpu": gpu(where),
        "bandwidth": ceiling,
        "scout": scout,
        "numerics": checks,
        "captured_step": graph,
        "decode": rows,
        "skipped": clock.skipped,
        "seconds": clock.spent,
    }


def _guarded(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why not."""
    try:
        return measured()
    except Exception as reason:  # out of memory, a kernel that does not compile: go on
        return {"raised": f"{type(reason).__name__}: {str(reason)[:300]}"}


def table(found: dict[str, Any]) -> str:
    """The run as plain text; figures that are not a GPU's are marked."""
    mark = "" if found["verified"] else " (unverified)"
    lines = [f"{found['gpu']['name']}: copy {found['bandwidth'] / 1e9:.0f} GB/s{mark}"]
    passed = sum(checked["passed"] for checked in found["numerics"])
    lines.append(f"numerics: {passed} of {len(found['numerics'])} within bounds{mark}")
    for checked in found["numerics"]:
        if not checked["passed"]:
            why = checked.get("raised")
            why = why or f"error {checked['error']:.2e} > {checked['allowed']:.2e}"
            lines.append(f"  FAILED {checked['case']} {checked['dtype']}: {why}")
    if found["captured_step"]:
        told = (f"{name} {value}" for name, value in found["captured_step"].items())
        lines.append(f"captured step: {', '.join(told)}{mark}")
    heads = (
        *("batch", "context", "best of PyTorch", "µs", "flex µs", "dense µs", "×", "% bw"),
        *("scout µs", "×", "× floor", "score+select µs", "eager µs"),
    )
    cells = [list(heads)]
    for row in found["decode"]:
        if "raised" in row:
            lines.append(
                f"  FAILED batch {row['batch']}, context {row['context']}: {row['raised']}"
            )
            continue
        us, best = row["torch_us"], row["baseline"]
        cells.append(
            [
                str(row["batch"]),
                str(row["context"]),
                best or "none ran",
                f"{us[best]:.1f}" if best else "-",
                f"{us['flex']:.1f}" if "flex" in us else "-",
                f"{row['dense']['us']:.1f}",
                f"{row['dense']['times_baseline']:.2f}" if best else "-",
                f"{100 * row['dense']['bandwidth_share']:.0f}",
                f"{row['scout']['us']:.1f}",
                f"{row['scout']['times_baseline']:.2f}" if best else "-",
                f"{row['scout']['times_floor']:.2f}",
                f"{row['score_select_us']:.1f}",
                f"{row['eager_us']:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        text = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join(text) + (mark if line is not cells[0] else ""))
    lines += [f"left out: {reason}" for reason in found["skipped"]]
    lines.append(f"{found['seconds']:.0f} s{mark}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m memcompile.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, small: that it runs")
    parser.add_argument(
        "--kernels",
        choices=DRY_KERNELS,
        default=DRY_KERNELS[0],
        help="of a dry run: references, C++, or Triton in its interpreter (float16 alone)",
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of time to spend at most")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="where the result goes")
    given = parser.parse_args(arguments)
    try:
        if given.minutes <= 0 or given.rounds < 1:
            raise RuntimeError("--minutes must be above 0 and --rounds at least 1")
        where = dry_place(given.kernels) if given.dry else gpu_place()
    except RuntimeError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    with torch.no_grad():
        found = run(where, Clock(60 * given.minutes), given.rounds)
    result = results.record("gpu", found.pop("decode"), {"rounds": given.rounds}, [])
    result |= found
    path = results.write(result, given.out, found["gpu"]["name"])
    print(table({**found, "decode": result["rows"]}))
    print(path)
    return 0 if all(checked["passed"] for checked in found["numerics"]) else 1


if __name__ == "__main__":
    sys.exit(main())
