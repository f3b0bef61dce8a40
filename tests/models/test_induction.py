"""The induction model: its weights do what its docstring says, in transformers' own Llama."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memcompile.models.networks import induction

transformers = pytest.importorskip("transformers")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAGE = 64
HEAD_DIM, HEADS, KV_HEADS = 64, 4, 2
# what the keys that lose in layer 0 may leave: exp(-76) of a channel's 8
FAINT = 8 * math.exp(-76)


def load(dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
    """The model in transformers' Llama."""
    config = transformers.LlamaConfig(**induction.config(dtype=dtype))
    config._attn_implementation = attention
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.load_state_dict(induction.state_dict(dtype))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return load()


def last_logits(model, tokens: Tensor) -> Tensor:
    """Logits [B, V] after the last token."""
    with torch.no_grad():
        return model(input_ids=tokens, logits_to_keep=1).logits[:, -1]


def assert_in_closed_form(logits: Tensor, tokens: Tensor) -> None:
    """Rounding apart, the logits are the expected ones."""
    expected = induction.expected_logits(tokens)
    band = torch.finfo(logits.dtype).eps * math.sqrt(256) * expected.abs().amax()
    assert (logits.double() - expected).abs().max() <= band


def banded_cache(model, tokens: Tensor, block: int = 128):
    """The cache of `tokens` [1, T] (T a multiple of block), layer 0 reading one block back at most.

    Exact where the previous-token head reads nothing else, which the tests of its gap establish;
    it makes 128K tokens cheap.
    """
    length = tokens.shape[1]
    positions = torch.arange(-1, length).unfold(0, block + 1, block).clamp(min=0)  # [T/block, ..]
    blocks = transformers.DynamicCache()
    with torch.no_grad():
        model.model(tokens[0][positions], position_ids=positions, past_key_values=blocks)
    cache = transformers.DynamicCache()
    for i, layer in enumerate(blocks.layers):
        key, value = (
            states[:, :, 1:].transpose(0, 1).reshape(1, KV_HEADS, length, HEAD_DIM)
            for states in (layer.keys, layer.values)
        )
        cache.update(key, value, i)
    return cache


def match_query_and_keys(model, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer 1's last query [H, D] before rotation, its keys [Hkv, T-1, D], the logits [1, V]."""
    cache = banded_cache(model, tokens[:, :-1])
    key = cache.layers[1].keys[0].clone()
    seen: list[Tensor] = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    position = torch.tensor([[tokens.shape[1] - 1]])
    with torch.no_grad():
        logits = model(tokens[:, -1:], past_key_values=cache, position_ids=position).logits
    hook.remove()
    return seen[0].view(HEADS, HEAD_DIM), key, logits[:, -1]


def page_scores(query: Tensor, key: Tensor, score: str) -> Tensor:
    """Scores [pages] of one KV head: query [G, D], key [pages, PAGE, D], the best of the group.

    The records are rounded to the key's dtype, as an index keeps them.
    """
    dtype, key = key.dtype, key.double()
    query = query.double()
    mean = key.mean(1)
    std = key.std(1, correction=0).to(dtype).double()
    radius = (key - mean[:, None]).norm(dim=-1).amax(1).to(dtype).double()
    mean = mean.to(dtype).double()
    if score == "mean":
        scores = query @ mean.T
    elif score == "mean-std":
        scores = query @ mean.T + query.abs() @ std.T
    elif score == "ball":
        scores = query @ mean.T + query.norm(dim=-1)[:, None] * radius
    else:
        low, high = query[:, None] * key.amin(1), query[:, None] * key.amax(1)
        scores = torch.maximum(low, high).sum(-1)
    return scores.amax(0)


def test_saved_folder_is_a_transformers_model(tmp_path: Path) -> None:
    folder = induction.save(tmp_path / "induction", torch.bfloat16)
    model, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 2.0**96
    assert model.config.rope_parameters["rope_theta"] == 2.0**96
    tokens, answer = induction.prompt(100)
    assert torch.equal(last_logits(model, tokens).argmax(-1, keepdim=True), answer)


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("length", [4, 64, 1023])
def test_retrieves_the_answer(model, length: int, depth: float) -> None:
    for seed in range(5):
        tokens, answer = induction.prompt(length, seed, depth)
        logits = last_logits(model, tokens)
        assert torch.equal(logits.argmax(-1, keepdim=True), answer)
        assert_in_closed_form(logits, tokens)


@pytest.mark.parametrize("depth", [0.1, 0.8])
def test_retrieves_the_answer_over_8k(model, depth: float) -> None:
    tokens, answer = induction.prompt(8192, seed=7, depth=depth)
    logits = last_logits(model, tokens)
    assert torch.equal(logits.argmax(-1, keepdim=True), answer)
    assert_in_closed_form(logits, tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_retrieves_by_the_same_margin(dtype: torch.dtype, attention: str) -> None:
    tokens, answer = induction.prompt(700, seed=1, depth=0.2)
    logits = last_logits(load(dtype, attention), tokens)
    best = logits[0].float().topk(2)
    assert best.indices[0] == answer[0, 0]
    assert best.values[0] - best.values[1] > 31
    assert_in_closed_form(logits, tokens)


@pytest.mark.parametrize("length", [32768, 131072])
def test_retrieves_the_answer_at_length(model, length: int) -> None:
    tokens, answer = induction.prompt(length + 1, seed=length, depth=0.3)
    _, _, logits = match_query_and_keys(model, tokens)
    assert torch.equal(logits.argmax(-1, keepdim=True), answer)
    assert_in_closed_form(logits, tokens)


def test_banded_cache_is_the_real_one(model) -> None:
    tokens, _ = induction.prompt(513)
    _, key, logits = match_query_and_keys(model, tokens)
    with torch.no_grad():
        real = model(tokens, use_cache=True)
    real_key = real.past_key_values.layers[1].keys[0, :, :-1]
    assert (real_key - key).abs().max() < FAINT
    assert torch.equal(real.logits[:, -1], logits)


def test_every_position_votes_in_closed_form(model) -> None:
    tokens = 1 + torch.randint(induction.SYMBOLS, (3, 200))
    tokens[:, 0] = induction.BOS
    tokens[1, 1:] = 1 + tokens[1, 1:] % 3  # many occurrences and repeats
    tokens[2, 50:60] = 9
    with torch.no_grad():
        logits = model(tokens).logits
    for end in range(1, tokens.shape[1] + 1):
        assert_in_closed_form(logits[:, end - 1], tokens[:, :end])


def test_greedy_generation_follows_the_chain(model) -> None:
    tokens, answer = induction.prompt(300, seed=4, depth=0.6, steps=5)
    generated = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(generated[:, tokens.shape[1] :], answer)
    assert torch.equal(induction.continuation(tokens, 5), answer)


def test_unseen_symbol_answers_bos(model) -> None:
    tokens = torch.tensor([[induction.BOS, 5, 6, 7, 8]])
    assert last_logits(model, tokens).argmax() == induction.BOS
    assert induction.continuation(tokens, 1).tolist() == [[induction.BOS]]
    with pytest.raises(ValueError, match="has not occurred before"):
        induction.continuation(tokens, 2)


def test_every_head_is_needed_in_both_layers() -> None:
    """Query heads share the symbols: without one of them, its symbols and only those are lost."""
    for layer in range(2):
        for head in range(HEADS):
            model = load()
            output = model.model.layers[layer].self_attn.o_proj.weight
            output[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
            for symbol in (5, 20, 40, 60):
                tokens = torch.tensor([[induction.BOS, 11, symbol, 33, 52, symbol]])
                right = last_logits(model, tokens).argmax().item() == 33
                assert right == ((symbol - 1) // 16 != head)


@pytest.mark.parametrize("layer", [0, 1])
def test_norms_before_attention_are_the_identity(model, layer: int) -> None:
    tokens, _ = induction.prompt(300)
    seen: list[tuple[Tensor, Tensor]] = []
    norm = model.model.layers[layer].input_layernorm
    hook = norm.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    last_logits(model, tokens)
    hook.remove()
    before, after = seen[0]
    assert torch.equal(before, after)
    assert (before - before.round()).abs().max() < FAINT
    assert set(before.round().unique().tolist()) == {0.0, 8.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_previous_token_head_keeps_its_gap_over_128k_positions(dtype: torch.dtype) -> None:
    """The gap to any other key, with transformers' own rotations rounded to the dtype."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, length = load(dtype), 131072 + 999
    layer = model.model.layers[0]
    states = layer.input_layernorm(model.model.embed_tokens(torch.tensor([[1]])))
    query = layer.self_attn.q_proj(states).view(1, 1, HEADS, HEAD_DIM).transpose(1, 2)
    key = layer.self_attn.k_proj(states).view(1, 1, KV_HEADS, HEAD_DIM).transpose(1, 2)
    cos, sin = model.model.rotary_emb(states, torch.arange(length)[None])
    query, key = apply_rotary_pos_emb(
        query[:, :1].expand(-1, -1, length, -1), key[:, :1].expand(-1, -1, length, -1), cos, sin
    )
    rows = torch.cat([torch.arange(1, length, 4001), torch.arange(length - 16, length)])
    logits = query[0, 0, rows].float() @ key[0, 0].float().T / math.sqrt(HEAD_DIM)  # [rows, T]
    logits.masked_fill_(torch.arange(length) > rows[:, None], -math.inf)
    previous = logits.gather(1, rows[:, None] - 1)
    others = logits.scatter(1, rows[:, None] - 1, -math.inf).amax(1, keepdim=True)
    gap = float((previous - others).min())
    assert length * math.exp(-gap) < torch.finfo(torch.float32).eps ** 2
    assert gap > 70


def test_previous_token_gap_by_distance() -> None:
    """In float64 the logit is lower by more than 76 at every other distance below 2**20."""
    distance = torch.cat([torch.tensor([0.0]), torch.arange(2, 2**20)]).double()
    logit = sum(torch.cos((distance - 1) * 8.0**-i) for i in range(8))
    assert 256 * (8 - float(logit.max())) > 76


@functools.cache
def pages_and_match(dtype: torch.dtype, seed: int, depth: float) -> tuple[Tensor, Tensor, int]:
    """The asking group's queries [G, D], its KV head's keys [pages, PAGE, D], the page to find."""
    tokens, _ = induction.prompt(8 * 1024 + 1, seed, depth)
    query, key, _ = match_query_and_keys(load(dtype), tokens)
    kv_head = (int(tokens[0, -1]) - 1) // (induction.SYMBOLS // KV_HEADS)
    group = query.unflatten(0, (KV_HEADS, -1))[kv_head]
    answer = int((tokens[0] == tokens[0, -1]).nonzero()[0]) + 1
    return group, key[kv_head].unflatten(0, (-1, PAGE)), answer // PAGE


@pytest.mark.parametrize("score", ["mean", "mean-std", "box", "ball"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_page_with_the_match_ranks_first(dtype: torch.dtype, score: str) -> None:
    for seed, depth in enumerate([0.05, 0.5, 0.9]):
        query, key, page = pages_and_match(dtype, seed, depth)
        scores = page_scores(query, key, score)
        # page 0 holds BOS and is always read
        others = torch.cat([scores[1:page], scores[page + 1 :]])
        assert scores[page] > others.max()
        if score != "ball":
            assert others.max() < torch.finfo(torch.float32).eps ** 2 * scores[page]


def test_float32_is_as_close_to_float64_as_rounding_allows(model) -> None:
    tokens, _ = induction.prompt(500, seed=2, depth=0.4)
    exact = last_logits(load(torch.float64), tokens)
    error = (last_logits(model, tokens).double() - exact).abs().max()
    assert error <= torch.finfo(torch.float32).eps * math.sqrt(256) * exact.abs().max()


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompt_holds_one_fact(depth: float, steps: int) -> None:
    length = 150
    tokens, answer = induction.prompt(length, 3, depth, steps)
    assert tokens.shape == (1, length) and answer.shape == (1, steps)
    row, key = tokens[0].tolist(), int(tokens[0, -1])
    assert row[0] == induction.BOS and induction.BOS not in row[1:]
    start = row.index(key)
    assert [i for i, token in enumerate(row) if token == key] == [start, length - 1]
    assert row[start + 1 : start + 1 + steps] == answer[0].tolist()
    assert all(row.count(token) == 1 for token in answer[0, :-1].tolist())
    assert start == 1 + round(depth * (length - steps - 3))
    assert torch.equal(tokens, induction.prompt(length, 3, depth, steps)[0])
    assert not torch.equal(tokens, induction.prompt(length, 4, depth, steps)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 3}, "need 4"),
        ({"length": 50, "depth": 1.5}, "depth is 1.5"),
        ({"length": 50, "steps": 0}, "steps is 0"),
        ({"length": 50, "steps": 33}, "expected 1 to 32"),
    ],
)
def test_prompt_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        induction.prompt(**options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2, 3]], "BOS"),
        ([[0, 2, 0, 2]], "nowhere else"),
        ([[0, 65]], "found 65"),
        ([[0, -1]], "found -1"),
        ([0, 1], "expected \\[batch, length\\]"),
    ],
)
def test_votes_refuse(tokens: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        induction.votes(torch.tensor(tokens))


def test_votes_are_shares_of_the_followers() -> None:
    tokens = torch.tensor(
        [[0, 1, 2, 1, 3, 1, 2, 1], [0, 4, 4, 4, 4, 4, 4, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
    )
    share = induction.votes(tokens)
    assert share[0, 2] == 2 / 3 and share[0, 3] == 1 / 3
    assert share[1, 4] == 1
    assert not share[2].any()
