"""Plans of launches: what launchers do on tensors that are there, for the sizes these have."""

from __future__ import annotations

import itertools
import os
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memcompile.codegen.spec import KernelSpec, NotCovered
from memcompile.codegen.triton.load import module
from memcompile.codegen.triton.record import Allocate, Copy, Plan, StandIn, fixed_size, plans
from memcompile.codegen.triton.sizes import Size, evaluate
from memcompile.codegen.triton.tune import example
from memcompile.models.memory.parts import INDEX_FIELDS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels have other names there"
)
CPU = torch.device("cpu")
SMALL: dict[str, Any] = dict(key_dim=16, value_dim=16, page_size=4)
SCORED: dict[str, Any] = dict(key_dim=16, group=2, page_size=1, score="mean-std")
STATE: dict[str, Any] = dict(key_dim=16, value_dim=24, group=2)
SPECS = (
    KernelSpec("attend", group=3, window=True, softcap=True, **SMALL),
    KernelSpec("attend", group=40, pages="listed", page_lse=True, **SMALL),
    KernelSpec("attend", group=2, pages="unlisted", bias=True, **SMALL),
    KernelSpec("attend", group=2, pages="listed", summaries=True, **SMALL),
    KernelSpec("attend", dtype="bfloat16", key_dim=24, value_dim=16, shared_kv=True, page_size=4),
    KernelSpec("append_index", fields=INDEX_FIELDS, **SMALL),
    KernelSpec("append_index", fields=("mean",), record_table=True, **SMALL),
    KernelSpec("append_index", key_dim=16, value_dim=16, fields=INDEX_FIELDS, fold=True),
    KernelSpec("score_select", **SCORED),
    KernelSpec("score_select", page_logits=True, **SCORED),
    KernelSpec("score_select", among=True, **SCORED),
    KernelSpec("combine", value_dim=16, count=3),
    KernelSpec("state_step", decay="gate", normalised=True, **STATE),
    KernelSpec("state_step", decay="constant", **STATE),
    KernelSpec("state_chunk", decay="gate", normalised=True, **STATE),
    KernelSpec("state_chunk", decay="gate", delta=True, **STATE),
)


def sizes_of(plan: Plan, arguments: list[Any]) -> dict[str, int]:
    """The named sizes of a launcher's arguments."""
    found: dict[str, int] = {}
    for told, value in zip(plan.arguments, arguments, strict=True):
        if isinstance(told, StandIn):
            pairs = [*zip(told.shape, value.shape, strict=True)]
            if told.strided:
                pairs += [(told.stride(axis), value.stride(axis)) for axis in range(value.dim())]
            for name, extent in pairs:
                if isinstance(name, Size) and name.op == "name":
                    assert found.setdefault(name.text(), extent) == extent
        elif told[0] == "int":
            found[told[1]] = value
    return found


def launched(spec: KernelSpec, made: ModuleType, arguments: list[Any]) -> list[tuple[Any, ...]]:
    """What the launcher launches on tensors: kernel, grid, arguments, constants, options."""
    found: list[tuple[Any, ...]] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*given: Any, **constants: int) -> None:
                found.append((self.kernel.__name__, (*grid, 1, 1)[:3], given, constants))

            return launch

    launcher = getattr(made, spec.op)
    names = {**vars(made), "wrap_triton": Recorded}
    FunctionType(launcher.__code__, names)(*arguments)
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_plan_is_what_the_launcher_does(spec: KernelSpec) -> None:
    made = module(spec, "cuda:sm_90")
    reached = set()
    contexts = (200, 1000, 4000, 8000, 9000) if spec.op == "score_select" else (40, 3000)
    for batch, rows, context in itertools.product((1, 3), (1, 5), contexts):
        arguments = example(spec, CPU, batch, 2, context, rows, 40 * spec.page_size)
        width = None
        if fixed := fixed_size(spec):
            lists = "pages" if fixed == "list_pages" else "candidates"
            at = [name for _, name in spec.arguments].index(lists)
            width = int(arguments[at].shape[3])
        known = plans(spec, made, width)
        sizes = sizes_of(known[0], arguments)
        chosen = next(plan for plan in known if plan.holds(sizes))
        reached.add(known.index(chosen))
        sizes = chosen.sizes(sizes)
        passed = {
            told.name if isinstance(told, StandIn) else told[1]: value
            for told, value in zip(chosen.arguments, arguments, strict=True)
        }
        done = launched(spec, made, arguments)
        assert len(done) == len(chosen.launches)
        for (kernel, grid, passed_on, options), launch in zip(done, chosen.launches, strict=True):
            assert kernel == launch.kernel
            assert tuple(evaluate(extent, sizes) for extent in launch.grid) == grid
            stages = {"num_warps": launch.warps, "num_stages": launch.stages}
            assert options == {**launch.constants, **stages}
            for value, told in zip(passed_on, launch.arguments.values(), strict=True):
                if isinstance(told, StandIn):
                    assert isinstance(value, Tensor) and value.dtype == told.dtype
                    assert value.shape == tuple(evaluate(x, sizes) for x in told.shape)
                    if told.name in passed:
                        assert value.data_ptr() == passed[told.name].data_ptr()
                elif isinstance(told, str):
                    assert value == passed[told]
                else:
                    assert value == evaluate(told, sizes)
    missed = [plan.conditions for at, plan in enumerate(known) if at not in reached]
    assert not missed, missed


def test_what_is_allocated_copied_and_returned() -> None:
    spec = next(spec for spec in SPECS if spec.op == "state_step" and spec.normalised)
    (plan,) = plans(spec, module(spec, "cuda:sm_90"))
    made = {step.tensor.name: step.tensor for step in plan.steps if isinstance(step, Allocate)}
    assert [*made] == ["norm_before", "out", "lse"]
    (copy,) = [step for step in plan.steps if isinstance(step, Copy)]
    assert (copy.source.name, copy.target.name) == ("norm", "norm_before")
    assert [tensor.name for tensor in plan.returns] == ["out", "lse"]
    assert [str(extent) for extent in made["out"].shape] == ["batch", "kv_heads * 2", "rows", "24"]
    split = plans(SPECS[0], module(SPECS[0], "cuda:sm_90"))[1]
    assert [condition.text() for condition in split.conditions] == ["rows <= 1", "splits > 1"]
    filled = plans(SPECS[1], module(SPECS[1], "cuda:sm_90"))[0].steps
    values = [step.value for step in filled if isinstance(step, Allocate)]
    assert values == [None, None, float("-inf")]


def test_a_launcher_that_decides_by_a_size_is_found_out() -> None:
    spec = KernelSpec("combine", value_dim=16, count=2)
    made = ModuleType("made")

    def combine(out0: Any, lse0: Any, out1: Any, lse1: Any) -> Any:
        return (out0, lse0) if out0.shape[2] > 1 else (out1, lse1)

    vars(made)["combine"] = combine
    with pytest.raises(TypeError, match=r"decides by Size\(rows\), which is not known"):
        plans(spec, made)


def test_what_has_no_plan_is_refused() -> None:
    backward = KernelSpec("state_chunk", backward=True, **STATE)
    with pytest.raises(NotCovered, match="gradients are made of more than kernels"):
        plans(backward, module(backward, "cuda:sm_90"))
    listed = next(spec for spec in SPECS if spec.summaries)
    with pytest.raises(ValueError, match="width of its lists; give list_pages"):
        plans(listed, module(listed, "cuda:sm_90"))


NAMES = ("a", "b", "c")
FORMULAS = st.recursive(
    st.sampled_from(NAMES).map(lambda name: Size("name", name)),
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(1, 9)).map(lambda p: p[0] + p[1]),
        st.tuples(inner, st.integers(1, 9)).map(lambda p: p[0] + p[1] - 1),
        st.tuples(inner, st.integers(1, 9)).map(lambda p: p[0] * p[1]),
        st.tuples(st.integers(1, 9), inner).map(lambda p: p[0] * p[1]),
        st.tuples(inner, st.integers(1, 9)).map(lambda p: p[0] // p[1]),
        st.tuples(st.integers(1, 9), inner).map(lambda p: p[0] // (p[1] + 1)),
        st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] * p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] // (p[1] + 1)),
        st.tuples(inner, inner).map(lambda p: p[0] + 9 - (p[1] // 7)),
        st.tuples(inner, inner).map(lambda p: torch.sym_max(*p)),
        st.tuples(inner, st.integers(1, 9)).map(lambda p: torch.sym_min(p[1], p[0])),
    ),
    max_leaves=6,
)


@given(FORMULAS, st.tuples(*[st.integers(1, 40)] * 3))
def test_a_formula_reads_as_what_it_is(formula: Size, values: tuple[int, int, int]) -> None:
    sizes = dict(zip(NAMES, values, strict=True))
    value = formula.value(sizes)
    assert eval(formula.text(), {"max": max, "min": min}, sizes) == value
    assert {*formula.names} <= {*NAMES}
    renamed = formula.text(name=lambda name: f"s['{name}']")
    assert eval(renamed, {"max": max, "min": min, "s": sizes}) == value
