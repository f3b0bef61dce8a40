"""Append and read become one operation where a runtime can do both, and nothing else changes."""

from __future__ import annotations

import pytest
from fused_case import LEVELS, SCOUT, assert_same, compiled, graph_of

from memcompile.passes.fuse_grouped import fuse_grouped


@pytest.mark.parametrize(
    ("policy", "options", "read", "applied", "reasons"),
    [
        ("dense", {}, "policy", 2, []),
        ("scout", SCOUT, "policy", 1, ["the others by their summaries"]),
        ("scout", SCOUT, "dense", 2, []),
        ("hierarchical", LEVELS, "dense", 2, []),
        (
            "hybrid",
            {"window": 16, "page_size": 8, "write": "delta", "state_layers": (1,)},
            "policy",
            1,
            ["its log-sum-exp is needed"],
        ),
        (
            "window",
            {"sinks": 8, "window": 16, "page_size": 8},
            "dense",
            0,
            ["keeps its first pages"] * 2,
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_fused_graph_is_the_same(
    policy: str, options: dict[str, object], read: str, applied: int, reasons: list[str]
) -> None:
    made = compiled(policy, **options)
    plain, fused = graph_of(made, read), graph_of(made, read)
    result = fuse_grouped(fused)
    assert result.applied == applied
    assert len(result.declined) == len(reasons)
    for declined, reason in zip(result.declined, reasons, strict=True):
        assert reason in declined.reason and declined.rule == "fuse_grouped"
    assert_same(made, fused, plain)


def test_a_site_that_the_runtime_cannot_take_is_left_alone() -> None:
    result = fuse_grouped(graph_of(compiled("dense")), {"site1_keys": "its keys are wider"})
    assert result.applied == 1
    assert [declined.reason for declined in result.declined] == ["its keys are wider"]
