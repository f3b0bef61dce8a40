"""What a memory that keeps only the useful would lose: a rare rule, and noise that matters."""

from __future__ import annotations

from dataclasses import dataclass

from ..filler import Stretch
from ..prompts import Outline, Question, Statement
from .task import Draw, Task

# The rule stands in this first share of the context.
EARLY = 0.1
FACTS, NOTES, REPEATS = 4, 4, 2
OWN = "of this project"


def _late_constraint(draw: Draw) -> Outline:
    """A rule early on, facts anywhere; the question does not mention the rule.

    An answer is right that begins with the rule's word and holds the value.
    """
    wording, names = draw.wording, draw.names
    word = names.name()
    facts = [(names.name(), names.value()) for _ in range(FACTS)]
    statements = [Statement(wording.rule.format(word=word), EARLY * draw.rng.random())]
    statements += [
        Statement(wording.fact.format(key=key, value=value), draw.rng.uniform(EARLY, 1))
        for key, value in facts
    ]
    key, value = facts[0]
    written = wording.before + wording.obeyed.format(word=word, value=value) + wording.end
    question = Question(wording.obey.format(key=key), (value,), written, begins=word)
    return Outline(draw.filler.open(draw.rng, names.taken), tuple(statements), (question,))


@dataclass(frozen=True)
class ShiftedStretch:
    """One stretch up to `share` of the amount, then another: the text changes its topic."""

    before: Stretch
    after: Stretch
    share: float

    def take(self, amount: int) -> str:
        first = round(self.share * amount)
        return self.before.take(first) + self.after.take(amount - first)

    def places(self, text: str) -> list[int]:
        return self.before.places(text)


def _topic_shift(draw: Draw) -> Outline:
    """Facts that are asked for again and again, notes that never are; then a note is asked for.

    The filler changes where the topic does, and nothing is asked for a while after it.
    """
    wording, names, rng = draw.wording, draw.names, draw.rng
    shift = rng.uniform(0.6, 0.8)
    statements = []
    for _ in range(FACTS):
        key, value = names.name(), names.value()
        stated = rng.uniform(0, shift / 2)
        statements.append(Statement(wording.fact.format(key=key, value=value), stated))
        answered = wording.question.format(key=key) + wording.before + value + wording.end
        statements += [Statement(answered, rng.uniform(stated, shift)) for _ in range(REPEATS)]
    notes = [(names.name(), names.value()) for _ in range(NOTES)]
    # The note that is asked for comes first: its place is the one that is reported.
    placed = [
        Statement(wording.note.format(key=key, value=value), shift * depth)
        for (key, value), depth in zip(
            notes, [draw.depth, *(rng.random() for _ in notes[1:])], strict=True
        )
    ]
    key, value = notes[0]
    question = draw.ask(wording.question.format(key=key), [value])
    stretch = ShiftedStretch(
        draw.filler.open(rng, names.taken), draw.filler.open(rng, names.taken), shift
    )
    return Outline(stretch, (*placed, *statements), (question,))


LATE_CONSTRAINT = Task(
    "late-constraint",
    "a rule given once, early, that the answer has to obey",
    OWN,
    needs=("rule", "fact", "obey", "obeyed"),
    deep=False,
    outline=_late_constraint,
)
TOPIC_SHIFT = Task(
    "topic-shift",
    "notes in passing among facts that are asked for; then a note is asked for",
    OWN,
    needs=("fact", "question", "note"),
    deep=True,
    outline=_topic_shift,
)
