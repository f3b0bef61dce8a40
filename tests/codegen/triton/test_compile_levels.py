"""Kernels of levels compiled for GPUs that are not there, and what torch sees of them."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from level_case import FOLDS, candidates, draw, lay_out_fold
from test_compile import compiled_launches, kept
from torch import Tensor

from memcompile.codegen.spec import SCORE_TERMS, KernelSpec
from memcompile.codegen.triton import blocks, compile_for, load, resources, source
from memcompile.codegen.triton.aot import compile_launch
from memcompile.codegen.triton.load import module
from memcompile.models.memory.parts import INDEX_FIELDS

pytest.importorskip("triton")
__all__ = ["kept"]  # a fixture of this file, too
LLAMA: dict[str, Any] = dict(dtype="bfloat16", key_dim=128)
SUMMARY = ("mean", "value_mean", "log_count")
FOLD = KernelSpec("append_index", value_dim=128, fields=INDEX_FIELDS, fold=True, **LLAMA)
APART = KernelSpec(
    "append_index", value_dim=128, page_size=64, fields=SUMMARY, record_table=True, **LLAMA
)
AMONG = KernelSpec("score_select", group=4, page_size=64, score="mean-std", among=True, **LLAMA)
ROLES = {FOLD: "fold", APART: "append", AMONG: "upto_256"}
by_spec = pytest.mark.parametrize("spec", ROLES, ids=lambda spec: spec.template)


@pytest.mark.parametrize("spec", [FOLD, AMONG], ids=lambda spec: spec.template)
@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_120", "hip:gfx942"])
def test_kernels_compile_and_fit(target: str, spec: KernelSpec) -> None:
    made, role = module(spec, target), ROLES[spec]
    launch = blocks.launches(spec, target)[role]
    compiled = compile_launch(spec, made, role, launch, target)
    assert compiled.binary
    assert compiled.shared <= blocks.architecture(target).shared


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_specs_compile() -> None:
    jobs = [(draw(seed), "cuda:sm_90") for seed in range(100)]
    with ProcessPoolExecutor() as pool:
        assert sum(pool.map(compiled_launches, jobs, chunksize=4)) > 150


@by_spec
def test_nothing_spills_on_sm_90(spec: KernelSpec) -> None:
    for compiled in compile_for(spec, "cuda:sm_90"):
        assert resources(compiled.binary)["stack"] == 0, compiled.role


@by_spec
def test_numbers_that_are_1_may_be_constants(spec: KernelSpec) -> None:
    """As Inductor makes them, whatever a kernel asks not to be specialised."""
    made, role = module(spec, "cuda:sm_90"), ROLES[spec]
    launch = blocks.launches(spec, "cuda:sm_90")[role]
    numbers = {"rows", "kv_heads", "table_pages", "record_columns", "child_columns", "columns"}
    numbers |= {"child_size", "ratio", "candidates", "sink_pages", "window_pages", "capacity"}
    ones = dict.fromkeys(numbers.intersection(getattr(made, launch.kernel).arg_names), 1)
    launch = dataclasses.replace(launch, constants={**launch.constants, **ones})
    assert compile_launch(spec, made, role, launch, "cuda:sm_90").binary


@by_spec
def test_generated_text(spec: KernelSpec, golden) -> None:
    name = f"{spec.template}_record_table" if spec.record_table else spec.template
    golden(f"triton_{name}.txt", source(spec, "cuda:sm_90"))


@pytest.mark.parametrize("dims", [(8, 8), (40, 576), (0, 24), (264, 0)])
@pytest.mark.parametrize("score", SCORE_TERMS)
def test_specs_of_any_width_are_printed(score: str, dims: tuple[int, int]) -> None:
    group, keys = dims[0] or 1, ("std", "mean", "radius") if dims[0] else ()
    fields = (*keys, *(("value_mean",) if dims[1] else ()), "log_count")
    for spec in (
        KernelSpec("append_index", "float16", *dims, fields=fields, fold=True),
        KernelSpec("append_index", "float32", *dims, fields=fields[-1:], fold=True),
        KernelSpec("score_select", "float32", max(8, dims[0]), group=group, score=score,
                   page_size=1 << 20, among=True),
    ):  # fmt: skip
        for target in ("cuda:sm_90", "hip:gfx942"):
            compile(source(spec, target), spec.name, "exec")


def test_operators_have_the_specs_arguments() -> None:
    for spec, op in load(ROLES).items():
        given = [
            (str(a.type), a.name, bool(a.alias_info and a.alias_info.is_write))
            for a in op._schema.arguments
        ]
        assert given == [(kind.split("(")[0], name, "!" in kind) for kind, name in spec.arguments]
        assert len(op._schema.returns) == len(spec.returns)


def test_a_compiler_sees_the_kernels() -> None:
    from torch._dynamo.backends.common import aot_autograd

    seen: list[str] = []

    class Captured(Exception):
        pass

    def capture(graph: torch.fx.GraphModule, _: Any) -> Any:
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        for node in graph.graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                seen.append(kernel.fn.__name__)
        raise Captured

    fold, choose = FOLDS[1], dataclasses.replace(AMONG, dtype="float32", key_dim=16)
    ops = load([fold, choose])
    laid = lay_out_fold(fold, (3,), (60,), 4, 4)
    table = laid.given["page_table"]
    lists, query = candidates(table, 1, 9), torch.randn(1, 8, 1, 16)

    def step(*given: Any) -> Tensor:
        ops[fold](*given)
        means = given[0][:, :16].contiguous()
        at = (laid.given["position"], laid.given["lengths"])
        chosen: Tensor = ops[choose](query, means, means, table, lists, *at, 1, 1, 5)
        return chosen

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=capture), fullgraph=True)
    with pytest.raises(Exception, match="Captured"):
        compiled(*(laid.given[name] for _, name in fold.arguments))
    assert seen == [fold.name, choose.name]
