"""Step graphs on contiguous state equal the engine, whatever the memory, the split and the rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from memcompile.compiler.export.contract import (
    Contract,
    contract_of,
    places_of,
    prefill_of,
)
from memcompile.compiler.export.driver import Driver
from memcompile.compiler.pipeline import Compiled, build
from memcompile.passes.make_functional import make_functional
from memcompile.passes.make_paged import make_paged
from memcompile.passes.result import NotRewritten

VOCABULARY = 97
SCOUT = {"budget": 48, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 0}
LEVELS = {"levels": (8, 32, 64), "sinks": 8, "window": 16, "dense_layers": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "window": ("window", {"sinks": 8, "window": 16, "page_size": 8}),
    "scout": ("scout", SCOUT),
    "scout, uncompensated": ("scout", {**SCOUT, "compensate": False}),
    "scout, ball": ("scout", {**SCOUT, "score": "ball"}),
    "scout, min_context": ("scout", {**SCOUT, "min_context": 100}),
    "quest": ("quest", {"budget": 48, "page_size": 8}),
    "hierarchical": ("hierarchical", {**LEVELS, "refine": 16}),
    "hierarchical, nothing kept": ("hierarchical", {**LEVELS, "refine": 0, "keep": False}),
    "heavy-hitter": (
        "heavy-hitter",
        {"budget": 48, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 0},
    ),
    "heavy-hitter, decaying": (
        "heavy-hitter",
        {"budget": 48, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 0, "decay": 0.9},
    ),
    "hybrid": ("hybrid", {"window": 16, "page_size": 8}),
    "hybrid, gated": ("hybrid", {"decay": "gate", "window": 16, "page_size": 8}),
    "hybrid, constant decay": (
        "hybrid",
        {"decay": "constant", "feature_map": "identity", "window": 16, "page_size": 8},
    ),
}
GATE = ("window", "scout", "hierarchical, nothing kept", "hybrid, gated", "heavy-hitter, decaying")
KINDS = ("functional", "paged")
# Past the ring of a window: more than 512 tokens and what stays in reach.
SPLIT = (37, 1, 5, 90, 1, 1, 120, 300, 1, 170, 3)
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 1024}
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **shape)
        ).eval()
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=24)).eval()
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@cache
def compiled(name: str, case: str) -> Compiled:
    policy, options = CASES[case]
    return build(network(name), policy, kernels="off", check=False, **options)


def driver(made: Compiled, kind: str, capacity: int | None = 64, batch: int = 3) -> Driver:
    """Runs a rewritten graph by its contract."""
    assert made.program is not None and made.step is not None
    program, sites = made.program, places_of(made.program)
    contract = contract_of(program, sites)
    if kind == "paged":
        graph, contract = make_paged(made.step.policy, sites, program.ragged), contract.in_place()
    else:
        graph = make_functional(made.step.policy, sites, program.ragged)
    return Driver(contract, caller(graph, contract), batch, capacity)


def caller(graph: fx.GraphModule, contract: Contract) -> Any:
    def call(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            made = graph(*(given[name] for name in contract.inputs))
        return dict(zip(contract.outputs, made, strict=True))

    return call


def assert_follows(made: Compiled) -> None:
    program = made.program
    assert program is not None
    engine = made.engine()
    engine._always_select = True
    runs = [driver(made, kind) for kind in KINDS]
    tokens = torch.randint(VOCABULARY, (3, sum(SPLIT)), generator=torch.Generator().manual_seed(1))
    largest, at, scale = 0.0, 0, 0.0
    # An account is read page by page, and each call by pieces of a page.
    accounts = any(layout.memory.account for layout in program.layouts)
    for number, n in enumerate(SPLIT[:5] if accounts else SPLIT):
        piece, at = tokens[:, at : at + n], at + n
        ragged = program.ragged and number % 3 == 0 and n > 4
        lengths = [n, n - 2, max(0, n - 4 * number)] if ragged else None
        expected = engine(piece, lengths)
        for run in runs:
            got = run(piece, lengths)
            for row, count in enumerate(lengths or [n] * 3):
                if count:
                    difference = expected[row, :count].double() - got[row, :count].double()
                    largest = max(largest, float(difference.abs().max()))
        scale = max(scale, float(expected.abs().max()))
    # The same operations in another order: a few units in the last place a layer.
    assert largest <= 16 * torch.finfo(torch.float32).eps * max(scale, 1.0)
    assert all(run.position == engine.position for run in runs)


EVERY = [case if case in GATE else pytest.param(case, marks=pytest.mark.long) for case in CASES]


@pytest.mark.parametrize("case", EVERY)
def test_every_memory_equals_the_engine(case: str) -> None:
    assert_follows(compiled("llama", case))


@pytest.mark.parametrize(
    "name, case", [pytest.param("gpt2", "scout", marks=pytest.mark.long), ("mistral", "dense")]
)
def test_other_networks(name: str, case: str) -> None:
    assert_follows(compiled(name, case))


@pytest.mark.parametrize("case", EVERY)
def test_no_operation_is_left_that_targets_do_not_know(case: str) -> None:
    made = compiled("llama", case)
    assert made.program is not None and made.step is not None
    for step in (made.step.policy, made.step.dense):
        graph = make_functional(step, places_of(made.program), made.program.ragged).graph
        called = [node.target for node in graph.nodes if node.op == "call_function"]
        kinds = {op.namespace for op in called if isinstance(op, torch._ops.OpOverload)}
        assert kinds == {"aten", "memcompile_portable"}


@pytest.mark.parametrize("case", GATE)
def test_what_lies_behind_the_tokens_is_not_read(case: str) -> None:
    made = compiled("llama", case)
    clean, dirty = (driver(made, "functional", capacity=128) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    for n in (21, 1, 46, 1, 7):
        held = torch.tensor(dirty.position)
        for tensor in dirty.contract.state:
            there = tensor.filled(torch.ones_like(dirty.state[tensor.input]), held)
            noise = 50 * torch.randn(there.shape, generator=generator)
            if not tensor.input.endswith("_account"):  # of which -1 means something
                dirty.state[tensor.input] = torch.where(there > 0, dirty.state[tensor.input], noise)
        tokens = torch.randint(VOCABULARY, (3, n), generator=generator)
        lengths = [n, max(1, n - 3), 0]
        have, want = dirty(tokens, lengths), clean(tokens, lengths)
        for row, count in enumerate(lengths):
            torch.testing.assert_close(have[row, :count], want[row, :count])


@pytest.mark.parametrize("case", ["dense", "scout"])
def test_a_smaller_position_takes_tokens_back(case: str) -> None:
    made = compiled("llama", case)
    straight, back = (driver(made, "functional", capacity=192) for _ in range(2))
    tokens = torch.randint(VOCABULARY, (3, 120), generator=torch.Generator().manual_seed(4))
    back(tokens[:, :61])
    back((tokens[:, :61] + 1) % VOCABULARY)
    back.position = [61] * 3
    straight(tokens[:, :61])
    for piece in tokens[:, 61:].split(13, 1):
        torch.testing.assert_close(back(piece), straight(piece))


def test_state_is_told_up_to_its_tokens() -> None:
    made = compiled("llama", "heavy-hitter")
    assert made.program is not None
    contract = contract_of(made.program, places_of(made.program))
    by_name = {tensor.input.partition("_")[2]: tensor for tensor in contract.state}
    for name, kept in {"keys": [13, 0], "account": [2, 0]}.items():
        tensor = by_name[name]
        shape = [*tensor.shape]
        shape[tensor.batch_axis] = 2
        told = tensor.filled(torch.ones(shape), torch.tensor([13, 0]))
        assert told.shape == torch.Size(shape)
        first = [row.reshape(*row.shape[:2], -1)[0, :, 0] for row in told]
        assert [int(row.sum()) for row in first] == kept
    scout = compiled("llama", "scout")
    assert scout.program is not None
    records = next(
        tensor
        for tensor in contract_of(scout.program, places_of(scout.program)).state
        if tensor.input.endswith("index_mean")
    )
    told = records.filled(torch.ones(records.shape), torch.tensor([31]))
    assert int(told[0, 0, :, 0].sum()) == 3  # of pages of 8 the full ones


def test_states_of_fixed_size_do_not_grow() -> None:
    made = compiled("llama", "window")
    assert made.program is not None
    contract = contract_of(made.program, places_of(made.program))
    assert contract.capacity is None and contract.longest_call == 512
    # A pinned page, the window, a call, and a page on the way.
    assert {tensor.shape for tensor in contract.state} == {(1, 2, 8 + 16 + 512 + 8, 8)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_too_long_for_a_ring_raises(kind: str) -> None:
    run = driver(compiled("llama", "window"), kind)
    state = {**run.state}
    given = {"tokens": torch.zeros(3, 530, dtype=torch.int64), **state}
    given |= {name: torch.zeros(3, dtype=torch.int32) for name in ("position", "lengths")}
    given["lengths"] += 530
    with pytest.raises(IndexError):
        run.call(given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_beyond_the_capacity_raises(kind: str) -> None:
    run = driver(compiled("llama", "scout"), kind, capacity=8)
    given = {"tokens": torch.zeros(3, 9, dtype=torch.int64), **run.state}
    given |= {name: torch.zeros(3, dtype=torch.int32) for name in ("position", "lengths")}
    given["lengths"] += 9
    with pytest.raises(IndexError):
        run.call(given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_enters_two_pages_raises(kind: str) -> None:
    run = driver(compiled("llama", "heavy-hitter, decaying"), kind)
    assert run.contract.splits_at == 8
    given = {"tokens": torch.zeros(3, 9, dtype=torch.int64), **run.state}
    given |= {name: torch.zeros(3, dtype=torch.int32) for name in ("position", "lengths")}
    run.call({**given, "lengths": given["lengths"] + 8})
    with pytest.raises(IndexError):
        run.call({**given, "lengths": given["lengths"] + 9})


def test_a_delta_rule_has_no_portable_form() -> None:
    made = build(network("llama"), "hybrid", kernels="off", check=False, write="delta")
    assert made.program is not None and made.step is not None
    sites = places_of(made.program)
    with pytest.raises(NotRewritten, match="a delta rule needs its rows one after the other"):
        make_functional(made.step.policy, sites, made.program.ragged)
    make_paged(made.step.policy, sites, made.program.ragged)


@pytest.mark.parametrize(
    "case, there",
    [
        *(("dense", False), ("scout", True), ("hybrid, gated", True), ("window", False)),
        *(("hierarchical, nothing kept", False), ("heavy-hitter, decaying", False)),
    ],
)
def test_a_prompt_is_read_densely_where_everything_is_kept(case: str, there: bool) -> None:
    made = compiled("llama", case)
    assert made.program is not None and made.step is not None
    assert (prefill_of(made.step, made.program) is not None) == there
