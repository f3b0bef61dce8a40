"""Sampling: each step against transformers' own, draws against the probabilities, refusals."""

from __future__ import annotations

import pytest
import torch

from memcompile.runtime.sampling import Sampler, Sampling

transformers = pytest.importorskip("transformers")

WARPS = [
    {"temperature": 0.7},
    {"temperature": 2},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 500},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "min_p": 0.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.4},
    {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
    },
]


def theirs(logits: torch.Tensor, ids: torch.Tensor, options: dict[str, float]) -> torch.Tensor:
    """The scores after transformers' processors, in the order that its `generate` builds."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )
    )  # fmt: skip
    named = {**options, "temperature": float(options.get("temperature", 1.0))}
    config = transformers.GenerationConfig(**{"top_k": 0, "do_sample": True, **named})
    for process in model._get_logits_processor(config, ids.shape[1], device="cpu"):
        logits = process(ids, logits)
    return logits


@pytest.mark.parametrize("options", WARPS, ids=str)
def test_scores_equal_those_of_transformers(options):
    logits, ids = torch.randn(3, 97) * 4, torch.randint(97, (3, 11))
    seen = torch.zeros(3, 97, dtype=torch.bool).scatter(1, ids, True)
    ours = Sampling(**options).warp(logits, seen)
    assert torch.equal(ours, theirs(logits, ids, options))


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, -1.0, 0.0]])
    assert Sampler(Sampling(), 2, 3, "cpu")(logits).tolist() == [1, 0]


def test_tokens_are_drawn_as_often_as_they_are_probable():
    shares = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    sampler = Sampler(Sampling(temperature=1.0, seed=3), 1, 5, "cpu")
    drawn = torch.stack([sampler(shares.log()[None]) for _ in range(4000)])
    counts = drawn.flatten().bincount(minlength=5)
    spread = (4000 * shares * (1 - shares)).sqrt()
    assert ((counts - 4000 * shares).abs() <= 4 * spread).all(), counts


def test_a_seed_fixes_the_draws_and_leaves_torchs_generator_alone():
    logits = torch.randn(6, 3, 50)

    def draw(rows: int, seed: int | None) -> list[list[int]]:
        sampler = Sampler(Sampling(temperature=1.5, seed=seed), rows, 50, "cpu")
        return [sampler(step[:rows]).tolist() for step in logits]

    before = torch.get_rng_state()
    first = draw(3, 7)
    assert draw(3, 7) == first
    assert [step[:2] for step in first] == draw(2, 7), "a row's draws depend on its neighbours"
    assert draw(3, 8) != first
    assert draw(3, None) != draw(3, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_penalty_counts_what_was_seen_and_no_padding():
    sampler = Sampler(Sampling(repetition_penalty=100.0), 2, 4, "cpu")
    sampler.see(torch.tensor([[3, 3], [2, 3]]), [2, 1])
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(2, 4)
    assert sampler(logits).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1.0; give a finite number; 0 is greedy"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 1, "top_k": 0}, "top_k is 0; give a whole number of at least 1"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0; give a number above 0, at most 1"),
        ({"temperature": 1, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1, "min_p": -0.1}, "min_p is -0.1; give a number of 0 .. 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; give a finite number above 0"),
        ({"seed": -1}, "seed is -1; give a whole number of 0 .. 2"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"top_p": 0.9, "top_k": 3}, "top_k and top_p cut what is drawn from, but temperature 0"),
        ({"temprature": 1}, "no sampling option temprature; known: temperature, top_k, top_p"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling.of(**options)
