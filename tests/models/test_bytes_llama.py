"""The byte-level Llama is transformers' Llama: same names, same logits, same files."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_float64

from memcompile.models.networks.bytes_llama import (
    BytesLlama,
    BytesLlamaConfig,
    byte_alphabet,
    load,
    save,
    tokenizer_files,
)

SMALL = BytesLlamaConfig(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
)


@pytest.fixture
def network() -> BytesLlama:
    """Every parameter away from its start, so that no zero or one hides a difference."""
    made = BytesLlama(SMALL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_logits_are_those_of_transformers(
    network: BytesLlama, tmp_path: Path, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    save(network, tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ours = load(tmp_path, dtype)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens = torch.randint(0, 256, (3, 37))
    reference = load(tmp_path, dtype).to(torch.float64)(tokens)
    assert_close_to_float64(ours(tokens), theirs(tokens).logits, reference)


@pytest.mark.parametrize("block", [1, 16, 64], ids=["single", "odd-rest", "whole"])
@torch.no_grad()
def test_blockwise_attention_is_attention(network: BytesLlama, block: int) -> None:
    tokens = torch.randint(0, 256, (3, 37))
    reference = deepcopy(network).to(torch.float64)(tokens)
    assert_close_to_float64(network(tokens, block=block), network(tokens), reference)


@torch.no_grad()
def test_positions_are_those_of_transformers(network: BytesLlama, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save(network, tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 256, (2, 37))
    positions = torch.randint(1, 50, (2, 37)).cumsum(1)
    reference = deepcopy(network).to(torch.float64)(tokens, positions)
    eager = theirs(tokens, position_ids=positions).logits
    assert_close_to_float64(network(tokens, positions), eager, reference)
    assert not torch.equal(network(tokens, positions), network(tokens))


def test_parameters_have_the_names_of_transformers(network: BytesLlama, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save(network, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ours = dict(network.named_parameters())
    assert ours.keys() == dict(theirs.named_parameters()).keys()


def test_weights_survive_the_folder(network: BytesLlama, tmp_path: Path) -> None:
    save(network, tmp_path)
    again = load(tmp_path)
    assert again.config == SMALL
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16().float())


def test_foreign_folders_are_refused(network: BytesLlama, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; give a folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50257}))
    with pytest.raises(ValueError, match=r"'gpt2' with vocab_size=50257; expected a 'llama'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_key_value_heads": 4}, r"num_attention_heads=6 .* num_key_value_heads=4"),
        ({"head_dim": 31}, r"head_dim=31 is odd"),
    ],
    ids=["groups", "odd-head"],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BytesLlamaConfig(**sizes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, object]:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save(BytesLlama(SMALL), folder)
    return (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        AutoTokenizer.from_pretrained(folder),
    )


@given(text=st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_a_token_is_a_byte(tokenizers: tuple, text: str) -> None:  # type: ignore[type-arg]
    fast, auto = tokenizers
    ids = list(text.encode())
    assert fast.encode(text).ids == ids
    assert auto(text)["input_ids"] == ids
    assert fast.decode(ids, skip_special_tokens=False) == text
    assert auto.decode(ids) == text


def test_alphabet_is_that_of_the_byte_level_tokenizer() -> None:
    from tokenizers import pre_tokenizers

    assert len(set(byte_alphabet())) == 256
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    files = tokenizer_files(longest=77)
    assert files["tokenizer.json"]["model"]["merges"] == []
    assert files["tokenizer_config.json"]["model_max_length"] == 77
