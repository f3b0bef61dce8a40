"""`torch.compile(backend="memcompile")`: found by name, dense without a cache, and says so."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tolerance import assert_close_to_float64

from memcompile import graphs, invalidate
from memcompile.compiler import backend
from memcompile.compiler.backend import memcompile
from memcompile.models.networks.decoders import Decoder


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Scaled(torch.nn.Module):
    """Attention whose scale is a number of the module's."""

    def __init__(self):
        super().__init__()
        self.scale, self.factor = 0.3, 1.5

    def forward(self, q):
        q = q * self.factor
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=self.scale)


def test_a_graph_with_a_number_that_only_a_run_knows_stays_dense_and_says_so(caplog):
    model, given = Scaled(), torch.randn(1, 2, 9, 8)
    fast = torch.compile(model, backend=memcompile, dynamic=True)
    with torch.no_grad(), caplog.at_level(logging.INFO, "memcompile"):
        got, expected = fast(given), model(given)
    assert_close_to_float64(got, expected, model(given.double()), reduction=72)
    assert "1 attentions stay dense: the graph could not be looked into: it computes" in caplog.text
    assert "leave dynamic out" in str(graphs()[-1])
    assert (graphs()[-1].kind, graphs()[-1].attentions) == ("hidden", 1)


def test_a_graph_that_cannot_be_traced_stays_dense_and_says_so(caplog, monkeypatch):
    def fails(gm):
        raise NotImplementedError("no rule for this operation")

    monkeypatch.setattr(backend, "normal_form", fails)
    model, given = Scaled(), torch.randn(1, 2, 9, 8)
    with torch.no_grad(), caplog.at_level(logging.INFO, "memcompile"):
        got = torch.compile(model, backend=memcompile)(given)
    assert_close_to_float64(got, model(given), model(given.double()), reduction=72)
    assert "could not be looked into: no rule for this operation" in caplog.text


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_graph_without_a_cache_stays_dense_and_says_so(dynamic, caplog):
    told = "1 attentions in a graph without a cache stay dense, as those of"
    model, given = Decoder(0), torch.randint(29, (2, 9))
    fast = torch.compile(model, backend=memcompile, dynamic=dynamic, options={"budget": 1024})
    with torch.no_grad(), caplog.at_level(logging.INFO, "memcompile"):
        assert torch.equal(fast(given).argmax(-1), model(given).argmax(-1))
    assert told in caplog.text
    report = graphs()[-1]
    assert (report.kind, report.attentions, report.rewritten) == ("cacheless", 1, 0)
    assert told in str(report)


def test_a_graph_that_is_differentiated_stays_dense_with_eagers_gradients(caplog):
    model, given = Decoder(0), torch.randint(29, (2, 9))
    fast = torch.compile(model, backend=memcompile)

    def gradients(forward):
        model.zero_grad()
        forward(given).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with caplog.at_level(logging.INFO, "memcompile"):
        got = gradients(fast)
    eager = gradients(model)
    truth = gradients(model.double())
    assert len(got) == len(truth) > 0
    for one, plain, right in zip(got, eager, truth, strict=True):
        assert_close_to_float64(one, plain, right, reduction=64)
    assert graphs()[-1].kind == "training"
    assert "that is differentiated stay dense" in caplog.text


def test_no_setting_of_inductor_or_dynamo_is_touched():
    def settings():
        return {
            name: value
            for module in (torch._inductor.config, torch._dynamo.config)
            for name, value in module.get_config_copy().items()
        }

    before = settings()
    torch.compile(Decoder(0), backend=memcompile)(torch.randint(29, (2, 9)))
    assert settings() == before


def test_a_report_is_json_and_can_be_forgotten():
    torch.compile(Decoder(0), backend=memcompile)(torch.randint(29, (2, 9)))
    assert json.loads(json.dumps(graphs()[-1].to_json()))["kind"] == "training"
    assert graphs(clear=True)
    assert graphs() == []


@pytest.mark.parametrize("what", [7, "cache", object()])
def test_only_a_cache_is_invalidated(what):
    with pytest.raises(TypeError, match="expected a cache of transformers, or tensors of one"):
        invalidate(what)


def test_an_unread_cache_has_nothing_to_forget():
    assert invalidate([torch.zeros(2), (torch.ones(1),)]) == 0


def test_found_by_name():
    assert "memcompile" in torch.compiler.list_backends()


def test_unknown_options_are_refused():
    fast = torch.compile(Decoder(0), backend=memcompile, options={"polic": "scout"})
    with pytest.raises(Exception, match="did you mean 'policy'\\? known: budget"):
        fast(torch.randint(29, (2, 9)))


def test_mode_is_forwarded():
    fast = torch.compile(Decoder(0), backend=memcompile, mode="reduce-overhead")
    with torch.no_grad():
        fast(torch.randint(29, (2, 9)))
    assert torch._inductor.config.triton.cudagraphs is False
