"""The report: the same after JSON, honest about bytes, and readable."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from memcompile.compiler.report import (
    CONTEXTS,
    Report,
    bytes_of,
    comparison,
    describe,
    size_of,
)
from memcompile.models.memory import parse_policy, preset
from memcompile.passes.result import Declined, MaskRule, Site

SITE = Site(
    name="model.layers.0.self_attn",
    layer=0,
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


def report(**changes: Any) -> Report:
    sites = [
        SITE,
        replace(SITE, layer=1, name="model.layers.1.self_attn", rule=MaskRule("window", 512)),
        replace(SITE, layer=2, name="model.layers.2.self_attn"),
    ]
    scout = preset("scout", dense_layers=1, budget=2048)
    values: dict[str, Any] = {
        "model": "Toy",
        "policy": "scout",
        "options": {"budget": 2048, "min_context": None},
        "sites": sites,
        "memories": {s.name: scout.memory(s.layer, s.rule.window) for s in sites},
        "declined": [Declined("the mask is data", "where_3", "derive mask rule", "model.py:12")],
        "max_context": 4096,
        "ragged": True,
        "timings": {"export": 1.25},
        "self_check": {"splits": [1, 4, 8], "worst": 1e-6},
        "notes": ["reference operations"],
    }
    return Report(**{**values, **changes})


def test_json_gives_the_report_back() -> None:
    before = report()
    assert Report.from_json(json.loads(json.dumps(before.to_json()))) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "version 99"), ({"extra": 1}, "extra"), ({"sites": None}, "sites")],
)
def test_a_foreign_report_is_refused(change: dict[str, Any], message: str) -> None:
    data = {**report().to_json(), **change}
    if data["sites"] is None:
        del data["sites"]
    with pytest.raises(ValueError, match=message):
        Report.from_json(data)


def test_bytes_of_a_step() -> None:
    shown = report()
    dense, window, scout = shown.sites
    element, heads, key, value = 2, 2, 32, 48
    for context in CONTEXTS:
        everything = context * heads * (key + value) * element
        assert shown.step_bytes(dense, context) == everything
        assert shown.step_bytes(window, context) == 512 * heads * (key + value) * element
        pages = context // 64
        kept = 2048 * heads * (key + value) * element
        records = pages * heads * 2 * key * element
        # a skipped page's mean was read by the score already
        summaries = (pages - 32) * heads * ((key + value) * element + 4)
        assert kept + records <= shown.step_bytes(scout, context) <= kept + records + summaries
        assert shown.step_bytes(scout, context) < everything


def test_a_short_context_reads_what_dense_reads() -> None:
    shown = report()
    assert shown.step_bytes(shown.sites[2], 1024) == shown.sites[2].dense_bytes(1024)


def test_the_table_shows_every_site_and_every_decline() -> None:
    text = str(report())
    for part in ("model.layers.2.self_attn", "6/2×32:48", "window(512)", "causal"):
        assert part in text
    assert "32 pages of 64 by mean-std, compensated" in text
    assert "the mask is data" in text and "where_3" in text and "model.py:12" in text
    assert "4096" in text and "reference operations" in text


def test_a_site_that_was_left_reads_densely_and_says_so() -> None:
    shown = report(memories={})
    assert "untouched" in str(shown) and "no attention was rewritten" in str(shown)
    assert shown.step_bytes(shown.sites[2], 8192) == shown.sites[2].dense_bytes(8192)
    assert Report.from_json(shown.to_json()) == shown


def test_a_policy_that_skips_nothing_is_not_passed_over() -> None:
    skipping = report()
    everything = preset("scout", dense_layers=9)
    idle = report(memories={s.name: everything.memory(s.layer, 0) for s in skipping.sites})
    assert "reads everything" in str(idle) and "reads everything" not in str(skipping)
    hybrid = preset("hybrid", state_layers=(2,))
    states = report(memories={s.name: hybrid.memory(s.layer, 0) for s in skipping.sites})
    assert "reads everything" not in str(states) and "held of a sequence" in str(states)


def test_nothing_rewritten_is_said() -> None:
    assert "no attention was rewritten" in str(report(sites=[], memories={}))


def test_policies_stand_side_by_side() -> None:
    console = Console(width=140, color_system=None)
    with console.capture() as text:
        console.print(comparison({"one": report(), "two": report(memories={})}))
    shown = text.get()
    for part in ("3 attentions", "one", "two", "6/2×32:48", "policy two: no step can be derived"):
        assert part in shown
    assert "policy one: 2 of 3 dense: every page of 64; 1 of 3 scout: 32 pages of 64" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("│ one")]
    cells = [cell.strip() for cell in line.split("│")[2:-1]]
    one = report()
    assert cells == [
        bytes_of(sum(counted(site, context) for site in one.sites))
        for counted in (one.step_bytes, one.held_bytes)
        for context in CONTEXTS
    ]


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("dense", "dense: every page of 64"),
        ("scout", "scout: 32 pages of 64 by mean-std, compensated"),
        ("scout:min_context=4096", "mean-std, compensated, dense below 4096"),
        (
            "hierarchical",
            "hierarchical: 22 pages of 64 by mean-std, the rest in summaries of 64, 512, 4096 "
            "tokens",
        ),
        (
            "hierarchical:refine=0,keep=no,levels=64",
            "hierarchical: 6 pages of 64, the rest in summaries of 64 tokens, other pages are "
            "freed",
        ),
        ("window", "window: 18 pages of 64, other pages are freed"),
        ("heavy-hitter", "32 pages of 64 by attention mass, other pages are freed"),
        ("quest", "quest: 128 pages of 16 by box"),
        (
            "hybrid:state_layers=9",
            "hybrid: the last 64 tokens, and a state in one softmax with them (softmax features, "
            "additive write, no decay)",
        ),
        (
            "hybrid:state_layers=9,write=delta,decay=gate,feature_map=identity",
            "and a state joined by a gate (identity features, delta write, a decay a token)",
        ),
        ("mixture:layers=9=quest", "quest: 128 pages of 16 by box"),
    ],
)
def test_a_memory_is_told_in_a_line(policy: str, text: str) -> None:
    assert describe(parse_policy(policy).memory(9, 0)).endswith(text)


def test_what_is_held_of_a_sequence() -> None:
    """Keys and values of 2 heads in 16 bits; a page has 64 tokens."""
    page = 64 * 2 * (32 + 48) * 2

    def held(policy: str, context: int, window: int = 0) -> int:
        rule = MaskRule("window", window) if window else MaskRule("causal")
        site = replace(SITE, layer=9, rule=rule)
        memory = parse_policy(policy).memory(9, window)
        return report(memories={site.name: memory}).held_bytes(site, context)

    assert held("dense", 8192) == 128 * page and held("dense", 8200) == 129 * page
    assert held("window", 8192) == held("window", 131072) == (1 + 16 + 1) * page
    assert held("window", 128) == 2 * page
    assert held("scout", 8192, window=512) == 8 * page
    # Records of mean, std, mean value and count; the account, a number a page.
    assert held("scout", 8192) == 128 * (page + 2 * (2 * (32 + 32 + 48) + 4))
    assert held("heavy-hitter", 131072) == 32 * page + 2 * 4 * 2048
    assert held("hybrid:state_layers=9", 8192) == 2 * page + 4 * 2 * 64 * (48 + 1)
    # What is far is held in groups of 4096 alone.
    near, far = (held("hierarchical:refine=0,keep=no", n) for n in (65536, 131072))
    assert far - near == 16 * 2 * (2 * (32 + 48) + 4) < near < 8 * page
    assert report(memories={}).held_bytes(SITE, 8192) == SITE.dense_bytes(8192)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (300 * 2**20, "300 MiB"),
        (2**41, "2048 GiB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert bytes_of(count) == text


def test_sizes_for_people() -> None:
    assert [size_of(n) for n in (8192, 1000, 131072)] == ["8K", "1000", "128K"]
