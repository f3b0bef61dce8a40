"""Generated C++ attention against the reference in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import Laid, Shape, check_attend, lay_out, shapes

from memcompile.codegen import cpp
from memcompile.codegen.cpp import build
from memcompile.codegen.spec import KernelSpec


def spec(
    dtype: str, key_dim: int, value_dim: int, group: int, page_size: int, **rest: Any
) -> KernelSpec:
    return KernelSpec("attend", dtype, key_dim, value_dim, False, group, page_size, **rest)


SPECS = [
    spec("bfloat16", 128, 128, 4, 64),
    spec("bfloat16", 128, 128, 4, 64, pages="listed"),
    spec("bfloat16", 128, 128, 4, 1, span=16, pages="unlisted", bias=True),
    spec("bfloat16", 96, 40, 3, 32, window=True, page_lse=True),
    spec("bfloat16", 8, 256, 5, 16, softcap=True, bias=True),
    spec("bfloat16", 80, 80, 7, 128, pages="listed", page_lse=True),
    KernelSpec("attend", "bfloat16", 576, 512, True, 16, 64),
    KernelSpec("attend", "float16", 576, 512, True, 8, 64, pages="listed"),
    spec("float16", 128, 128, 8, 64),
    spec("float16", 40, 96, 1, 16, pages="listed", softcap=True, window=True),
    spec("float16", 64, 64, 2, 1, span=16, pages="unlisted", bias=True, page_lse=True),
    spec("float32", 64, 64, 1, 32, page_lse=True),
    spec("float32", 40, 8, 5, 128, window=True, bias=True, page_lse=True),
    spec("float32", 128, 80, 4, 16, pages="unlisted", softcap=True),
    spec("float32", 256, 256, 70, 64),
    spec("bfloat16", 128, 128, 4, 64, pages="listed", summaries=True),
    spec("bfloat16", 80, 40, 7, 16, pages="listed", summaries=True),
    spec("float16", 40, 96, 1, 16, pages="listed", summaries=True, softcap=True),
    spec("float32", 64, 80, 6, 32, pages="listed", summaries=True),
    KernelSpec("attend", "bfloat16", 576, 512, True, 16, 32, pages="listed", summaries=True),
    spec("bfloat16", 32, 32, 2, 1, span=4096, pages="unlisted", bias=True, page_lse=True),
    spec("float32", 8, 8, 1, 1, span=1 << 18, pages="listed", bias=True),
    spec("bfloat16", 64, 64, 4, 64, by_slot=True, pages="listed"),
    spec("float32", 40, 24, 2, 16, by_slot=True, window=True, page_lse=True),
]
BY_NAME = {spec.name: spec for spec in SPECS}
# Compiling them for every instruction set is what takes the time; no other test needs these.
LONG = {SPECS[i].name for i in (4, 5, 7, 8, 9, 10, 14, 16, 18)}


def named(specs: Iterable[KernelSpec]) -> Any:
    """A test of each spec, those that only the long suite compiles marked so."""
    long = pytest.mark.long
    names = [spec.name for spec in specs]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=long) if name in LONG else name for name in names]
    )


class Operators(dict):
    def __missing__(self, spec: KernelSpec) -> Any:
        self.update(cpp.load([spec]))
        return self[spec]


@pytest.fixture(scope="module")
def operators() -> Operators:
    return Operators(cpp.load([spec for spec in SPECS if spec.name not in LONG]))


def check(laid: Laid, operators) -> None:
    check_attend(laid, operators[laid.spec](*laid.arguments()))


@named(SPECS)
@settings(max_examples=12)
@given(shape=shapes())
def test_equals_the_reference(name: str, shape: Shape, operators) -> None:
    check(lay_out(BY_NAME[name], shape), operators)


@named((*SPECS[:3], *(s for s in SPECS if s.summaries)))
@pytest.mark.parametrize("batch", [1, 64])
def test_long_and_wide(name: str, batch: int, operators) -> None:
    """Far enough for splits at batch 1, and more sequences than threads at 64."""
    position = tuple(5000 // batch + 7 * b for b in range(batch))
    shape = Shape(position, (1,) * batch, kv_heads=1, listed=20)
    check(lay_out(BY_NAME[name], shape), operators)


@pytest.mark.parametrize("name", [SPECS[0].name, SPECS[3].name, SPECS[6].name])
def test_prefill_rows_in_many_blocks(name: str, operators) -> None:
    check(lay_out(BY_NAME[name], Shape((150, 3), (70, 66), rows=70)), operators)


def test_a_sequence_far_beyond_float_numbers(operators) -> None:
    """Slots are counted in 64 bits: a window at token 2^25 sees its own keys and no others."""
    spec = SPECS[12]
    near = lay_out(spec, Shape((900,), (3,), kv_heads=1, rows=3))
    near.given["window"] = 300
    far = Laid(spec, near.shape, dict(near.given))
    pages = (1 << 25) // spec.page_size
    far.given["position"] = near.given["position"] + (1 << 25)
    far.given["page_table"] = torch.cat(
        [torch.full((1, 1, pages), -1, dtype=torch.int32), near.given["page_table"]], 2
    )
    near_out, near_lse, _ = operators[spec](*near.arguments())
    far_out, far_lse, _ = operators[spec](*far.arguments())
    assert torch.equal(near_out, far_out)
    assert torch.equal(near_lse, far_lse)


@pytest.mark.parametrize("name", [spec.name for spec in SPECS[-4:-2]])
def test_records_of_many_tokens(name: str, operators) -> None:
    """A slot is seen from its last token on, whatever it stands for."""
    spec = BY_NAME[name]
    for seed in range(8):
        position = (spec.span * 90 - 2 + seed // 2, spec.span * 3 - 1, 7)
        shape = Shape(position, (3, 1, 0), rows=3, holes=10, listed=40, seed=seed)
        check(lay_out(spec, shape), operators)


@pytest.mark.parametrize("name", [SPECS[i].name for i in (0, 3, 11, 12, 13)])
def test_pages_that_were_evicted(name: str, operators) -> None:
    """All but the first and the last have left the table; each KV head kept one more of its own."""
    spec = BY_NAME[name]
    for rows in (1, 5):
        laid = lay_out(spec, Shape((spec.page_size * 40, spec.page_size * 9), (rows, 1), rows=rows))
        table = laid.given["page_table"]
        kept = table[:, :, 7:9].clone()
        table[:, :, 1:-3] = -1
        table[:, 0, 7], table[:, 1, 8] = kept[:, 0, 0], kept[:, 1, 1]
        laid.given["window"] = spec.page_size * 34 + 3  # its first page is not there
        check(laid, operators)


def test_strided_queries_and_tables(operators) -> None:
    """Heads and rows may be transposed; gaps in the last axis are copied away."""
    spec = SPECS[0]
    laid = lay_out(spec, Shape((100, 30), (5, 2), rows=5))
    expected = operators[spec](*laid.arguments())
    query = laid.given["query"]
    for other in (query.contiguous(), query.transpose(2, 3).contiguous().transpose(2, 3)):
        laid.given["query"] = other
        assert all(map(torch.equal, operators[spec](*laid.arguments()), expected))
    table = laid.given["page_table"]
    laid.given["page_table"] = table.repeat_interleave(2, 2)[..., ::2]
    assert all(map(torch.equal, operators[spec](*laid.arguments()), expected))


def test_the_same_whatever_the_threads(operators) -> None:
    """Splits change with the threads, results by no more than rounding; one run equals the next."""
    laid = lay_out(SPECS[0], Shape((3000,), (1,), kv_heads=1))
    many = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            check(laid, operators)
            first, second = (operators[SPECS[0]](*laid.arguments()) for _ in range(2))
            assert all(map(torch.equal, first, second))
    finally:
        torch.set_num_threads(many)


def wrong(laid: Laid, **changes: object) -> tuple[object, ...]:
    return Laid(laid.spec, laid.shape, {**laid.given, **changes}).arguments()


def test_wrong_tensors_are_refused(operators) -> None:
    spec = SPECS[0]
    laid = lay_out(spec, Shape())
    g, call = laid.given, operators[spec]
    with pytest.raises(TypeError, match=r"query is Float; this kernel reads BFloat16"):
        call(*wrong(laid, query=g["query"].float()))
    with pytest.raises(ValueError, match=r"value_pages is \[\d+, 64, 64\]; this call needs"):
        call(*wrong(laid, value_pages=g["value_pages"][..., :64].contiguous()))
    with pytest.raises(ValueError, match=r"key_pages has strides .*pools are contiguous"):
        call(*wrong(laid, key_pages=g["key_pages"].transpose(0, 1).contiguous().transpose(0, 1)))
    with pytest.raises(
        ValueError, match=r"page_table is \[1, 1, \d+\]; this call needs \[1, 2, -1"
    ):
        call(*wrong(laid, page_table=g["page_table"][:, :1]))
    with pytest.raises(TypeError, match=r"position is Long; this kernel reads Int"):
        call(*wrong(laid, position=g["position"].long()))
    with pytest.raises(ValueError, match=r"7 query heads; this kernel reads groups of 4"):
        call(*wrong(laid, query=g["query"][:, :7]))


def test_empty_calls(operators) -> None:
    laid = lay_out(SPECS[0], Shape())
    out, lse = operators[SPECS[0]](*wrong(laid, query=laid.given["query"][:, :, :0]))
    assert out.shape == (1, 8, 0, 128)
    assert lse.shape == (1, 8, 0)


@pytest.mark.parametrize("name", BY_NAME)
def test_fake_kernels_agree(name: str, operators) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    laid = lay_out(BY_NAME[name], Shape((70, 3), (2, 3), rows=3))
    real = operators[laid.spec](*laid.arguments())
    with FakeTensorMode() as mode:
        faked = [
            mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in laid.arguments()
        ]
        results = operators[laid.spec](*faked)
    for one, other in zip(real, results, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


ISAS = [isa for isa in build.isas() if isa != build.isas()[0]]
FORCED = """
import sys
sys.path += {paths!r}
import hypothesis, torch
import test_cpp_attend as t
names = [t.SPECS[i].name for i in {which!r}]
operators = t.cpp.load([t.BY_NAME[name] for name in names])
for name in names:
    for seed in range(3):
        shape = t.Shape((137, 20), (5, 0), rows=5, holes=20, seed=seed)
        t.check(t.lay_out(t.BY_NAME[name], shape), operators)
print("right")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_other_instruction_sets(isa: str) -> None:
    here = Path(__file__)
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
    which = [0, 2, 3, 5, 6, 7, 9, 11, 13]
    answer = subprocess.run(
        [sys.executable, "-c", FORCED.format(paths=paths, which=which)],
        env={**os.environ, "MEMCOMPILE_ISA": isa},
        capture_output=True,
        text=True,
    )
    if "is not an instruction set that this machine runs" in answer.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert answer.stdout == "right\n", answer.stderr


@pytest.mark.parametrize("index", [0, 2, 5, 15])
def test_golden_source(index: int, golden) -> None:
    golden(f"{SPECS[index].name}.cpp", cpp.source(SPECS[index]))


@settings(max_examples=200)
@given(
    dtype=st.sampled_from(("float32", "float16", "bfloat16")),
    key_dim=st.sampled_from((8, 40, 64, 80, 96, 128, 256, 576)),
    value_dim=st.sampled_from((8, 40, 64, 80, 96, 128, 256, 512)),
    shared=st.booleans(),
    group=st.integers(1, 130),
    page_size=st.sampled_from((1, 2, 16, 64, 1024)),
    span=st.sampled_from((1, 64)),
    pages=st.sampled_from(("all", "listed", "unlisted")),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_every_spec_prints_readable_source(
    dtype, key_dim, value_dim, shared, group, page_size, span, pages, flags
) -> None:
    """render() refuses long lines, trailing blanks and doubled empty lines."""
    bias, softcap, window, page_lse = flags
    text = cpp.source(
        KernelSpec(
            "attend", dtype, key_dim, min(value_dim, key_dim) if shared else value_dim, shared,
            group, page_size, span, pages, bias, softcap, window, page_lse,
        )
    )  # fmt: skip
    assert ("a.softcap" in text, "a.window" in text, "a.bias" in text) == (softcap, window, bias)
