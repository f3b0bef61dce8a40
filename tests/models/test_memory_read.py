"""A site's whole road, write to read, through the state that assigns its pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_case import SCALE, drive, exact, in_calls, sequences
from tolerance import assert_close_to_float64, rounding_band
from torch import Tensor, fx

from memcompile.models.memory import Dense, Scout, dense, scout
from memcompile.models.memory.parts import SCORE_FIELDS
from memcompile.models.memory.read import eager, emit_read, emit_write
from memcompile.models.memory.site import SiteTensors
from memcompile.runtime.memory_state import MemoryState
from memcompile.runtime.site_layout import SiteLayout

some = settings(max_examples=12, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMCOMPILE_POISON", "1")
        yield


presets = st.builds(
    Scout,
    budget=st.sampled_from((32, 40)),
    page_size=st.just(8),
    sinks=st.sampled_from((0, 8)),
    window=st.sampled_from((0, 5, 16)),
    dense_layers=st.just(0),
    score=st.sampled_from([*SCORE_FIELDS]),
    compensate=st.booleans(),
    min_context=st.sampled_from((None, 50)),
)
cuts = st.lists(st.integers(1, 90), max_size=5)


@some
@given(presets, cuts, st.sampled_from(("dense", "policy")), st.sampled_from((1, 3, 5)))
def test_chunked_is_token_by_token_within_a_mode(
    preset: Scout, cuts: list[int], read: str, group: int
) -> None:
    tokens = sequences(2, 70, torch.float64, group)
    memory = preset.memory(0, 0)
    one = drive(memory, tokens, in_calls(70, cuts, 2), read)
    two = drive(memory, tokens, [[1, 1]] * 70, read)
    assert_close_to_float64(one, two, two, reduction=70 * 6)


@some
@given(cuts, st.sampled_from((0, 7, 16)), st.sampled_from((8, 16)))
def test_dense_is_dense_however_it_was_split(cuts: list[int], window: int, size: int) -> None:
    tokens = sequences(2, 90, torch.float32)
    memory = Dense(size).memory(0, window)
    for read in ("dense", "policy"):
        got = drive(memory, tokens, in_calls(90, cuts, 2), read, window)
        truth, plain = exact(tokens, torch.float64, window), exact(tokens, torch.float32, window)
        assert_close_to_float64(got, plain, truth, reduction=90 * 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 96], ids=["everything", "as large as the context"])
def test_a_scout_that_keeps_everything_is_dense(budget: int | None, dtype: torch.dtype) -> None:
    tokens = sequences(3, 90, dtype)
    memory = Scout(budget=budget, page_size=8, sinks=8, window=8, compensate=False).memory(2, 0)
    got = drive(memory, tokens, in_calls(90, [31, 32], 3))
    assert_close_to_float64(
        got, exact(tokens, dtype), exact(tokens, torch.float64), reduction=90 * 6
    )
    if budget is None:  # the very same graph, so the same bits
        assert torch.equal(got, drive(Dense(8).memory(0, 0), tokens, in_calls(90, [31, 32], 3)))


@some
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25), st.integers(0, 25)), max_size=5))
def test_ragged_rows_are_as_if_alone(calls: list[tuple[int, int, int]]) -> None:
    tokens = sequences(3, 125, torch.float64)
    memory = Scout(budget=32, page_size=8, sinks=8, window=8).memory(2, 0)
    together = drive(memory, tokens, [[*call] for call in calls if any(call)])
    for b in range(3):
        held = sum(call[b] for call in calls)
        alone = drive(memory, tuple(x[b : b + 1] for x in tokens), [[held]] if held else [])
        rows = slice(0, held)
        assert_close_to_float64(
            together[b, :, rows], alone[0, :, rows], alone[0, :, rows], reduction=125 * 6
        )


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("score", SCORE_FIELDS)
def test_the_scout_is_its_reference_without_pages(score: str, compensate: bool) -> None:
    tokens = sequences(1, 120, torch.float32)
    memory = Scout(
        budget=40,
        page_size=8,
        sinks=8,
        window=9,
        score=score,
        compensate=compensate,
        min_context=60,
    ).memory(2, 0)
    got = drive(memory, tokens, in_calls(120, [7, 64, 65], 1))[0]
    q, k, v = (x[0] for x in tokens)
    rows = [0, 8, *range(40, 120, 3), 119]
    plain = torch.stack(
        [scout.reference(q[:, t], k[:, : t + 1], v[:, : t + 1], memory, SCALE) for t in rows], 1
    )
    assert_close_to_float64(got[:, rows], plain, plain.double(), reduction=120 * 6)
    skipped = got.double() - exact(tokens, torch.float64)[0]
    band = rounding_band(torch.float32, 120 * 6) * float(got.abs().max())
    assert float(skipped[:, :60].abs().max()) <= band
    assert float(skipped[:, 60:].abs().max()) > 100 * band


def test_the_dense_reference_is_plain_attention() -> None:
    tokens = sequences(1, 20, torch.float32)
    q, k, v = (x[0] for x in tokens)
    for window in (0, 6):
        got = dense.reference(q[:, 15:], k, v, SCALE, window=window)
        truth = exact(tokens, torch.float64, window)[0, :, 15:]
        plain = exact(tokens, torch.float32, window)[0, :, 15:]
        assert_close_to_float64(got, plain, truth, reduction=20 * 6)
    capped = dense.reference(q, k, v, SCALE, softcap=1e6)
    assert_close_to_float64(
        capped, exact(tokens, torch.float32)[0], exact(tokens, torch.float64)[0], reduction=10**5
    )


def test_compensation_is_exact_where_a_pages_keys_are_one() -> None:
    q, k, v = sequences(2, 120, torch.float32)
    k = k[:, :, ::8].repeat_interleave(8, 2)
    tokens = q, k, v
    memory = Scout(budget=32, page_size=8, sinks=8, window=8).memory(2, 0)
    got = drive(memory, tokens, in_calls(120, [50], 2))
    truth, plain = exact(tokens, torch.float64), exact(tokens, torch.float32)
    assert_close_to_float64(got, plain, truth, reduction=120 * 6)


def test_the_same_lines_print_a_graph_that_computes_the_same() -> None:
    memory = Scout(budget=32, page_size=8, sinks=8, window=8).memory(2, 0)
    q, k, v = sequences(1, 70, torch.float32)
    graph = fx.Graph()
    names = ["query", "key", "value", "position", "lengths", "page_table", "key_pages"]
    names += ["value_pages", *memory.fields]
    inputs = [graph.placeholder(name) for name in names]
    site = SiteTensors.take(memory, inputs[5:])

    def emit(target: object, *args: object) -> fx.Node:
        return graph.call_function(target, args)  # type: ignore[arg-type]

    emit_write(emit, memory, site, *inputs[1:5])
    options = {"scale": SCALE, "softcap": 0.0, "window": 0, "dtype": torch.float32}
    out, _ = emit_read(emit, memory, site, "policy", inputs[0], *inputs[3:5], **options)
    graph.output(out)
    module = fx.GraphModule(torch.nn.Module(), graph)
    state = MemoryState([SiteLayout("a", 2, 6, 5, torch.float32, memory)], 1, "cpu")
    state.reserve([70])
    at = torch.tensor([0], dtype=torch.int32), torch.tensor([70], dtype=torch.int32)
    got = module(q, k, v, *at, *state.tensors())
    assert torch.equal(got, drive(memory, (q, k, v), [[70]]))


def test_a_graph_of_memory_operations_exports_and_runs() -> None:
    memory = Scout(budget=32, page_size=8, sinks=8, window=8).memory(2, 0)

    class Step(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, p: Tensor, n: Tensor, *flat: Tensor):  # type: ignore[no-untyped-def]
            site = SiteTensors.take(memory, flat)
            emit_write(eager, memory, site, k, v, p, n)
            out, _ = emit_read(
                eager, memory, site, "policy", q, p, n,
                scale=SCALE, softcap=0.0, window=0, dtype=q.dtype,
            )  # fmt: skip
            return out

    state = MemoryState([SiteLayout("a", 2, 6, 5, torch.float32, memory)], 1, "cpu")
    state.reserve([70])
    tokens = sequences(1, 70, torch.float32)
    at = torch.tensor([0], dtype=torch.int32), torch.tensor([70], dtype=torch.int32)
    inputs = (*tokens, *at, *state.tensors())
    program = torch.export.export(Step(), inputs)
    targets = {str(node.target) for node in program.graph.nodes}
    expected = ("append_index.default", "score_select.page_logits", "attend.summaries")
    assert {f"memcompile.{name}" for name in expected} <= targets
    assert torch.equal(program.module()(*inputs), drive(memory, tokens, [[70]]))


def test_a_memory_that_selects_is_refused_where_the_site_has_a_window() -> None:
    memory = Scout(budget=32, page_size=8, sinks=8, window=8).memory(2, 0)
    with pytest.raises(ValueError, match="but its site has a window of 16 tokens"):
        drive(memory, sequences(1, 70, torch.float32), [[70]], window=16)


def test_an_unknown_read_or_too_few_tensors_are_refused() -> None:
    memory = Dense(8).memory(0, 0)
    with pytest.raises(ValueError, match="'dense' has 3 state tensors, got 2"):
        SiteTensors.take(memory, [0, 1])
    with pytest.raises(ValueError, match="unknown read 'fast'; known: dense, policy"):
        drive(memory, sequences(1, 3, torch.float32), [[3]], read="fast")
