"""Append and read become one operation where a runtime can do both, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from memcompile.compiler.export.contract import contract_of, places_of
from memcompile.compiler.export.driver import Driver
from memcompile.compiler.pipeline import Compiled, build
from memcompile.models.networks.decoders.frame import PositionedDecoder
from memcompile.passes.fuse_grouped import fuse_grouped
from memcompile.passes.make_functional import make_functional

SCOUT = {"page_size": 8, "budget": 32, "sinks": 8, "window": 8, "dense_layers": 1}
LEVELS = {"levels": (8, 32, 64), "sinks": 8, "window": 16, "refine": 16, "dense_layers": 1}
CALLS = ((7, [7, 3, 5]), (1, None), (30, None), (1, [0, 1, 1]), (20, [20, 1, 5]))


class Two(PositionedDecoder):
    """Two layers, and a context that rings are shorter than."""

    layers = 2
    context = 1024


def compiled(policy: str, **options: object) -> Compiled:
    return build(Two(0), policy, kernels="off", check=False, **options)


def graphs(made: Compiled, read: str) -> list[fx.GraphModule]:
    """The same functional graph twice."""
    assert made.program is not None and made.step is not None
    step, sites = getattr(made.step, read), places_of(made.program)
    return [make_functional(step, sites, made.program.ragged, delta=True) for _ in range(2)]


@pytest.mark.parametrize(
    ("policy", "options", "read", "applied", "reasons"),
    [
        ("dense", {}, "policy", 2, []),
        ("scout", SCOUT, "policy", 1, ["the others by their summaries"]),
        ("scout", SCOUT, "dense", 2, []),
        ("hierarchical", LEVELS, "dense", 2, []),
        (
            "hybrid",
            {"window": 16, "page_size": 8, "write": "delta", "state_layers": (1,)},
            "policy",
            1,
            ["its log-sum-exp is needed"],
        ),
        (
            "window",
            {"sinks": 8, "window": 16, "page_size": 8},
            "dense",
            0,
            ["keeps its first pages"] * 2,
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_fused_graph_is_the_same(
    policy: str, options: dict[str, object], read: str, applied: int, reasons: list[str]
) -> None:
    made = compiled(policy, **options)
    plain, fused = graphs(made, read)
    result = fuse_grouped(fused)
    assert result.applied == applied
    assert len(result.declined) == len(reasons)
    for declined, reason in zip(result.declined, reasons, strict=True):
        assert reason in declined.reason and declined.rule == "fuse_grouped"
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
    _, graph = graphs(compiled("dense"), "policy")
    result = fuse_grouped(graph, {"site1_keys": "its keys are wider"})
    assert result.applied == 1
    assert [declined.reason for declined in result.declined] == ["its keys are wider"]
