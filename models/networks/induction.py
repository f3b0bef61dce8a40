"""A hand-constructed two-layer Llama whose every answer is known in advance, at any length.

It retrieves the token that followed the earlier occurrences of the current token. Nothing is
trained: the weights are written down below, so a wrong answer is an error of whoever runs it.

**Vocabulary.** Token 0 is BOS and opens every sequence; tokens 1..64 are symbols. Head h of the
four query heads owns symbols 16h..16h+15 (counted from 0), KV head g those of its two query heads.

**Residual stream** (256 channels, each 0 or 8): `now`, one-hot of the token; `before`, one-hot of
the previous token; `answer`; three constants. Layer 0 pays for `before` with one constant, so
before either attention exactly four channels hold 8, the mean square is exactly 1, and RMSNorm is
the identity. The MLPs are zero.

**Rotary frequencies.** theta = 2**96 over 32 pairs makes frequency i exactly 8**-i, in 16 bit too.
Pairs 0..7 turn and tell positions apart; pairs 15..31 turn by less than 1e-6 rad in 16M tokens,
so content is stored there.

**Layer 0, the previous token.** Query and key are the constant; the query is turned one step, so
a key at distance D has the logit A * sum_{i<8} cos(8**-i (D-1)) with A = 256, peaked at D = 1. The
runner-up below 2**23 tokens (D - 1 = 3217) lies 0.2978 A = 76 lower; over N keys the rest weighs
at most N exp(-76). The first token has no previous one and reads itself.

**Layer 1, the match.** key = one-hot of `before`, query = 8 * one-hot of `now` (logit 64), value =
`now`. A constant part of the query meets a key only BOS has (logit 32) and its value is zero: heads
that do not own the symbol, and symbols never seen before, read nothing. Over N keys the rest
weighs N exp(-32), 2e-9 at 128K. All other logits are 0: pages without the match score 0 under mean,
mean-std and box. Under the ball they come second by half a per cent, so its index needs precision.

**Logits.** The follower of a share v_s of the occurrences gets 32 v_s * sqrt(5 / (4 + |v|^2)): 32
when the followers agree; all other symbols get 0, and BOS (the answer "not seen") about 0.1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

BOS = 0
SYMBOLS = 64
VOCABULARY = 1 + SYMBOLS

_HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _MLP = 256, 4, 2, 64, 8
_PAIRS = _HEAD_DIM // 2
_GROUP = _HEADS // _KV_HEADS
_OWNED = SYMBOLS // _HEADS

# Residual channels. `now` and `before` have one channel a token, `answer` one a symbol.
_NOW = 0
_BEFORE = _NOW + VOCABULARY
_ANSWER = _BEFORE + VOCABULARY
_CONSTANT = _ANSWER + SYMBOLS
_SPENT = _CONSTANT + 2  # the constant that layer 0 gives up for `before`

_UNIT = 8.0  # what a set channel holds: four of them in 256 channels have mean square 1
_THETA = 2.0**96
_TURNING = 8  # pairs that tell positions apart
_SINK_DIM = 15  # layer 1's key dimension of BOS; pairs 16.. hold the symbols


def config(
    *, max_position_embeddings: int = 1 << 20, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The contents of transformers' `config.json` (a `LlamaConfig`)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": 2,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-8,  # lost beside a mean square of 1
        # transformers 4 reads the first, transformers 5 the second
        "rope_theta": _THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def state_dict(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights under transformers' names, every one of `dtype`."""
    embedding = torch.zeros(VOCABULARY, _HIDDEN, dtype=torch.float64)
    embedding[:, _NOW : _NOW + VOCABULARY] = _UNIT * torch.eye(VOCABULARY)
    embedding[:, _CONSTANT : _CONSTANT + 3] = _UNIT

    head = torch.zeros(VOCABULARY, _HIDDEN, dtype=torch.float64)
    # a unanimous answer leaves five channels set, so the last norm divides by sqrt(5/4)
    for symbol in range(SYMBOLS):
        head[1 + symbol, _ANSWER + symbol] = 4 * math.sqrt(5 / 4)
    # far below the vote of one follower among 64
    head[BOS, _CONSTANT] = 1 / 64

    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(_HIDDEN),
        "lm_head.weight": head,
    }
    for layer, attention in enumerate((_previous_token(), _match())):
        prefix = f"model.layers.{layer}."
        for name, weight in attention.items():
            weights[f"{prefix}self_attn.{name}_proj.weight"] = weight
        weights[f"{prefix}mlp.gate_proj.weight"] = torch.zeros(_MLP, _HIDDEN)
        weights[f"{prefix}mlp.up_proj.weight"] = torch.zeros(_MLP, _HIDDEN)
        weights[f"{prefix}mlp.down_proj.weight"] = torch.zeros(_HIDDEN, _MLP)
        weights[f"{prefix}input_layernorm.weight"] = torch.ones(_HIDDEN)
        weights[f"{prefix}post_attention_layernorm.weight"] = torch.ones(_HIDDEN)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def save(folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write `config.json` and `model.safetensors`, a folder transformers can load; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(dtype=dtype), indent=2) + "\n")
    save_file(state_dict(dtype), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompt(length: int, seed: int = 0, depth: float = 0.5, steps: int = 1) -> tuple[Tensor, Tensor]:
    """A question with one right answer: BOS, filler, key, answer, filler, key.

    The key occurs once before the end, and so do all answers but the last: generating `steps`
    tokens greedily has to give `answer`, whatever the filler.

    Args:
        length: tokens in all, at least steps + 3.
        seed: of the filler, the key and the answers.
        depth: where the fact stands, 0 = right after BOS, 1 = right before the question.
        steps: answers that follow one another, 1 to 32.

    Returns:
        tokens [1, length] and answer [1, steps], int64.

    Raises:
        ValueError: for a length, depth or steps outside these ranges.
    """
    if not 1 <= steps <= SYMBOLS // 2:
        raise ValueError(f"steps is {steps}; expected 1 to {SYMBOLS // 2}.")
    if length < steps + 3:
        raise ValueError(
            f"length is {length}; BOS, key, {steps} answer(s) and the question need {steps + 3}."
        )
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}; expected a share of the length between 0 and 1.")
    generator = torch.Generator().manual_seed(seed)
    symbols = 1 + torch.randperm(SYMBOLS, generator=generator)
    unique, filler = symbols[:steps], symbols[steps:]
    tokens = filler[torch.randint(len(filler), (length,), generator=generator)]
    fact = torch.cat([unique, filler[:1]])
    start = 1 + round(depth * (length - steps - 3))
    tokens[0] = BOS
    tokens[start : start + steps + 1] = fact
    tokens[-1] = unique[0]
    return tokens[None], fact[None, 1:]


def votes(tokens: Tensor) -> Tensor:
    """What layer 1 reads at the last token: the share of each follower.

    Every earlier occurrence of the last token has one equal vote for the token that followed it.

    Args:
        tokens: [B, T] int64, BOS first and nowhere else.

    Returns:
        [B, VOCABULARY] float64; a row sums to 1, or to 0 when the last token is new.

    Raises:
        ValueError: when BOS is missing at the start or stands elsewhere, or a token is unknown.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens have the shape {list(tokens.shape)}; expected [batch, length].")
    if not bool((tokens[:, 0] == BOS).all()) or bool((tokens[:, 1:] == BOS).any()):
        raise ValueError(f"a sequence has BOS (token {BOS}) first and nowhere else.")
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < VOCABULARY:
            raise ValueError(f"tokens go from 0 to {VOCABULARY - 1}; found {token}.")
    before, now = tokens[:, :-1], tokens[:, 1:]
    # BOS starts nothing: no head owns it
    follows = (before == tokens[:, -1:]) & (before != BOS)  # [B, T-1]
    counts = torch.zeros(tokens.shape[0], VOCABULARY, dtype=torch.float64)
    counts.scatter_add_(1, now, follows.double())
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def expected_logits(tokens: Tensor) -> Tensor:
    """The logits [B, VOCABULARY] float64 after the last of `tokens` [B, T], in closed form."""
    share = votes(tokens)
    # channels set at the end: now, before, two constants, and the answer's votes
    norm = torch.sqrt((4 + share.square().sum(1, keepdim=True)) / 4)
    logits = 32 * math.sqrt(5 / 4) * share
    logits[:, BOS] = 1 / 8
    return logits / norm


def continuation(tokens: Tensor, n: int) -> Tensor:
    """The n tokens [B, n] that greedy generation gives after `tokens` [B, T].

    The follower with most votes wins and is asked for in turn. Among equal votes this takes the
    lowest number, where the network leaves the choice to rounding. A last token without an
    earlier occurrence gives BOS, "not seen".

    Raises:
        ValueError: as `votes`; and for n > 1 when the first answer is BOS.
    """
    out = tokens
    for step in range(n):
        winner = expected_logits(out).argmax(1, keepdim=True)
        if n > 1 and step == 0 and bool((winner == BOS).any()):
            raise ValueError(
                f"a last token has not occurred before, so nothing follows it; expected n = 1, "
                f"got {n}. End on a symbol the sequence already holds."
            )
        out = torch.cat([out, winner], dim=1)
    return out[:, tokens.shape[1] :]


def _previous_token() -> dict[str, Tensor]:
    """Layer 0: head h copies its own symbols of the previous token into `before`."""
    weight = _zeros()
    frequency = _THETA ** (-torch.arange(_TURNING, dtype=torch.float64) / _PAIRS)
    for h in range(_HEADS):
        first = h * _HEAD_DIM
        # turned back by one position, so that the key at distance 1 meets it head on
        weight["q"][first : first + _TURNING, _CONSTANT] = 8 * torch.cos(frequency)
        second = first + _PAIRS
        weight["q"][second : second + _TURNING, _CONSTANT] = -8 * torch.sin(frequency)
        for symbol in range(h * _OWNED, (h + 1) * _OWNED):
            dim = symbol % (_GROUP * _OWNED)
            weight["v"][h // _GROUP * _HEAD_DIM + dim, _NOW + 1 + symbol] = 1
            weight["o"][_BEFORE + 1 + symbol, first + dim] = 1
    for g in range(_KV_HEADS):
        weight["k"][g * _HEAD_DIM : g * _HEAD_DIM + _TURNING, _CONSTANT] = 4
    # BOS as previous token, and the constant given up, ride on head 0
    dim = _GROUP * _OWNED
    weight["v"][dim, _NOW + BOS] = 1
    weight["o"][_BEFORE + BOS, dim] = 1
    weight["v"][dim + 1, _SPENT] = 1
    weight["o"][_SPENT, dim + 1] = -1
    return weight


def _match() -> dict[str, Tensor]:
    """Layer 1: head h asks for the places whose previous token is one of its own symbols."""
    weight = _zeros()
    for h in range(_HEADS):
        first, kv = h * _HEAD_DIM, h // _GROUP * _HEAD_DIM
        # even heads use the first member of a still pair, odd heads the second
        content = _PAIRS * (h % _GROUP) + _PAIRS - _OWNED
        for i in range(_OWNED):
            symbol = h * _OWNED + i
            weight["q"][first + content + i, _NOW + 1 + symbol] = 8
            weight["k"][kv + content + i, _BEFORE + 1 + symbol] = 1
        weight["q"][first + _SINK_DIM, _CONSTANT] = 4
        weight["k"][kv + _SINK_DIM, _NOW + BOS] = 1
        for symbol in range(SYMBOLS):
            weight["v"][kv + symbol, _NOW + 1 + symbol] = 1
            weight["o"][_ANSWER + symbol, first + symbol] = 1
    return weight


def _zeros() -> dict[str, Tensor]:
    """Zero projections of one attention."""
    rows = {"q": _HEADS * _HEAD_DIM, "k": _KV_HEADS * _HEAD_DIM, "v": _KV_HEADS * _HEAD_DIM}
    weight = {name: torch.zeros(n, _HIDDEN, dtype=torch.float64) for name, n in rows.items()}
    return weight | {"o": torch.zeros(_HIDDEN, _HEADS * _HEAD_DIM, dtype=torch.float64)}
