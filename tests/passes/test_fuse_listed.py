"""Reads of listed pages become one operation, told of the new rows, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from memcompile.compiler.export.contract import contract_of, places_of
from memcompile.compiler.export.driver import Driver
from memcompile.compiler.pipeline import Compiled, build
from memcompile.models.networks.decoders.frame import PositionedDecoder
from memcompile.passes.fuse_listed import fuse_listed
from memcompile.passes.make_functional import make_functional

SCOUT = {"page_size": 8, "budget": 32, "sinks": 8, "window": 8, "dense_layers": 1}
LEVELS = {"levels": (8, 32, 64), "sinks": 8, "window": 16, "refine": 16, "dense_layers": 1}
CALLS = ((7, [7, 3, 5]), (1, None), (30, None), (1, [0, 1, 1]), (20, [20, 1, 5]))


class Two(PositionedDecoder):
    """Two layers."""

    layers = 2
    context = 1024


def graph_of(made: Compiled) -> fx.GraphModule:
    assert made.program is not None and made.step is not None
    return make_functional(made.step.policy, places_of(made.program), made.program.ragged)


@pytest.mark.parametrize(
    ("policy", "options", "applied", "reasons"),
    [
        ("dense", {}, 0, []),
        ("scout", {**SCOUT, "compensate": False}, 1, []),
        ("quest", {"page_size": 8, "budget": 32, "dense_layers": 1}, 1, []),
        ("scout", SCOUT, 0, ["by their summaries"]),
        ("hierarchical", LEVELS, 0, ["records of pages", "records of pages", "log-sum-exp"]),
    ],
    ids=["dense", "scout", "quest", "compensating", "hierarchical"],
)
def test_a_fused_graph_is_the_same(
    policy: str, options: dict[str, object], applied: int, reasons: list[str]
) -> None:
    made = build(Two(0), policy, kernels="off", check=False, **options)
    plain, fused = graph_of(made), graph_of(made)
    result = fuse_listed(fused)
    assert result.applied == applied
    for declined, reason in zip(result.declined, reasons, strict=True):
        assert reason in declined.reason and declined.rule == "fuse_listed"
    assert made.program is not None
    contract = contract_of(made.program, places_of(made.program))

    def driver(graph: fx.GraphModule) -> Driver:
        def call(given):
            with torch.no_grad():
                values = graph(*[given[name] for name in contract.inputs])
            return dict(zip(contract.outputs, values, strict=True))

        return Driver(contract, call, batch=3, capacity=64)

    ours, theirs = driver(fused), driver(plain)
    for n, lengths in CALLS:
        tokens = torch.randint(29, (3, n))
        assert torch.equal(ours(tokens, lengths), theirs(tokens, lengths))
    for name, tensor in theirs.state.items():
        assert torch.equal(ours.state[name], tensor)


def test_a_site_that_the_runtime_cannot_take_is_left_alone() -> None:
    options = {**SCOUT, "dense_layers": 0, "compensate": False}
    graph = graph_of(build(Two(0), "scout", kernels="off", check=False, **options))
    result = fuse_listed(graph, {"site1_keys": "its keys are wider"})
    assert result.applied == 1
    assert [declined.reason for declined in result.declined] == ["its keys are wider"]


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (3, "keys", "records of pages"),
        (9, 30.0, "capped"),
        (10, 16, "read in part"),
        (12, 1, "records of pages"),
        (13, 1, "keeps its first pages"),
        (1, "query", "not written by one append"),
        (4, "keys", "not listed in order"),
    ],
)
def test_what_is_declined(place: int, value: object, reason: str) -> None:
    options = {**SCOUT, "compensate": False}
    graph = graph_of(build(Two(0), "scout", kernels="off", check=False, **options))
    listed = torch.ops.memcompile_portable.attend.default
    reads = [n for n in graph.graph.nodes if n.target is listed and n.args[4] is not None]
    (read,) = reads
    named = {"keys": read.args[1], "query": read.args[0]}
    read.update_arg(place, named[value] if isinstance(value, str) else value)
    result = fuse_listed(graph)
    assert result.applied == 0
    assert reason in result.declined[0].reason
