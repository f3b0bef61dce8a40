"""Kernels of specs that nobody chose: drawn over the whole coverage, on random memories."""

from __future__ import annotations

import random
from functools import cache

import pytest
import test_cpp_attend as attend
import test_cpp_score_select as select
from hypothesis import given, settings
from kernel_case import Shape, lay_out, shapes

from memcompile.codegen import cpp
from memcompile.codegen.spec import SCORE_TERMS, KernelSpec

DIMS = (8, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
DTYPES = ("float32", "float16", "bfloat16")


def draw(seed: int) -> KernelSpec:
    """One spec of attend or score_select, a function of the seed."""
    rng = random.Random(seed)
    shape = {
        "dtype": rng.choice(DTYPES),
        "key_dim": rng.choice(DIMS),
        "group": rng.choice((1, 2, 3, 4, 5, 7, 8, 12, 16, 33, 71)),
        "page_size": rng.choice((16, 32, 64, 128)),
    }
    if rng.random() < 0.3:
        score = rng.choice([*SCORE_TERMS])
        return KernelSpec("score_select", **shape, score=score, page_logits=rng.random() < 0.5)
    shape["value_dim"] = rng.choice(DIMS)
    if rng.random() < 0.15:
        shape |= {"key_dim": 576, "value_dim": 512, "shared_kv": True}
    flags = {flag: rng.random() < 0.3 for flag in ("softcap", "window", "page_lse", "bias")}
    kind = rng.choice(("all", "listed", "unlisted", "records", "summaries"))
    if kind == "summaries":
        return KernelSpec(
            "attend", **shape, pages="listed", softcap=flags["softcap"], summaries=True
        )
    if kind == "records":
        span = shape["page_size"]
        shape |= {"page_size": 1, "shared_kv": False}
        return KernelSpec("attend", **shape, span=span, pages="unlisted", **flags | {"bias": True})
    return KernelSpec("attend", **shape, pages=kind, **flags)


@cache
def operators(first: int, count: int):
    """The specs of these seeds and their operators, built together."""
    return cpp.load([draw(seed) for seed in range(first, first + count)])


def check(seed: int, loaded) -> None:
    spec = draw(seed)

    @settings(max_examples=8)
    @given(shape=shapes(longest=400), choice=select.choices)
    def on_any_memory(shape: Shape, choice: select.Choice) -> None:
        if spec.op == "attend":
            attend.check(lay_out(spec, shape), loaded)
        else:
            select.check_close(select.lay_out(spec, shape), choice, loaded)
            select.check_exact(select.lay_out(spec, shape, select.whole), choice, loaded)

    on_any_memory()


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_reference(seed: int) -> None:
    check(seed, operators(0, 8))


@pytest.mark.long
@pytest.mark.parametrize("batch", range(10))
def test_many_equal_the_reference(batch: int) -> None:
    loaded = operators(100 + 8 * batch, 8)
    for seed in range(100 + 8 * batch, 108 + 8 * batch):
        check(seed, loaded)


def test_draws_reach_all_kinds() -> None:
    specs = [draw(seed) for seed in range(200)]
    assert {spec.op for spec in specs} == {"attend", "score_select"}
    for flag in ("summaries", "page_logits", "shared_kv", "bias", "softcap", "window", "page_lse"):
        assert {getattr(spec, flag) for spec in specs} == {False, True}, flag
    assert {spec.pages for spec in specs} == {"all", "listed", "unlisted"}
