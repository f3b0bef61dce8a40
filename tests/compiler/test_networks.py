"""Networks people use, tiny and random: the dense engine is the model, scout is itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import assert_logits, calls_of, forward, odd_calls, random_tokens, stepped
from tolerance import assert_close_to_float64
from torch import Tensor, nn

import memcompile
from memcompile.compiler.pipeline import Compiled, build
from memcompile.models.networks.decoders.frame import Decoder, PositionedDecoder
from memcompile.models.networks.decoders.styles import LlamaTables, NanoGpt
from memcompile.passes.result import NotRewritten

transformers = pytest.importorskip("transformers")

VOCABULARY = 29
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
GPT = {
    "vocab_size": VOCABULARY,
    "attn_pdrop": 0.1,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16}),
    "neox": (
        "GPTNeoX",
        {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"rotary_pct": 0.5},
    ),
    "gpt2": ("GPT2", GPT),
    "opt": ("OPT", OPT),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 9}),
}
HEADS = {"gpt2": "GPT2LMHeadModel"}
NETWORKS = [f"{name}-{kind}" for name in CONFIGS for kind in ("sdpa", "eager")] + [
    "nanogpt",
    "llama.c",
]
LAYERS = {
    name: {key: 1 for key in options if key in ("num_hidden_layers", "n_layer")}
    for name, (_, options) in CONFIGS.items()
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def scaled_up(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_" in name:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
            elif parameter.dim() < 2:
                parameter.copy_(0.2 * noise)
            elif "emb" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(1.5 * parameter.shape[-1] ** -0.5 * noise)
    return model.eval()


def network(name: str, **changes: Any) -> nn.Module:
    if name == "nanogpt":
        return NanoGpt(3)
    if name == "llama.c":
        return LlamaTables(3)
    family, kind = name.split("-")
    prefix, options = CONFIGS[family]
    config = getattr(transformers, f"{prefix}Config")(
        **{**options, **changes}, attn_implementation=kind
    )
    return scaled_up(getattr(transformers, HEADS.get(family, f"{prefix}ForCausalLM"))(config))


@cache
def dense(name: str, dtype: str = "float32") -> tuple[Compiled, nn.Module]:
    """The dense compilation of a network, checked, and the network; made once."""
    # One layer in 16 bit: what is tried there is the arithmetic, not the graph.
    changes = LAYERS[name.split("-")[0]] if dtype != "float32" and "-" in name else {}
    model = network(name, **changes).to(DTYPES[dtype])
    return build(model, "dense", page_size=8), model


@cache
def scout(name: str) -> tuple[Compiled, nn.Module]:
    """A scout that must choose: six pages at most, of up to fifteen at the lengths used here."""
    model = network(name)
    options = {"page_size": 8, "sinks": 8, "window": 16, "budget": 48, "dense_layers": 0}
    return build(model, "scout", **options), model


def longest(model: nn.Module) -> int:
    return min(61, model.context) if isinstance(model, Decoder) else 61


def takes_positions(model: nn.Module) -> bool:
    return not isinstance(model, Decoder) or isinstance(model, PositionedDecoder)


SITES = pytest.mark.parametrize("name", NETWORKS)
# Written out, attention is another graph to find, which the dense engine in float32 shows for every
# network; what follows from it is tried with SDPA, and in the long suite with both.
FEWER_SITES = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name.endswith("-eager") else name
        for name in NETWORKS
    ],
)


@SITES
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_is_eager_at_odd_chunks(name: str, batch: int) -> None:
    compiled, model = dense(name)
    tokens = random_tokens(VOCABULARY, batch, longest(model), seed=batch)
    calls = odd_calls(tokens.shape[1], batch)
    assert_logits(model, stepped(compiled.engine(), tokens, calls, prefill=True), tokens)


@SITES
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.long)])
def test_dense_is_eager_token_by_token(name: str, batch: int) -> None:
    compiled, model = dense(name)
    tokens = random_tokens(VOCABULARY, batch, 23, seed=9)
    assert_logits(model, stepped(compiled.engine(), tokens, calls_of(23, 1)), tokens)


@FEWER_SITES
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dense_is_eager_in_sixteen_bits(name: str, dtype: str) -> None:
    compiled, model = dense(name, dtype)
    for batch, sizes in ((1, [1]), (3, odd_calls(23))):
        tokens = random_tokens(VOCABULARY, batch, 23, seed=batch)
        assert_logits(model, stepped(compiled.engine(), tokens, calls_of(23, *sizes)), tokens)


@SITES
def test_prefill_returns_the_last_logits(name: str) -> None:
    compiled, model = dense(name)
    tokens = random_tokens(VOCABULARY, 2, 17)
    assert_logits(model, compiled.engine().prefill(tokens), tokens, start=16)


@SITES
def test_ragged_rows_are_each_row_alone(name: str) -> None:
    """Rows of unlike length, where positions are an input; a clear refusal where they are not."""
    compiled, model = dense(name)
    engine = compiled.engine()
    tokens = random_tokens(VOCABULARY, 3, 40, seed=4)
    if not takes_positions(model):
        with pytest.raises(ValueError, match="share one position"):
            engine(tokens, lengths=[40, 3, 7])
        return
    seen = [0, 0, 0]
    parts: list[list[Tensor]] = [[], [], []]
    for lengths in ([11, 3, 7], [1, 1, 1], [5, 9, 0], [1, 1, 1], [2, 4, 13]):
        piece = torch.full((3, max(lengths)), 5)
        for row, length in enumerate(lengths):
            piece[row, :length] = tokens[row, seen[row] : seen[row] + length]
        logits = engine(piece, lengths=lengths)
        for row, length in enumerate(lengths):
            parts[row].append(logits[row, :length])
            seen[row] += length
    assert engine.position == seen
    for row in range(3):
        alone = tokens[row : row + 1, : seen[row]]
        assert_logits(model, torch.cat(parts[row])[None], alone)


@pytest.mark.parametrize("name", ["llama-sdpa", "mistral-eager", "nanogpt"])
def test_rewind_fork_and_reset(name: str) -> None:
    compiled, model = dense(name)
    tokens = random_tokens(VOCABULARY, 2, 40, seed=6)
    other = tokens.clone()
    other[:, 21:] = (other[:, 21:] + 1) % VOCABULARY
    engine = compiled.engine()
    engine.prefill(tokens[:, :24])
    engine.rewind(3)
    assert engine.position == [21, 21]
    branch = engine.fork()
    assert_logits(model, stepped(engine, tokens[:, 21:], [1, 3, 15]), tokens, start=21)
    assert_logits(model, stepped(branch, other[:, 21:], [5, 1, 13]), other, start=21)
    branch.reset()
    assert branch.position == []
    assert_logits(model, branch(tokens[:1, :9]), tokens[:1, :9])
    with pytest.raises(ValueError, match="cannot take back"):
        branch.rewind(10)


def test_generate_continues_greedily() -> None:
    compiled, model = dense("llama-sdpa")
    tokens = random_tokens(VOCABULARY, 2, 9, seed=2)
    out = compiled.engine().generate(tokens, 12)
    assert out.shape == (2, 21) and torch.equal(out[:, :9], tokens)
    logits = forward(model, out)[:, 8:-1]
    chosen = logits.gather(-1, out[:, 9:, None]).squeeze(-1)
    top = logits.topk(2, dim=-1).values
    sure = top[..., 0] - top[..., 1] > torch.finfo(torch.float32).eps * 1000 * top.abs().max()
    assert bool(sure.any()), "some step has a clear winner"
    assert torch.equal(chosen[sure], top[..., 0][sure])


@FEWER_SITES
def test_scout_with_everything_is_dense(name: str) -> None:
    model = network(name)
    options = {"page_size": 8, "sinks": 8, "window": 16, "dense_layers": 0}
    engine = build(model, "scout", budget=None, compensate=False, check=False, **options).engine()
    tokens = random_tokens(VOCABULARY, 2, 61, seed=5)
    assert_logits(model, stepped(engine, tokens, odd_calls(61, 5)), tokens)


def test_scout_leaves_pages_unread_and_says_so() -> None:
    compiled, model = scout("llama-sdpa")
    tokens = random_tokens(VOCABULARY, 2, 117, seed=5)
    engine = compiled.engine()
    logits = stepped(engine, tokens, [117])
    stats = engine.stats()
    assert 0 < stats.pages_read < stats.pages_dense
    with pytest.raises(AssertionError, match="exceeds 2 x eager's"):
        assert_logits(model, logits, tokens)


SCOUTS = ("llama-sdpa", "neox-eager", "mistral-sdpa")


@cache
def token_by_token(name: str, prefilled: int) -> tuple[Tensor, Tensor]:
    """A scout's tokens [2, 95] and logits behind `prefilled` tokens, one call a token."""
    tokens = random_tokens(VOCABULARY, 2, 95, seed=8)
    engine = scout(name)[0].engine()
    if prefilled:
        engine.prefill(tokens[:, :prefilled])
    rest = tokens[:, prefilled:]
    return tokens, stepped(engine, rest, calls_of(rest.shape[1], 1))


@pytest.mark.parametrize("name", SCOUTS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    prefilled=st.sampled_from([0, 33]),
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=7),
)
def test_scout_chunked_is_scout_token_by_token(name: str, prefilled: int, sizes: list[int]) -> None:
    """However the questions are split, every token reads what it would read alone."""
    compiled, model = scout(name)
    tokens, single = token_by_token(name, prefilled)
    rest = tokens[:, prefilled:]
    engine = compiled.engine()
    if prefilled:
        engine.prefill(tokens[:, :prefilled])
    chunked = stepped(engine, rest, calls_of(rest.shape[1], *sizes))
    eager = forward(model, tokens)
    truth = forward(model.double(), tokens)
    model.float()
    noise = eager.double() - truth
    assert_close_to_float64(
        chunked, (single.double() + noise[:, prefilled:]).float(), single.double(), reduction=95
    )


@pytest.mark.parametrize("name", SCOUTS[:2])
def test_scout_rows_do_not_see_each_other(name: str) -> None:
    compiled, model = scout(name)
    tokens = random_tokens(VOCABULARY, 3, 95, seed=8)
    together, alone = compiled.engine(), compiled.engine()
    both = stepped(together, tokens, odd_calls(95, 1))
    only = stepped(alone, tokens[1:2], odd_calls(95, 2))
    noise = forward(model.double(), tokens) - forward(model.float(), tokens)
    assert_close_to_float64(
        both[1:2], (only.double() + noise[1:2]).float(), only.double(), reduction=95
    )


@pytest.mark.parametrize("made", [dense, scout])
def test_a_sliding_window_keeps_its_memory_bounded(
    made: Callable[[str], tuple[Compiled, nn.Module]],
) -> None:
    compiled, _ = made("mistral-sdpa")
    engine = compiled.engine()
    held = []
    for piece in random_tokens(VOCABULARY, 2, 400, seed=1).split(40, dim=1):
        stepped(engine, piece, odd_calls(40))
        held.append(engine.memory_bytes())
    # The page table names every page of the sequence; the pages themselves are recycled.
    one_token = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in compiled.sites) * 2 * 4
    assert held[-1] - held[1] < 320 * one_token / 4
    assert engine.position == [400, 400]


def test_a_long_walk_through_a_sliding_window_stays_right() -> None:
    compiled, model = dense("mistral-sdpa")
    tokens = random_tokens(VOCABULARY, 1, 150, seed=3)
    assert_logits(model, stepped(compiled.engine(), tokens, odd_calls(150, 3)), tokens)


def test_rewinding_past_recycled_pages_is_refused() -> None:
    compiled, _ = dense("mistral-sdpa")
    engine = compiled.engine()
    for piece in random_tokens(VOCABULARY, 1, 80).split(8, dim=1):
        engine(piece)
    with pytest.raises(ValueError, match="window"):
        engine.rewind(60)
    assert engine.position == [80]


def dynamic_llama() -> nn.Module:
    return network(
        "llama-sdpa",
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
    )


def test_dynamic_ntk_is_declined_without_a_context() -> None:
    with pytest.raises(NotRewritten, match="max_context") as refused:
        memcompile.compile(dynamic_llama(), policy="dense", page_size=8)
    assert any("dynamic" in declined.reason for declined in refused.value.declined)


def test_dynamic_ntk_is_right_at_its_context() -> None:
    context = 48
    model = dynamic_llama()
    engine = memcompile.compile(model, policy="dense", page_size=8, max_context=context)
    tokens = random_tokens(VOCABULARY, 2, context, seed=7)
    assert_logits(dynamic_llama(), stepped(engine, tokens, odd_calls(context)), tokens)
    with pytest.raises(ValueError, match="max_context"):
        engine(tokens[:, :1])
    assert_logits(dynamic_llama(), forward(model, tokens), tokens)


@pytest.mark.parametrize(
    ("name", "context"), [("gpt2-sdpa", 128), ("opt-sdpa", 128), ("nanogpt", 64), ("llama.c", 64)]
)
def test_the_context_ends_where_the_table_ends(name: str, context: int) -> None:
    compiled, model = dense(name)
    engine = compiled.engine()
    tokens = random_tokens(VOCABULARY, 1, context + 1, seed=context)
    engine.prefill(tokens[:, : context - 1])
    last = engine(tokens[:, context - 1 : context])
    assert_logits(model, last, tokens[:, :context], start=context - 1)
    with pytest.raises(ValueError, match=str(context)):
        engine(tokens[:, context:])
    assert engine.position == [context]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.float(),
        lambda t: t[0],
        lambda t: t[:, :0],
        lambda t: t.tolist(),
        lambda t: t[:1],
    ],
    ids=["float", "one axis", "empty", "list", "other batch"],
)
def test_what_is_not_tokens_is_refused(change: Callable[[Tensor], Any]) -> None:
    engine = dense("llama-sdpa")[0].engine()
    tokens = random_tokens(VOCABULARY, 2, 5)
    engine(tokens)
    with pytest.raises(ValueError, match=r"int64|token|rows"):
        engine(change(tokens))
    assert engine.position == [5, 5]


def test_the_model_is_left_as_it_was() -> None:
    model = network("llama-sdpa", num_hidden_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = random_tokens(VOCABULARY, 1, 9)
    logits = forward(model, tokens)
    stepped(memcompile.compile(model, policy="dense", page_size=8), tokens, [4, 5])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(forward(model, tokens), logits)
    assert model.config.use_cache
