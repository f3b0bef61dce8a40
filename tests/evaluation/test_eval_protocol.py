"""The protocol on a network whose answers are known: what is right, what is broken, what cheats."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from eval_case import (
    CHECKPOINT,
    SMALL,
    byte_tokenizer,
    compiled,
    contender,
    dropping_pages,
    induction_source,
    silently_dense,
    with_program,
)
from tolerance import assert_close_to_float64

from memcompile.evaluation.protocol import (
    Contender,
    Counts,
    ReadTooMuch,
    answer,
    ask,
    check,
    read_context,
    score,
)
from memcompile.evaluation.records import open_records
from memcompile.evaluation.run import Plan, prepare, readers, run, skips
from memcompile.evaluation.summary import Row, summarise
from memcompile.evaluation.tasks import TASKS, make_prompt
from memcompile.evaluation.text_loss import Loss, Window, bits_per_byte, text_loss, windows
from memcompile.evaluation.tokens import Tokenizer
from memcompile.models.networks import bytes_llama, induction, recall

NAME = "scout:budget=64"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Contender, Contender]:
    """The induction network, dense and under a scout."""
    folder = induction.save(tmp_path_factory.mktemp("induction"))
    scout = contender(compiled(folder, "scout", **SMALL), NAME)
    return contender(compiled(folder, "dense", page_size=8), "dense"), scout


def rows(contenders: list[Contender], plan: Plan, folder: Path) -> list[Row]:
    source = induction_source()
    with open_records(folder, {}) as records:
        prepare(plan, source, contenders)
        run(plan, source, contenders, records)
        return summarise(plan, contenders, records.done.values())


def plan(tasks: tuple[str, ...], length: int, samples: int) -> Plan:
    return Plan(tasks, (length,), (0.0, 0.5, 1.0), samples, seed=3, stride=16)


def test_the_known_answers_are_given_densely_and_through_the_scout(
    pair: tuple[Contender, Contender], tmp_path: Path
) -> None:
    found = rows([*pair], plan(("single", "multi-key", "multi-query", "mqar"), 640, 2), tmp_path)
    assert len(found) == 8
    for row in found:
        assert row.value is not None and row.value.mean == 1.0, row
    for row in found[1::2]:
        assert not row.claim and row.verdict == "no claim: 6 prompts < 20"
        assert 8 * row.pages_read <= row.pages_dense
        assert row.difference is not None and row.difference.low < 0 < row.difference.high


@pytest.mark.long
def test_the_known_answers_at_32k(tmp_path: Path) -> None:
    folder = induction.save(tmp_path / "induction")
    scout = compiled(folder, "scout", budget=2048, dense_layers=0)
    both = [contender(compiled(folder, "dense"), "dense"), contender(scout, "scout")]
    asked = Plan(("single", "mqar"), (32 * 1024,), (0.3,), 1, seed=0, stride=16)
    found = rows(both, asked, tmp_path / "out")
    assert [row.value.mean for row in found if row.value] == [1.0] * 4
    assert all(16 * row.pages_read <= row.pages_dense for row in found[1::2])


def test_a_policy_that_drops_a_page_in_eight_is_exposed(
    pair: tuple[Contender, Contender], tmp_path: Path
) -> None:
    dense, scout = pair
    broken = with_program(scout, dropping_pages)
    whole, found = rows([dense, broken], plan(("single",), 640, 8), tmp_path)
    assert whole.value is not None and whole.value.mean == 1.0
    assert found.difference is not None and found.difference.high < 0, found
    assert found.claim and found.verdict == "worse than dense"


def test_a_policy_that_silently_runs_dense_ends_the_run(
    pair: tuple[Contender, Contender], tmp_path: Path
) -> None:
    dense, scout = pair
    with pytest.raises(ReadTooMuch, match=r"'scout:budget=64' read \d+ pages .* dense reads"):
        rows([dense, with_program(scout, silently_dense)], plan(("single",), 640, 1), tmp_path)
    # What was recorded before stays, and nothing of the cheat.
    with open_records(tmp_path, {}) as records:
        assert {record["policy"] for record in records.done.values()} == {"dense"}


def test_pages_are_held_against_the_memories_not_against_the_count_of_dense() -> None:
    hollow = Contender("scout", make=lambda: None, layouts=())  # type: ignore[arg-type, return-value]
    fine = Counts(tokens=1, pages_read=8, pages_dense=100, pages_allowed=8)
    check(hollow, 10, fine)
    with pytest.raises(ReadTooMuch, match="allows 8"):
        check(hollow, 10, dataclasses.replace(fine, pages_read=9))


def test_questions_of_one_context_do_not_see_each_other(pair: tuple[Contender, Contender]) -> None:
    source, (dense, _) = induction_source(), pair
    prompt = make_prompt(
        TASKS["mqar"],
        *(200, 0.0, 5),
        tokenizer=source.tokenizer,
        wording=source.wording,
        filler=source.filler,
    )
    together = answer(dense, prompt, source.tokenizer)
    alone = [
        answer(dense, dataclasses.replace(prompt, asked=(asked,)), source.tokenizer)
        for asked in prompt.asked
    ]
    assert len(alone) > 1 and together.written == tuple(one.written[0] for one in alone)
    assert together.counts == sum((one.counts for one in alone), Counts())


def test_one_dense_read_serves_all_memories_that_hold_no_more(
    pair: tuple[Contender, Contender], tmp_path: Path
) -> None:
    dense, scout = pair
    smaller = dataclasses.replace(scout, name="smaller")
    assert scout.serves(dense) and not dense.serves(scout)
    assert readers([dense, scout, smaller]) == {"dense": scout, NAME: scout, "smaller": scout}
    assert readers([dense]) == {"dense": dense}
    source = induction_source()
    prompt = make_prompt(
        TASKS["multi-query"],
        *(640, 0.5, 1),
        tokenizer=source.tokenizer,
        wording=source.wording,
        filler=source.filler,
    )
    reader = scout.make()
    read_context(reader, prompt.context)
    shared = [ask(each, each.make(), reader, prompt, source.tokenizer) for each in (dense, scout)]
    assert shared == [answer(each, prompt, source.tokenizer) for each in (dense, scout)]
    assert reader.position == [len(prompt.context)]


def test_only_question_and_answer_are_counted(pair: tuple[Contender, Contender]) -> None:
    source, (dense, scout) = induction_source(), pair
    prompt = make_prompt(
        TASKS["single"],
        *(640, 0.5, 0),
        tokenizer=source.tokenizer,
        wording=source.wording,
        filler=source.filler,
    )
    (asked,) = prompt.asked
    tokens = len(asked.tokens) + asked.room - 1  # the last one written is not read again
    for each in (dense, scout):
        counts = answer(each, prompt, source.tokenizer).counts
        assert counts.tokens == tokens
        assert counts.pages_read == counts.pages_allowed
    pages = {"dense": 2 * 2 * 80, NAME: 2 * 2 * 8}
    assert scout.pages_allowed(636, 1) == pages[NAME]
    assert counts.pages_dense == tokens * pages["dense"] == tokens * dense.pages_allowed(636, 1)


def test_lengths_with_nothing_to_skip_are_no_evidence(
    pair: tuple[Contender, Contender], tmp_path: Path
) -> None:
    both = Plan(("single",), (48, 640), (0.5,), 1, seed=0, stride=16)
    dense, scout = pair
    assert not skips(scout, 64) and skips(scout, 65) and not skips(dense, 640)
    found = {(row.length, row.policy): row for row in rows([dense, scout], both, tmp_path)}
    assert found[48, NAME].value is None and not found[48, NAME].claim
    assert found[48, NAME].verdict == "nothing to skip ≤ 64"
    assert found[640, NAME].value is not None


def test_what_cannot_be_compared_is_refused_before_the_run(
    pair: tuple[Contender, Contender],
) -> None:
    dense, scout = pair
    source = induction_source()
    good = plan(("single",), 640, 1)

    def refused(contenders: list[Contender], message: str, asked: Plan = good) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(asked, source, contenders)

    refused([scout], "'dense' comes first")
    refused([dense, scout, scout], "name of its own")
    refused([dense, dataclasses.replace(dense, name="scout")], "keeps all 2 attentions dense")
    refused([dense, scout], "nothing to skip", plan(("single",), 64, 1))
    refused([dataclasses.replace(dense, limit=100)], "above the context of 100")
    refused([dense], "too short", plan(("single",), 4, 1))
    refused([dense], "no let, same, trace", plan(("tracking",), 640, 1))
    refused([dense], "there is no text", plan(("text-loss",), 640, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("sinlge",)}, "unknown task 'sinlge'; known: single, "),
        ({"tasks": ()}, "tasks: give at least one"),
        ({"lengths": (8, 8)}, "lengths: give at least one, and none twice"),
        ({"lengths": (0, 8)}, r"lengths \[0, 8\]: each is a number of tokens, at least 1"),
        ({"depths": (1.5,)}, "share of the context"),
        ({"samples": 0}, "samples is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan(("single",), 640, 1), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "answers", "end", "expected"),
    [
        ("4821\n", ("4821",), "\n", 1.0),
        (" 4821.\nand 9", ("4821", "9"), ".\n", 0.5),
        ("48219", ("4821",), "\n", 0.0),
        ("\n 4821", ("4821",), "\n", 1.0),
        ("a\n4821", ("4821",), "\n", 0.0),
        ("4 8 21 ", ("8 21",), "", 1.0),
        ("kalubi 17", ("kalubi 4821",), "\n", 0.0),
    ],
)
def test_a_score_is_the_share_of_answers_found_as_whole_words(
    written: str, answers: tuple[str, ...], end: str, expected: float
) -> None:
    assert score(written, answers, end) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (" kalubi 4821.\n", 1.0),
        (" kalubi. The secret number is 4821.\n", 1.0),
        ("kalubi, 4821", 1.0),
        ("kalubis 4821", 0.0),
        ("the word kalubi 4821", 0.0),
        ("kalubi 48211", 0.0),
    ],
)
def test_an_answer_under_a_rule_begins_with_its_word(written: str, expected: float) -> None:
    assert score(written, ("4821",), ".\n", "kalubi") == expected


@pytest.fixture(scope="module")
def bytes_pair() -> tuple[Contender, Contender]:
    built = [compiled(CHECKPOINT, "dense"), compiled(CHECKPOINT, "scout", **SMALL)]
    dense, scout = (contender(b, name) for b, name in zip(built, ("dense", NAME), strict=True))
    return dense, scout


def lost(given: Contender, window: Window, tokenizer: Tokenizer) -> Loss:
    reader = given.make()
    read_context(reader, window.read)
    return text_loss(given, given.make(), reader, window, tokenizer)


def test_text_loss_is_the_model_s_own(
    bytes_pair: tuple[Contender, Contender], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    text = [*recall.library_text(held_out=True)[:2000]]
    window = windows(text, (), 300, 100, 3)[1]
    loss = lost(bytes_pair[0], window, tokenizer)

    def direct(dtype: torch.dtype) -> torch.Tensor:
        network = bytes_llama.load(CHECKPOINT, dtype)
        tokens = torch.tensor([[*window.context, *window.scored]])
        with torch.no_grad():
            logits = network(tokens)[0, -101:-1].float()
        return torch.nn.functional.cross_entropy(logits, tokens[0, -100:]).double()

    assert_close_to_float64(
        torch.tensor(loss.nats),
        direct(torch.bfloat16).bfloat16(),
        direct(torch.float64),
    )
    assert loss.text_bytes == loss.counts.tokens == 100
    assert loss.counts.pages_read == loss.counts.pages_dense
    assert bits_per_byte(loss.nats, 100, 100) == pytest.approx(loss.nats / 0.6931471805599453)


def test_a_character_that_a_window_cuts_counts_its_bytes(
    bytes_pair: tuple[Contender, Contender], tmp_path: Path
) -> None:
    window = windows([*("äöü" * 200).encode()], (), 300, 101, 1)[0]
    assert lost(bytes_pair[0], window, byte_tokenizer(tmp_path)).text_bytes == 101


def test_text_loss_through_a_policy_reads_what_it_allows(
    bytes_pair: tuple[Contender, Contender], tmp_path: Path
) -> None:
    scout, tokenizer = bytes_pair[1], byte_tokenizer(tmp_path)
    window = windows([*recall.library_text(held_out=True)[:2000]], (), 400, 40, 1)[0]
    counts = lost(scout, window, tokenizer).counts
    assert counts.pages_read == counts.pages_allowed == 40 * 8 * 2 * 4
    cheat = with_program(scout, silently_dense)
    with pytest.raises(ReadTooMuch):
        lost(cheat, window, tokenizer)


def test_windows_score_every_token_once() -> None:
    tokens = list(range(100))
    every = windows(tokens, (7, 7), 22, 5, 17)
    assert [token for window in every for token in window.scored] == tokens[15:100]
    assert every[0] == Window((7, 7, *range(15)), tuple(range(15, 20)))
    few = windows(tokens, (), 20, 5, 3)
    assert [window.scored[0] for window in few] == [15, 40, 70]
    with pytest.raises(ValueError, match="has 17 windows of 20"):
        windows(tokens, (), 20, 5, 18)
    with pytest.raises(ValueError, match="leaves no context"):
        windows(tokens, (), 20, 20, 1)
