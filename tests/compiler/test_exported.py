"""Exported programs as input: from a file through the command line, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stepping import assert_logits
from torch.export import Dim, ExportedProgram

import memcompile
from memcompile.compiler.cli import main
from memcompile.models.networks.decoders.frame import PositionedDecoder
from memcompile.passes.result import NotRewritten

FREE = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


def exported(model: torch.nn.Module, *inputs: torch.Tensor) -> ExportedProgram:
    return torch.export.export(model, inputs, dynamic_shapes=(FREE,) * len(inputs), strict=False)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(3, 7, dtype=torch.int64), torch.arange(7).expand(3, 7).contiguous()


def test_in_memory_program_equals_its_model() -> None:
    model = PositionedDecoder(0)
    engine = memcompile.compile(exported(model, *example()), "dense", page_size=8)
    tokens = torch.randint(29, (2, 20))
    parts = [engine(piece) for piece in tokens.split([7, 1, 12], dim=1)]
    assert_logits(model, torch.cat(parts, 1), tokens)


def test_one_tensor_for_both_inputs_is_noticed() -> None:
    """torch.export merges them, and the tokens would then be taken for positions."""
    tokens, _ = example()
    with pytest.raises(NotRewritten, match="does not use its input"):
        memcompile.compile(exported(PositionedDecoder(0), tokens, tokens), "dense")


def test_a_transformers_program_from_file_to_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=31,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, position_ids=position_ids, use_cache=False).logits

    torch.export.save(exported(Logits(), *example()), tmp_path / "llama.pt2")
    folder = tmp_path / "llama.dense"
    assert main([str(tmp_path / "llama.pt2"), "--policy", "dense", "--out", str(folder)]) == 0
    capsys.readouterr()
    assert (
        main(["run", str(folder), "--ids", "--prompt", "3 1 4 1 5", "--max-new-tokens", "6"]) == 0
    )
    written = [int(word) for word in capsys.readouterr().out.split()]
    expected = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        for _ in range(6):
            following = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, following], 1)
    assert written == expected[0, 5:].tolist()
