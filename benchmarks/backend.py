"""One token through a whole Llama over a StaticCache: torch.compile's backends and eager."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import graphs
from ..models.memory.traffic import bytes_read
from . import bandwidth
from .decode import LLAMA, POLICIES, SMALL, Static, baselines, llama, static_cache, weight_bytes
from .registry import Column, Outcome, Settings, figure
from .rules import Bar, Contender, measure, near_the_best

CONTEXTS = (8192, 32768)


def through_backend(
    model: nn.Module, policy: str, options: dict[str, Any], tokens: int
) -> tuple[Contender, Any]:
    """A step of transformers' own forward, compiled by this backend, and what became of it."""
    config: Any = model.config
    torch._dynamo.reset()
    forward = torch.compile(
        model.forward, backend="memcompile", dynamic=False, options={"policy": policy, **options}
    )
    static = Static(forward, static_cache(model, tokens), tokens)
    static.rewind()
    graphs(clear=True)
    static.step()
    static.rewind()
    (report,) = graphs()
    if report.rewritten != config.num_hidden_layers:
        raise RuntimeError(f"of {config.num_hidden_layers} attentions, {report}")
    floor = weight_bytes(model)
    for site in report.sites:
        floor += bytes_read(report.memories[site.name], site, tokens - 1)
    name = f"memcompile {policy}"
    return Contender(name, static.step, 1, floor, static.rewind), report


def run(settings: Settings) -> Outcome:
    config = SMALL if settings.quick else LLAMA
    contexts = settings.contexts or ((256,) if settings.quick else CONTEXTS)
    policies = {name: dict(options) for name, options in POLICIES.items()}
    if settings.quick:
        policies["scout"] = {"budget": 64, "sinks": 16, "window": 16, "page_size": 16}
        policies["scout"]["dense_layers"] = 1
    kernels = "off" if settings.kernels == "reference" else "required"
    for options in policies.values():
        options["kernels"] = kernels
    models = {"sdpa": llama(config)}
    models["eager"] = llama(config, "eager")
    models["eager"].load_state_dict(models["sdpa"].state_dict(), assign=True)
    probes = bandwidth.probes(settings.cache)
    rows = [at_context(models, policies, tokens, settings, probes) for tokens in contexts]
    return Outcome(rows, COLUMNS, bars(rows), {"llama": config, "policies": policies})


def at_context(
    models: dict[str, nn.Module],
    policies: dict[str, dict[str, Any]],
    tokens: int,
    settings: Settings,
    probes: list[Contender],
) -> dict[str, Any]:
    """All contenders at one context."""
    model = models["sdpa"]
    config: Any = model.config
    per_key = config.num_key_value_heads * config.head_dim * 2 * torch.bfloat16.itemsize
    dense = weight_bytes(model) + config.num_hidden_layers * tokens * per_key
    theirs, behind = near_the_best(baselines(models, tokens, dense, compiled=True))
    mine = {name: through_backend(model, name, given, tokens) for name, given in policies.items()}
    contenders = [*(contender for contender, _ in mine.values()), *theirs, *probes]
    timings = measure(contenders, settings.rounds)
    speed = bandwidth.bandwidths(timings, {probe.name: probe.floor for probe in probes})
    best = min(theirs, key=lambda contender: timings[contender.name].median)
    row: dict[str, Any] = {
        "context": tokens,
        "bandwidth": {kind: figure(value / 1e9) for kind, value in speed.items()},
        "baseline": best.name,
        "baseline_ms": 1e3 * timings[best.name].median,
        "far_behind_ms": {name: 1e3 * seconds for name, seconds in behind.items()},
        "timings": {
            contender.name: timings[contender.name].to_json() | {"floor_bytes": contender.floor}
            for contender in contenders
        },
    }
    for name, (contender, report) in mine.items():
        median = timings[contender.name].median
        row[name] = {
            **timings[contender.name].to_json(),
            "tokens_a_second": 1 / median,
            "floor_bytes": contender.floor,
            "bandwidth_share": contender.floor / median / max(speed.values()),
            "times_baseline": timings[best.name].median / median,
            "calls": report.calls.to_json(),
        }
    return row


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What the backend is held to: the faster of eager and Inductor, in the same run."""
    at = {row["context"]: row for row in rows}
    long = at.get(32768)
    return [
        Bar(
            "scout × the faster of eager and inductor at 32768",
            long["scout"]["times_baseline"] if long else None,
            1.8,
        )
    ]


def _columns(name: str) -> tuple[Column, ...]:
    return (
        Column(f"{name} ms", lambda row: f"{row[name]['ms']:.2f}"),
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
