"""What a compiler may lose without a word, injected: each is found before it is handed out."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aoti_case import SCOUT
from torch import Tensor, fx

from memcompile.compiler.export import against_graph, aoti_portable, inductor
from memcompile.compiler.export.contract import Contract, contract_of, places_of
from memcompile.compiler.pipeline import build
from memcompile.passes.make_functional import make_functional
from memcompile.passes.make_paged import make_paged

POLICIES: dict[str, dict[str, Any]] = {
    "scout": SCOUT,
    "window": {"sinks": 8, "window": 16, "page_size": 8},
    "hierarchical": {
        "levels": (8, 32, 64), "sinks": 8, "window": 16, "refine": 16, "dense_layers": 0,
    },
    "hybrid": {"window": 16, "page_size": 8},
}  # fmt: skip


class Case:
    """A policy's step on contiguous state, written in place."""

    def __init__(self, policy: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        compiled = build(model, policy, kernels="off", check=False, **POLICIES[policy])
        assert compiled.program is not None and compiled.step is not None
        self.sites = places_of(compiled.program)
        self.contract = contract_of(compiled.program, self.sites).in_place()
        given = (compiled.step.policy, self.sites, compiled.program.ragged)
        self.paged = make_paged(*given)
        self.flat = aoti_portable.in_place(make_functional(*given), self.contract)

    def check(self, engine: Callable[[list[Tensor]], Any]) -> None:
        graph = inductor.eager(self.paged)
        against_graph.check(self.contract, self.sites, engine, graph, "it")


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {policy: Case(policy) for policy in POLICIES}


def copy_of(graph: fx.GraphModule) -> fx.GraphModule:
    made = fx.Graph()
    made.output(made.graph_copy(graph.graph, {}))
    return fx.GraphModule(graph, made)


@pytest.mark.parametrize("policy", POLICIES)
def test_both_forms_of_a_step_agree(policy: str, cases: dict[str, Case]) -> None:
    cases[policy].check(inductor.eager(cases[policy].flat))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_tensor_of_the_state_is_missed(policy: str, cases: dict[str, Case]) -> None:
    """A write that is lost, one after the other, is told by the name of its tensor."""
    case = cases[policy]
    for number, tensor in enumerate(case.contract.state):
        lossy = copy_of(case.flat)
        writes = [n for n in lossy.graph.nodes if n.target is torch.ops.aten.copy_.default]
        assert len(writes) == len(case.contract.state)
        lossy.graph.erase_node(writes[number])
        lossy.recompile()
        with pytest.raises(RuntimeError, match=f"it: {tensor.input} changes otherwise .*lose stat"):
            case.check(inductor.eager(lossy))


def faults(contract: Contract) -> dict[str, Callable[[list[Tensor]], list[Tensor]]]:
    """What is made of the inputs, by fault."""
    position = contract.inputs.index(contract.position)
    count = len(contract.inputs) - len(contract.state)

    def folded(inputs: list[Tensor]) -> list[Tensor]:
        fixed = torch.zeros_like(inputs[position])
        return [*inputs[:position], fixed, *inputs[position + 1 :]]

    def stale(inputs: list[Tensor]) -> list[Tensor]:
        """The caches are buffers of the engine, made when it was compiled."""
        return [*inputs[:count], *(torch.zeros_like(x) for x in inputs[count:])]

    return {"a counter is folded": folded, "state is kept elsewhere": stale}


@pytest.mark.parametrize("fault", ["a counter is folded", "state is kept elsewhere"])
@pytest.mark.parametrize("policy", ["scout", "hybrid"])
def test_inputs_that_do_not_reach_the_graph(
    fault: str, policy: str, cases: dict[str, Case]
) -> None:
    case = cases[policy]
    change = faults(case.contract)[fault]
    with pytest.raises(RuntimeError, match=r"it: \w+ (is|changes) otherwise than the graph makes"):
        case.check(lambda inputs: [*case.flat(*change(inputs))])


def test_outputs_that_are_dropped_or_stay_empty(cases: dict[str, Case]) -> None:
    case = cases["scout"]
    said = "it: call 1, of 2 x 1 tokens fails: it returns 0 tensors where 1 were expected"
    with pytest.raises(RuntimeError, match=re.escape(said)):
        case.check(lambda inputs: [*case.flat(*inputs)][1:])
    with pytest.raises(RuntimeError, match=r"it: logits is otherwise .*off by nan"):
        case.check(lambda inputs: [torch.full_like(case.flat(*inputs)[0], float("nan"))])
    with pytest.raises(RuntimeError, match=r"it: logits is torch.float64 \[1, 97\] after call 1"):
        case.check(lambda inputs: [case.flat(*inputs)[0].double()])


def test_an_engine_that_raises(cases: dict[str, Case]) -> None:
    def broken(inputs: list[Tensor]) -> list[Tensor]:
        raise IndexError("out of range")

    with pytest.raises(RuntimeError, match="it: call 1, of 2 x 1 tokens fails: out of range"):
        cases["window"].check(broken)


def test_a_graph_for_some_sizes_alone_is_refused() -> None:
    """Nobody checks the sizes that a package is called with."""
    contract = Contract("tokens", "position", None, "logits", (), None, None, None, None, 9)

    def fixed(tokens: Tensor, position: Tensor) -> tuple[Tensor]:
        return (tokens.new_full((len(tokens), 1), 1),)

    graph = fx.Graph()
    tokens, position = graph.placeholder("tokens"), graph.placeholder("position")
    graph.output(graph.call_function(fixed, (tokens, position)))
    with pytest.raises(RuntimeError, match=r"traced for some sizes alone: .*report this model"):
        inductor.trace_flat(fx.GraphModule({}, graph), contract, torch.device("cpu"))


def test_conditions_on_sizes() -> None:
    """Sizes that are not one are all that a package may ask for: it is called with ones as well."""
    import sympy

    batch, rows = sympy.symbols("batch rows", integer=True, positive=True)
    for guard in (sympy.Ne(rows, 1), batch * rows > 1, rows < batch * rows, sympy.Ge(batch, 2)):
        assert inductor._not_one(guard), guard
    for guard in (sympy.Ne(batch, 4), rows // 8 < 2, sympy.Eq(batch * rows, 6), batch < rows):
        assert not inductor._not_one(guard), guard


def test_a_package_that_is_not_self_contained_is_refused() -> None:
    """In this process the operation is there, and nothing that runs here would miss it."""
    contract = Contract("tokens", "position", None, "logits", (), None, None, None, None, 9)
    graph = fx.Graph()
    tokens, _ = graph.placeholder("tokens"), graph.placeholder("position")
    wide = graph.call_function(torch.ops.aten.to.dtype, (tokens, torch.float32))
    merged = graph.call_function(torch.ops.memcompile.combine.default, ([wide], [wide]))
    graph.output((graph.call_function(operator.getitem, (merged, 0)),))
    traced = inductor.trace_flat(fx.GraphModule({}, graph), contract, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"calls memcompile\.combine\.default, which no process"):
        inductor.check_operations(traced)
    inductor.check_operations(traced, ("memcompile",))
