"""Needles in a haystack: facts among filler, asked for by their keys."""

from __future__ import annotations

from ..prompts import Outline, Question, Statement
from .task import Draw, Task

RULER = "RULER, Hsieh et al. 2024"
KEYS, VALUES, QUERIES = 8, 4, 4


def _single(draw: Draw) -> Outline:
    return _facts(draw, 1, 1)


def _multi_key(draw: Draw) -> Outline:
    return _facts(draw, KEYS, 1)


def _multi_query(draw: Draw) -> Outline:
    return _facts(draw, KEYS, QUERIES)


def _facts(draw: Draw, count: int, queries: int) -> Outline:
    """`count` facts, the first at the depth asked for; the first `queries` are asked for."""
    wording, names = draw.wording, draw.names
    facts = [(names.name(), names.value()) for _ in range(count)]
    depths = [draw.depth, *(draw.rng.random() for _ in facts[1:])]
    statements = tuple(
        Statement(wording.fact.format(key=key, value=value), depth)
        for (key, value), depth in zip(facts, depths, strict=True)
    )
    asked = facts[:queries]
    questions: tuple[Question, ...]
    if queries > 1 and wording.many:
        keys = ", ".join(key for key, _ in asked)
        questions = (draw.ask(wording.many.format(keys=keys), [value for _, value in asked]),)
    else:
        questions = tuple(
            draw.ask(wording.question.format(key=key), [value]) for key, value in asked
        )
    return Outline(draw.filler.open(draw.rng, names.taken), statements, questions)


def _multi_value(draw: Draw) -> Outline:
    """Several values of one key, the first at the depth asked for."""
    wording, names = draw.wording, draw.names
    key = names.name()
    values = [names.value() for _ in range(VALUES)]
    placed = [(draw.depth, values[0]), *((draw.rng.random(), value) for value in values[1:])]
    # In the order in which they stand: a model may be taught to answer so.
    ordered = sorted(placed, key=lambda pair: pair[0])
    statements = tuple(
        Statement(wording.item.format(key=key, value=value), depth) for depth, value in placed
    )
    question = draw.ask(wording.items.format(key=key), [value for _, value in ordered])
    return Outline(draw.filler.open(draw.rng, names.taken), statements, (question,))


SINGLE = Task(
    "single", "one fact, asked for", RULER, needs=("fact", "question"), deep=True, outline=_single
)
MULTI_KEY = Task(
    "multi-key",
    f"{KEYS} facts, one asked for",
    RULER,
    needs=("fact", "question"),
    deep=True,
    outline=_multi_key,
)
MULTI_VALUE = Task(
    "multi-value",
    f"{VALUES} values of one key, all asked for",
    RULER,
    needs=("item", "items"),
    deep=True,
    outline=_multi_value,
)
MULTI_QUERY = Task(
    "multi-query",
    f"{KEYS} facts, {QUERIES} asked for",
    RULER,
    needs=("fact", "question"),
    deep=True,
    outline=_multi_query,
)
