"""The list of operations, and that fakes promise what the references deliver."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from paged_case import Case, Laid, page_lists
from torch import Tensor

from memcompile.models import ops as registry

ops = torch.ops.memcompile

# The templates of the design, and no others.
FAMILIES = {"append_index", "score_select", "attend", "combine"} | {
    "append_index.record_table",
    "append_index.fold",
    "score_select.page_logits",
    "score_select.among",
    "attend.page_lse",
    "attend.summaries",
    "state_step",
    "state_chunk",
    "state_chunk.backward",
}
NORMAL_FORM = {"attention"}
APPENDED = {"key_pages", "value_pages", "index"}
WRITES = {
    "append_index": APPENDED,
    "append_index.record_table": APPENDED,
    "append_index.fold": {"index"},
    "state_step": {"state", "norm"},
    "state_chunk": {"state", "norm"},
}


def test_there_are_these_operations_and_no_others() -> None:
    assert set(registry.OPS) == FAMILIES | NORMAL_FORM
    assert set(registry.FAMILIES.values()) == FAMILIES
    for name in registry.OPS:
        schema = registry.operator(name)._schema
        writes = {
            arg.name for arg in schema.arguments if arg.alias_info and arg.alias_info.is_write
        }
        assert writes == WRITES.get(name, set())


def arguments(name: str, dtype: torch.dtype, rows: int, group: int) -> tuple[object, ...]:
    case = Case(position=(13, 2), lengths=(rows, 1), group=group, dtype=dtype)
    laid = Laid(case)
    query = laid.query.nan_to_num(1.0)
    at = laid.position, laid.lengths
    key, value = (torch.randn(2, 2, rows, d, dtype=dtype) for d in (7, 5))
    mean = torch.randn(len(laid.key_pages), 7, dtype=dtype)
    out, lse = torch.randn(2, 6, rows, 5), torch.randn(2, 6, rows)
    pools = laid.key_pages.nan_to_num(0), laid.value_pages.nan_to_num(0)
    index = [mean], ["mean"]
    given = {
        "attention": (query, key, value, None, True, 0.4, 0.0),
        "append_index": (key, value, laid.table, *at, *pools, [mean], ["mean"]),
        "score_select": (*(query, [mean], ["mean"], laid.table, *at, "mean", 4, 1, 0, 3, 2, 0),),
        "attend": (
            *(query, *pools, None, laid.table, page_lists(laid, 2), False, *at, 0.4, 0.0, 0, 1),
        ),
        "combine": ([out, out], [lse, lse]),
    }
    tables = laid.table, laid.table
    given["append_index.record_table"] = (key, value, *tables, *at, *pools, *index)
    given["append_index.fold"] = ([mean], laid.table, laid.table[:, :, ::2], *at, *index, 4, 2)
    given["score_select.among"] = (
        *(query, *index, laid.table, page_lists(laid, 3), *at, "mean", 4, 1, 0, 2),
    )
    given["attend.page_lse"] = given["attend"]
    given["score_select.page_logits"] = given["score_select"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(2, 2 * group, rows, laid.table.shape[2], dtype=wide)
    records = torch.randn(len(mean), 5, dtype=dtype), torch.randn(len(mean), 1)
    lists = page_lists(laid, 2)
    given["attend.summaries"] = (
        *(query, *pools, laid.table, lists, logits, *records, *at, 0.4, 0.0),
    )
    # decay and beta are float32 beside inputs of any dtype; the state is of the summing type.
    gates = -torch.rand(2, 2, rows), None, laid.lengths
    given["state_step"] = given["state_chunk"] = (
        *(query, key, value, *gates, torch.zeros(2, 2, 7, 5, dtype=wide)),
        torch.zeros(2, 2, 7, dtype=wide),
    )
    grads = torch.randn(2, 2 * group, rows, 5), torch.randn(2, 2 * group, rows)
    given["state_chunk.backward"] = (query, key, value, *gates, *grads)
    return given[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 3), (5, 1), (5, 3)])
@pytest.mark.parametrize("name", registry.OPS)
def test_fakes_promise_the_real_shapes_strides_and_types(
    name: str, rows: int, group: int, dtype: torch.dtype
) -> None:
    inputs = arguments(name, dtype, rows, group)
    real = registry.operator(name)(*inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = registry.operator(name)(
            *torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, inputs)
        )
    for one, two in zip(*map(torch.utils._pytree.tree_leaves, (real, fake)), strict=True):
        if one is not None:
            assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


@pytest.mark.parametrize("name", registry.OPS)
def test_operations_pass_torchs_own_checks(name: str) -> None:
    torch.library.opcheck(
        registry.operator(name),
        arguments(name, torch.float32, 5, 3),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_importing_the_operations_needs_torch_alone() -> None:
    code = (
        "import sys, memcompile.models.ops, memcompile.models.memory.read\n"
        "print([m for m in ('triton', 'transformers', 'onnx', 'networkx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
