"""Decode steps on the device at hand: memory steps against PyTorch's dense forms, and captured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.memory import preset
from ..models.memory.spec import Memory
from ..runtime.site_layout import SiteLayout
from .memory_step import Load, MemoryStep, one_site
from .rules import CACHES, TURN_SECONDS, Contender, measure

DTYPES = (torch.bfloat16, torch.float16)
REPLAY_CALLS = 16  # at least, in one captured graph: then its launch hardly counts
COPY_BYTES = 4 << 30


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
    release(where)
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


def release(where: Place) -> None:
    """Gives memory that no tensor holds back to the device."""
    if where.device.type == "cuda":
        torch.cuda.empty_cache()
