"""Functional graphs before and after a fusion, driven by the same tokens."""

from __future__ import annotations

import torch
from torch import fx

from memcompile.compiler.export.contract import contract_of, places_of
from memcompile.compiler.export.driver import Driver
from memcompile.compiler.pipeline import Compiled, build
from memcompile.models.networks.decoders.frame import PositionedDecoder
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


def graph_of(made: Compiled, read: str = "policy") -> fx.GraphModule:
    assert made.program is not None and made.step is not None
    step, sites = getattr(made.step, read), places_of(made.program)
    return make_functional(step, sites, made.program.ragged, delta=True)


def assert_same(made: Compiled, fused: fx.GraphModule, plain: fx.GraphModule) -> None:
    """Logits and state, bit for bit, call after call."""
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
