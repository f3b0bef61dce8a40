"""Generated C++ for a state: steps, chunks and gradients against the recurrence in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_case import Shape, check, check_gradients, gradients, lay_out, reference, shapes, widened
from tolerance import assert_close_to_float64

from memcompile.codegen import NotCovered, cpp
from memcompile.codegen.cpp import build
from memcompile.codegen.spec import DECAYS, KernelSpec, specialise


def spec(op: str, dtype: str, key_dim: int, value_dim: int, group: int, **rest: Any) -> KernelSpec:
    return KernelSpec(op, dtype, key_dim, value_dim, group=group, **rest)


FORWARD = [
    spec(op, *sizes, **rule)
    for op in ("state_step", "state_chunk")
    for sizes, rule in (
        (("bfloat16", 128, 128, 4), {}),
        (("bfloat16", 40, 72, 3), {"decay": "gate", "normalised": True}),
        (("bfloat16", 64, 64, 2), {"decay": "gate", "delta": True}),
        (("float16", 64, 200, 11), {"delta": True}),
        (("float32", 128, 16, 1), {"decay": "constant", "normalised": True}),
    )
]
BACKWARD = [
    spec("state_chunk", *sizes, **rule, backward=True)
    for sizes, rule in (
        (("bfloat16", 128, 128, 4), {"normalised": True}),
        (("float16", 136, 24, 11), {"decay": "gate", "normalised": True}),
        (("float32", 40, 72, 3), {"decay": "constant"}),
    )
]
BY_NAME = {spec.name: spec for spec in (*FORWARD, *BACKWARD)}
STEPS, CHUNKS = FORWARD[:5], FORWARD[5:]


@pytest.fixture(scope="module")
def operators():
    return cpp.load([*FORWARD, *BACKWARD])


@pytest.mark.parametrize("name", [spec.name for spec in FORWARD])
@settings(max_examples=8)
@given(data=st.data())
def test_equals_the_recurrence(name: str, data: st.DataObject, operators) -> None:
    spec = BY_NAME[name]
    shape = data.draw(shapes(6 if spec.op == "state_step" else 150))
    check(spec, shape, operators[spec])


@pytest.mark.parametrize("name", [spec.name for spec in BACKWARD])
@settings(max_examples=6)
@given(shape=shapes(150))
def test_gradients_equal_autograd(name: str, shape: Shape, operators) -> None:
    check_gradients(BY_NAME[name], shape, operators[BY_NAME[name]])


@pytest.mark.parametrize("spec", [STEPS[1], STEPS[2], CHUNKS[0], CHUNKS[3]], ids=lambda s: s.name)
def test_threads_split_columns_and_change_nothing(spec: KernelSpec, operators) -> None:
    """With fewer heads than threads, blocks of columns are items of their own."""
    many = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            given = lay_out(spec, Shape((70,), 70, 1))
            out = operators[spec](*(given[name] for _, name in spec.arguments))
            results.append((*out, given["state"]))
    finally:
        torch.set_num_threads(many)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("spec", [STEPS[1], CHUNKS[1], CHUNKS[2]], ids=lambda s: s.name)
def test_inputs_may_have_any_strides(spec: KernelSpec, operators) -> None:
    shape = Shape((35, 9), 35)
    given = lay_out(spec, shape)
    given["query"] = given["query"].transpose(2, 3).contiguous().transpose(2, 3)
    given["key"] = given["key"].transpose(1, 2).contiguous().transpose(1, 2)
    given["value"] = torch.nn.functional.pad(given["value"], (3, 5))[..., 3:-5]
    for name in ("decay", "beta"):
        if given[name] is not None:
            given[name] = torch.stack((given[name], given[name]), 3)[..., 0]
            assert not given[name].is_contiguous()
    check(spec, shape, operators[spec], given)


@pytest.mark.parametrize("rule", [1, 2], ids=["normalised", "delta"])
def test_rows_may_come_in_any_calls(rule: int, operators) -> None:
    step, chunk = operators[STEPS[rule]], operators[CHUNKS[rule]]
    spec = CHUNKS[rule]
    given = lay_out(spec, Shape((90, 90), 90))
    exact, plain = widened(given, torch.float64), widened(given, torch.float32)
    truth, eager = reference.state_step(*exact), reference.state_chunk(*plain)
    parts = []
    for operator, first, last in ((chunk, 0, 67), (step, 67, 68), (step, 68, 71), (chunk, 71, 90)):
        rows = {
            name: given[name][:, :, first:last]
            for name in ("query", "key", "value", "decay", "beta")
            if given[name] is not None
        }
        rows["lengths"] = torch.full((2,), last - first, dtype=torch.int32)
        parts.append(operator(*((given | rows)[name] for _, name in spec.arguments)))
    width = 90 * spec.key_dim
    out = torch.cat([part[0] for part in parts], 2)
    assert_close_to_float64(out, eager[0].to(spec.torch_dtype), truth[0], reduction=width)
    assert_close_to_float64(given["state"], plain[6], exact[6], reduction=width)


@pytest.mark.parametrize("spec", [STEPS[2], CHUNKS[1], CHUNKS[2]], ids=lambda s: s.name)
def test_what_decays_to_nothing_leaves_the_rest_exact(spec: KernelSpec, operators) -> None:
    shape = Shape((80,), 80)
    given = lay_out(spec, shape)
    given["decay"][:, :, 20] = -1e6
    given["decay"][:, :, 70] = -torch.inf
    check(spec, shape, operators[spec], given)


def test_a_read_that_nothing_weighs_is_none(operators) -> None:
    """z . q <= 0 is no sum of weights; features are whole, so that it is exact."""
    for spec in (STEPS[4], CHUNKS[4]):
        given = lay_out(spec, Shape((70,), 70))
        given["decay"].zero_()
        for name in ("query", "key", "norm"):
            given[name] = torch.randint(-2, 3, given[name].shape).float()
        given["key"][:, :, 10:] = 0
        truth = reference.state_step(*widened(given, torch.float64))
        out, lse = operators[spec](*(given[name] for _, name in spec.arguments))
        nothing = lse == -torch.inf
        assert torch.equal(nothing, truth[1] == -torch.inf)
        assert 0 < nothing.sum() < nothing.numel()
        assert (out[nothing] == 0).all()


def test_no_rows_change_nothing(operators) -> None:
    for spec in (STEPS[0], CHUNKS[0]):
        given = lay_out(spec, Shape((0,), 1))
        before = given["state"].clone()
        out, lse = operators[spec](*(given[name] for _, name in spec.arguments))
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
        assert torch.equal(given["state"], before)
        none = {name: given[name][:, :, :0] for name in ("query", "key", "value")}
        out, lse = operators[spec](*((given | none)[name] for _, name in spec.arguments))
        assert (out.shape, lse.shape) == ((1, 8, 0, 128), (1, 8, 0))


def test_large_results_take_the_memory_that_others_left(operators) -> None:
    spec = CHUNKS[0]
    given = lay_out(spec, Shape((1000,), 1100))

    def out() -> torch.Tensor:
        fresh = given | {"state": given["state"].clone()}
        return operators[spec](*(fresh[name] for _, name in spec.arguments))[0]

    first, second = out(), out()
    place, right = first.data_ptr(), first.clone()
    assert second.data_ptr() != place
    assert torch.equal(second, right)
    first.fill_(torch.nan)
    held = first[0, 0]
    del first
    third = out()
    assert third.data_ptr() != place, "a view still holds the result"
    del held
    fourth = out()
    assert fourth.data_ptr() == place
    assert torch.equal(third, right)
    assert torch.equal(fourth, right)


def test_wrong_tensors_are_refused(operators) -> None:
    spec = CHUNKS[1]
    given = lay_out(spec, Shape())

    def call(**changes: object) -> None:
        operators[spec](*((given | changes)[name] for _, name in spec.arguments))

    with pytest.raises(TypeError, match="query is Float; this kernel reads BFloat16"):
        call(query=given["query"].float())
    with pytest.raises(ValueError, match=r"query must be \[B, H, n, 40\] with groups of 3 heads"):
        call(query=given["query"][:, :5])
    with pytest.raises(
        ValueError, match=r"key is \[2, 2, 4, 40\]; this call needs \[2, 2, 5, 40\]"
    ):
        call(key=given["key"][:, :, :4])
    with pytest.raises(ValueError, match=r"decay is \[2\]; this call needs \[2, 2, 5\]"):
        call(decay=torch.zeros(2))
    with pytest.raises(ValueError, match=r"state has strides \[.*\]; it is written in place and"):
        call(state=given["state"].transpose(2, 3).contiguous().transpose(2, 3))


def test_what_no_kernel_covers_is_said() -> None:
    given = [*lay_out(CHUNKS[2], Shape()).values()]
    with pytest.raises(NotCovered, match="a delta-rule state has no normaliser; give norm None"):
        specialise("state_step", [*given[:7], torch.zeros(2, 2, 64)])
    grads = [torch.zeros(2, 4, 5, 64), None]
    with pytest.raises(NotCovered, match="gradients of the delta rule are the reference's"):
        specialise("state_chunk.backward", [*given[:6], *grads])
    with pytest.raises(NotCovered, match=r"state of torch\.bfloat16; kernels read float32"):
        specialise("state_step", [*given[:6], given[6].bfloat16(), None])
    with pytest.raises(NotCovered, match=r"gradients of 17 query heads a KV head; .* up to 16"):
        spec("state_chunk", "float32", 8, 8, 17, backward=True)
    with pytest.raises(ValueError, match="unknown decay of a state 'row'"):
        spec("state_step", "float32", 8, 8, 1, decay="row")


@pytest.mark.parametrize("name", BY_NAME)
def test_fake_kernels_agree(name: str, operators) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = BY_NAME[name]
    given = gradients(spec, Shape()) if spec.backward else lay_out(spec, Shape())
    arguments = [given[name] for _, name in spec.arguments]
    real = operators[spec](*arguments)
    with FakeTensorMode() as mode:
        results = operators[spec](*map(mode.from_tensor, arguments))
    for one, other in zip(real, results, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


FORCED = """
import sys
sys.path += PATHS
import test_cpp_state as t
from state_case import Shape, check, check_gradients, lay_out
from test_cpp_variants import fenced

def ends(spec, shape):
    given = lay_out(spec, shape)
    return {n: fenced(x) if x is not None and x.numel() else x for n, x in given.items()}

operators = t.cpp.load([*t.FORWARD, *t.BACKWARD])
for spec in t.FORWARD:
    shape = Shape((3, 1), 3) if spec in t.STEPS else Shape((77, 20), 80)
    check(spec, shape, operators[spec], ends(spec, shape))
for spec in t.BACKWARD:
    check_gradients(spec, Shape((77, 20), 80), operators[spec])
print("right")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fences are made by mprotect")
@pytest.mark.parametrize("isa", build.isas())
def test_right_on(isa: str) -> None:
    """On every instruction set, with inputs and states that end where memory does."""
    here = Path(__file__)
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
    answer = subprocess.run(
        [sys.executable, "-c", FORCED.replace("PATHS", repr(paths))],
        env={**os.environ, "MEMCOMPILE_ISA": isa},
        capture_output=True,
        text=True,
    )
    if "is not an instruction set" in answer.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert answer.stdout == "right\n", f"exit {answer.returncode}: {answer.stderr}"


@pytest.mark.parametrize("spec", [STEPS[0], STEPS[2], CHUNKS[1], BACKWARD[1]], ids=lambda s: s.name)
def test_golden_source(spec: KernelSpec, golden) -> None:
    golden(f"{spec.name}.cpp", cpp.source(spec))


@settings(max_examples=100)
@given(
    op=st.sampled_from(("state_step", "state_chunk")),
    dtype=st.sampled_from(("float32", "float16", "bfloat16")),
    key_dim=st.sampled_from((8, 40, 128, 576)),
    value_dim=st.sampled_from((8, 72, 128, 512)),
    group=st.integers(1, 130),
    decay=st.sampled_from(DECAYS),
    rule=st.sampled_from(("additive", "delta", "normalised")),
    backward=st.booleans(),
)
def test_every_spec_prints_readable_source(
    op, dtype, key_dim, value_dim, group, decay, rule, backward
) -> None:
    """render() refuses long lines, trailing blanks and doubled empty lines."""
    backward = backward and op == "state_chunk" and rule != "delta"
    rules = {} if rule == "additive" else {rule: True}
    group = min(group, 16) if backward else group
    made = spec(
        op, dtype, key_dim, value_dim, group, decay=decay, backward=backward, **rules
    )  # fmt: skip
    text = cpp.source(made)
    assert ("a.beta" in text, "a.norm" in text or "normalise<" in text or "grad_den" in text) == (
        rule == "delta",
        rule == "normalised",
    )
