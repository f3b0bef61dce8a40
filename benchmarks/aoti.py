"""One token through an exported AOTInductor package, beside the engine it was exported from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import compile as compile_model
from .. import export
from ..runtime import huge_pages
from ..runtime.engine import Engine
from . import bandwidth
from .decode import LLAMA, SMALL, llama, ours, weight_bytes
from .registry import Column, Outcome, Settings, figure
from .rules import Bar, Contender, measure

CONTEXTS = (8192, 32768, 131072)
# Attention as wide as an 8B model's, little else: what the two differ in is not hidden by weights.
WIDE = {
    **LLAMA,
    "hidden_size": 512,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1 << 18,
}
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "scout": {"budget": 2048, "dense_layers": 0},
    "window": {},
}
TOKENS = 16  # that are decoded in turn: each asks for other pages
MOST = 1.05


def run(settings: Settings) -> Outcome:
    config = SMALL if settings.quick else WIDE
    contexts = settings.contexts or ((256,) if settings.quick else CONTEXTS)
    policies = {name: dict(options) for name, options in POLICIES.items()}
    if settings.quick:
        policies = {"scout": {"budget": 64, "sinks": 16, "window": 16, "page_size": 16}}
        policies["scout"]["dense_layers"] = 0
    if settings.kernels == "reference":
        return Outcome([], COLUMNS, bars([]), left_out=["aoti: a package needs the kernels"])
    model = llama(config)
    weights = weight_bytes(model)
    probes = bandwidth.probes(settings.cache)
    rows = []
    for name, options in policies.items():
        options = {**options, "max_context": max(contexts), "check": False}
        engine = compile_model(model, name, kernels="required", **options)
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            export(model, out, ["aoti"], name, kernels="off", **options)
            package = load(out / "aoti")
            contract = json.loads((out / "aoti" / "state.json").read_text(encoding="utf-8"))
            rows += [
                at_context(engine, contract, package, name, tokens, weights, settings, probes)
                for tokens in contexts
            ]
    return Outcome(rows, COLUMNS, bars(rows), {"llama": config, "policies": policies})


def load(folder: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """The package in a folder, as a runtime has it: without a tree of arguments."""
    torch.ops.load_library(folder / "libmemcompile_engine.so")
    model = torch._inductor.aoti_load_package(str(folder / "engine.pt2"))
    run: Callable[[list[Tensor]], list[Tensor]] = model.loader.run
    return run


def at_context(
    engine: Engine,
    contract: dict[str, Any],
    package: Callable[[list[Tensor]], list[Tensor]],
    name: str,
    tokens: int,
    weights: int,
    settings: Settings,
    probes: list[Contender],
) -> dict[str, Any]:
    """Both at one context."""
    mine, held = ours(engine, "engine", tokens, weights)
    asked = [torch.full((1, 1), 7 * i % contract["vocabulary"]) for i in range(TOKENS)]
    one = torch.ones(1, dtype=torch.int32)
    first = [
        torch.full((1,), tokens - 1, dtype=torch.int32),
        *([one] if contract["lengths"] else []),
    ]
    state = memory(contract, tokens)
    contenders = [
        Contender("engine", lambda i: held(asked[i]), TOKENS, mine.floor, lambda _: held.rewind(1)),
        Contender("package", lambda i: package([asked[i], *first, *state]), TOKENS, mine.floor),
    ]
    timings = measure([*contenders, *probes], settings.rounds)
    speed = bandwidth.bandwidths(timings, {probe.name: probe.floor for probe in probes})
    held.reset()
    medians = {each.name: timings[each.name].median for each in contenders}
    return {
        "policy": name,
        "context": tokens,
        "bandwidth": {kind: figure(value / 1e9) for kind, value in speed.items()},
        "floor_bytes": mine.floor,
        "timings": {each.name: timings[each.name].to_json() for each in contenders},
        "ms": {each: 1e3 * seconds for each, seconds in medians.items()},
        "times_engine": medians["package"] / medians["engine"],
        "bandwidth_share": mine.floor / medians["package"] / max(speed.values()),
    }


def memory(contract: dict[str, Any], tokens: int) -> list[Tensor]:
    """State of random tokens for one sequence, from memory as an engine's: 2 MB pages."""
    made = []
    for tensor in contract["state"]:
        shape = [*tensor["shape"]]
        if tensor["grows"] is not None:
            multiple = contract["capacity"]["multiple"]
            room = -(-tokens // multiple) * multiple
            shape[tensor["grows"]["axis"]] = room // tensor["grows"]["tokens"]
        dtype = getattr(torch, tensor["dtype"])
        made.append(huge_pages.zeros(tuple(shape), dtype, torch.device("cpu")).normal_().abs_())
    return made


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What is asked of a package: that an export costs nothing."""
    at = {(row["policy"], row["context"]): row["times_engine"] for row in rows}
    asked = [(name, tokens) for name in POLICIES for tokens in CONTEXTS]
    return [
        Bar(f"{name} package × engine at {tokens}", at.get((name, tokens)), MOST, at_least=False)
        for name, tokens in asked
    ]


COLUMNS = (
    Column("policy", lambda row: row["policy"]),
    Column("context", lambda row: f"{row['context']}"),
    Column("read GB/s", lambda row: " / ".join(f"{v:.0f}" for v in row["bandwidth"].values())),
    Column("engine ms", lambda row: f"{row['ms']['engine']:.3f}"),
    Column("package ms", lambda row: f"{row['ms']['package']:.3f}"),
    Column("× engine", lambda row: f"{row['times_engine']:.3f}"),
    Column("% bw", lambda row: f"{100 * row['bandwidth_share']:.0f}"),
)
