"""One token through a whole Llama: dense and scout engines against transformers' StaticCache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import compile as compile_model
from ..models.memory.traffic import bytes_read
from ..runtime.engine import Engine
from ..runtime.memory_state import MemoryState
from . import bandwidth
from .memory_step import fill
from .registry import Column, Outcome, Settings, figure
from .rules import Bar, Contender, measure, near_the_best

CONTEXTS = (2048, 8192, 32768)
LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 1 << 17,
    "tie_word_embeddings": False,
}
SMALL = {
    **LLAMA,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}
# Random keys leave nothing to find: the policy's speed is measured here, its quality elsewhere.
POLICIES: dict[str, dict[str, Any]] = {"dense": {}, "scout": {"budget": 2048, "dense_layers": 2}}
TOKEN = 3  # is decoded over and over


def llama(config: dict[str, Any], attention: str = "sdpa") -> nn.Module:
    """A transformers Llama with random bfloat16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        given = LlamaConfig(**config, attn_implementation=attention)
        meta = LlamaForCausalLM(given).to(torch.bfloat16)
    model: nn.Module = meta.to_empty(device="cpu").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("norm.weight"):
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.02)
    # What is computed, not learned: lost with the meta device.
    inner: Any = model.model
    inner.rotary_emb = type(inner.rotary_emb)(config=given)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that one token reads: all but the table of embeddings."""
    table = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(p.nbytes for p in model.parameters() if id(p) not in table)


# --- transformers ---


@dataclass
class Static:
    """transformers' own step over a StaticCache that holds `tokens` - 1 random tokens."""

    forward: Callable[..., Any]
    cache: Any
    tokens: int

    def rewind(self, _: int = 0) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.tokens - 1)

    def step(self, _: int = 0) -> Tensor:
        asked = torch.full((1, 1), TOKEN)
        position = torch.tensor([[self.tokens - 1]])
        logits: Tensor = self.forward(
            input_ids=asked, position_ids=position, past_key_values=self.cache, use_cache=True
        ).logits
        return logits


def static_cache(model: nn.Module, tokens: int) -> Any:
    """A StaticCache of exactly `tokens` tokens, random but for the last."""
    from transformers import StaticCache

    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=tokens)
    heads, dim = config.num_key_value_heads, config.head_dim
    for layer in cache.layers:
        empty = torch.empty(1, heads, 0, dim, dtype=torch.bfloat16)
        layer.lazy_initialization(empty, empty)
        for held in (layer.keys, layer.values):
            held.normal_()
    return cache


def baselines(
    models: dict[str, nn.Module], tokens: int, floor: int, compiled: bool
) -> list[Contender]:
    """Eager steps with each attention, and the compiled one."""
    found = []
    forwards: list[tuple[str, nn.Module, Callable[..., Any]]]
    forwards = [(f"eager, {name}", model, model.forward) for name, model in models.items()]
    if compiled:
        # For this length alone: a graph for any length would be the slower one.
        torch._dynamo.reset()
        model = models["sdpa"]
        forwards.append(("compiled, sdpa", model, torch.compile(model.forward, dynamic=False)))
    for name, model, forward in forwards:
        static = Static(forward, static_cache(model, tokens), tokens)
        static.rewind()
        static.step()
        static.rewind()
        found.append(Contender(f"transformers {name}", static.step, 1, floor, static.rewind))
    return found


# --- memcompile ---


def holding(engine: Engine, tokens: int) -> Engine:
    """A copy of an engine without a memory, given one that holds `tokens` random tokens.

    A prefill of that length would take minutes and read the same bytes afterwards. It reaches into
    the engine: `_program` knows the sites, `_state` is the memory that the first call would make.
    """
    other = copy.copy(engine)
    other.reset()
    program = other._program
    other._state = MemoryState(program.layouts, 1, program.device, program.max_context)
    fill(other._state, [tokens])
    return other


def ours(engine: Engine, name: str, tokens: int, weights: int) -> tuple[Contender, Engine]:
    """The engine's step for the last of `tokens` tokens."""
    held = holding(engine, tokens - 1)
    asked = torch.full((1, 1), TOKEN)
    floor = weights + sum(
        bytes_read(layout.memory, layout, tokens - 1, window=layout.window)
        for layout in held._program.layouts
    )
    return Contender(name, lambda _: held(asked), 1, floor, lambda _: held.rewind(1)), held


def run(settings: Settings) -> Outcome:
    config = SMALL if settings.quick else LLAMA
    contexts = settings.contexts or ((64, 256) if settings.quick else CONTEXTS)
    policies = {name: dict(options) for name, options in POLICIES.items()}
    if settings.quick:
        policies["scout"] = {"budget": 64, "sinks": 16, "window": 16, "page_size": 16}
        policies["scout"]["dense_layers"] = 1
    if settings.min_context is not None:
        policies["scout"]["min_context"] = settings.min_context
    models = {"sdpa": llama(config)}
    models["eager"] = llama(config, "eager")
    models["eager"].load_state_dict(models["sdpa"].state_dict(), assign=True)
    kernels = "off" if settings.kernels == "reference" else "required"
    engines = {
        name: compile_model(
            models["sdpa"], name, max_context=max(contexts), kernels=kernels, **options
        )
        for name, options in policies.items()
    }
    probes = bandwidth.probes(settings.cache)
    rows = [at_context(models, engines, tokens, settings, probes) for tokens in contexts]
    return Outcome(rows, COLUMNS, bars(rows), {"llama": config, "policies": policies})


def at_context(
    models: dict[str, nn.Module],
    engines: dict[str, Engine],
    tokens: int,
    settings: Settings,
    probes: list[Contender],
) -> dict[str, Any]:
    """All contenders at one context."""
    weights = weight_bytes(models["sdpa"])
    mine = {name: ours(engine, name, tokens, weights) for name, engine in engines.items()}
    dense = mine["dense"][0].floor
    theirs, behind = near_the_best(baselines(models, tokens, dense, compiled=not settings.quick))
    contenders = [*(contender for contender, _ in mine.values()), *theirs, *probes]
    timings = measure(contenders, settings.rounds)
    speed = bandwidth.bandwidths(timings, {probe.name: probe.floor for probe in probes})
    best = min(theirs, key=lambda contender: timings[contender.name].median)
    row: dict[str, Any] = {
        "context": tokens,
        "bandwidth": {kind: figure(value / 1e9) for kind, value in speed.items()},
        "weight_bytes": weights,
        "baseline": best.name,
        "far_behind_ms": {name: 1e3 * seconds for name, seconds in behind.items()},
        "baseline_ms": 1e3 * timings[best.name].median,
        "timings": {
            contender.name: timings[contender.name].to_json() | {"floor_bytes": contender.floor}
            for contender in contenders
        },
    }
    for name, (contender, engine) in mine.items():
        median = timings[name].median
        engine.reset()  # the memory goes before the next context's is made
        row[name] = {
            **timings[name].to_json(),
            "tokens_a_second": 1 / median,
            "floor_bytes": contender.floor,
            "bandwidth_share": contender.floor / median / max(speed.values()),
            "times_baseline": timings[best.name].median / median,
        }
    return row


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What issue 3 asks of a whole step."""
    at = {row["context"]: row for row in rows}
    asked = (("dense", 2048, 1.0), ("dense", 32768, 1.5), ("scout", 32768, 2.5))
    return [
        Bar(
            f"{name} engine × transformers at {tokens}",
            at[tokens][name]["times_baseline"] if tokens in at else None,
            bound,
        )
        for name, tokens, bound in asked
    ]


def _columns(name: str) -> tuple[Column, ...]:
    return (
        Column(f"{name} ms", lambda row: f"{row[name]['ms']:.2f}"),
        Column("tokens/s", lambda row: f"{row[name]['tokens_a_second']:.1f}"),
        Column("×", lambda row: f"{row[name]['times_baseline']:.2f}"),
        Column("% bw", lambda row: f"{100 * row[name]['bandwidth_share']:.0f}"),
    )


COLUMNS = (
    Column("context", lambda row: f"{row['context']}"),
    Column("read GB/s", lambda row: " / ".join(f"{v:.0f}" for v in row["bandwidth"].values())),
    Column("baseline", lambda row: row["baseline"]),
    Column("ms", lambda row: f"{row['baseline_ms']:.1f}"),
    *_columns("dense"),
    *_columns("scout"),
)
