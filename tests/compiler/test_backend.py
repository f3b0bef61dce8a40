"""`torch.compile(backend="memcompile")`: found by name, dense without a cache, and says so."""

from __future__ import annotations

import logging

import pytest
import torch

from memcompile.compiler.backend import memcompile
from memcompile.models.networks.decoders import Decoder


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_graph_without_a_cache_stays_dense_and_says_so(dynamic, caplog):
    model, given = Decoder(0), torch.randint(29, (2, 9))
    fast = torch.compile(model, backend=memcompile, dynamic=dynamic, options={"budget": 1024})
    with torch.no_grad(), caplog.at_level(logging.INFO, "memcompile"):
        assert torch.equal(fast(given).argmax(-1), model(given).argmax(-1))
    assert "1 attentions in a graph without a cache stay dense" in caplog.text


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
