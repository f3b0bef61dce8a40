"""transformers' generate through the `torch.compile` backend: eager's tokens, a few graphs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tolerance import assert_close_to_float64
from torch import Tensor
from transformers_case import ALL, DENSE, MODELS, SPARSE, VOCABULARY

import memcompile
from memcompile.compiler import backend
from memcompile.runtime.cache_index import Indexes

CACHES = ("static", "dynamic")
LONG = pytest.mark.long


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    memcompile.graphs(clear=True)
    yield
    torch._dynamo.reset()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run operation by operation, which spares Inductor's seconds."""
    monkeypatch.setattr(backend, "_compiled", lambda gm, inputs, patches: gm)


def pair(name: str = "llama", options: dict[str, Any] = ALL, **more: Any) -> tuple[Any, Any]:
    """A model, and the same compiled."""
    torch.manual_seed(0)
    eager = MODELS[name](**more).eval()
    ours = copy.deepcopy(eager)
    ours.compile(backend="memcompile", options=options)
    return eager, ours


def prompt(batch: int = 2, length: int = 17, seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=drawn)


def padded(batch: int = 3, length: int = 17) -> dict[str, Tensor]:
    ids = prompt(batch, length)
    mask = torch.ones_like(ids)
    for row, columns in ((0, 6), (batch - 1, 1)):
        ids[row, :columns], mask[row, :columns] = 0, 0
    return {"inputs": ids, "attention_mask": mask}


def new_cache(kind: str, model: Any, length: int = 96) -> Any:
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=length)


def generated(model: Any, cache: str = "dynamic", *, new: int = 40, **options: Any) -> Tensor:
    options.setdefault("inputs", prompt())
    if "past_key_values" not in options:
        options["cache_implementation"] = None if cache == "dynamic" else "static"
    torch.manual_seed(1)
    tokens: Tensor = model.generate(
        max_new_tokens=new, disable_compile=True, **{"do_sample": False, **options}
    )
    return tokens


def stepped(model: Any, kind: str, ids: Tensor, at: int, **options: Any) -> Tensor:
    """Logits [B, T - at, V] of the tokens behind a prompt, one call each."""
    cache = new_cache(kind, model, **options)
    with torch.no_grad():
        model(ids[:, :at], past_key_values=cache)
        steps = [
            model(ids[:, p : p + 1], past_key_values=cache).logits for p in range(at, ids.shape[1])
        ]
    return torch.cat(steps, 1)


def rewritten() -> list[Any]:
    """The reports of graphs that read a cache; every attention of theirs does."""
    found = [graph for graph in memcompile.graphs() if graph.kind == "cached"]
    assert found and all(graph.rewritten == graph.attentions == 2 for graph in found)
    return found


def forget() -> None:
    """Every index is made anew at the next call."""
    for indexes in Indexes.everywhere():
        indexes.drop(lambda index: True)


# --- eager's tokens, and how many graphs ---


def same_and_constant(name: str, cache: str, options: dict[str, Any], **more: Any) -> None:
    eager, ours = pair(name, options, **more)

    def run(model: Any, new: int) -> Tensor:
        # Caches of one size: another would be another tensor, with graphs of its own.
        held = new_cache(cache, model, 530)
        return generated(model, new=new, past_key_values=held, **padded(2))

    short = run(ours, 40)
    graphs = len(memcompile.graphs())
    long = run(ours, 512)
    assert len(memcompile.graphs()) == graphs
    assert torch.equal(long, run(eager, 512))
    assert torch.equal(short, long[:, : short.shape[1]])
    calls = [graph.calls for graph in rewritten()]
    assert sum(c.policy for c in calls) == 39 + 511
    assert not any(c.dense or c.rebuilt for c in calls)
    held = sum(c.pages_held for c in calls)
    assert sum(c.pages_read for c in calls) == held > 0 or options is DENSE


@pytest.mark.parametrize("cache", CACHES)
def test_512_tokens_by_a_constant_number_of_graphs(uncompiled: None, cache: str) -> None:
    same_and_constant("llama", cache, ALL)


def test_through_inductor() -> None:
    eager, ours = pair("llama", {**SPARSE["scout"], "budget": 1024})
    assert torch.equal(generated(ours, "static"), generated(eager, "static"))
    assert sum(graph.calls.policy for graph in rewritten()) == 39


@LONG
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", [ALL, DENSE], ids=["scout", "dense"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_512_tokens_of_every_model(
    name: str, attention: str, options: dict[str, Any], cache: str
) -> None:
    same_and_constant(name, cache, options, attn_implementation=attention)


@pytest.mark.parametrize(
    ("name", "attention", "cache"),
    [
        ("llama", "eager", "static"),
        ("gpt2", "eager", "dynamic"),
        ("qwen3", "sdpa", "static"),
        ("mistral", "sdpa", "static"),
        *(
            pytest.param(name, attention, cache, marks=LONG)
            for name in MODELS
            for attention in ("sdpa", "eager")
            for cache in CACHES
        ),
    ],
)
def test_tokens_are_eagers(uncompiled: None, name: str, attention: str, cache: str) -> None:
    eager, ours = pair(name, attn_implementation=attention)
    given = padded()
    assert torch.equal(generated(ours, cache, **given), generated(eager, cache, **given))
    assert not any(graph.calls.dense or graph.calls.rebuilt for graph in rewritten())


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "padded beams": {**padded(), "num_beams": 2, "length_penalty": 0.5},
    "sampling": {**padded(), "do_sample": True, "num_return_sequences": 2},
    "lookup": {"inputs": prompt(1, 5).repeat(1, 5), "prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize(
    ("way", "cache"),
    [
        ("beams", "dynamic"),
        # With a StaticCache transformers refuses.
        pytest.param("lookup", "dynamic", marks=LONG),
        *(
            pytest.param(way, cache, marks=LONG)
            for way in ("padded beams", "sampling")
            for cache in CACHES
        ),
    ],
)
def test_ways_to_generate(uncompiled: None, cache: str, way: str) -> None:
    eager, ours = pair()
    assert torch.equal(generated(ours, cache, **WAYS[way]), generated(eager, cache, **WAYS[way]))
    assert not any(graph.calls.rebuilt for graph in rewritten())


@LONG
def test_an_assistant(uncompiled: None) -> None:
    eager, ours = pair()
    small, fast = pair(num_hidden_layers=1)
    tokens = generated(ours, inputs=prompt(1), assistant_model=fast)
    assert torch.equal(tokens, generated(eager, inputs=prompt(1), assistant_model=small))
    assert any(graph.rewritten == 1 for graph in memcompile.graphs())


# --- sparse policies: the engine's logits ---


@pytest.mark.parametrize(
    ("policy", "cache"),
    [
        ("scout", "static"),
        *(pytest.param(p, cache, marks=LONG) for p in SPARSE for cache in CACHES),
    ],
)
def test_sparse_is_what_the_engine_reads(uncompiled: None, policy: str, cache: str) -> None:
    options, ids, at = SPARSE[policy], prompt(2, 84), 70
    eager, ours = pair("llama", options)
    got = stepped(ours, cache, ids, at, **({"length": 84} if policy == "quest" else {}))
    logits = []
    for model in (eager, copy.deepcopy(eager).double()):
        engine = memcompile.compile(model, **options)
        engine.prefill(ids[:, :at])
        logits.append(torch.cat([engine(ids[:, p : p + 1]) for p in range(at, 84)], 1))
    assert_close_to_float64(got, *logits, reduction=32)
    calls = [graph.calls for graph in rewritten()]
    assert sum(c.policy for c in calls) == 14
    assert sum(c.pages_read for c in calls) < sum(c.pages_held for c in calls)


@pytest.mark.parametrize(
    ("name", "dtype", "cache"),
    [
        ("llama", torch.bfloat16, "static"),
        *(
            pytest.param(name, dtype, cache, marks=LONG)
            for name in MODELS
            for dtype in (torch.bfloat16, torch.float16)
            for cache in CACHES
        ),
    ],
)
def test_16_bit_by_margin(uncompiled: None, name: str, dtype: torch.dtype, cache: str) -> None:
    ids, at = prompt(2, 60), 40
    eager, _ = pair(name)
    truth = stepped(copy.deepcopy(eager).double(), cache, ids, at)
    half = eager.to(dtype)
    ours = copy.deepcopy(half)
    ours.compile(backend="memcompile", options=ALL)
    plain, got = (stepped(model, cache, ids, at) for model in (half, ours))
    assert_close_to_float64(got, plain, truth, reduction=32)
    best = plain.double().topk(2, -1).values
    clear = best[..., 0] - best[..., 1] > 4 * (plain.double() - truth).abs().max()
    assert clear.any()
    assert torch.equal(got.argmax(-1)[clear], plain.argmax(-1)[clear])


# --- caches ---


@pytest.mark.parametrize("length", [pytest.param(48, marks=LONG), 50])
def test_a_static_cache_full_to_its_last_token(uncompiled: None, length: int) -> None:
    eager, ours = pair()
    ids = prompt(2, length)
    plain, got = (stepped(m, "static", ids, 30, length=length) for m in (eager, ours))
    truth = stepped(copy.deepcopy(eager).double(), "static", ids, 30, length=length)
    assert_close_to_float64(got, plain, truth, reduction=32)
    assert sum(graph.calls.policy for graph in rewritten()) == length - 30


@LONG
@pytest.mark.parametrize("cache", CACHES)
def test_chunks(uncompiled: None, cache: str) -> None:
    """Calls of up to decode_tokens tokens, or a window, read through the policy."""
    eager, ours = pair("llama", {**ALL, "window": 16})
    ids, parts = prompt(2, 120), (40, 2, 16, 1, 17, 3, 20, 1)
    logits = []
    for model in (eager, ours, copy.deepcopy(eager).double()):
        held, at = new_cache(cache, model, 120), 0
        with torch.no_grad():
            for n in parts:
                out = model(ids[:, at : at + n], past_key_values=held).logits
                at += n
                if at > 40:
                    logits.append(out)
    plain, got, truth = (torch.cat(logits[i : i + 7], 1) for i in (0, 7, 14))
    assert_close_to_float64(got, plain, truth, reduction=32)
    dense = {why: n for g in rewritten() for why, n in g.calls.why_dense.items()}
    assert dense == {"more than 16 tokens at a time": 2}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=LONG)])
def test_a_static_cache_filled_anew(uncompiled: None, layers: int, mode: Any) -> None:
    """The same last tokens behind another beginning, at the very place a next call would be."""
    eager, ours = pair("llama", SPARSE["scout"], num_hidden_layers=layers)
    with mode():
        held = new_cache("static", eager)
        for trial in range(4):
            ids = prompt(1, 60)
            ids[0, 8 : 8 + trial] = 5
            at = 40 + trial
            held.reset()
            eager(ids[:, :at], past_key_values=held)
            got = ours(ids[:, at : at + 1], past_key_values=held).logits.clone()
            other = new_cache("static", eager)
            eager(ids[:, :at], past_key_values=other)
            forget()
            want = ours(ids[:, at : at + 1], past_key_values=other).logits
            assert torch.equal(got, want)


@pytest.mark.parametrize("cache", CACHES)
def test_an_edit_in_place_is_seen(uncompiled: None, cache: str) -> None:
    """Rows in the midst of a page that is not the newest."""
    eager, ours = pair("llama", SPARSE["scout"])
    ids, logits = prompt(1, 70), []
    for again in (False, True):
        held = new_cache(cache, eager)
        with torch.no_grad():
            eager(ids[:, :60], past_key_values=held)
            for p in range(60, 64):
                ours(ids[:, p : p + 1], past_key_values=held)
            for layer in held.layers:
                layer.values[:, :, 11].mul_(-1)
            if again:
                forget()
            logits.append(ours(ids[:, 64:65], past_key_values=held).logits)
    assert torch.equal(*logits)


def test_an_edit_behind_its_back(uncompiled: None) -> None:
    eager, ours = pair("llama", SPARSE["scout"])
    ids, logits = prompt(1, 70), []
    for drop in (memcompile.invalidate, lambda cache: forget()):
        held = new_cache("static", eager)
        with torch.no_grad():
            eager(ids[:, :60], past_key_values=held)
            ours(ids[:, 60:61], past_key_values=held)
            for layer in held.layers:
                layer.values.data[:, :, 11].mul_(-1)
            assert drop(held) in (2, None)
            logits.append(ours(ids[:, 61:62], past_key_values=held).logits)
    assert torch.equal(*logits)


@LONG
def test_caches_and_modes_take_turns(uncompiled: None) -> None:
    """Two prompts that begin alike, over both kinds of caches, with and without inference_mode."""
    eager, ours = pair("llama", SPARSE["scout"])
    prompts = [prompt(1, 60, seed) for seed in (1, 2)]
    prompts[1][:, :20] = prompts[0][:, :20]
    kinds = [(kind, ids) for kind in CACHES for ids in prompts]
    held = [new_cache(kind, eager) for kind, _ in kinds]
    got: dict[int, list[Tensor]] = {number: [] for number in range(4)}
    with torch.no_grad():
        for cache, (_, ids) in zip(held, kinds, strict=True):
            eager(ids[:, :40], past_key_values=cache)
    for p in range(40, 60):
        with torch.inference_mode() if p % 3 else torch.no_grad():
            for number, (_, ids) in enumerate(kinds):
                out = ours(ids[:, p : p + 1], past_key_values=held[number]).logits
                got[number].append(out.clone())
    for number, (kind, ids) in enumerate(kinds):
        forget()
        alone = stepped(ours, kind, ids, 40)
        truth = stepped(copy.deepcopy(ours).double(), kind, ids, 40)
        assert_close_to_float64(torch.cat(got[number], 1), alone, truth, reduction=32)


@LONG
def test_indexes_go_with_their_caches(uncompiled: None) -> None:
    _, ours = pair("llama", SPARSE["scout"])
    sizes = []
    for _ in range(6):
        generated(ours, inputs=prompt(2, 60), new=6)
        gc.collect()
        sizes.append(sum(indexes.nbytes for indexes in Indexes.everywhere()))
    # Those of the last cache stay until the next is met.
    assert 0 < sizes[-1] <= 2 * sizes[0]


def test_autocast(uncompiled: None) -> None:
    """What autocast casts is cast once: the cache is bfloat16, as eager's is."""
    eager, ours = pair("llama", DENSE)
    ids = prompt(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = (stepped(model, "dynamic", ids, 30) for model in (eager, ours))
    truth = stepped(eager.double(), "dynamic", ids, 30)
    assert plain.dtype == got.dtype
    assert_close_to_float64(got.bfloat16(), plain.bfloat16(), truth, reduction=40)
    assert all(graph.rewritten == 2 for graph in rewritten())


# --- one process ---


@LONG
def test_two_models_and_three_policies(uncompiled: None) -> None:
    pairs = [pair(), pair("qwen3", {**SPARSE["quest"], "budget": 1024}), pair("gpt2", DENSE)]
    for eager, ours in [*pairs, pairs[0]]:
        assert torch.equal(generated(ours, new=12), generated(eager, new=12))
    policies = {graph.policy for graph in memcompile.graphs() if graph.kind == "cached"}
    assert policies == {"scout", "quest", "dense"}


def test_threads_with_caches_of_their_own(uncompiled: None) -> None:
    from concurrent.futures import ThreadPoolExecutor

    _, ours = pair("llama", SPARSE["scout"])

    def run(seed: int) -> Tensor:
        return generated(ours, inputs=prompt(2, 30, seed), new=16)

    alone = [run(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(run, [*range(3)] * 2))
    assert all(map(torch.equal, together, alone * 2))


@LONG
def test_layers_compiled_by_themselves(uncompiled: None) -> None:
    eager, _ = pair()
    ours = copy.deepcopy(eager)
    for layer in ours.model.layers:
        layer.compile(backend="memcompile", options=ALL)
    assert torch.equal(generated(ours), generated(eager))
    assert any(graph.kind == "cached" for graph in memcompile.graphs())


@LONG
def test_graph_breaks(uncompiled: None) -> None:
    eager, _ = pair()
    ours = copy.deepcopy(eager)
    for layer in ours.model.layers:
        broken(layer)
        broken(layer.self_attn.o_proj)
    ours.compile(backend="memcompile", options=ALL)
    assert torch.equal(generated(ours), generated(eager))
    found = [g for g in memcompile.graphs() if g.kind == "cached"]
    assert found and all(graph.rewritten == graph.attentions == 1 for graph in found)


def broken(module: Any) -> None:
    forward = module.forward

    def breaks(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        out = forward(*args, **kwargs)
        torch._dynamo.graph_break()
        return out

    module.forward = breaks


def test_training_passes_through(uncompiled: None) -> None:
    eager, ours = pair()
    ids = prompt(2, 20)
    for model in (eager, ours):
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
    truth = copy.deepcopy(eager).double()
    truth.zero_grad()
    truth(ids, labels=ids, use_cache=False).loss.backward()
    for got, plain, exact in zip(*(m.parameters() for m in (ours, eager, truth)), strict=True):
        assert_close_to_float64(got.grad, plain.grad, exact.grad, reduction=40)
    assert [graph.kind for graph in memcompile.graphs()] == ["training"]


def test_a_copy_of_a_compiled_model(uncompiled: None) -> None:
    eager, ours = pair()
    assert torch.equal(generated(copy.deepcopy(ours), new=8), generated(eager, new=8))
