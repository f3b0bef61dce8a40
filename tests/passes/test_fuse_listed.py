"""Reads of listed pages become one operation, told of the new rows, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from fused_case import LEVELS, SCOUT, assert_same, compiled, graph_of

from memcompile.passes.fuse_listed import fuse_listed

EXACT = {**SCOUT, "compensate": False}


@pytest.mark.parametrize(
    ("policy", "options", "applied", "reasons"),
    [
        ("dense", {}, 0, []),
        ("scout", EXACT, 1, []),
        ("quest", {"page_size": 8, "budget": 32, "dense_layers": 1}, 1, []),
        ("scout", SCOUT, 0, ["by their summaries"]),
        ("hierarchical", LEVELS, 0, ["records of pages", "records of pages", "log-sum-exp"]),
    ],
    ids=["dense", "scout", "quest", "compensating", "hierarchical"],
)
def test_a_fused_graph_is_the_same(
    policy: str, options: dict[str, object], applied: int, reasons: list[str]
) -> None:
    made = compiled(policy, **options)
    plain, fused = graph_of(made), graph_of(made)
    result = fuse_listed(fused)
    assert result.applied == applied
    for declined, reason in zip(result.declined, reasons, strict=True):
        assert reason in declined.reason and declined.rule == "fuse_listed"
    assert_same(made, fused, plain)


def test_a_site_that_the_runtime_cannot_take_is_left_alone() -> None:
    made = compiled("scout", **{**EXACT, "dense_layers": 0})
    result = fuse_listed(graph_of(made), {"site1_keys": "its keys are wider"})
    assert result.applied == 1
    assert [declined.reason for declined in result.declined] == ["its keys are wider"]


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (3, "keys", "records of pages"),
        (9, 30.0, "capped"),
        (10, 16, "read in part"),
        (12, 1, "records of pages"),
        (13, 1, "keeps its first pages"),
        (1, "query", "not written by one append"),
        (4, "keys", "not chosen among all pages"),
    ],
)
def test_what_is_declined(place: int, value: object, reason: str) -> None:
    graph = graph_of(compiled("scout", **EXACT))
    listed = torch.ops.memcompile_portable.attend.default
    reads = [n for n in graph.graph.nodes if n.target is listed and n.args[4] is not None]
    (read,) = reads
    named = {"keys": read.args[1], "query": read.args[0]}
    read.update_arg(place, named[value] if isinstance(value, str) else value)
    result = fuse_listed(graph)
    assert result.applied == 0
    assert reason in result.declined[0].reason
