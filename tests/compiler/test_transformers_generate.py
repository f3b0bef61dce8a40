"""transformers' generate on a compiled model: the tokens are those of the model it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from stepping import forward
from tolerance import assert_close_to_float64, rounding_band
from torch import Tensor

import memcompile
from memcompile.compiler.capture import Captured, capture
from memcompile.compiler.pipeline import build_captured
from memcompile.models.memory import preset
from memcompile.runtime.engine import Engine

VOCABULARY, NEW = 61, 12
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    **IDS,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
WINDOW = 13
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**BASE)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2, **IDS, initializer_range=0.3)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**BASE, sliding_window=None)
    ),
    "mistral, sliding": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**BASE, sliding_window=WINDOW)
    ),
}
# A budget that holds every context here; the engine is told to select all the same.
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"page_size": 8},
    "scout": {"page_size": 8, "budget": 256, "sinks": 8, "window": 16, "dense_layers": 0},
}


def prompt(batch: int = 2, length: int = 17, seed: int = 0) -> Tensor:
    return torch.randint(
        3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def padded() -> dict[str, Tensor]:
    ids, mask = prompt(3), torch.ones(3, 17, dtype=torch.int64)
    for row, columns in ((0, 6), (2, 1)):
        ids[row, :columns], mask[row, :columns] = 0, 0
    return {"inputs": ids, "attention_mask": mask}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"inputs": prompt()},
    "sampling": {"inputs": prompt(), "do_sample": True, "top_k": 20, "top_p": 0.9},
    "several of a prompt": {"inputs": prompt(), "do_sample": True, "num_return_sequences": 3},
    "beams": {"inputs": prompt(), "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"inputs": prompt(), "num_beams": 3, "do_sample": True},
    "padded": {**padded(), "repetition_penalty": 1.3},
    "padded beams": {**padded(), "num_beams": 3, "length_penalty": 0.5},
    "ends": {"inputs": prompt(), "eos_token_id": list(range(3, 20))},
    "lookup": {"inputs": prompt(1, 5).repeat(1, 4), "prompt_lookup_num_tokens": 4},
}


def same(
    eager: Any, compiled: Any, *, max_new_tokens: int = NEW, seed: int = 1, **options: Any
) -> tuple[Any, Any]:
    """What both generate, under one seed; equal token by token."""
    results = []
    for model in (eager, compiled):
        torch.manual_seed(seed)
        given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
        results.append(model.generate(max_new_tokens=max_new_tokens, **given))
    tokens = [r if isinstance(r, Tensor) else r.sequences for r in results]
    assert torch.equal(*tokens), f"eager: {tokens[0].tolist()}\nours:  {tokens[1].tolist()}"
    return results[0], results[1]


@pytest.fixture(scope="module")
def eager() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            torch.manual_seed(0)
            made[name] = MODELS[name]().eval()
        return made[name]

    return get


@pytest.fixture(scope="module")
def engines(eager: Callable[[str], Any]) -> Callable[..., Engine]:
    captured: dict[str, Captured] = {}
    made: dict[tuple[str, str], Engine] = {}

    def get(name: str, policy: str = "scout", **options: Any) -> Engine:
        if name not in captured:
            captured[name] = capture(eager(name))
        if options or (name, policy) not in made:
            chosen = preset(policy, **(options or POLICIES[policy]))
            compiled = build_captured(captured[name], chosen, check=False, kernels="off")
            engine = Engine(compiled.program, always_select=True)
            if options:
                return engine
            made[name, policy] = engine
        return made[name, policy]

    return get


@pytest.fixture(scope="module")
def llama(eager: Callable[[str], Any]) -> Any:
    return eager("llama")


@pytest.fixture
def ours(engines: Callable[..., Engine]) -> Any:
    return engines("llama").transformers


def ways() -> Iterator[Any]:
    """Every model, policy and way; what differs little is left to the long suite."""
    little = ("several of a prompt", "sampled beams", "padded beams", "ends")
    for name, policy, way in itertools.product(MODELS, POLICIES, WAYS):
        plain = name not in ("llama", "mistral, sliding")
        marks = [pytest.mark.long] if plain and way in little else []
        yield pytest.param(name, policy, way, marks=marks)


@pytest.mark.parametrize(("name", "policy", "way"), [*ways()])
def test_tokens_are_eagers(
    name: str, policy: str, way: str, eager: Any, engines: Callable[..., Engine]
) -> None:
    same(eager(name), engines(name, policy).transformers, **WAYS[way])


def test_the_model_is_of_its_class_and_has_no_weights(llama: Any, ours: Any) -> None:
    assert isinstance(ours, transformers.LlamaForCausalLM)
    assert (ours.config, ours.generation_config) == (llama.config, llama.generation_config)
    assert (ours.dtype, ours.device.type) == (torch.float32, "cpu")
    assert not list(ours.parameters())


def test_the_prompt_is_read_densely_and_the_rest_through_the_policy(llama: Any, ours: Any) -> None:
    cache = ours.new_cache()
    same_cache = ours.generate(
        prompt(), max_new_tokens=NEW, past_key_values=cache, return_dict_in_generate=True
    ).past_key_values
    assert same_cache is cache
    stats = cache.engine.stats()
    assert stats.tokens == {"dense": 2 * 17, "policy": 2 * (NEW - 1)}
    assert cache.get_seq_length() == 17 + NEW - 1
    assert str(cache) == "MemoryCache(tokens=[28, 28], padding=[0, 0])"


def test_a_prompt_that_goes_on_in_many_ways_is_read_once(ours: Any) -> None:
    cache = ours.new_cache()
    ours.generate(prompt(), max_new_tokens=4, num_beams=3, past_key_values=cache)
    assert cache.engine.stats().tokens["dense"] == 2 * 17
    assert cache.batch_size == 6


@pytest.mark.parametrize("policy", ["scout", "window"])
def test_what_a_small_memory_writes_does_not_depend_on_guesses(
    policy: str, engines: Callable[..., Engine], llama: Any
) -> None:
    small = {"scout": {"budget": 24, "sinks": 8, "window": 8, "dense_layers": 0}}
    options = small.get(policy, {"sinks": 8, "window": 16})
    ours = engines("llama", policy, page_size=8, **options).transformers
    outs = []
    for guesses in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": llama}):
        cache = ours.new_cache()
        out = ours.generate(prompt(1, 80), max_new_tokens=NEW, past_key_values=cache, **guesses)
        outs.append(out.tolist())
        assert cache.engine.stats().tokens["dense"] == 80
    assert outs[1:] == outs[:1] * 2
    assert outs[0] != llama.generate(prompt(1, 80), max_new_tokens=NEW).tolist()


def test_beams_of_a_small_budget_leave_pages_out(engines: Callable[..., Engine]) -> None:
    options = {"page_size": 8, "budget": 24, "sinks": 8, "window": 8, "dense_layers": 0}
    ours = engines("llama", **options).transformers
    cache = ours.new_cache()
    ours.generate(prompt(1, 80), max_new_tokens=8, past_key_values=cache, num_beams=3)
    stats = cache.engine.stats()
    assert stats.tokens == {"dense": 80, "policy": 3 * 7}
    sites = BASE["num_hidden_layers"] * BASE["num_key_value_heads"]
    read = stats.pages_read - sites * sum(p // 8 + 1 for p in range(80))
    assert read == sites * 3 * stats.tokens["policy"]


def test_a_model_without_weights_is_not_saved(ours: Any, tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="has no weights: save the model that was compiled"):
        ours.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("helper", ["another", "eager", "compiled"])
def test_assisted_decoding(helper: str, llama: Any, ours: Any, eager: Any) -> None:
    torch.manual_seed(3)
    made = {"another": MODELS["llama"]().eval(), "eager": llama, "compiled": ours}
    assistant = copy.deepcopy(made[helper]) if helper != "compiled" else ours
    expected = llama.generate(prompt(1), max_new_tokens=NEW)
    got = ours.generate(prompt(1), max_new_tokens=NEW, assistant_model=assistant)
    assert torch.equal(got, expected)


def test_a_compiled_model_assists_beyond_its_sliding_window(
    eager: Any, engines: Callable[..., Engine]
) -> None:
    model, ours = eager("mistral, sliding"), engines("mistral, sliding").transformers
    expected = model.generate(prompt(1), max_new_tokens=40)
    for main, helper in ((model, ours), (ours, ours), (ours, copy.deepcopy(model))):
        got = main.generate(prompt(1), max_new_tokens=40, assistant_model=helper)
        assert torch.equal(got, expected)


def test_scores_are_returned(llama: Any, ours: Any) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, got = same(llama, ours, inputs=prompt(), **wanted)
    tokens = expected.sequences
    truth = forward(copy.deepcopy(llama).double(), tokens)[:, 16:-1]
    for one, two in ((got.logits, expected.logits), (got.scores, expected.scores)):
        assert len(one) == len(two) == NEW
        assert_close_to_float64(torch.stack(one, 1), torch.stack(two, 1), truth, reduction=40)
    _, beams = same(llama, ours, inputs=prompt(), num_beams=2, **wanted)
    assert beams.sequences_scores.shape == (2,)


def test_streamer_processors_and_criteria(llama: Any, ours: Any) -> None:
    class Heard(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    def odd(ids: Tensor, scores: Tensor) -> Tensor:
        even = torch.arange(VOCABULARY) % 2 == 0
        return scores.masked_fill(even, -torch.inf)

    class Long(transformers.StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **options: Any) -> Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 25)

    heard = Heard()
    out = ours.generate(prompt(1), max_new_tokens=NEW, streamer=heard)
    assert heard.tokens == [*out[0].tolist(), -1]
    _, out = same(
        llama,
        ours,
        inputs=prompt(),
        logits_processor=transformers.LogitsProcessorList([odd]),
        stopping_criteria=transformers.StoppingCriteriaList([Long()]),
    )
    assert out.shape == (2, 25)
    assert bool((out[:, 17:] % 2 == 1).all())


def test_stop_strings(llama: Any, ours: Any) -> None:
    from tokenizers import Tokenizer, decoders, models

    letters = {chr(ord("0") + i): i for i in range(VOCABULARY)}
    plain = Tokenizer(models.BPE(letters, []))
    plain.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
    free = llama.generate(prompt(1), max_new_tokens=NEW)
    stop = "".join(chr(ord("0") + t) for t in free[0, 20:22].tolist())
    _, out = same(llama, ours, inputs=prompt(1), stop_strings=[stop], tokenizer=tokenizer)
    assert 17 < out.shape[1] < 17 + NEW


@pytest.mark.parametrize("given", ["whole", "padded"])
def test_a_later_call_goes_on_with_the_cache(given: str, llama: Any, ours: Any) -> None:
    options = {"inputs": prompt()} if given == "whole" else padded()
    more = prompt(len(options["inputs"]), 5, seed=4)
    results = []
    for model in (llama, ours):
        first = model.generate(max_new_tokens=8, return_dict_in_generate=True, **options)
        again = copy.deepcopy(first.past_key_values)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.ones_like(ids)
        mask[:, :17] = options.get("attention_mask", 1)
        for cache in (first.past_key_values, again):
            results.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=8, past_key_values=cache)
            )
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_generate_goes_on_from_an_engine(llama: Any, engines: Callable[..., Engine]) -> None:
    engine = engines("llama").fork()
    engine.prefill(prompt(1)[:, :12])
    ours = engine.transformers
    expected = llama.generate(prompt(1), max_new_tokens=NEW)
    got = ours.generate(prompt(1), max_new_tokens=NEW, past_key_values=ours.new_cache(engine))
    assert torch.equal(got, expected)
    assert engine.position == [12]


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 7},
        {"guidance_scale": 1.5},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 9, "bad_words_ids": [[5]]},
        {"renormalize_logits": True, "do_sample": True, "min_p": 0.05, "typical_p": 0.9},
    ],
    ids=str,
)
def test_other_options(options: dict[str, Any], llama: Any, ours: Any) -> None:
    same(llama, ours, inputs=prompt(), **options)


def test_calls_of_the_model_itself(llama: Any, ours: Any) -> None:
    given = padded()
    ids, mask = given["inputs"], given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = llama(ids, attention_mask=mask, position_ids=positions).logits
        truth = copy.deepcopy(llama).double()(ids, attention_mask=mask, position_ids=positions)
    real = mask.bool()
    out = ours(ids, attention_mask=mask, position_ids=positions)
    assert_close_to_float64(out.logits[real], expected[real], truth.logits[real], reduction=17)
    assert not out.logits[~real].any()
    kept = ours(ids, attention_mask=mask, logits_to_keep=torch.tensor([16, 9])).logits
    assert torch.equal(kept, out.logits[:, [16, 9]])
    some = ours(prompt(), logits_to_keep=3, return_dict=False)[0]
    assert torch.equal(some.argmax(-1), ours(prompt()).logits[:, -3:].argmax(-1))
    cache = ours(ids[:, :9], attention_mask=mask[:, :9]).past_key_values
    rest = ours(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(rest.argmax(-1), out.logits[:, 9:].argmax(-1))
    assert cache.engine.stats().tokens == {"dense": 20, "policy": 24}


def test_rows_and_ends_of_a_cache(ours: Any) -> None:
    given = padded()
    cache = ours(given["inputs"], attention_mask=given["attention_mask"]).past_key_values
    whole = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    assert (cache.engine.position, cache.padding) == ([11, 11, 17, 17, 16, 16], [6, 6, 0, 0, 1, 1])
    cache.batch_select_indices(torch.tensor([True, False, False, True, False, False]))
    assert (cache.engine.position, cache.padding) == ([11, 17], [6, 0])
    cache.crop(-4)
    cache.crop(0)
    assert (cache.get_seq_length(), cache.engine.position) == (13, [7, 13])
    assert cache.get_mask_sizes(2) == (15, 0)
    assert cache.get_max_length() == -1 and cache.is_croppable and cache.is_initialized
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert (whole.get_seq_length(), whole.engine.position) == (17, [11, 17, 16])


def test_a_cache_holds_no_more_than_it_says(engines: Callable[..., Engine]) -> None:
    ours = engines("gpt2").transformers
    cache = ours.new_cache()
    assert cache.get_max_length() == 256
    with pytest.raises(ValueError, match="258 tokens exceed the context of 256"):
        ours(prompt(1, 258), past_key_values=cache, logits_to_keep=4)
    assert (cache.get_seq_length(), cache.engine.position) == (0, [])


def test_memories_that_cannot_be_rewound_generate_all_the_same(
    engines: Callable[..., Engine],
) -> None:
    engine = engines("llama", "hybrid", page_size=8, window=8, rest="dense")
    ours = engine.transformers
    assert torch.equal(
        ours.generate(prompt(), max_new_tokens=8, do_sample=False),
        engine.fork().generate(prompt(), 8),
    )
    assert ours.generate(prompt(), max_new_tokens=8, num_beams=2).shape == (2, 25)
    assert not ours.new_cache().is_croppable
    with pytest.raises(ValueError, match=r"keeps a state, .* this memory cannot be rewound"):
        ours.generate(prompt(1), max_new_tokens=8, prompt_lookup_num_tokens=3)


def test_bfloat16_by_margin() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    low = copy.deepcopy(model).bfloat16()
    engine = memcompile.compile(low, "scout", check=False, kernels="off", **POLICIES["scout"])
    assert engine.transformers.dtype == torch.bfloat16
    out = engine.transformers.generate(
        prompt(), max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True
    )
    part = slice(16, -1)
    truth = forward(copy.deepcopy(low).double(), out.sequences)[:, part]
    plain = forward(low, out.sequences)[:, part].float()
    assert_close_to_float64(
        torch.stack(out.logits, 1).bfloat16(), plain.bfloat16(), truth, reduction=40
    )
    off = float((plain.double() - truth).abs().max())
    band = 3 * off + rounding_band(torch.bfloat16, 40) * float(truth.abs().max())
    best = plain.topk(2, -1)
    decided = best.values[..., 0] - best.values[..., 1] > band
    assert decided.any()
    assert torch.equal(best.indices[..., 0][decided], out.sequences[:, 17:][decided])


@pytest.mark.long
def test_generated_kernels_give_the_same_tokens_and_nothing_is_compiled_for_them(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import compile_fx

    program = memcompile.compile(llama, "scout", kernels="auto", **POLICIES["scout"])._program
    ours = Engine(program, always_select=True).transformers

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("compiled while generating")

    monkeypatch.setattr(compile_fx, "compile_fx_inner", never)
    for options in WAYS.values():
        same(llama, ours, **options)


MASKS = [[1] * 8 + [0, 1] + [1] * 7, [1] * 16 + [0], [0] * 17]


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.generate(prompt(), use_cache=False), "use_cache=False: a compiled model is"),
        (lambda m: m(prompt(), use_cache=False), "or call the model that was compiled"),
        (lambda m: m.generate(prompt(), cache_implementation="static"), "the memory is the policy"),
        (
            lambda m: m.generate(
                prompt(), output_attentions=True, return_dict_in_generate=True
            ),
            "output_attentions=True: the kernels never hold attention weights; leave it out",
        ),
        (lambda m: m(prompt(), output_hidden_states=True), "the step graph returns logits alone"),
        (lambda m: m(prompt(), labels=prompt()), "labels=.*: the step graph does not take it"),
        (
            lambda m: m.generate(prompt(), penalty_alpha=0.6, top_k=4),
            "generation mode contrastive_search: needs a cache of keys and values; .* greedy",
        ),
        (lambda m: m.generate(prompt(1), assistant_early_exit=1), "the step graph runs all layers"),
        (lambda m: m.generate(inputs_embeds=torch.zeros(1, 3, 32)), "inputs_embeds"),
        (lambda m: m(inputs_embeds=torch.zeros(1, 3, 32)), "a compiled model reads token ids"),
        (lambda m: m(), "input_ids is missing"),
        (
            lambda m: m.generate(prompt(), past_key_values=transformers.DynamicCache()),
            r"past_key_values is a DynamicCache; give a cache .* new_cache\(\)",
        ),
        *[
            (
                lambda m, row=row: m.generate(
                    prompt(2), attention_mask=torch.tensor([[1] * 17, row])
                ),
                "has a hole, padding on the right, or a row without a token: pad on the left",
            )
            for row in MASKS
        ],
        (
            lambda m: m(prompt(), attention_mask=torch.ones(2, 4)),
            r"attention_mask is \(2, 4\); expected \(2, 17\)",
        ),
        (
            lambda m: m(
                prompt(),
                attention_mask=torch.tensor([[0] + [1] * 33, [1] * 34]),
                past_key_values=m(prompt()).past_key_values,
            ),
            r"pads the rows by \[1, 0\], but they were read with \[0, 0\]",
        ),
        (
            lambda m: m(prompt(), position_ids=torch.arange(1, 18)[None]),
            r"position_ids are \[\[1, 2.* from \[0, 0\] on: leave position_ids out",
        ),
        (lambda m: m.new_cache().crop(3), r"crop\(3\): give the number of tokens to forget, neg"),
        (lambda m: m.generate(prompt(), cache_implementation="paged"), "continuous batching"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(act: Callable[[Any], Any], message: str, ours: Any) -> None:
    with pytest.raises(ValueError, match=message):
        act(ours)


def test_caches_and_engines_of_other_compilations_are_refused(
    llama: Any, ours: Any, engines: Callable[..., Engine]
) -> None:
    other = engines("llama", "dense")
    with pytest.raises(ValueError, match="new_cache: the engine is of another compilation"):
        ours.new_cache(other)
    with pytest.raises(ValueError, match="made by a model of another compilation"):
        ours(prompt(), past_key_values=other.transformers.new_cache())
    with pytest.raises(TypeError, match="give it a cache of transformers, or none"):
        llama(prompt(), past_key_values=ours.new_cache())


def test_models_that_transformers_cannot_generate_with_have_no_such_form() -> None:
    from memcompile.models.networks.decoders.frame import PositionedDecoder

    engine = memcompile.compile(PositionedDecoder(0), "dense", check=False, kernels="off")
    with pytest.raises(ValueError, match=r"not made from a transformers model .* engine\.generate"):
        _ = engine.transformers
