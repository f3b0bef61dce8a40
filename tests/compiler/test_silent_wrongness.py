"""Hand-written decoders and traps: every one is right or declined, none is silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from stepping import (
    assert_logits,
    calls_of,
    forward,
    odd_calls,
    random_tokens,
    stepped,
)
from torch import Tensor, nn

import memcompile
from memcompile.compiler.pipeline import Compiled, build
from memcompile.compiler.self_check import self_check
from memcompile.models.networks.decoders import DECLINED, DECODERS, RIGHT, TRAPS, Decoder, Entry
from memcompile.passes.result import NotRewritten

ENTRIES = {entry.name: entry for entry in DECODERS}
# What no reading of the graph can know, and the self-check has to find: torch.export traces sizes
# from two on, and whether -1e4 hides a key hangs on how large the scores are.
BEYOND_THE_PROOF = {"BatchBranch", "EmptyLengthBranch", "OverwhelmedMask"}
# The gate runs every trap and a sixth of the others; the long suite runs all.
ORDINARY = [entry.name for entry in DECODERS if not entry.trap]
GATE = {entry.name for entry in TRAPS} | {*ORDINARY[::6]}


def gated(names: Iterable[str], gate: Collection[str] = GATE) -> pytest.MarkDecorator:
    """A test of each name, long where it is not in `gate`."""
    long = pytest.mark.long
    return pytest.mark.parametrize(
        "name", [name if name in gate else pytest.param(name, marks=long) for name in names]
    )


@dataclass(frozen=True)
class Verdict:
    """What became of a decoder: a compiled model, or why not."""

    compiled: Compiled | None
    reason: str = ""


def made(entry: Entry) -> Decoder:
    return entry.decoder(1)


def compiled_or_declined(entry: Entry, *, check: bool) -> Verdict:
    try:
        return Verdict(build(made(entry), "dense", page_size=8, check=check))
    except ValueError as refused:
        assert str(refused), "a refusal says why"
        return Verdict(None, str(refused))


@cache
def proven(name: str) -> Verdict:
    """The decoder by the proof alone, without the self-check."""
    return compiled_or_declined(ENTRIES[name], check=False)


def cases(entry: Entry) -> list[tuple[Tensor, list[int]]]:
    """Tokens and the calls they come in: token by token, odd, whole, a single token."""
    longest = min(entry.length, entry.decoder.context)
    vocabulary = entry.decoder.vocabulary
    made: list[tuple[Tensor, list[int]]] = []
    for batch, length, sizes in (
        (1, longest, [1]),
        (3, longest, odd_calls(longest)),
        (2, longest, [longest]),
        (1, 1, [1]),
        (3, 1, [1]),
    ):
        tokens = random_tokens(vocabulary, batch, length, seed=batch, multiple=entry.multiple)
        if tokens.shape[1] >= entry.least:
            made.append((tokens, calls_of(tokens.shape[1], *sizes)))
    return made


def run_or_refuse(compiled: Compiled, model: nn.Module, entry: Entry) -> str:
    """Hold every case against the full forward; the reason if a call was refused on the way."""
    for tokens, calls in cases(entry):
        try:
            logits = stepped(compiled.engine(), tokens, calls, prefill=len(calls) > 1)
        except ValueError as refused:
            return str(refused)
        assert_logits(model, logits, tokens)
    return ""


def test_there_are_enough_decoders_and_half_are_traps() -> None:
    assert len(ENTRIES) == len(DECODERS) >= 30, "names are unique"
    assert 2 * len(TRAPS) >= len(DECODERS)
    assert all(entry.trap for entry in TRAPS)


def test_an_unknown_expectation_is_refused() -> None:
    with pytest.raises(ValueError, match="right-or-declined"):
        Entry(Decoder, "perhaps")


@gated(ENTRIES, [*ENTRIES][::5])
def test_the_forward_runs_at_every_length(name: str) -> None:
    entry = ENTRIES[name]
    model = made(entry)
    for length in (1, 2, 3, 9, 31, entry.decoder.context):
        length = min(length, entry.decoder.context)
        if length < entry.least or length % entry.multiple:
            continue
        for batch in (1, 3):
            tokens = random_tokens(entry.decoder.vocabulary, batch, length, seed=length)
            assert bool(forward(model, tokens).isfinite().all())


@gated([e.name for e in DECODERS if e.expectation == RIGHT], ORDINARY[::5])
def test_an_ordinary_decoder_does_not_look_ahead(name: str) -> None:
    entry = ENTRIES[name]
    tokens = random_tokens(entry.decoder.vocabulary, 2, 29)
    assert_logits(made(entry), forward(made(entry), tokens[:, :17]), tokens)


@gated(ENTRIES)
def test_the_proof_alone_is_never_wrong(name: str) -> None:
    entry, verdict = ENTRIES[name], proven(name)
    if verdict.compiled is None:
        refusal = verdict.reason
    elif name in BEYOND_THE_PROOF:
        return
    else:
        refusal = run_or_refuse(verdict.compiled, made(entry), entry)
    if entry.expectation == RIGHT:
        assert not refusal
    if entry.expectation == DECLINED:
        assert refusal, "right against all expectation: say so in the registry"
        assert not entry.reason or any(word in refusal for word in entry.reason), refusal


@gated(ENTRIES)
def test_the_self_check_agrees_with_the_proof(name: str) -> None:
    """What the proof lets through must pass the self-check: no false alarm, no second opinion."""
    verdict, entry = proven(name), ENTRIES[name]
    if verdict.compiled is None or name in BEYOND_THE_PROOF:
        return
    compiled = verdict.compiled
    assert compiled.program is not None and compiled.captured.forward is not None
    try:
        figures = self_check(
            compiled.program,
            compiled.captured.forward,
            compiled.captured.takes_position_ids,
        )
    except NotRewritten:
        assert entry.least > 1, "only a forward that one token alone breaks may be refused here"
        return
    assert figures["largest_difference"] <= figures["allowed"]


@pytest.mark.parametrize("name", sorted(BEYOND_THE_PROOF))
def test_the_self_check_refuses_what_is_beyond_the_proof(name: str) -> None:
    with pytest.raises(NotRewritten) as refused:
        build(made(ENTRIES[name]), "dense", page_size=8)
    assert refused.value.declined


@pytest.mark.parametrize("name", [e.name for e in DECODERS][::29])
def test_the_face_is_right_or_declines(name: str) -> None:
    entry = ENTRIES[name]
    try:
        engine = memcompile.compile(made(entry), policy="dense", page_size=8)
    except NotRewritten as refused:
        assert entry.expectation != RIGHT
        assert refused.declined and all(d.reason and d.rule for d in refused.declined)
        return
    assert entry.expectation != DECLINED
    tokens = random_tokens(entry.decoder.vocabulary, 3, 24 - 24 % entry.multiple, seed=5)
    tokens = tokens[:, : entry.decoder.context]
    try:
        logits = stepped(engine, tokens, odd_calls(tokens.shape[1], 2))
    except ValueError:
        assert entry.expectation != RIGHT
        return
    assert_logits(made(entry), logits, tokens)


@gated([e.name for e in DECODERS if e.expectation != DECLINED])
def test_past_its_last_position_a_decoder_is_right_or_raises(name: str) -> None:
    """Tables end: a step must not wrap, clamp or read another row where the forward fails."""
    compiled, entry = proven(name).compiled, ENTRIES[name]
    if compiled is None or name in BEYOND_THE_PROOF or entry.length > entry.decoder.context:
        return
    model, context = made(entry), entry.decoder.context
    tokens = random_tokens(entry.decoder.vocabulary, 2, context + 9, multiple=entry.multiple)
    engine = compiled.engine()
    try:
        stepped(engine, tokens[:, :context], [context])
    except ValueError:
        assert entry.expectation != RIGHT
        return
    for index in range(context, tokens.shape[1]):
        seen = tokens[:, : index + 1]
        try:
            forward(model, seen)
        except (RuntimeError, IndexError):
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                engine(seen[:, -1:])
            assert engine.position == [index, index], "a refused call changes nothing"
            return
        try:
            logits = engine(seen[:, -1:])
        except ValueError:
            return
        assert_logits(model, logits, seen, start=index)


@gated([e.name for e in DECODERS if e.takes_position_ids])
def test_ragged_rows_are_right_or_refused(name: str) -> None:
    """Rows of unlike length, right-padded: each as if the padding were not there."""
    compiled, entry = proven(name).compiled, ENTRIES[name]
    if compiled is None:
        return
    tokens = random_tokens(entry.decoder.vocabulary, 3, 12, seed=3)
    engine, model = compiled.engine(), made(entry)
    rows: list[list[Tensor]] = [[], [], []]
    logits_of: list[list[Tensor]] = [[], [], []]
    for lengths in ([4, 1, 3], [1, 1, 1], [0, 2, 3]):
        n = max(lengths)
        piece = torch.full((3, n), 7)
        for row, length in enumerate(lengths):
            done = sum(part.numel() for part in rows[row])
            piece[row, :length] = tokens[row, done : done + length]
        try:
            logits = engine(piece, lengths=lengths)
        except ValueError as refused:
            assert "position" in str(refused)
            return
        for row, length in enumerate(lengths):
            rows[row].append(piece[row, :length])
            logits_of[row].append(logits[row, :length])
    for row in range(3):
        alone = torch.cat(rows[row])[None]
        assert_logits(model, torch.cat(logits_of[row])[None], alone)


def test_ragged_rows_are_refused_where_the_model_counts_by_itself() -> None:
    compiled = proven("Decoder").compiled
    assert compiled is not None
    with pytest.raises(ValueError, match="share one position"):
        compiled.engine()(torch.zeros(2, 3, dtype=torch.int64), lengths=[3, 1])


def test_the_self_check_refuses_a_step_without_its_position() -> None:
    """The step of learned positions, its `position` forgotten: a naive rewrite."""
    compiled = compiled_or_declined(ENTRIES["SlicedTable"], check=True).compiled
    assert compiled is not None and compiled.program is not None
    program = compiled.program
    graph = copy.deepcopy(program.dense)
    position = next(n for n in graph.graph.nodes if n.name == "position")
    readers = [n for n in position.users if getattr(n.target, "namespace", "") != "memcompile"]
    assert readers, "learned positions read the position outside the memory"
    for reader in readers:
        with graph.graph.inserting_before(reader):
            nothing = graph.graph.call_function(torch.zeros_like, (position,))
        reader.replace_input_with(position, nothing)
    graph.recompile()
    broken = type(program)(
        **{
            **{f: getattr(program, f) for f in program.__dataclass_fields__},
            "dense": graph,
            "policy": graph,
        }
    )
    with pytest.raises(NotRewritten, match="does not reproduce"):
        self_check(broken, lambda tokens: forward(made(ENTRIES["SlicedTable"]), tokens), False)


@pytest.mark.parametrize("drop", ["append_index", "attend"])
def test_the_self_check_refuses_a_broken_memory(drop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory that forgets its writes, or a read one position off, does not get past `compile`."""
    from memcompile.runtime import engine as engine_module

    advance = engine_module.MemoryState.advance
    if drop == "append_index":

        def forgetful(self: engine_module.MemoryState, lengths: list[int]) -> None:
            advance(self, lengths)
            for tensor in self.tensors():
                if tensor.is_floating_point():
                    tensor.zero_()

        monkeypatch.setattr(engine_module.MemoryState, "advance", forgetful)
    else:

        def late(self: engine_module.MemoryState, lengths: list[int]) -> None:
            advance(self, [max(length - 1, 0) for length in lengths])

        monkeypatch.setattr(engine_module.MemoryState, "advance", late)
    with pytest.raises(NotRewritten, match="does not reproduce"):
        build(made(ENTRIES["Decoder"]), "dense", page_size=8)
