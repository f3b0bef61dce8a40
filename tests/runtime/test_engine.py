"""The engine: calls, splits, memory, statistics and every refusal."""

from __future__ import annotations

import pytest
import torch
from stepping import assert_logits

import memcompile
from memcompile.compiler.pipeline import build
from memcompile.models.networks.decoders import Decoder
from memcompile.models.networks.decoders.frame import PositionedDecoder

SCOUT = {"page_size": 8, "budget": 32, "sinks": 8, "window": 8, "dense_layers": 0}


def tokens(batch: int, n: int) -> torch.Tensor:
    return torch.randint(29, (batch, n))


@pytest.fixture(scope="module")
def compiled():
    return build(PositionedDecoder(0), "scout", **SCOUT)


@pytest.fixture
def engine(compiled):
    return compiled.engine()


def test_prefill_gives_the_last_logits_or_all(engine):
    given = tokens(2, 11)
    every = engine.fork().prefill(given, all_logits=True)
    assert every.shape == (2, 11, 29)
    assert torch.equal(engine.prefill(given), every[:, -1:])
    assert engine.position == [11, 11]


def test_prefill_runs_in_chunks(engine, monkeypatch):
    given = tokens(2, 23)
    monkeypatch.setattr("memcompile.runtime.engine.CHUNK_TOKENS", 5)
    assert_logits(PositionedDecoder(0), engine.prefill(given, all_logits=True), given)
    assert engine.position == [23, 23]


def test_a_long_question_runs_in_chunks(compiled, monkeypatch):
    given, question = tokens(2, 40), tokens(2, 23)
    whole, parts = compiled.engine(), compiled.engine()
    whole.prefill(given)
    expected = whole(question, lengths=[23, 9])
    parts.prefill(given)
    monkeypatch.setattr("memcompile.runtime.engine.CHUNK_TOKENS", 5)
    got = parts(question, lengths=[23, 9])
    assert parts.position == [63, 49]
    for row, length in enumerate([23, 9]):
        assert torch.equal(got[row, :length].argmax(-1), expected[row, :length].argmax(-1))


def test_ragged_prefill_returns_each_rows_last(engine, monkeypatch):
    monkeypatch.setattr("memcompile.runtime.engine.CHUNK_TOKENS", 4)
    given = tokens(3, 10)
    last = engine.prefill(given, lengths=[10, 3, 6])
    for row, length in enumerate([10, 3, 6]):
        alone = engine.fork()
        alone.reset()
        expected = alone.prefill(given[row : row + 1, :length])
        assert torch.equal(last[row].argmax(-1), expected[0].argmax(-1))
    assert engine.position == [10, 3, 6]


def test_fork_rewind_reset(engine):
    given, more = tokens(1, 40), tokens(1, 6)
    engine.prefill(given)
    other = engine.fork()
    first = engine(more)
    assert other.position == [40]
    assert torch.equal(other(more), first)
    engine.rewind(6)
    engine(tokens(1, 9))
    engine.rewind(9)
    assert torch.equal(engine(more), first)
    assert engine.memory_bytes() > 0
    engine.reset()
    assert (engine.position, engine.memory_bytes()) == ([], 0)
    engine.prefill(tokens(2, 3))


def test_an_engine_goes_on_with_what_another_policy_read(engine):
    narrow = build(PositionedDecoder(0), "scout", **{**SCOUT, "budget": 24}).engine()
    dense = build(PositionedDecoder(0), "dense", page_size=8).engine()
    given, more = tokens(2, 50), tokens(2, 5)
    engine.prefill(given)
    for other in (narrow, dense):
        read = other.fork()
        read.prefill(given)
        expected = read(more)
        other.prefill(tokens(1, 3))
        other.adopt(engine)
        assert other.position == [50, 50]
        assert torch.equal(other(more), expected)
        other.adopt(engine)
        assert torch.equal(other(more), expected)
    assert engine.position == [50, 50]
    with pytest.raises(ValueError, match=r"cannot go on as one of .*index fields that are among"):
        engine.adopt(dense)
    assert engine.position == [50, 50]
    engine.reset()
    dense.adopt(engine)
    assert dense.position == []


def test_generate_is_greedy_and_stops(engine):
    given = tokens(2, 9)
    out = engine.fork().generate(given, 5)
    assert out.shape == (2, 14)
    assert torch.equal(out[:, :9], given)
    step = engine.prefill(given)[:, -1].argmax(-1)
    for i in range(5):
        assert torch.equal(out[:, 9 + i], step)
        step = engine(step[:, None])[:, -1].argmax(-1)
    one = engine.fork()
    one.reset()
    stop = int(out[0, 9])
    assert one.generate(given[:1], 5, eos=stop).shape == (1, 10)


def test_stats_prove_the_sparsity(compiled, engine):
    engine.prefill(tokens(1, 60))
    before = engine.stats().to_json()
    assert before["pages_read"] == before["pages_dense"]
    engine(tokens(1, 4))
    stats = engine.stats()
    assert stats.tokens == {"dense": 60, "policy": 4}
    layers, heads = len(compiled.sites), compiled.sites[0].kv_heads
    read = stats.pages_read - before["pages_read"]
    dense = stats.pages_dense - before["pages_dense"]
    assert read == layers * heads * 4 * 4  # 4 tokens, 32 / 8 pages each
    assert dense == layers * heads * 4 * 8  # tokens 60..63 stand in page 7
    assert stats.bytes_read - before["bytes_read"] < stats.bytes_dense - before["bytes_dense"]


def test_stats_are_folded_up_in_long_runs(engine, monkeypatch):
    engine.prefill(tokens(1, 8))
    for _ in range(3):
        engine(tokens(1, 1))
    assert len(engine._log) == 4
    assert engine.stats().tokens["policy"] == 3
    assert engine._log == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e(torch.zeros(3, dtype=torch.int64)), r"expected tokens\[B, n\] as an int64"),
        (lambda e: e(torch.zeros(2, 3)), "torch.float32"),
        (lambda e: e([[1]]), "expected tokens"),
        (lambda e: e(torch.zeros(2, 0, dtype=torch.int64)), "holds no token"),
        (lambda e: e(torch.tensor([[3, 29]])), "token 29 is not in the vocabulary of 29"),
        (lambda e: e(torch.tensor([[3, -1]])), "token -1 is not in the vocabulary"),
        (lambda e: e(tokens(2, 4), lengths=[5, 1]), "give one of 0..4 a row"),
        (lambda e: e(tokens(2, 4), lengths=[0, 0]), "give one of 0..4 a row"),
        (lambda e: e(tokens(2, 4), lengths=[4]), "give one of 0..4 a row"),
        (lambda e: e.rewind(1), "cannot take back 1 tokens"),
        (lambda e: e.rewind(-1), "cannot take back -1 tokens"),
        (lambda e: e.generate(tokens(1, 3), 0), "give at least 1"),
        (
            lambda e: (e.prefill(tokens(2, 3)), e(tokens(3, 1))),
            "this engine remembers 2 rows, got 3",
        ),
    ],
)
def test_refusals(engine, call, message):
    with pytest.raises(ValueError, match=message):
        call(engine)


def test_ragged_calls_need_position_ids():
    engine = memcompile.compile(Decoder(0), "dense")
    with pytest.raises(ValueError, match="takes position_ids"):
        engine.prefill(tokens(2, 4), lengths=[4, 2])


def test_failed_calls_change_nothing(engine):
    engine.prefill(tokens(2, 60))
    with pytest.raises(ValueError, match="exceed the context"):
        engine(tokens(2, 5))
    assert engine.position == [60, 60]
    assert engine.stats().tokens == {"dense": 120, "policy": 0}
