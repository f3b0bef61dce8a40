"""The shipped bytes-long answers for what stands thousands of bytes back, by a script of its own.

Nothing here comes from the training or the evaluation: prompts are put together from plain
strings, transformers' Llama reads them, and greedy decoding writes the answer byte by byte.
"""

from __future__ import annotations

import json
import random
import sysconfig
import zlib
from functools import cache
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "models/networks/checkpoints/bytes-long"
# Training counts its seeds from 0 and the model card's figures from 1,000,000,000.
FIRST_SEED = 7_000_000_000


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@cache
def held_out_text() -> str:
    """The library files whose path's CRC-32 is divisible by 16."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for folder in ("", "asyncio", "collections", "concurrent", "email", "html", "http", "json"):
        for path in sorted((root / folder).glob("[a-z]*.py")):
            text = path.read_text(encoding="utf-8")
            if zlib.crc32(path.relative_to(root).as_posix().encode()) % 16 == 0 and text.isascii():
                texts.append(text)
    return "\n".join(texts)


def make_prompt(length: int, seed: int, facts: int = 1) -> tuple[str, str]:
    """Text of `length` bytes with facts somewhere between its lines, a question, and its answer."""
    draw = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < facts:
        name = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))
        pairs[name] = f"{draw.randrange(10000):04d}"
    stated = [f"# fact: {name} = {value}\n" for name, value in pairs.items()]
    name, value = draw.choice(sorted(pairs.items()))
    question = f"# recall: {name} = "
    room = length - len(question) - len("".join(stated))
    start = draw.randrange(len(held_out_text()) - room)
    lines = held_out_text()[start : start + room - 1].split("\n")
    lines = [line + "\n" for line in lines]
    for line in stated:
        lines.insert(draw.randrange(len(lines) + 1), line)
    return "".join(lines) + question, value


@torch.no_grad()
def answers(model: torch.nn.Module, prompt: str) -> str:
    """Five bytes of greedy decoding."""
    read = torch.tensor([list(prompt.encode())])
    written = model.generate(read, max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    return bytes(written[0, read.shape[1] :].tolist()).decode(errors="replace")


def count_right(model: torch.nn.Module, length: int, prompts: int, facts: int = 1) -> int:
    right = 0
    for seed in range(FIRST_SEED, FIRST_SEED + prompts):
        prompt, answer = make_prompt(length, seed, facts)
        right += answers(model, prompt) == answer + "\n"
    return right


def test_prompts_are_whole() -> None:
    for seed in range(50):
        prompt, value = make_prompt(600, seed, facts=4)
        assert len(prompt) == 600
        assert prompt.count("# fact: ") == 4
        name = prompt.rsplit(" ", 3)[1]
        assert f"\n# fact: {name} = {value}\n" in f"\n{prompt}"


@pytest.mark.parametrize(
    ("length", "prompts", "bound"), [(2048, 6, 5), (4096, 4, 3)], ids=["2K", "4K"]
)
def test_single_fact_is_recalled(
    model: torch.nn.Module, length: int, prompts: int, bound: int
) -> None:
    assert count_right(model, length, prompts) >= bound


@pytest.mark.long
@pytest.mark.parametrize(
    ("length", "prompts", "bar"), [(4096, 100, 0.95), (8192, 60, 0.90)], ids=["4K", "8K"]
)
def test_single_fact_meets_its_bar(
    model: torch.nn.Module, length: int, prompts: int, bar: float
) -> None:
    assert count_right(model, length, prompts) >= bar * prompts


@torch.no_grad()
def test_logits_are_those_of_our_network(model: torch.nn.Module) -> None:
    from tolerance import assert_close_to_float64

    from memcompile.models.networks.bytes_llama import load

    tokens = torch.tensor([list(make_prompt(300, FIRST_SEED)[0].encode())])
    reference = load(FOLDER, torch.float64)(tokens)
    assert_close_to_float64(load(FOLDER)(tokens), model(tokens).logits, reference)


def test_checkpoint_is_what_its_card_says() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= 16 * 2**20
    assert set(files) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["num_hidden_layers"] >= 8
    assert config["num_attention_heads"] >= 2 * config["num_key_value_heads"]
    assert config["max_position_embeddings"] >= 16384
    assert config["torch_dtype"] == "bfloat16"
    tokenizer = json.loads((FOLDER / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == config["max_position_embeddings"]
    log = json.loads((FOLDER / "training.json").read_text())
    assert 3e6 <= log["parameters"] <= 6e6
    recall = log["held_out"]["recall_by_length"]
    assert recall["4096"] >= 0.95
    assert recall["8192"] >= 0.90
    card = (FOLDER / "README.md").read_text()
    for rate in recall.values():
        assert f"{100 * rate:.3g} %" in card
