"""Recall tasks: exact lengths, facts where they should be, nothing of the machine in the text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.models.networks import recall

TEXT = b"".join(b"line %d of the filler\n" % i for i in range(2000))


@given(
    length=st.integers(150, 1500),
    seed=st.integers(0, 2**40),
    depth=st.none() | st.floats(0, 1),
    facts=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_prompt_has_its_length_and_its_fact(
    length: int, seed: int, depth: float | None, facts: int
) -> None:
    made = recall.recall_prompt(length, seed, depth=depth, facts=facts, text=TEXT)
    assert len(made.prompt) == length
    stated = recall.fact_line(made.key, made.answer.decode().strip())
    assert made.prompt[made.fact_start :].startswith(stated)
    assert made.prompt.count(stated) == 1
    assert made.prompt.endswith(b"\n" + recall.question(made.key))
    assert made.prompt.count(b"# fact: ") == facts
    assert made == recall.recall_prompt(length, seed, depth=depth, facts=facts, text=TEXT)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_fact_stands_at_its_depth(depth: float) -> None:
    made = recall.recall_prompt(1000, 7, depth=depth, text=TEXT)
    room = 1000 - len(recall.fact_line(made.key, "0000")) - len(recall.question(made.key))
    longest_line = max(map(len, TEXT.splitlines(keepends=True)))
    assert abs(made.fact_start - depth * room) <= longest_line / 2
    assert made.depth == pytest.approx(made.fact_start / room)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 40}, r"length=40 is too short for 1 fact\(s\) and a question"),
        ({"depth": 1.5}, r"depth=1\.5 is outside 0\.0 to 1\.0"),
        ({"facts": 0}, r"facts=0 leaves nothing to ask for"),
        ({"text": b"short\n"}, r"the filler text has 6 bytes, \d+ are needed"),
    ],
    ids=["length", "depth", "facts", "text"],
)
def test_impossible_prompts_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recall.recall_prompt(**{"length": 512, "seed": 0, "text": TEXT, **options})  # type: ignore[arg-type]


def test_prompts_stack_only_at_one_length() -> None:
    prompts = [recall.recall_prompt(length, 3, text=TEXT) for length in (200, 200, 201)]
    questions, answers = recall.recall_batch(prompts[:2])
    assert questions.shape == (2, 200)
    assert bytes(answers[1].tolist()) == prompts[1].answer
    with pytest.raises(ValueError, match=r"lengths \[200, 201\] do not stack"):
        recall.recall_batch(prompts)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "text"])
def test_training_document_marks_answers(dense: bool) -> None:
    for seed in range(50):
        document, roles = recall.training_document(random.Random(seed), TEXT, 400, dense)
        assert len(document) == len(roles) == 400
        known: dict[bytes, bytes] = {}
        start = 0
        for line in document.splitlines(keepends=True):
            marks = set(roles[start : start + len(line)])
            start += len(line)
            if b" = " not in line or not line.endswith(b"\n"):
                continue
            key, value = line.split()[-3], line.split()[-1]
            assert (recall.ANSWER in marks) == (key in known)
            assert (recall.UNPREDICTABLE in marks) == (key not in known)
            assert known.setdefault(key, value) == value


def test_library_text_leaves_out_what_is_not_source(tmp_path: Path) -> None:
    kept = [f"module_{i}.py" for i in range(64)]
    dropped = [
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "site-packages/foreign.py",
        "test/test_os.py",
        "json/tests/test_json.py",
        "encodings/cp037.py",
        "sitecustomize.py",
    ]
    for name in kept + dropped:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# <{name}>\n")
    (tmp_path / "accents.py").write_text("# é\n", encoding="utf-8")
    training = recall.library_text(False, tmp_path).decode()
    held_out = recall.library_text(True, tmp_path).decode()
    for name in kept:
        assert (f"<{name}>" in training) != (f"<{name}>" in held_out)
    assert held_out.count("<") < training.count("<")
    assert not any(f"<{name}>" in training + held_out for name in dropped)
    assert (training + held_out).isascii()


def test_empty_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Python sources were found"):
        recall.library_text(False, tmp_path)
