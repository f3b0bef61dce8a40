"""Generation: streams, ends, stop strings, ragged prompts, continuations, refusals."""

from __future__ import annotations

import pytest
import torch
from test_engine import SCOUT, tokens

from memcompile.compiler.pipeline import build
from memcompile.models.networks.decoders import Decoder
from memcompile.models.networks.decoders.frame import PositionedDecoder


def text(ids: list[int]) -> str:
    """A letter a token."""
    return "".join(chr(ord("A") + i) for i in ids)


@pytest.fixture(scope="module")
def compiled():
    return build(PositionedDecoder(0), "scout", **SCOUT)


@pytest.fixture
def engine(compiled):
    return compiled.engine()


def test_a_stream_gives_what_generate_collects(engine):
    given = tokens(2, 9)
    steps = list(engine.fork().stream(given, 6))
    assert [(s.shape, s.dtype) for s in steps] == [((2,), torch.int64)] * 6
    assert torch.equal(engine.generate(given, 6), torch.cat([given, torch.stack(steps, 1)], 1))
    assert engine.position == [14, 14], "the last token is not in the memory"


def test_tokens_are_read_when_they_are_asked_for(engine):
    running = engine.stream(tokens(1, 9), 6)
    assert engine.position == []
    next(running)
    assert engine.position == [9]
    next(running)
    assert engine.position == [10]


@pytest.mark.parametrize("read", ["policy", "dense"])
@pytest.mark.parametrize("read_prompt", ["policy", "dense"])
def test_prompt_and_tokens_are_read_as_asked(engine, read, read_prompt):
    given = tokens(1, 40)
    engine.generate(given, 8, read=read, read_prompt=read_prompt)
    counted = {"policy": 0, "dense": 0}
    counted[read_prompt] += 40
    counted[read] += 7
    assert engine.stats().tokens == counted


def test_the_policys_prompt_gives_each_rows_last_logits(engine):
    given, lengths = tokens(2, 40), [40, 33]
    out = engine.fork().generate(given, 1, lengths=lengths, read_prompt="policy")
    every = engine(given, lengths)
    assert out[:, 40].tolist() == [int(every[0, 39].argmax()), int(every[1, 32].argmax())]


def test_rows_of_a_ragged_batch_are_those_of_batches_of_one(compiled):
    given, lengths = tokens(3, 30), [30, 7, 19]
    out = compiled.engine().generate(given, 8, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = compiled.engine().generate(given[row : row + 1, :length], 8)
        assert torch.equal(out[row, 30:], alone[0, length:])
    assert torch.equal(out[:, :30], given)


def test_a_row_ends_at_any_eos_and_its_memory_stands_still(compiled):
    given = tokens(3, 9)
    free = compiled.engine().generate(given, 8)[:, 9:]
    ends = [int(free[0, 2]), int(free[1, 4])]
    engine = compiled.engine()
    out = engine.generate(given, 8, eos=ends)[:, 9:]
    for row, (ended, held) in enumerate(zip(out.tolist(), engine.position, strict=True)):
        plain = free[row].tolist()
        at = next((i for i, t in enumerate(plain) if t in ends), len(plain) - 1)
        assert ended[: at + 1] == plain[: at + 1]
        assert ended[at + 1 :] == [ends[0]] * (len(ended) - at - 1)
        assert held == 9 + min(at, 7)
    assert len(set(engine.position)) > 1


def test_generation_stops_when_all_rows_have_ended(engine):
    given = tokens(1, 9)
    free = engine.fork().generate(given, 8)[0, 9:].tolist()
    assert engine.generate(given, 8, eos=free[3])[0, 9:].tolist() == free[: free.index(free[3]) + 1]


def test_a_stop_string_may_span_tokens(engine):
    given = tokens(2, 9)
    free = engine.fork().generate(given, 8)[:, 9:].tolist()
    pairs = [text(free[0][i : i + 2]) for i in range(1, 6)]
    stop = [next(pair for pair in pairs if pair not in text(free[1])), "never"]
    out = engine.fork().generate(given, 8, stop=stop, decode=text)[:, 9:].tolist()
    end = text(free[0]).index(stop[0]) + 2
    assert out[0] == free[0][:end] + [-1] * (8 - end), "after the end there is no token to give"
    assert out[1] == free[1]
    out = engine.generate(given, 8, stop=stop[0], decode=text, eos=28)[:, 9:].tolist()
    assert out[0][end:] == [28] * (8 - end)


def test_stop_strings_are_looked_for_in_the_last_tokens_alone(engine):
    given = tokens(1, 9)
    free = engine.fork().generate(given, 50)[0, 9:].tolist()
    decoded = []

    def heard(ids: list[int]) -> str:
        decoded.append(len(ids))
        return text(ids)

    at = next(i for i in range(45) if text(free[i : i + 4]) not in text(free[: i + 3]))
    last = max(i for i in range(45) if text(free[i : i + 4]) not in text(free[: i + 3]))
    for start in (at, last):
        stop = text(free[start : start + 4])
        out = engine.fork().generate(given, 50, stop=stop, decode=heard)[0, 9:].tolist()
        assert out == free[: start + 4]
    assert max(decoded) <= 4 * 4 + 16


def test_rows_that_share_a_position_end_too():
    engine = build(Decoder(0), "dense").engine()
    given = tokens(2, 9)
    free = engine.fork().generate(given, 6)[:, 9:]
    end = int(free[0, 0])
    out = engine.generate(given, 6, eos=end)[:, 9:]
    at = [(*row, end).index(end) for row in free.tolist()]
    assert at[0] < at[1], "one row has to end before the other"
    for row, last in enumerate(at):
        assert out[row, :last].tolist() == free[row, :last].tolist()
        assert (out[row, last:] == end).all()
    assert engine.position == [9 + out.shape[1] - 1] * 2


def test_sampling_repeats_with_its_seed(engine):
    given, warm = tokens(2, 9), {"temperature": 1.5, "top_k": 20, "repetition_penalty": 1.2}
    first = engine.fork().generate(given, 8, seed=1, **warm)
    assert torch.equal(engine.fork().generate(given, 8, seed=1, **warm), first)
    assert not torch.equal(engine.generate(given, 8, seed=2, **warm), first)


def test_the_penalty_counts_prompt_and_continuation(engine):
    given = tokens(2, 9)
    new = engine.generate(given, 15, repetition_penalty=1e6)
    for row in new.tolist():
        assert len(set(row[9:]) | set(row[:9])) == 15 + len(set(row[:9]))


def test_generation_goes_on_from_what_is_remembered(compiled):
    context, question = tokens(1, 20), tokens(1, 5)
    engine = compiled.engine()
    engine.prefill(context)
    branches = [engine.fork(), engine.fork()]
    expected = compiled.engine().generate(torch.cat([context, question], 1), 6)[:, 25:]
    assert torch.equal(branches[0].generate(question, 6)[:, 5:], expected)
    assert torch.equal(branches[1].generate(question, 6)[:, 5:], expected)
    assert engine.position == [20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read": "sparse"}, "read is 'sparse'; known: policy, dense"),
        ({"read_prompt": ""}, "read_prompt is ''; known"),
        ({"eos": 29}, r"eos is 29; give one token of 0 \.\. 28"),
        ({"eos": []}, r"eos is \[\]; give one token"),
        ({"stop": "x"}, "give decode, a function from token ids to their text"),
        ({"stop": ["x", ""], "decode": text}, "none of them empty"),
        ({"lengths": [3, 0]}, r"lengths \[3, 0\]: every row needs at least one token"),
        ({"top_q": 1}, "no sampling option top_q"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give at least 1"),
    ],
)
def test_refusals_before_anything_is_read(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.stream(tokens(2, 3), **{"max_new_tokens": 4, **options})
    assert engine.position == []


def test_one_prompt_goes_on_in_many_rows(compiled):
    context, questions = tokens(1, 20), tokens(3, 5)
    engine = compiled.engine()
    engine.prefill(context)
    branch = engine.fork(rows=[0] * 3)
    assert (branch.position, engine.position) == ([20] * 3, [20])
    out = branch.generate(questions, 6, lengths=[5, 2, 4])
    whole = torch.cat([context.expand(3, -1), questions], 1)
    expected = compiled.engine().generate(whole, 6, lengths=[25, 22, 24])
    assert torch.equal(out[:, 5:], expected[:, 25:])
    draws = engine.fork(rows=torch.zeros(2, dtype=torch.int64))
    free = draws.generate(questions[:1].expand(2, -1), 12, temperature=2.0, seed=0)
    assert not torch.equal(free[0], free[1]), "rows of one prompt draw apart"


SMALL = {"sinks": 8, "window": 8, "dense_layers": 0}
EVERY = {
    "dense": {},
    "hybrid": {"page_size": 8, "window": 8, "state_layers": (0,)},
    "heavy-hitter": {"page_size": 8, "budget": 32, **SMALL},
    "window": {"page_size": 8, "sinks": 8, "window": 16},
    "hierarchical": {"levels": (8, 16), "refine": 0, "keep": False, **SMALL},
}


@pytest.mark.parametrize("policy", EVERY)
def test_rows_of_any_memory_are_selected(policy):
    engine = build(PositionedDecoder(0), policy, check=False, **EVERY[policy]).engine()
    engine.prefill(tokens(3, 40), lengths=[40, 22, 31])
    engine(tokens(3, 3))
    rows, more = [2, 0, 2], tokens(3, 9)
    branch = engine.fork(rows)
    assert branch.position == [engine.position[row] for row in rows]
    given = torch.stack([more[rows.index(row)] if row in rows else more[0] for row in range(3)])
    expected = engine(given)
    got = branch(torch.stack([given[row] for row in rows]))
    for at, row in enumerate(rows):
        assert torch.equal(got[at].argmax(-1), expected[row].argmax(-1))


@pytest.mark.parametrize(("policy", "kept"), [("hybrid", "a state"), ("heavy-hitter", "an acc")])
def test_what_cannot_be_rewound_cannot_be_held(policy, kept):
    engine = build(PositionedDecoder(0), policy, check=False, **EVERY[policy]).engine()
    with pytest.raises(ValueError, match=f"keeps {kept}.* cannot be rewound"):
        engine.hold()


def test_rows_of_an_empty_engine_are_refused(engine):
    with pytest.raises(ValueError, match=r"rows \[0, 0\]: this engine remembers none yet"):
        engine.fork(rows=[0, 0])
    engine.prefill(tokens(1, 3))
    with pytest.raises(ValueError, match=r"rows \[1\]: give numbers of 0 \.\. 0"):
        engine.fork(rows=[1])
