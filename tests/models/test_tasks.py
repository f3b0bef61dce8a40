"""Training tasks: answers follow from the lines before them, and every byte has the right role."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.models.networks import recall, tasks
from memcompile.models.networks.tasks import Diet

TEXT = b"".join(b"line %d of the filler\n" % i for i in range(2000))
NAME, VALUE = r"[a-z]{6}", r"\d{4}"
MIXED = Diet(dense=0.4, lone=0.2, others=0.6)
STATEMENT = re.compile(rf"# (fact|note|item|let): ({NAME}) = ({NAME}|{VALUE})\n|# rule: ({NAME})\n")
QUESTION = re.compile(r"(# (recall|items|trace|obey): ([a-z]{6}) = )([^\n]*\n)")


def rightful_answer(mark: str, name: str, known: dict[str, dict[str, list[str]]]) -> str:
    """The answer as a reader would find it, walking back through the statements."""
    if mark == "items":
        return " ".join(known["item"][name])
    if mark == "trace":
        trail = [name]
        while not trail[-1].isdigit():
            trail.append(known["let"][trail[-1]][0])
        return " = ".join(trail[1:])
    value = (known["fact"][name] or known["note"][name])[0]
    return f"{known['rule'][''][0]} {value}" if mark == "obey" else value


def read_document(document: bytes, roles: bytes) -> set[str]:
    """Asserts each question's answer and all roles; returns the marks of the questions met."""
    known: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    expected = bytearray([recall.TEXT]) * len(document)
    met = set()
    text = document.decode()
    # Statements and questions in the order of the text; a line the document's end cuts is none.
    for line in re.finditer(r"^.*\n", text, re.MULTILINE):
        if stated := STATEMENT.fullmatch(line.group()):
            mark, name, value, word = stated.groups()
            for group in range(2, 5):
                start, end = (line.start() + place for place in stated.span(group))
                if stated.group(group):
                    expected[start:end] = bytes([recall.UNPREDICTABLE]) * (end - start)
            known[mark or "rule"][name or ""].append(value or word)
        elif asked := QUESTION.fullmatch(line.group()):
            ask, mark, name, answer = asked.groups()
            assert answer == rightful_answer(mark, name, known) + "\n"
            start = line.start() + len(ask)
            expected[start : line.end()] = bytes([recall.ANSWER]) * len(answer)
            met.add(mark)
    whole = text.rfind("\n") + 1
    assert roles[:whole] == bytes(expected[:whole])
    return met


@given(seed=st.integers(0, 2**40), length=st.integers(128, 1500))
@settings(max_examples=200, deadline=None)
def test_every_answer_follows_and_every_role_is_right(seed: int, length: int) -> None:
    document, roles = tasks.training_document(random.Random(seed), TEXT, length, MIXED)
    assert len(document) == len(roles) == length
    if not re.fullmatch(rb"\n*([a-z]{6} = \d{4}\n)*", document):
        read_document(document, roles)
    assert (document, roles) == tasks.training_document(random.Random(seed), TEXT, length, MIXED)


def test_every_task_occurs_and_asks() -> None:
    met: set[str] = set()
    for seed in range(60):
        diet = Diet(dense=0.0, others=0.7)
        met |= read_document(*tasks.training_document(random.Random(seed), TEXT, 1500, diet))
    assert met == {"recall", "items", "trace", "obey"}


def test_bare_documents_repeat_their_pairs() -> None:
    seen = 0
    for seed in range(60):
        document, roles = tasks.training_document(random.Random(seed), TEXT, 400, Diet(dense=1.0))
        if b"#" in document:
            continue
        seen += 1
        known: dict[bytes, bytes] = {}
        for line in re.finditer(rb"([a-z]{6}) = (\d{4})\n", document):
            name, value = line.groups()
            again = name in known
            role = recall.ANSWER if again else recall.UNPREDICTABLE
            assert set(roles[line.start(2) : line.end(2)]) == {role}
            assert set(roles[line.start(1) : line.end(1)]) == {recall.TEXT if again else role}
            assert known.setdefault(name, value) == value
        assert len(known) == 400 // 42
    assert seen


@pytest.mark.parametrize("task", [tasks.fact_task, *tasks.OTHER_TASKS], ids=lambda t: t.__name__)
def test_questions_stand_behind_their_statements(task) -> None:  # type: ignore[no-untyped-def]
    for seed in range(200):
        events = task(random.Random(seed))
        assert all(0 <= place <= 1 for place, _ in events)
        ordered = sorted(events, key=lambda event: event[0])
        document, roles = (b"".join(part) for part in zip(*(e[1] for e in ordered), strict=True))
        assert read_document(document, roles)


def test_a_rule_comes_early_and_notes_wait() -> None:
    for seed in range(200):
        for place, (line, _) in tasks.rule_task(random.Random(seed)):
            assert not line.startswith(b"# rule: ") or place < 0.5
        for place, (line, _) in tasks.note_task(random.Random(seed)):
            assert (place < 0.5) == line.startswith(b"# note: ")


@given(seed=st.integers(0, 2**40), length=st.integers(2, 600), slack=st.integers(0, 20000))
@settings(max_examples=300, deadline=None)
def test_skipped_positions_rise_within_bounds(seed: int, length: int, slack: int) -> None:
    document = TEXT[:length]
    positions = tasks.skipped_positions(random.Random(seed), document, length + slack)
    assert len(positions) == length
    assert positions[0] == 0
    assert positions[-1] < length + slack
    steps = [b - a for a, b in pairwise(positions)]
    assert all(step >= 1 for step in steps)
    # Gaps stand before lines, never within one.
    assert all(document[i] == 0x0A for i, step in enumerate(steps) if step > 1)


def test_some_documents_skip_far_and_some_not_at_all() -> None:
    document = TEXT[:500]
    spans = [
        tasks.skipped_positions(random.Random(seed), document, 16384)[-1] for seed in range(200)
    ]
    assert 20 <= sum(span == 499 for span in spans) <= 90
    assert max(spans) > 12000


def test_positions_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reach=10 has no room for 11 bytes"):
        tasks.skipped_positions(random.Random(0), b"x" * 11, 10)
