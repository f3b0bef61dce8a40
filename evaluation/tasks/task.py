"""What a task is, and what it draws its prompts from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..filler import Filler
from ..prompts import Outline, Question
from ..wordings import Names, Wording


@dataclass(frozen=True)
class Draw:
    """One prompt's random numbers, filler, wording, names, and the depth that was asked for."""

    rng: random.Random
    filler: Filler
    wording: Wording
    names: Names
    depth: float

    def ask(self, text: str, answers: Sequence[str], joiner: str | None = None) -> Question:
        """A question whose right answer is the `answers` with the wording's joiner between."""
        wording = self.wording
        joiner = wording.joiner if joiner is None else joiner
        written = wording.before + joiner.join(answers) + wording.end
        return Question(text, tuple(answers), written)


@dataclass(frozen=True)
class Task:
    """A kind of prompt.

    Attributes:
        name: what the user calls it.
        what: one line about it.
        source: where it comes from.
        needs: templates that a wording must have for it.
        deep: whether a depth can be asked for.
        outline: draws a prompt.
    """

    name: str
    what: str
    source: str
    needs: tuple[str, ...]
    deep: bool
    outline: Callable[[Draw], Outline]
