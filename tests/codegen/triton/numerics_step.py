"""What generated Triton kernels do beside and after each other: merging, tuning, whole steps.

`test_numerics.py` runs this file in a process of its own: on a GPU where there is one, otherwise
through Triton's interpreter, which has to be chosen before the first kernel is made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import Tensor
from triton_case import DEVICE, Case, Laid, quantised, run

import memcompile.models.ops  # noqa: F401 (registers the references)
from memcompile.codegen.spec import KernelSpec
from memcompile.codegen.triton import load
from memcompile.codegen.triton.tune import example
from memcompile.models.memory.parts import INDEX_FIELDS

reference = torch.ops.memcompile


@pytest.mark.parametrize(("count", "value_dim"), [(1, 8), (2, 128), (3, 40), (4, 512)])
def test_combine_merges_reads(count: int, value_dim: int) -> None:
    outs = [torch.randn(2, 3, 5, value_dim) for _ in range(count)]
    lses = [torch.randn(2, 3, 5) * 4 for _ in range(count)]
    for out, lse in zip(outs, lses, strict=True):
        lse[torch.rand(2, 3, 5) < 0.3] = -torch.inf
        out[lse == -torch.inf] = 0
    spec = KernelSpec("combine", value_dim=value_dim, count=count)
    named = {f"out{i}": out for i, out in enumerate(outs)}
    got = run(spec, **named, **{f"lse{i}": lse for i, lse in enumerate(lses)})
    truth = reference.combine([o.double() for o in outs], [x.double() for x in lses])
    eager = reference.combine(outs, lses)
    for part, *three in zip(("out", "lse"), got, eager, truth, strict=True):
        assert_close_to_float64(*three, reduction=4 * count, logarithm=part == "lse")


@pytest.mark.parametrize(
    "spec",
    [
        KernelSpec("attend", key_dim=16, value_dim=8, group=2, page_size=16),
        KernelSpec(
            "attend", key_dim=16, value_dim=8, pages="unlisted", span=16, bias=True,
            softcap=True, window=True,
        ),
        KernelSpec(
            "attend", key_dim=16, value_dim=8, group=2, page_size=16, pages="listed",
            summaries=True,
        ),
        KernelSpec("score_select", key_dim=16, group=2, page_size=16, score="mean-std"),
        KernelSpec(
            "score_select", key_dim=16, group=2, page_size=16, score="box", page_logits=True
        ),
        KernelSpec("append_index", key_dim=16, value_dim=8, page_size=16, fields=INDEX_FIELDS),
        KernelSpec("append_index", key_dim=16, value_dim=8, fields=INDEX_FIELDS, fold=True),
        KernelSpec("score_select", key_dim=16, group=2, page_size=16, score="box", among=True),
        KernelSpec("combine", value_dim=8, count=2),
        KernelSpec("state_step", key_dim=16, value_dim=8, group=2, decay="constant", delta=True),
        KernelSpec("state_chunk", key_dim=16, value_dim=8, decay="gate", normalised=True),
        KernelSpec(
            "state_chunk", key_dim=16, value_dim=8, decay="constant", normalised=True,
            backward=True,
        ),
    ],
    ids=lambda spec: spec.name,
)  # fmt: skip
def test_what_tuning_measures_runs(spec: KernelSpec) -> None:
    given = example(spec, torch.device(DEVICE), 1, 2, 80, 3, 32)
    out = load([spec])[spec](*given)
    for tensor in out if isinstance(out, tuple) else ():
        assert not tensor.isnan().any()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_step_is_captured_in_a_cuda_graph() -> None:
    """Select and read replay with other positions, tables and queries than were captured."""
    case = Case(
        position=(700, 90), lengths=(1, 1), kv_heads=2, group=3, page_size=16,
        dtype=torch.bfloat16, key_dim=64, value_dim=64,
    )  # fmt: skip
    laid, later = Laid(case), Laid(dataclasses.replace(case, position=(650, 200), seed=1))
    later.table = torch.nn.functional.pad(
        later.table, (0, laid.table.shape[2] - later.table.shape[2]), value=-1
    )
    records = quantised(laid, "mean")
    shapes: dict[str, Any] = dict(dtype="bfloat16", key_dim=64, group=3, page_size=16)
    chooses = KernelSpec("score_select", score="mean", page_logits=True, **shapes)
    reads = KernelSpec("attend", value_dim=64, pages="listed", summaries=True, **shapes)
    ops = load([chooses, reads])
    query, table, position, lengths = (
        x.to(DEVICE) for x in (laid.query, laid.table, laid.position, laid.lengths)
    )
    keys, values = (p.nan_to_num(0).to(DEVICE) for p in (laid.key_pages, laid.value_pages))
    mean = records["mean"].nan_to_num(0).to(DEVICE)
    page_values, page_bias = values.mean(1), torch.full((len(keys), 1), 16.0, device=DEVICE).log()
    at = (position, lengths)

    def step() -> tuple[Tensor, ...]:
        chosen = ops[chooses](query, mean, table, *at, 1, 1, 12, 10, 0)
        return *chosen, *ops[reads](
            query, keys, values, table, *chosen, page_values, page_bias, *at, 0.1
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in (laid, later):
        query.copy_(other.query.nan_to_num(0))
        table.copy_(other.table.clamp_max(len(keys) - 1))
        position.copy_(other.position)
        graph.replay()
        for replayed, fresh in zip(captured, step(), strict=True):
            assert torch.equal(replayed, fresh)
