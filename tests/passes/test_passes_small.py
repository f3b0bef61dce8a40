"""unlift, strip_asserts and verify."""

from __future__ import annotations

import pytest
import torch
from normal_form import Forward, lowered, targets
from torch import nn
from torch.export import Dim

from memcompile.compiler.capture import capture
from memcompile.compiler.pipeline import normalise
from memcompile.passes.result import NotRewritten
from memcompile.passes.strip_asserts import strip_asserts
from memcompile.passes.unlift import unlift
from memcompile.passes.verify import verify


def test_unlift_keeps_tied_weights_one():
    model = Forward(lambda m, x: x @ m.embedding.weight.T)
    module = unlift(capture(model).program).graph
    assert len([p for p in module.parameters() if p.shape == (19, 16)]) == 1
    tokens = torch.randint(19, (2, 5))
    assert torch.equal(module(tokens), model(tokens))


def test_in_place_code_is_functionalised():
    def body(m, x):
        y = x.clone()
        y += 1
        y[..., 0] = 3
        return y

    module, _ = normalise(capture(Forward(body)).program)
    verify(module, "normalise")
    tokens = torch.randint(19, (2, 5))
    assert torch.equal(module(tokens), Forward(body)(tokens))


def test_a_forward_with_state_of_its_own_is_declined():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(19, 16)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, tokens):
            self.calls.add_(1)
            return self.embedding(tokens) * self.calls

    with pytest.raises(NotRewritten, match=r"writes to 'model\.calls'"):
        normalise(capture(Counting().eval()).program)


def regions(mutate=False):
    """Exported with gradients on, so that each switch is a graph of its own."""

    def body(m, x):
        with torch.no_grad():
            y = x * 2
            if mutate:
                y += 1
        with torch.autocast("cpu", enabled=False):
            z = m.project(y)
        return x + z

    tokens, free = torch.zeros(2, 5, dtype=torch.int64), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    model = Forward(body)
    return model, torch.export.export(model, (tokens,), dynamic_shapes=(free,), strict=False)


def test_unlift_dissolves_regions_without_gradients_or_autocast():
    model, program = regions()
    assert sum("wrap_with" in str(node.target) for node in program.graph.nodes) == 2
    module = unlift(program).graph
    verify(module, "unlift")
    assert not any("wrap_with" in target for target in targets(module))
    assert all(
        isinstance(getattr(module, n.target), torch.Tensor)
        for n in module.graph.nodes
        if n.op == "get_attr"
    )
    tokens = torch.randint(19, (3, 7))
    assert torch.equal(module(tokens), model(tokens))


def test_unlift_keeps_a_region_that_writes_in_place():
    _, program = regions(mutate=True)
    kept = [t for t in targets(unlift(program).graph) if "wrap_with" in t]
    assert kept == ["wrap_with_set_grad_enabled"]


def test_strip_asserts_removes_identities():
    def body(m, x):
        x = nn.functional.dropout(x.to(torch.float32)[:, :], 0.3, training=False)
        return x.expand(x.shape)

    assert targets(lowered(body)) == ["aten.embedding.default"]


def test_strip_asserts_keeps_what_changes_values():
    def body(m, x):
        return x.to(torch.float64)[:, :, 1:]

    assert len(targets(lowered(body))) == 3


def test_verify_catches_broken_graphs():
    module = lowered(lambda m, x: m.project(x))
    node = next(n for n in module.graph.nodes if n.op == "call_function")
    kept = node.meta.pop("val")
    with pytest.raises(AssertionError, match="after a_pass: no metadata on %embedding"):
        verify(module, "a_pass")
    node.meta["val"] = kept
    with module.graph.inserting_after(node):
        module.graph.call_function(torch.ops.aten.add_.Tensor, (node, 1)).meta["val"] = kept
    with pytest.raises(AssertionError, match="writes in place"):
        verify(module, "a_pass")
    assert strip_asserts(lowered(lambda m, x: x)).applied == 0


def test_a_forward_that_replaces_a_buffer_is_declined():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(19, 16)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, tokens):
            self.calls = self.calls + 1
            return self.embedding(tokens) * self.calls

    with pytest.raises(NotRewritten, match="replaces the buffer 'calls'"):
        capture(Counting().eval())
