"""Tiers: what is drawn of a memory adds up to what is counted of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memcompile.compiler.report import layout_of
from memcompile.compiler.tiers import KINDS, held, tiers
from memcompile.models.memory import PRESETS, parse_policy
from memcompile.models.memory.traffic import bytes_read
from memcompile.passes.result import MaskRule, Site

SITE = Site(
    name="layers.9",
    layer=9,
    node="attention",
    heads=6,
    kv_heads=2,
    key_dim=32,
    value_dim=48,
    rule=MaskRule("causal"),
    scale=0.25,
    softcap=0.0,
    dtype=torch.bfloat16,
)
CONTEXTS = (1, 63, 64, 65, 700, 1500, 8192, 8200, 100_001)
POLICIES = {
    "dense": {"pages"},
    "scout": {"sinks", "pages", "index", "summaries", "window"},
    "scout:compensate=false": {"sinks", "pages", "index", "window"},
    "scout:min_context=150000": {"sinks", "pages", "window"},
    "scout:sinks=0,window=0": {"pages", "index", "summaries", "window"},
    "hierarchical": {"sinks", "pages", "levels", "window"},
    "hierarchical:refine=0,keep=no": {"sinks", "levels", "window"},
    "hierarchical:levels=64": {"sinks", "pages", "levels", "window"},
    "window": {"sinks", "freed", "window"},
    "heavy-hitter": {"sinks", "pages", "account", "freed", "window"},
    "quest": {"pages", "index", "window"},
    "hybrid:state_layers=9": {"state", "window"},
    "hybrid:state_layers=9,write=delta,decay=gate": {"state", "window"},
    "mixture:layers=9=quest": {"pages", "index", "window"},
}


def test_every_preset_is_taken_apart_here() -> None:
    assert {policy.partition(":")[0] for policy in POLICIES} == {*PRESETS}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [0, 512], ids=["causal", "sliding"])
def test_tiers_add_up(policy: str, window: int) -> None:
    rule = MaskRule("window", window) if window else MaskRule("causal")
    site = replace(SITE, rule=rule)
    memory = parse_policy(policy).memory(9, window)
    layout = layout_of(site, memory)
    for context in CONTEXTS:
        found = tiers(memory, site, context, window)
        counted = bytes_read(memory, site, context - 1, window=window)
        assert sum(tier.tokens for tier in found) == context
        assert sum(tier.bytes for tier in found) == counted
        assert all(tier.tokens >= 0 and tier.bytes >= 0 for tier in found)
        assert [tier.kind for tier in found] == sorted(
            (tier.kind for tier in found), key=[*KINDS].index
        )
        assert sum(held(layout, context).values()) == layout.held_bytes(context)


@pytest.mark.parametrize(("policy", "kinds"), POLICIES.items())
def test_which_tiers_a_memory_has(policy: str, kinds: set[str]) -> None:
    memory = parse_policy(policy).memory(9, 0)
    assert {tier.kind for tier in tiers(memory, SITE, 100_001)} == kinds


def test_levels_are_told_apart() -> None:
    memory = parse_policy("hierarchical").memory(9, 0)
    found = tiers(memory, SITE, 100_001)
    assert [tier.level for tier in found if tier.kind == "levels"] == [4096, 512, 64]
    assert "read in groups of 512" in {tier.label for tier in found}


def test_a_sliding_window_reads_the_window_alone() -> None:
    memory = parse_policy("scout").memory(9, 512)
    found = {tier.kind: tier for tier in tiers(memory, SITE, 8192, 512)}
    assert found["window"].tokens == 512 and found["freed"].tokens == 8192 - 512
    assert found["freed"].bytes == 0


def test_what_is_held_by_its_kind() -> None:
    def parts(policy: str) -> set[str]:
        return {*held(layout_of(SITE, parse_policy(policy).memory(9, 0)), 8192)}

    assert parts("dense") == {"keys and values"}
    assert parts("scout") == {"keys and values", "records"}
    assert parts("hierarchical") == {"keys and values", "records"}
    assert parts("heavy-hitter") == {"keys and values", "account"}
    assert parts("hybrid:state_layers=9") == {"keys and values", "state"}
