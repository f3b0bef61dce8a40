"""Every memory down the whole road: a model in, generated kernels, an engine out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import assert_logits, forward, random_tokens
from tolerance import assert_close_to_float64
from transformers import LlamaConfig, LlamaForCausalLM

from memcompile.compiler.package import open_engine, read, write
from memcompile.compiler.pipeline import Compiled, build, build_captured
from memcompile.models.memory import preset
from memcompile.models.memory.features import FEATURE_MAPS, register_feature_map

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "hierarchical": (
        "hierarchical",
        {"levels": (8, 32, 64), "refine": 32, "sinks": 8, "window": 16, "dense_layers": 1},
    ),
    "dropped": (
        "hierarchical",
        {
            **{"levels": (8, 32, 64), "refine": 0, "sinks": 8, "window": 16},
            **{"keep": False, "dense_layers": 0},
        },
    ),
    "window": ("window", {"window": 32, "sinks": 8, "page_size": 8}),
    "quest": ("quest", {"budget": 64, "page_size": 8, "dense_layers": 1}),
    "heavy-hitter": (
        "heavy-hitter",
        {"budget": 64, "page_size": 8, "sinks": 8, "window": 16, "dense_layers": 0},
    ),
    "hybrid": ("hybrid", {"window": 16, "page_size": 8, "rest": "scout:budget=384"}),
    "gated delta": (
        "hybrid",
        {"window": 16, "page_size": 8, "decay": "gate", "write": "delta", "state_layers": (0, 2)},
    ),
    "mixture": (
        "mixture",
        {
            "layers": {
                0: "dense:page_size=8",
                2: "hybrid:state_layers=2,window=16,page_size=8,decay=constant",
            },
            "default": "heavy-hitter:budget=64,page_size=8,sinks=8,window=16,dense_layers=0",
        },
    ),
}
TOKENS = 200
LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


@pytest.fixture(scope="module")
def built(model: LlamaForCausalLM) -> Any:
    made: dict[str, Compiled] = {}

    def get(name: str) -> Compiled:
        if name not in made:
            policy, options = POLICIES[name]
            made[name] = build(model, policy, kernels="off", **options)
        return made[name]

    return get


@pytest.mark.parametrize("name", POLICIES)
def test_a_context_is_read_whole_then_through_the_policy_however_it_is_split(
    name: str, model: LlamaForCausalLM, built: Any
) -> None:
    compiled = built(name)
    tokens = random_tokens(61, 2, TOKENS)
    whole, single = compiled.engine(), compiled.engine()
    read = whole.prefill(tokens[:, :150], all_logits=True)
    single.prefill(tokens[:, :37])
    single.prefill(tokens[:, 37:150])
    if all(memory.exact for memory in compiled.memories.values()):
        assert_logits(model, read, tokens)
    at_once = whole(tokens[:, 150:])
    steps = torch.cat([single(tokens[:, i : i + 1]) for i in range(150, TOKENS)], 1)
    truth = at_once.double()
    assert_close_to_float64(steps, at_once, truth, reduction=4 * TOKENS)
    counted, stepped = whole.stats(), single.stats()
    assert counted.pages_read == stepped.pages_read < counted.pages_dense
    assert counted.bytes_read == stepped.bytes_read < counted.bytes_dense
    evicts = {memory.evict.rule for memory in compiled.memories.values() if memory.evict}
    assert bool(counted.pages_evicted) == bool(evicts)
    if "oldest" in evicts:  # what a call's last rows no longer need goes at the next call
        assert counted.pages_evicted < stepped.pages_evicted
    else:
        assert counted.pages_evicted == stepped.pages_evicted
    states = any(memory.state for memory in compiled.memories.values())
    assert bool(counted.state_bytes) == states
    assert counted.resident_bytes == whole.memory_bytes() > counted.state_bytes


ALL = {
    0: "hierarchical:levels=8+32+64,refine=32,sinks=8,window=16,dense_layers=0",
    1: "hybrid:state_layers=1,window=16,page_size=8,decay=gate",
    2: "heavy-hitter:budget=64,page_size=8,sinks=8,window=16,dense_layers=0",
    3: "window:window=32,sinks=8,page_size=8",
    4: "hybrid:state_layers=4,window=16,page_size=8,decay=constant,write=delta",
    5: "hierarchical:levels=8+32,refine=0,keep=false,sinks=8,window=16,dense_layers=0",
}


@pytest.mark.long  # two minutes; each kernel has tests of its own, each memory one on references
def test_generated_kernels_serve_every_architecture_in_one_model() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(**{**LLAMA, "num_hidden_layers": 7})
    model = LlamaForCausalLM(config).eval()
    default = "quest:budget=64,page_size=8,dense_layers=0"
    options: dict[str, Any] = {"layers": ALL, "default": default}
    generated = build(model, "mixture", kernels="required", **options)
    plain = build(model, "mixture", kernels="off", check=False, **options)
    truth = build(copy.deepcopy(model).double(), "mixture", kernels="off", check=False, **options)
    names = " ".join(kernel["name"] for kernel in generated.report.lowered.kernels)
    for family in (
        "append_index",
        "score_select",
        "attend",
        "combine",
        "state_step",
        "state_chunk",
    ):
        assert family in names
    tokens = random_tokens(61, 2, TOKENS)
    logits = []
    for compiled in (generated, plain, truth):
        engine = compiled.engine()
        parts = [engine.prefill(tokens[:, :150], all_logits=True), engine(tokens[:, 150:190])]
        parts += [engine(tokens[:, i : i + 1]) for i in range(190, TOKENS)]
        logits.append(torch.cat(parts, 1))
        assert engine.stats().pages_evicted
    assert_close_to_float64(*logits, reduction=4 * TOKENS)


@pytest.mark.parametrize("name", POLICIES)
def test_ragged_rows_are_as_if_alone(name: str, built: Any) -> None:
    compiled = built(name)
    tokens = random_tokens(61, 2, TOKENS, seed=3)
    together = compiled.engine()
    together.prefill(tokens[:, :130], lengths=[130, 91])
    both = together(tokens[:, 130:170], lengths=[40, 29])
    for row, (held, n) in enumerate(((130, 40), (91, 29))):
        alone = compiled.engine()
        alone.prefill(tokens[row : row + 1, :held])
        got = alone(tokens[row : row + 1, 130 : 130 + n])
        assert_close_to_float64(both[row : row + 1, :n], got, got.double(), reduction=4 * TOKENS)


@pytest.mark.parametrize("name", ["dropped", "window", "heavy-hitter"])
def test_evicting_gives_memory_back(name: str, built: Any) -> None:
    engine = built(name).engine()
    tokens = random_tokens(61, 1, 480)
    engine.prefill(tokens[:, :440])
    full = engine.memory_bytes()
    for at in range(440, 450):
        engine(tokens[:, at : at + 1])
    kept = engine.memory_bytes()
    assert kept < full / 2
    streamed, peak = built(name).engine(), 0
    for piece in tokens[:, :450].split(10, 1):
        streamed(piece)
        peak = max(peak, streamed.memory_bytes())
    assert peak < full / 2
    # What is gone is gone: a dense read would be another's figure, so it goes through the policy.
    fork = engine.fork()
    assert torch.equal(engine.prefill(tokens[:, 450:460])[:, -1], fork(tokens[:, 450:460])[:, -1])


def test_hierarchical_reads_hardly_more_from_a_longer_context(model: LlamaForCausalLM) -> None:
    from memcompile.models.memory import Hierarchical
    from memcompile.models.memory.traffic import bytes_read

    compiled = build(model, "hierarchical", check=False, kernels="off")
    assert compiled.program is not None
    layout, memory = compiled.program.layouts[0], Hierarchical(dense_layers=0).memory(0, 0)
    read = [bytes_read(memory, layout, (1 << power) * 1024 - 1) for power in range(3, 10)]
    assert read == sorted(read)
    assert read[-1] < 1.5 * read[0]  # 64 times the context, 8K to 512K
    dense = bytes_read(memory, layout, 512 * 1024 - 1, read="dense")
    assert read[-1] * 100 < dense


def test_a_mixture_names_layers_that_are_there(model: LlamaForCausalLM, built: Any) -> None:
    names = [site.name for site in built("mixture").sites]
    by_name = build(
        model, "mixture", layers={names[1]: "quest:budget=64"}, default="dense", kernels="off"
    )
    assert [memory.name for memory in by_name.memories.values()] == ["dense"] * 3  # quest's first 2
    listed = rf"there is no layer 7; this model's are 0 \({names[0]}\), 1"
    for refused, message in (
        (preset("mixture", layers={7: "dense"}), listed),
        (preset("mixture", layers={"lm_head": "dense"}), "there is no layer 'lm_head'"),
        (preset("hybrid", state_layers=(1, 5)), "there is no layer 5"),
        (
            preset("mixture", layers={1: "dense", names[1]: "scout"}),
            "name one layer by number and by name",
        ),
    ):
        assert by_name.captured is not None
        with pytest.raises(ValueError, match=message):
            build_captured(by_name.captured, refused, kernels="off")


def test_a_state_that_was_not_fitted_says_so(built: Any) -> None:
    report = built("hybrid").report
    assert "are not fitted" in str(report)
    assert "memcompile distill" in str(report)
    assert "states differ" in str(report)  # from themselves, however they are split
    assert "not fitted" not in str(built("window").report)


def test_a_users_feature_map_is_traced_into_the_step(model: LlamaForCausalLM) -> None:
    register_feature_map("square", lambda x: x.square(), positive=True)
    try:
        options = {"window": 16, "page_size": 8, "kernels": "off"}
        compiled = build(model, "hybrid", feature_map="square", **options)
        tokens = random_tokens(61, 1, 60)
        one, two = compiled.engine(), compiled.engine()
        got = torch.cat([one(piece) for piece in tokens.split(7, 1)], 1)
        whole = two.prefill(tokens, all_logits=True)
        assert_close_to_float64(got, whole, whole.double(), reduction=240)
        elu = build(model, "hybrid", feature_map="elu", **options).engine()
        assert not torch.allclose(elu.prefill(tokens, all_logits=True)[:, 20:], whole[:, 20:])
    finally:
        del FEATURE_MAPS["square"]
    with pytest.raises(ValueError, match=r"unknown feature map 'square'.*register_feature_map"):
        build(model, "hybrid", feature_map="square")


@pytest.mark.parametrize(
    ("apply", "positive", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, False, "cannot be traced"),
        (lambda x: x.sum(-1), False, r"made \(3, 5\) of \(3, 5, 16\); expected \(3, 5, m\)"),
        (lambda x: x[..., :7], False, "makes 7 features of 16; expected a multiple of 16"),
        (lambda x: x.softmax(-2), False, "mixes rows"),
        (lambda x: x.sin(), True, "given as positive, but made -"),
    ],
)
def test_what_is_no_feature_map_is_refused(apply: Any, positive: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_feature_map("mine", apply, positive=positive)
    with pytest.raises(ValueError, match="'elu' is built in; give another name"):
        register_feature_map("elu", apply)
    assert "mine" not in FEATURE_MAPS


@pytest.mark.parametrize("name", ["hierarchical", "mixture"])
def test_a_folder_keeps_the_architecture(name: str, built: Any, tmp_path: Path) -> None:
    compiled = built(name)
    write(tmp_path / "out", compiled)
    kept = read(tmp_path / "out").preset
    assert kept.to_json() == json.loads(json.dumps(compiled.preset.to_json()))
    tokens = random_tokens(61, 1, 100)
    one, two = compiled.engine(), open_engine(tmp_path / "out", kernels="off")
    for got, kept_ in ((two.prefill(tokens), one.prefill(tokens)), (two(tokens), one(tokens))):
        assert_close_to_float64(got, kept_, kept_.double(), reduction=4 * TOKENS)


def test_an_engine_takes_over_only_what_serves_it(model: LlamaForCausalLM, built: Any) -> None:
    tokens = random_tokens(61, 1, 100)
    dense = build(model, "dense", page_size=8, kernels="off", check=False).engine()
    dense.prefill(tokens)
    for name in ("heavy-hitter", "hybrid", "hierarchical", "window"):
        why = "written by the weights" if name == "hybrid" else "cannot go on as one of"
        with pytest.raises(ValueError, match=why):
            built(name).engine().adopt(dense)
    mine, other = built("heavy-hitter").engine(), built("heavy-hitter").engine()
    other.prefill(tokens)
    mine.adopt(other)
    assert torch.equal(mine(tokens[:, :9]), other(tokens[:, :9]))


def test_the_forward_is_untouched_by_what_it_is_compared_with(model: LlamaForCausalLM) -> None:
    tokens = random_tokens(61, 1, 40)
    before = forward(model, tokens)
    build(model, "hybrid", window=16, page_size=8, kernels="off")
    assert torch.equal(forward(model, tokens), before)
