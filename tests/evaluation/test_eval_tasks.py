"""The generators: every task with any tokenizer has its length, its depth, and a right answer."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from eval_case import TOKENIZERS, induction_source

from memcompile.compiler.evaluate import FileTokenizer
from memcompile.evaluation import filler as fillers
from memcompile.evaluation.filler import NumberFiller, ProseFiller, TextFiller
from memcompile.evaluation.prompts import Outline, Prompt, Question, fit
from memcompile.evaluation.tasks import TASKS, make_prompt, tasks_of
from memcompile.evaluation.tasks.shifts import EARLY
from memcompile.evaluation.tokens import NumberTokenizer, shared_prefix
from memcompile.evaluation.wordings import BYTES, NATURAL, PROFILES, Wording, numbers, templates
from memcompile.models.networks import induction, recall, tasks

TEXT = TextFiller(recall.library_text(held_out=True)[:80_000].decode())
CASES = [
    (kind, wording, task)
    for kind in TOKENIZERS
    for wording in (BYTES, NATURAL)
    for task in tasks_of(wording)
    if wording is NATURAL or kind == "bytes"
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileTokenizer]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in TOKENIZERS.items()}


def made(
    tokenizer: FileTokenizer, wording: Wording, task: str, length: int = 1200, seed: int = 1
) -> Prompt:
    return make_prompt(
        TASKS[task], length, 0.4, seed, tokenizer=tokenizer, wording=wording, filler=TEXT
    )


def texts(prompt: Prompt, tokenizer: FileTokenizer) -> list[tuple[str, str, tuple[str, ...]]]:
    """Context, question and answers of each question, read back from the tokens."""
    start = len(tokenizer.start)
    assert [*prompt.context[:start]] == [*tokenizer.start]
    context = [*prompt.context[start:]]
    found = []
    for asked in prompt.asked:
        whole = tokenizer.decode([*context, *asked.tokens])
        before = tokenizer.decode(context)
        found.append((before, whole[len(before) :], asked.answers))
    return found


def pattern(template: str) -> str:
    """A template as an expression with a group for each of its fields."""
    text, seen = "", set[str]()
    for i, part in enumerate(re.split(r"\{(\w+)\}", template.strip())):
        again = f"(?P={part})" if part in seen else rf"(?P<{part}>\w+)"
        text += again if i % 2 else re.escape(part)
        seen |= {part} if i % 2 else set()
    return text


def solved(task: str, wording: Wording, context: str, question: str) -> set[str]:
    """The answers that a plain reader of the text would give."""

    def facts(template: str) -> list[dict[str, str]]:
        return [match.groupdict() for match in re.finditer(pattern(template), context)]

    def asked(template: str) -> dict[str, str]:
        match = re.search(pattern(template), question)
        assert match, (template, question)
        return match.groupdict()

    if task in ("common-words", "frequent-words"):
        words = Counter(context.rpartition(wording.words.strip())[2].split())
        return {word for word, _ in words.most_common(wording.listed)}
    if task == "mqar":
        key = asked(wording.recall)["key"]
        return {fact["value"] for fact in facts(wording.pair) if fact["key"] == key}
    if task == "multi-value":
        key = asked(wording.items)["key"]
        return {fact["value"] for fact in facts(wording.item) if fact["key"] == key}
    if task == "tracking":
        given = {fact["key"]: fact["value"] for fact in facts(wording.let)}
        given |= {fact["key"]: fact["other"] for fact in facts(wording.same)}
        if "{value}" in wording.trace:
            value = asked(wording.trace)["value"]
            holding = {value}
            for _ in given:
                holding |= {key for key, other in given.items() if other in holding}
            return holding - {value}
        chain = [asked(wording.trace)["key"]]
        while chain[-1] in given:
            chain.append(given[chain[-1]])
        return {*chain[1:]}
    if task == "late-constraint":
        assert len(facts(wording.rule)) == 1
        key = asked(wording.obey)["key"]
        values = [fact["value"] for fact in facts(wording.fact) if fact["key"] == key]
        return {*values}
    template = wording.note if task == "topic-shift" else wording.fact
    known = {fact["key"]: fact["value"] for fact in facts(template)}
    if task == "multi-query" and wording.many:
        keys = [key for key in known if key in question]
        return {known[key] for key in keys}
    return {known[asked(wording.question)["key"]]}


@pytest.mark.parametrize(
    ("kind", "wording", "task"), CASES, ids=[f"{k}-{w.name}-{t}" for k, w, t in CASES]
)
def test_a_prompt_fits_its_length_and_holds_its_answer_once(
    tokenizers: dict[str, FileTokenizer], kind: str, wording: Wording, task: str
) -> None:
    tokenizer = tokenizers[kind]
    prompt = made(tokenizer, wording, task)
    # One more letter, word or pair would be one too many.
    unit = 40 if task in ("mqar", "common-words", "frequent-words") else 4
    assert 1200 - unit <= prompt.tokens <= 1200
    assert prompt == made(tokenizer, wording, task)
    assert prompt.context != made(tokenizer, wording, task, seed=2).context
    for context, question, answers in texts(prompt, tokenizer):
        assert question.strip() and len({*answers}) == len(answers)
        assert solved(task, wording, context, question) == {*answers}
    for asked in prompt.asked:
        if task == "late-constraint":
            assert wording.rule.format(word=asked.begins) in tokenizer.decode(prompt.context)
        else:
            assert not asked.begins
        written = wording.before + wording.joiner.join(asked.answers) + wording.end
        assert asked.room >= len(tokenizer.encode(written)) - 1


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_needle_stands_at_its_depth(
    tokenizers: dict[str, FileTokenizer], kind: str, depth: float
) -> None:
    for task in ("single", "multi-key", "multi-value", "multi-query"):
        prompt = make_prompt(
            TASKS[task],
            *(2000, depth, 0),
            tokenizer=tokenizers[kind],
            wording=NATURAL,
            filler=TEXT,
        )
        # A line's length, and other needles at the end, may lie between.
        assert abs(prompt.depth - depth) < 0.16, task


def test_depth_changes_nothing_where_a_task_has_none(
    tokenizers: dict[str, FileTokenizer],
) -> None:
    for task in TASKS.values():
        shallow, deep = (
            make_prompt(
                task,
                *(1500, depth, 0),
                tokenizer=tokenizers["bytes"],
                wording=NATURAL,
                filler=TEXT,
            )
            for depth in (0.0, 0.9)
        )
        assert (shallow == deep) is not task.deep, task.name


def test_the_rule_of_a_late_constraint_is_early(tokenizers: dict[str, FileTokenizer]) -> None:
    depths = [made(tokenizers["bytes"], BYTES, "late-constraint", seed=s).depth for s in range(8)]
    assert max(depths) < EARLY + 0.05 and len({*depths}) > 4


def test_a_topic_shift_asks_for_what_nobody_asked_for(
    tokenizers: dict[str, FileTokenizer],
) -> None:
    for seed in range(4):
        prompt = made(tokenizers["bytes"], BYTES, "topic-shift", seed=seed)
        ((context, question, _),) = texts(prompt, tokenizers["bytes"])
        asked_before = re.findall(r"# recall: (\w+) = \d", context)
        noted = re.findall(r"# note: (\w+) = \d", context)
        assert len(asked_before) == 8 and not {*asked_before} & {*noted}
        assert question.split()[2] in noted


def test_lengths_that_are_too_short_are_refused(tokenizers: dict[str, FileTokenizer]) -> None:
    for task in tasks_of(NATURAL):
        with pytest.raises(ValueError, match=rf"task {task}: a length of 20 tokens is too short"):
            made(tokenizers["bytes"], NATURAL, task, length=20)
    with pytest.raises(ValueError, match=r"take (\d+); give at least that") as refused:
        made(tokenizers["bytes"], BYTES, "single", length=30)
    needed = int(re.findall(r"take (\d+)", str(refused.value))[0])
    assert made(tokenizers["bytes"], BYTES, "single", length=needed).tokens == needed


@pytest.mark.parametrize(
    ("task", "depth", "seed", "message"),
    [
        ("single", 1.1, 0, "depth is 1.1"),
        ("single", 0.5, -1, "seed is -1"),
        ("common-words", 0.5, 0, "has no words, common .* its tasks are single, "),
    ],
)
def test_what_cannot_be_made_is_refused(
    tokenizers: dict[str, FileTokenizer], task: str, depth: float, seed: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_prompt(
            TASKS[task],
            *(500, depth, seed),
            tokenizer=tokenizers["bytes"],
            wording=BYTES,
            filler=TEXT,
        )


def test_the_byte_profile_speaks_as_the_checkpoints_were_taught() -> None:
    def said(mark: str, key: str = "zorvik", value: str = "4821") -> str:
        return tasks.stated(mark, key, value)[0].decode()

    def answered(mark: str, answer: str) -> str:
        return tasks.asked(mark, "zorvik", answer)[0].decode()

    both = {"key": "zorvik", "value": "4821"}
    assert recall.fact_line("zorvik", "4821").decode() == BYTES.fact.format(**both)
    assert recall.question("zorvik").decode() == BYTES.question.format(**both)
    assert said("note") == BYTES.note.format(**both)
    assert said("item") == BYTES.item.format(**both)
    assert said("let") == BYTES.let.format(**both)
    assert said("let", value="mabelo") == BYTES.same.format(key="zorvik", other="mabelo")
    for mark, template, answer in (
        ("items", BYTES.items, BYTES.joiner.join(["4821", "9310"])),
        ("trace", BYTES.trace, BYTES.chain.join(["mabelo", "4821"])),
        ("obey", BYTES.obey, BYTES.obeyed.format(word="kalubi", value="4821")),
    ):
        assert answered(mark, answer) == template.format(**both) + answer + BYTES.end
    drawn = random.Random(0)
    assert re.fullmatch(r"([b-z][aeiou]){3}", BYTES.name_of(drawn))
    assert re.fullmatch(r"\d{4}", BYTES.value_of(drawn))


def test_a_question_without_tokens_is_refused(tokenizers: dict[str, FileTokenizer]) -> None:
    silent = Outline(TEXT.open(random.Random(0), ()), (), (Question("", ("a",), "a"),))
    with pytest.raises(ValueError, match="the question '' has no tokens of its own"):
        fit(silent, 50, tokenizers["bytes"], lambda tokens: tokens, "\n")


def test_prompts_can_be_long(tokenizers: dict[str, FileTokenizer]) -> None:
    for task in tasks_of(BYTES):
        prompt = made(tokenizers["bytes"], BYTES, task, length=20_000)
        assert 20_000 - 16 <= prompt.tokens <= 20_000, task


def test_ids_are_prompts_for_a_model_without_words() -> None:
    source = induction_source()
    assert tasks_of(source.wording) == ["single", "multi-key", "multi-query", "mqar"]
    prompt = make_prompt(
        TASKS["single"],
        *(100, 0.5, 0),
        tokenizer=source.tokenizer,
        wording=source.wording,
        filler=source.filler,
    )
    (asked,) = prompt.asked
    assert prompt.context[0] == induction.BOS and prompt.context.count(induction.BOS) == 1
    answer = [int(token) for token in asked.answers[0].split()]
    at = prompt.context.index(asked.tokens[0])
    assert [*prompt.context[at + 1 : at + 4]] == answer and asked.room == 3
    assert all(prompt.context.count(token) == 1 for token in [*asked.tokens, *answer])
    with pytest.raises(ValueError, match="too few for this task"):
        make_prompt(
            TASKS["multi-key"],
            *(100, 0.5, 0),
            tokenizer=NumberTokenizer(9),
            wording=numbers(9),
            filler=NumberFiller(9),
        )
    with pytest.raises(ValueError, match="none is left for filler"):
        NumberFiller(3).open(random.Random(0), ["0", "1 ", "2"])
    with pytest.raises(ValueError, match="token 9 is not in the vocabulary of 9"):
        NumberTokenizer(9, [9])


def test_a_name_never_stands_in_the_filler() -> None:
    held = [BYTES.name_of(random.Random(seed)) for seed in range(3)]
    filler = TextFiller(" ".join(held))
    names = BYTES.names(random.Random(0), filler)
    drawn = [names.name() for _ in range(200)]
    assert not {*drawn} & {*held} and len({*drawn}) == 200
    with pytest.raises(ValueError, match="no free name or value"):
        numbers(3, steps=3).names(random.Random(0), NumberFiller(3, (0, 1, 2))).name()


@pytest.mark.parametrize("source", [TextFiller("one line.\nAnd two. And three.\n"), ProseFiller()])
def test_filler_can_be_taken_in_any_amount(source: fillers.Filler) -> None:
    stretch = source.open(random.Random(1), ())
    for amount in (0, 1, 7, 500):
        text = stretch.take(amount)
        assert len(text) == amount and text[-1:] in ("", "\n")
        places = stretch.places(text)
        assert places == sorted({*places}) and places[0] == 0
        assert all(text[place - 1] in "\n " for place in places if place)
    assert len(stretch.places(stretch.take(500))) > 5


def test_an_empty_text_is_no_filler() -> None:
    with pytest.raises(ValueError, match="filler text is empty"):
        TextFiller(" \n")


def test_profiles_are_told_apart_by_their_templates() -> None:
    assert {*PROFILES} == {"bytes", "natural"}
    assert templates(BYTES) != templates(NATURAL)
    assert "name_of" not in templates(BYTES) and templates(BYTES)["patience"] == 1.0


def test_the_shared_prefix_is_counted() -> None:
    assert shared_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_prefix([1, 2], [1, 2, 4]) == 2
