"""Steps of a GPU opened to the Triton kernels that they launch: traced here, run where a GPU is."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from aoti_case import SCOUT, llama
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._library.triton import get_triton_kernels_for_op

from memcompile.codegen import triton
from memcompile.compiler.export import aoti, aoti_portable, inductor
from memcompile.compiler.export.contract import contract_of, places_of
from memcompile.compiler.export.launched import launched
from memcompile.compiler.lower import Traced, memory_calls
from memcompile.compiler.pipeline import build
from memcompile.passes.make_paged import make_paged

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's kernels are not traced"
)
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"page_size": 16},
    "scout": {**SCOUT, "page_size": 16},
    "hierarchical": {"levels": (16, 64), "sinks": 16, "window": 16, "refine": 16},
    "hybrid": {"window": 16, "page_size": 16},
}


def name_of(kernel: Any) -> str:
    """A kernel's name; one whose launch is tuned is held by its tuner."""
    name: str = getattr(kernel, "__name__", "") or name_of(kernel.fn)
    return name


def traced(policy: str) -> Traced:
    model = llama(hidden_size=128, num_hidden_layers=2)
    compiled = build(model, policy, kernels="off", check=False, **POLICIES[policy])
    assert compiled.program is not None and compiled.step is not None
    sites = places_of(compiled.program)
    contract = contract_of(compiled.program, sites).in_place()
    paged = make_paged(compiled.step.policy, sites, compiled.program.ragged)
    return inductor.trace_flat(paged, contract, torch.device("cpu"))


@interpreted
@pytest.mark.parametrize(
    "policy", [p if p == "scout" else pytest.param(p, marks=pytest.mark.long) for p in POLICIES]
)
def test_every_operator_becomes_its_launches(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from memcompile import codegen

    step = traced(policy)
    specs = {spec for _, _, spec, _ in memory_calls({"step": step})}
    monkeypatch.setattr(codegen, "load", lambda specs, device: triton.load(specs))
    aoti.put_all(step, torch.device("cpu"))
    operators = triton.load(specs)
    called = Counter(node.target for node in step.graph.graph.nodes)
    opened = launched(step, specs)
    names = {node.target for node in opened.graph.graph.nodes if node.op == "call_function"}
    assert not names & set(operators.values())
    kernels = Counter(
        name_of(kernel_side_table.get_kernel(node.kwargs["kernel_idx"]))
        for node in opened.graph.graph.nodes
        if node.target is torch.ops.higher_order.triton_kernel_wrapper_mutation
    )
    assert kernels
    for operator in operators.values():
        # torch finds an operator's kernels in its launcher's source, which is a file on disk.
        found = {name_of(kernel) for kernel in get_triton_kernels_for_op(operator._name)}
        assert found and sum(kernels[name] for name in found) >= called[operator] > 0


@interpreted
def test_torch_export_keeps_the_operator() -> None:
    from memcompile.codegen.spec import KernelSpec

    spec = KernelSpec("combine", value_dim=16, count=2)
    operator = triton.load([spec])[spec]

    class Merge(torch.nn.Module):
        def forward(self, *parts: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = operator(*parts)[0]
            return out

    parts = tuple(torch.ones(2, 4, 3, 16) if i % 2 == 0 else torch.ones(2, 4, 3) for i in range(4))
    program = torch.export.export(Merge(), parts)
    assert operator in {node.target for node in program.graph.nodes}


@pytest.mark.parametrize("form", ["aoti", "aoti-portable"])
def test_a_gpu_engine_needs_a_gpu(form: str, tmp_path: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    compiled = build(llama(), "dense", kernels="off", check=False)
    assert compiled.program is not None
    compiled.program = replace(compiled.program, device=torch.device("cuda"))
    emit = aoti.emit if form == "aoti" else aoti_portable.emit
    with pytest.raises(
        RuntimeError, match=rf"{form}: the model is on cuda, and there is none here"
    ):
        emit(tmp_path, compiled, None)
