"""unlift, strip_asserts and verify."""

from __future__ import annotations

import pytest
import torch
from normal_form import Forward, lowered, targets
from torch import nn

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
