"""`explain` and the rest of the face: what was rewritten, what was not, and what was read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from archive_payloads import Decoder
from torch import Tensor, nn
from torch.nn import functional

import memcompile
from memcompile.models.memory import PRESETS
from memcompile.models.networks import induction

OPTIONS = {"budget": 64, "page_size": 8, "sinks": 8, "window": 16, "dense_layers": 0}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return induction.save(tmp_path_factory.mktemp("models") / "induction")


class LooksAhead(nn.Module):
    """One attention without a mask: every query reads every key."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)[:, None]
        read: Tensor = functional.scaled_dot_product_attention(x, x, x)[:, 0]
        return read @ self.embed.weight.T


def test_explain_names_the_memory_of_each_attention(network: Path) -> None:
    report = memcompile.explain(network, **OPTIONS)
    assert [report.memories[site.name].name for site in report.sites] == ["scout", "scout"]
    assert report.options["budget"] == 64
    assert not report.notes


def test_explain_counts_what_given_tokens_read(network: Path) -> None:
    tokens, _ = induction.prompt(300)
    report = memcompile.explain(network, tokens, **OPTIONS)
    (note,) = report.notes
    counted = re.fullmatch(
        r"300 tokens read (\d+) of (\d+) pages .* next token is dense's at ([\d.]+)% of them", note
    )
    assert counted, note
    # 2 layers, 2 KV heads; a token reads all of its pages until they are more than 8
    assert int(counted[1]) == 4 * sum(min(p // 8 + 1, 8) for p in range(300))
    assert int(counted[2]) == 4 * sum(p // 8 + 1 for p in range(300))
    assert 90 < float(counted[3]) <= 100  # equal votes are settled by rounding


def test_explain_lists_declines_and_raises_nothing() -> None:
    report = memcompile.explain(LooksAhead().eval(), torch.zeros(1, 4, dtype=torch.int64))
    assert not report.memories
    assert report.declined
    for declined in report.declined:
        assert declined.reason and declined.node and declined.rule
        assert declined.reason in str(report)


def test_compile_refuses_what_explain_explains() -> None:
    with pytest.raises(ValueError, match="LooksAhead"):
        memcompile.compile(LooksAhead().eval())


def test_compile_takes_a_path_and_gives_an_engine(network: Path) -> None:
    engine = memcompile.compile(network, policy="scout", **OPTIONS)
    tokens, answer = induction.prompt(200, steps=3)
    assert engine.generate(tokens, 3)[:, 200:].tolist() == answer.tolist()


@pytest.fixture
def ahead(tmp_path: Path) -> Path:
    """A pickled model that nothing can be made of, so that little is compiled."""
    path = tmp_path / "ahead.pt"
    torch.save(LooksAhead().eval(), path)
    return path


def test_a_path_is_read_as_the_command_line_reads_it(ahead: Path, tmp_path: Path) -> None:
    report = memcompile.explain(ahead, trust_pickle=True)
    assert report.model == "ahead.pt" and report.declined
    weights = tmp_path / "weights.pt"
    torch.save(Decoder(scale=0.5).state_dict(), weights)
    given = {"arch": "archive_payloads:Decoder", "arch_config": {"scale": 0.5}}
    report = memcompile.explain(weights, policy="dense", **given)
    assert report.model == "weights.pt"
    with pytest.raises(ValueError, match="runs code from the file, so it is refused"):
        memcompile.compile(ahead)
    with pytest.raises(ValueError, match="say how a path is read; the model given is a LooksAhead"):
        memcompile.compile(LooksAhead(), trust_pickle=True)


@pytest.mark.parametrize("call", [memcompile.compile, memcompile.explain])
def test_unknown_names_are_refused_with_the_known_ones(call: object, network: Path) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match="dense, scout"):
        call(network, policy="elephant")
    with pytest.raises(ValueError, match="page_size"):
        call(network, policy="scout", pagesize=3)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        call(Path("nowhere"))


def test_the_face_lists_the_policies_and_has_nothing_else() -> None:
    assert memcompile.policies() == sorted(PRESETS)
    named = "compile explain export graphs invalidate policies register_attention"
    assert sorted(memcompile.__all__) == named.split()
