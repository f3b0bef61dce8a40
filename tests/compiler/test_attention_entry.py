"""transformers' models whose attention function is a policy: eager's tokens, the backend's logits,
caches that change, and what is refused or read densely."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers_case import ALL, DENSE, MODELS, SCOUT, SPARSE, VOCABULARY

import memcompile
from memcompile.compiler import backend
from memcompile.runtime.attention_interface import CachedAttention
from memcompile.runtime.cache_index import Indexes

CACHES = ("static", "dynamic")
LONG = pytest.mark.long
FIRST = ("scout", "static")
GATE = {
    *(("llama", "scout", "static"), ("llama", "dense", "dynamic"), ("gpt2", "scout", "dynamic")),
    *(("qwen3", "scout", "static"), ("mistral", "scout", "static")),
}


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop("memcompile", None)


def model_of(name: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    return MODELS[name](**more).eval()


def read_by(model: Any, options: dict[str, Any]) -> CachedAttention:
    """The model from now on reads through this policy; what counts its calls."""
    entry = memcompile.register_attention(**options)
    model.set_attn_implementation("memcompile")
    return entry


def some_tokens(batch: int = 2, length: int = 60) -> Tensor:
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, length), generator=drawn)


def new_cache(kind: str, model: Any, length: int = 96) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=length)


def stepped(model: Any, cache: Any, tokens: Tensor, at: int, step: int = 1, **more: Any) -> Tensor:
    """Logits [B, T - at, V] of the tokens behind a prompt, a call for each `step` of them."""
    made = []
    with torch.no_grad():
        model(tokens[:, :at], past_key_values=cache, **more)
        for first in range(at, tokens.shape[1], step):
            rows = tokens[:, first : first + step]
            made.append(model(rows, past_key_values=cache, **more).logits)
    return torch.cat(made, 1)


# --- the tokens and logits of others ---


@pytest.mark.parametrize(
    ("name", "options", "cache"),
    [
        pytest.param(
            *(name, options, cache),
            id=f"{name}-{options['policy']}-{cache}",
            marks=() if (name, options["policy"], cache) in GATE else LONG,
        )
        for name in MODELS
        for options in (DENSE, ALL)
        for cache in CACHES
    ],
)
def test_generate_gives_eagers_tokens(name: str, options: dict[str, Any], cache: str) -> None:
    model = model_of(name)
    tokens = some_tokens(2, 17)
    mask = torch.ones_like(tokens)
    tokens[0, :6], mask[0, :6] = 0, 0  # padded on the left

    def generated() -> Tensor:
        made: Tensor = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=40,
            do_sample=False,
            cache_implementation=None if cache == "dynamic" else "static",
        )
        return made

    expected = generated()
    entry = read_by(model, options)
    assert torch.equal(generated(), expected)
    calls = entry.calls
    assert (calls.policy, calls.dense, calls.rebuilt) == (2 * 39, 2, 0)
    assert calls.pages_read == calls.pages_held
    assert (calls.pages_held > 0) == (options is ALL)


@pytest.mark.parametrize(
    ("policy", "cache"),
    [
        FIRST,
        *(pytest.param(p, c, marks=LONG) for p in SPARSE for c in CACHES if (p, c) != FIRST),
    ],
)
def test_a_policy_reads_what_the_backend_reads(
    policy: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_compiled", lambda gm, inputs, patches: gm)
    torch._dynamo.reset()
    memcompile.graphs(clear=True)
    tokens = some_tokens()
    model = model_of()
    given = {key: value for key, value in SPARSE[policy].items() if key != "policy"}

    entry = read_by(model, SPARSE[policy])
    ours = stepped(model, new_cache(cache, model), tokens, 40)
    calls = entry.calls.to_json()
    exact = copy.deepcopy(model).double()
    truth = stepped(exact, new_cache(cache, exact), tokens, 40)
    model.set_attn_implementation("sdpa")
    model.compile(backend="memcompile", options={"policy": policy, **given})
    theirs = stepped(model, new_cache(cache, model), tokens, 40)
    graphs = [graph for graph in memcompile.graphs() if graph.kind == "cached"]
    for name in ("pages_read", "pages_held"):
        assert calls[name] == sum(getattr(graph.calls, name) for graph in graphs)
    assert 0 < calls["pages_read"] < calls["pages_held"]
    assert_close_to_float64(ours, theirs, truth, reduction=60 * 8)
    assert calls["dense"] == 2 and calls["policy"] == 2 * 20
    torch._dynamo.reset()


def test_generated_kernels_read_the_same() -> None:
    """The references' logits; kernels of these shapes are built once and kept."""
    model, tokens = model_of(), some_tokens()
    caches = [new_cache("static", model) for _ in range(2)]
    entry = read_by(model, {**SCOUT, "kernels": "required"})
    built = stepped(model, caches[0], tokens, 40)
    read_by(model, SCOUT)
    plain = stepped(model, caches[1], tokens, 40)
    exact = model.double()
    read_by(exact, SCOUT)
    truth = stepped(exact, new_cache("static", exact), tokens, 40)
    assert_close_to_float64(built, plain, truth, reduction=60 * 8)
    assert 0 < entry.calls.pages_read < entry.calls.pages_held


@pytest.mark.parametrize("cache", CACHES)
def test_several_tokens_a_call_and_inference_mode(cache: str) -> None:
    model, tokens = model_of(), some_tokens()
    read_by(model, SCOUT)
    single = stepped(model, new_cache(cache, model), tokens, 40)
    exact = copy.deepcopy(model).double()
    truth = stepped(exact, new_cache(cache, exact), tokens, 40)
    with torch.inference_mode():
        several = stepped(model, new_cache(cache, model), tokens, 40, step=4)
    assert_close_to_float64(several, single, truth, reduction=60 * 8)


# --- the index beside a cache ---


def test_steps_compare_no_cache_that_is_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    verified = Indexes._verified

    def counted(self: Indexes, sites: Any, *rest: Any) -> Any:
        compared.append(sites[0][0])
        return verified(self, sites, *rest)

    monkeypatch.setattr(Indexes, "_verified", counted)
    model, tokens = model_of(), some_tokens()
    read_by(model, SCOUT)
    stepped(model, new_cache("static", model), tokens, 40)
    assert compared == [0, 1]  # when they were first seen
    compared.clear()
    # A growing cache is a new tensor at each step. The first layer's keys tell nothing of the
    # tokens before them, and are compared.
    stepped(model, new_cache("dynamic", model), tokens, 40)
    assert compared == [0, 1, *[0] * 19]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dynamic", "crop"),
        *((kind, c) for kind in CACHES for c in ("reorder", "reset", "written", "other")),
    ],
)
def test_a_changed_cache_is_noticed(kind: str, change: str) -> None:
    """What is read next is what a new index of the same cache reads."""
    model, tokens = model_of(), some_tokens()
    read_by(model, SCOUT)
    cache = new_cache(kind, model)
    stepped(model, cache, tokens[:, :56], 40)
    last = tokens[:, 56:57]
    if change == "crop":
        cache.crop(-20)
    elif change == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    elif change == "reset":
        cache.reset()
        with torch.no_grad():
            model(tokens.flip(1)[:, :50], past_key_values=cache)
    elif change == "written":
        with torch.no_grad():
            for layer in cache.layers:
                layer.keys[:, :, 8:24] += 1
                # A growing cache has no count that lives on; this says it.
        if kind == "dynamic":
            assert memcompile.invalidate(cache) == 2
    else:
        cache = new_cache(kind, model)
        with torch.no_grad():
            model(tokens[:, :30], past_key_values=cache)
            model(tokens[:, 30:56].flip(0), past_key_values=cache)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        ours = model(last, past_key_values=cache).logits
        fresh = read_by(model, SCOUT)
        expected = model(last, past_key_values=twin).logits
    assert torch.equal(ours, expected)
    assert 0 < fresh.calls.pages_read < fresh.calls.pages_held


def test_two_conversations_take_turns() -> None:
    model, tokens = model_of(), some_tokens(1)
    read_by(model, SCOUT)
    other = tokens.flip(1)
    alone = [stepped(model, new_cache("dynamic", model), t, 40) for t in (tokens, other)]
    caches = [new_cache("dynamic", model) for _ in range(2)]
    made: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for cache, t in zip(caches, (tokens, other), strict=True):
            model(t[:, :40], past_key_values=cache)
        for at in range(40, 60):
            for i, t in enumerate((tokens, other)):
                logits = model(t[:, at : at + 1], past_key_values=caches[i]).logits
                made[i].append(logits)
    for i in range(2):
        assert torch.equal(torch.cat(made[i], 1), alone[i])


# --- what is read densely, and what is refused ---


def why_dense(model: Any, cache: Any = None, **more: Any) -> dict[str, int]:
    entry = read_by(model, ALL)
    stepped(model, cache or new_cache("dynamic", model), some_tokens(2, 44), 40, **more)
    assert str(entry).startswith("policy 'scout': ")
    assert all(why in str(entry) for why in entry.calls.why_dense)
    return dict(entry.calls.why_dense)


def test_dense_reads_say_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="memcompile")
    first = {"the first tokens of a context": 2}
    assert why_dense(model_of()) == first
    said = [r.getMessage() for r in caplog.records]
    assert said == ["attention of LlamaAttention reads densely: the first tokens of a context"]
    hole = torch.ones(2, 44, dtype=torch.long)
    hole[0, 20:24] = 0
    model = model_of()
    assert why_dense(model) == first
    entry = read_by(model, ALL)
    cache = new_cache("dynamic", model)
    with torch.no_grad():
        model(some_tokens(2, 40), past_key_values=cache)
        model(some_tokens(2, 1), past_key_values=cache, attention_mask=hole[:, :41])
        model(some_tokens(2, 20), past_key_values=cache)
    assert entry.calls.why_dense == {
        **first,
        "the mask hides keys in the midst of a context": 2,
        "more than 9 tokens at a time": 2,  # the window and one
    }
    mistral = model_of("mistral", sliding_window=24)
    assert why_dense(mistral) == {"its layer has a sliding window of its own": 10}
    short = read_by(model, {**ALL, "page_size": 64, "sinks": 64, "window": 64})
    stepped(model, new_cache("dynamic", model), some_tokens(2, 44), 40)
    assert short.calls.why_dense == {**first, "the cache is shorter than a page of 64": 8}


def test_dense_reads_are_those_of_sdpa() -> None:
    """Masked, windowed, and with gradients: nothing of ours is in between."""
    tokens = some_tokens(2, 30)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    for name, more in (("llama", {}), ("mistral", {"sliding_window": 12})):
        model = model_of(name, **more)
        entry = None
        results = []
        for _ in range(2):
            model.zero_grad()
            made = model(tokens, attention_mask=mask, labels=tokens, use_cache=False)
            made.loss.backward()
            weight = next(model.parameters())
            results.append((made.logits.detach(), weight.grad.clone()))
            entry = entry or read_by(model, ALL)
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        assert list(entry.calls.why_dense) == [
            "it is differentiated: for inference, call the model under torch.no_grad()"
        ]


def called(**more: Any) -> Any:
    """One call of the function, as a layer of transformers makes it."""
    torch.manual_seed(0)
    module = model_of().model.layers[0].self_attn
    query, key, value = (torch.randn(1, heads, n, 8) for heads, n in ((4, 1), (2, 40), (2, 40)))
    given = {"attention_mask": None, "scaling": module.scaling, "dropout": 0.0, **more}
    function = AttentionInterface()["memcompile"]
    with torch.no_grad():
        return function(module, query, key, value, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"softcap": 50.0}, r"layer 0 caps its attention logits \(softcap\).*another attn_impl"),
        ({"s_aux": torch.ones(4)}, r"learned attention sinks \(s_aux\)"),
        ({"position_bias": torch.ones(1, 4, 1, 40)}, r"a bias to its attention logits"),
        ({"cache": object()}, r"the paged cache of continuous batching"),
        ({"output_attentions": True}, r"no weights to return; set attn_implementation='eager'"),
    ],
)
def test_what_no_policy_reads_is_refused(given: dict[str, Any], message: str) -> None:
    memcompile.register_attention(**ALL)
    with pytest.raises(ValueError, match=message):
        called(**given)


def test_calls_are_told_apart_by_their_arguments() -> None:
    entry = memcompile.register_attention(**ALL)
    out, weights = called()
    assert out.shape == (1, 1, 4, 8) and weights is None and entry.calls.policy == 1
    called(is_causal=False)
    called(attention_mask=torch.ones(1, 4, 1, 40, dtype=torch.bool))
    called(dropout=0.5)
    assert entry.calls.why_dense == {
        "it is not causal": 1,
        "its mask is [1, 4, 1, 40]; expected one for all heads": 1,
        "attention has dropout": 1,
    }


def test_it_takes_what_transformers_own_functions_take() -> None:
    """The contract: callers fill these names, and may add keywords of their own."""
    memcompile.register_attention()
    own = inspect.signature(AttentionInterface()["sdpa"]).parameters
    ours = inspect.signature(CachedAttention.__call__).parameters
    named = [p for p in list(own)[:5]]
    assert [*ours][1:6] == named
    assert {p.kind for p in ours.values()} >= {inspect.Parameter.VAR_KEYWORD}
    for name in ("dropout", "scaling", "is_causal"):
        assert ours[name].default == own[name].default
    assert AttentionInterface().get_interface("memcompile", None) is not None
    assert AttentionMaskInterface()["memcompile"] is AttentionMaskInterface()["sdpa"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "scoot"}, "unknown policy 'scoot'"),
        ({"policy": "scout", "budgett": 4}, "budgett"),
        ({"policy": "hybrid"}, "policy 'hybrid' keeps a state.*use memcompile.compile"),
        ({"policy": "heavy-hitter"}, "policy 'heavy-hitter' keeps an account"),
        ({"decode_tokens": 0}, "decode_tokens is 0; give a whole number of at least 1"),
        ({"kernels": "some"}, "kernels is 'some'; known: auto, required, off"),
        ({"name": "sdpa"}, "'sdpa' is an attention function of somebody else's"),
        ({"name": "eager"}, "'eager' is an attention function of somebody else's"),
        ({"name": ""}, "name is ''; give what attn_implementation is to say"),
    ],
)
def test_what_cannot_be_registered(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memcompile.register_attention(**given)
    assert "memcompile" not in AttentionInterface()


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'memcompile\[hf\]'"):
        memcompile.register_attention()


def test_a_name_is_registered_anew_and_others_stand_beside_it() -> None:
    model, tokens = model_of(), some_tokens()
    first = read_by(model, SCOUT)
    second = memcompile.register_attention(**ALL)
    third = memcompile.register_attention(**ALL, name="memcompile-all")
    stepped(model, new_cache("dynamic", model), tokens, 58)
    model.set_attn_implementation("memcompile-all")
    stepped(model, new_cache("dynamic", model), tokens, 58)
    assert [entry.calls.policy for entry in (first, second, third)] == [0, 4, 4]
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop("memcompile-all")


@pytest.mark.long
def test_dynamo_breaks_its_graph_there() -> None:
    model, tokens = model_of(), some_tokens()
    expected = stepped(model, new_cache("static", model), tokens, 56)
    entry = read_by(model, ALL)
    model.compile(backend="eager")
    made = stepped(model, new_cache("static", model), tokens, 56)
    exact = model_of().double()
    truth = stepped(exact, new_cache("static", exact), tokens, 56)
    assert_close_to_float64(made, expected, truth, reduction=60 * 8)
    assert entry.calls.policy == 2 * 4
