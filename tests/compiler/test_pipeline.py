"""Build: options, refusals, limits, debug output; and capture's own messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import memcompile
from memcompile.compiler import pipeline
from memcompile.compiler.capture import capture
from memcompile.compiler.pipeline import build
from memcompile.models.networks.decoders import Decoder
from memcompile.passes.result import NotRewritten
from memcompile.passes.strip_asserts import strip_asserts


class Plain(nn.Module):
    """No attention at all."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)

    def forward(self, tokens):
        return self.embedding(tokens)


def test_no_attention_says_what_was_looked_for():
    with pytest.raises(NotRewritten) as refused:
        build(Plain().eval())
    assert "no attention was rewritten" in str(refused.value)
    assert "scaled_dot_product_attention" in str(refused.value)
    compiled = build(Plain().eval(), strict=False)
    assert compiled.program is None
    with pytest.raises(NotRewritten, match="Plain has no step graph"):
        compiled.engine()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "scoot"}, "known: dense, scout"),
        ({"budgt": 3}, "known: budget"),
        ({"max_context": 0}, "give a positive number of tokens"),
        ({"max_context": "8K"}, "give a positive number of tokens"),
    ],
)
def test_options_are_checked_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        build(Plain().eval(), **options)


def test_what_is_not_a_model():
    with pytest.raises(
        TypeError, match=r"expected a torch\.nn\.Module or an ExportedProgram, got int"
    ):
        build(3)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        build(Plain().train())
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        build("no-such-model")


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return x if x.sum() > 0 else -x


class Fixed(Branching):
    def forward(self, tokens):
        return self.embedding(tokens) + torch.zeros(13, 8)


class Words(Branching):
    def forward(self, tokens):
        return "words"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branching, "branches on the values of a tensor"),
        (Fixed, "fixes the length or the batch"),
        (Words, "expected logits"),
    ],
)
def test_capture_says_why_not(model, reason):
    with pytest.raises(NotRewritten, match=reason) as refused:
        build(model().eval())
    assert refused.value.declined[0].rule == "capture"
    if model is Branching:
        assert "test_pipeline.py" in refused.value.declined[0].source
    report = memcompile.explain(model().eval())
    assert reason in str(report)


def test_the_context_ends_where_the_table_does():
    engine = memcompile.compile(Decoder(0), "dense")
    engine.prefill(torch.zeros(1, 60, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"65 tokens exceed the context of 64 \(the table read by"):
        engine(torch.zeros(1, 5, dtype=torch.int64))
    assert engine.position == [60]
    engine(torch.zeros(1, 4, dtype=torch.int64))
    short = memcompile.compile(Decoder(0), "dense", max_context=9)
    with pytest.raises(ValueError, match=r"10 tokens exceed the context of 9 \(max_context\)"):
        short.prefill(torch.zeros(1, 10, dtype=torch.int64))


def test_a_torch_without_guards_is_told_of(monkeypatch):
    monkeypatch.setattr("memcompile.compiler.pipeline.keeps_guards", lambda program: False)
    assert "branches on sizes were not looked for" in str(build(Decoder(0), "dense").report)
    monkeypatch.undo()
    assert not any("guards" in note for note in build(Decoder(0), "dense").report.notes)


@pytest.mark.parametrize(("level", "shown"), [(1, "self-check"), (2, "after fold_attention")])
def test_debug_levels(level, shown, monkeypatch, capsys):
    monkeypatch.setenv("MEMCOMPILE_DEBUG", str(level))
    build(Decoder(0), "dense")
    assert shown in capsys.readouterr().err


def test_an_exported_program_is_checked_against_itself_and_not_its_normal_form(monkeypatch):
    program = capture(Decoder(0)).program
    assert build(program, "dense").report.self_check["tokens"] > 0

    def spoilt(module):
        result = strip_asserts(module)
        for node in result.graph.graph.nodes:
            if node.target is torch.ops.aten.scaled_dot_product_attention.default:
                node.kwargs = {**node.kwargs, "scale": 0.01}
        return result

    monkeypatch.setattr(pipeline, "NORMALISE", (spoilt, *pipeline.NORMALISE[1:]))
    with pytest.raises(NotRewritten, match="does not reproduce the forward"):
        build(program, "dense")


def test_a_debug_level_is_a_number(monkeypatch):
    monkeypatch.setenv("MEMCOMPILE_DEBUG", "loud")
    with pytest.raises(ValueError, match="MEMCOMPILE_DEBUG is 'loud'; give 0, 1, 2 or 3"):
        build(Decoder(0), "dense")


def test_explain_names_node_reason_and_rule():
    class Ahead(Decoder):
        def forward(self, tokens):
            return super().forward(tokens) + super().forward(tokens).flip(1)

    report = memcompile.explain(Ahead(0), policy="dense")
    declined = next(d for d in report.declined if "flip" in d.node)
    assert declined.rule == "derive_step"
    assert "not known to keep tokens apart" in declined.reason
    assert declined.source.rpartition(":")[0].endswith(".py")
    assert str(declined) in str(report) or declined.reason in str(report)


def test_a_whole_context_of_float32_passes_its_self_check() -> None:
    """Rounding grows with the keys that are summed over: 512 of them here."""
    folder = Path(__file__).parents[2] / "models/networks/checkpoints/bytes-small"
    made = build(folder, "dense", dtype="float32", max_context=512, kernels="off")
    assert made.report.self_check is not None and made.report.self_check["tokens"] > 512
