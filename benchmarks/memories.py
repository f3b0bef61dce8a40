"""One decode step of attention under every memory, as an engine runs it, and what is resident."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import compile as compile_model
from ..models.memory.traffic import bytes_read, state_bytes
from ..runtime.engine import Program
from ..runtime.memory_state import MemoryState
from . import bandwidth
from .attention_step import Shape, baselines
from .memory_step import fill
from .registry import Column, Outcome, Settings, figure
from .rules import Bar, Contender, measure, near_the_best, states_for

CONTEXTS = (8192, 32768, 131072)
PIECE = 512  # tokens that an engine reads at a time
# Counted, not run: what hierarchical reads of contexts that no machine here holds many times.
COUNTED = tuple(1024 << i for i in range(3, 10))
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "scout": ("scout", {"budget": 1408, "dense_layers": 0}),
    "hierarchical": ("hierarchical", {"dense_layers": 0}),
    "summaries": ("hierarchical", {"refine": 0, "keep": False, "dense_layers": 0}),
    "window": ("window", {"window": 1280, "sinks": 64}),
    "heavy-hitter": ("heavy-hitter", {"budget": 1408, "dense_layers": 0}),
    "quest": ("quest", {"budget": 1408, "dense_layers": 0}),
    "state": ("hybrid", {"state_layers": (0,), "features": 64}),
}
SMALL: dict[str, dict[str, Any]] = {
    "scout": {"budget": 64, "page_size": 8, "sinks": 8, "window": 16},
    "hierarchical": {"refine": 32, "levels": (8, 32), "sinks": 8, "window": 16},
    "summaries": {"levels": (8, 32), "sinks": 8, "window": 16},
    "window": {"window": 32, "sinks": 8, "page_size": 8},
    "heavy-hitter": {"budget": 64, "page_size": 8, "sinks": 8, "window": 16},
    "quest": {"budget": 64, "page_size": 8},
    "state": {"window": 16, "page_size": 8, "features": 16},
}


class OneAttention(nn.Module):
    """Attention alone: a token's query, keys and values are rows of a table."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.table = nn.Embedding(64, (shape.heads + 2 * shape.kv_heads) * shape.dim)
        self.to(shape.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, n] -> [B, n, heads * dim]."""
        shape = self.shape
        rows = self.table(tokens).unflatten(-1, (-1, shape.dim)).transpose(1, 2)
        query, key, value = rows.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


@dataclass
class Held:
    """A memory at one context, many times over: more than the last-level cache holds."""

    name: str
    program: Program
    states: list[list[Tensor]]
    position: Tensor
    floor: int
    resident: int
    before: int
    states_bytes: int

    @property
    def contender(self) -> Contender:
        token, one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
        run, states, at = self.program.policy, self.states, self.position
        return Contender(
            self.name, lambda i: run(token, at, one, *states[i]), len(states), self.floor
        )


def program_of(name: str, shape: Shape, settings: Settings) -> Program:
    """What an engine of OneAttention runs under the policy of that name."""
    policy, options = POLICIES[name]
    options = options | (SMALL.get(name, {}) if settings.quick else {})
    kernels = "required" if settings.kernels == "generated" else "off"
    model = OneAttention(shape).eval()
    return compile_model(model, policy=policy, kernels=kernels, check=False, **options)._program


def held(name: str, program: Program, shape: Shape, tokens: int, cache: int) -> Held:
    """The memory after `tokens` - 1 tokens that were read densely, about to write the last."""
    (layout,) = program.layouts
    memory, position = layout.memory, tokens - 1
    floor = bytes_read(memory, layout, position) + state_bytes(memory, layout)  # it is written too
    states, resident, before = [], 0, 0
    for seed in range(states_for(floor, cache)):
        state = MemoryState(program.layouts, 1, "cpu")
        left = position
        while memory.state is not None and left > PIECE:  # only its window is ever there
            state.reserve([PIECE])
            state.advance([PIECE])
            left -= PIECE
        fill(state, [left], seed)
        before = state.memory_bytes()
        state.reserve([1], policy=True)
        resident = state.memory_bytes()
        states.append(state.tensors())
    at = torch.tensor([position], dtype=torch.int32)
    return Held(name, program, states, at, floor, resident, before, state_bytes(memory, layout))


def run(settings: Settings) -> Outcome:
    shape = Shape(8, 2, 64, 8) if settings.quick else Shape()
    contexts = settings.contexts or ((128, 512) if settings.quick else CONTEXTS)
    programs = {name: program_of(name, shape, settings) for name in POLICIES}
    probes = bandwidth.probes(settings.cache)
    rows = [at_context(shape, tokens, programs, settings, probes) for tokens in contexts]
    (layout,) = programs["hierarchical"].layouts
    counted = {n: bytes_read(layout.memory, layout, n - 1) for n in COUNTED}
    return Outcome(
        rows,
        COLUMNS,
        bars(rows, counted),
        {
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "dim": shape.dim,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "policies": {n: {"policy": p, **o} for n, (p, o) in POLICIES.items()},
            "hierarchical_bytes_a_step": counted,
        },
    )


def at_context(
    shape: Shape,
    tokens: int,
    programs: dict[str, Program],
    settings: Settings,
    probes: list[Contender],
) -> dict[str, Any]:
    """Every memory at one context, a few at a time, each time beside the best dense form."""
    theirs, _ = near_the_best(baselines(shape, tokens, settings.cache))
    row: dict[str, Any] = {"context": tokens, "memories": {}}
    for name, program in programs.items():
        mine = held(name, program, shape, tokens, settings.cache)
        timings = measure([mine.contender, *theirs, *probes], settings.rounds)
        speed = max(
            bandwidth.bandwidths(timings, {probe.name: probe.floor for probe in probes}).values()
        )
        best = min(theirs, key=lambda contender: timings[contender.name].median).name
        low, median, high = timings[name].quartiles
        row["memories"][name] = {
            "ms": 1e3 * median,
            "ms_quartiles": [1e3 * low, 1e3 * high],
            "states": len(mine.states),
            "bytes_a_step": mine.floor,
            "times_floor": median * speed / mine.floor,
            "baseline": best,
            "baseline_ms": 1e3 * timings[best].median,
            "times_baseline": timings[best].median / median,
            "bandwidth": figure(speed / 1e9),
            "resident_bytes": mine.resident,
            "resident_bytes_before_eviction": mine.before,
            "state_bytes": mine.states_bytes,
        }
        del mine  # two memories of this length, many times over, are more than a machine may hold
    return row


def bars(rows: list[dict[str, Any]], counted: dict[int, int]) -> list[Bar]:
    """What issue 5 asks of the memories, on what was measured."""
    at = {row["context"]: row["memories"] for row in rows}

    def value(tokens: int, name: str, figure: str) -> float | None:
        found: float | None = at[tokens][name][figure] if tokens in at else None
        return found

    first, last = min(counted), max(counted)
    found = [
        Bar(
            "hierarchical × baseline at 131072", value(131072, "hierarchical", "times_baseline"), 40
        ),
        Bar(
            f"hierarchical, bytes at {last} ÷ bytes at {first} ({last // first} × the context)",
            counted[last] / counted[first],
            last / first / 8,
            at_least=False,
        ),
    ]
    for name in ("summaries", "window", "heavy-hitter"):
        kept = value(131072, name, "resident_bytes")
        dense = value(131072, "dense", "resident_bytes")
        part = None if kept is None or dense is None else kept / dense
        found.append(Bar(f"{name}, resident ÷ dense at 131072", part, 1 / 16, at_least=False))
    grown = [value(n, "state", "ms") for n in (8192, 131072)]
    ratio = None if None in grown else grown[1] / grown[0]  # type: ignore[operator]
    found.append(Bar("state, ms at 131072 ÷ ms at 8192", ratio, 1.25, at_least=False))
    return found


def _each(form: Any) -> Any:
    return lambda row: "\n".join(form(name, found) for name, found in row["memories"].items())


COLUMNS = (
    Column("context", lambda row: f"{row['context']}"),
    Column("memory", _each(lambda name, found: name)),
    Column("ms", _each(lambda name, found: f"{found['ms']:.3f}")),
    Column("× baseline", _each(lambda name, found: f"{found['times_baseline']:.1f}")),
    Column("KiB a step", _each(lambda name, found: f"{found['bytes_a_step'] / 1024:.0f}")),
    Column("× floor", _each(lambda name, found: f"{found['times_floor']:.2f}")),
    Column("resident MiB", _each(lambda name, found: f"{found['resident_bytes'] / 2**20:.2f}")),
    Column("state KiB", _each(lambda name, found: f"{found['state_bytes'] / 1024:.0f}")),
)
