"""Multi-query associative recall: bare pairs, several of which are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..prompts import Outline, Statement
from .task import Draw, Task

QUERIES = 8


@dataclass(frozen=True)
class PairStretch:
    """Pairs that nobody asks for, one a line, drawn when they are needed; units are pairs."""

    draw: Callable[[], str]
    lines: list[str] = field(default_factory=list)

    def take(self, amount: int) -> str:
        while len(self.lines) < amount:
            self.lines.append(self.draw())
        return "".join(self.lines[:amount])

    def places(self, text: str) -> list[int]:
        return [0, *(i + 1 for i, letter in enumerate(text) if letter == "\n")]


def _mqar(draw: Draw) -> Outline:
    """Pairs and nothing else; where a wording's names are few, so many pairs among filler."""
    wording, names = draw.wording, draw.names

    def line(key: str, value: str) -> str:
        return wording.pair.format(key=key, value=value)

    pairs = [(names.name(), names.value()) for _ in range(wording.pairs or QUERIES)]
    statements = tuple(Statement(line(*pair), draw.rng.random()) for pair in pairs)
    questions = tuple(
        draw.ask(wording.recall.format(key=key), [value]) for key, value in pairs[:QUERIES]
    )
    if wording.pairs:
        return Outline(draw.filler.open(draw.rng, names.taken), statements, questions)
    # Keys differ in all of a prompt; two that nobody asks for may have one value.
    others = PairStretch(lambda: line(names.name(), wording.value_of(draw.rng)))
    return Outline(others, statements, questions)


MQAR = Task(
    "mqar",
    f"bare pairs, {QUERIES} asked for",
    "Zoology, Arora et al. 2023",
    needs=("pair", "recall"),
    deep=False,
    outline=_mqar,
)
