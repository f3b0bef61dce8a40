"""What lies between the statements of a prompt: the user's text, or one that is made up."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

# A place to put a statement: after a line, and inside a long line after a sentence.
_BREAK = re.compile(r"\n+|(?<=[.!?]) (?=[A-Z])")


class Stretch(Protocol):
    """A text that can be taken in any amount."""

    def take(self, amount: int) -> str:
        """`amount` units (letters, words, numbers) of it; a larger amount is no shorter text."""
        ...

    def places(self, text: str) -> list[int]:
        """Where in `text`, which `take` gave, a statement may stand: offsets, ascending."""
        ...


class Filler(Protocol):
    """A source of stretches."""

    def holds(self, word: str) -> bool:
        """Whether `word` may occur in a stretch, so that it cannot be the name of a needle."""
        ...

    def open(self, rng: random.Random, avoid: Sequence[str]) -> Stretch:
        """A stretch from a place that `rng` draws; numbers in `avoid` do not occur in it."""
        ...


@dataclass(frozen=True)
class TextFiller:
    """Stretches of a text from a random line on; a text that ends too soon starts again.

    Raises:
        ValueError: there is nothing but white space in the text.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("the filler text is empty; give files that hold text")

    @cached_property
    def starts(self) -> list[int]:
        return _places(self.text)

    def holds(self, word: str) -> bool:
        return word in self.text

    def open(self, rng: random.Random, avoid: Sequence[str]) -> Stretch:
        return TextStretch(self.text, rng.choice(self.starts))


@dataclass(frozen=True)
class TextStretch:
    """A text from the offset `first` on; units are letters, the last one is a newline."""

    text: str
    first: int

    def take(self, amount: int) -> str:
        if amount < 1:
            return ""
        end = self.first + amount - 1
        rounds = -(-end // len(self.text))
        return (self.text * rounds)[self.first : end] + "\n"

    def places(self, text: str) -> list[int]:
        return _places(text) if text else [0]


def _places(text: str) -> list[int]:
    return sorted({0, *(match.end() for match in _BREAK.finditer(text))} - {len(text)}) or [0]


@dataclass(frozen=True)
class NumberFiller:
    """Stretches of random token ids, for models without a tokenizer.

    Args:
        vocabulary: ids are drawn from 0 .. vocabulary - 1.
        reserved: ids that are never drawn (a BOS).
    """

    vocabulary: int
    reserved: tuple[int, ...] = ()

    def holds(self, word: str) -> bool:
        return int(word) in self.reserved

    def open(self, rng: random.Random, avoid: Sequence[str]) -> Stretch:
        banned = {int(number) for number in avoid} | {*self.reserved}
        free = [number for number in range(self.vocabulary) if number not in banned]
        if not free:
            raise ValueError(
                f"the statements use up all {self.vocabulary} tokens, none is left for filler; "
                "the vocabulary is too small for this task"
            )
        return NumberStretch(free, rng.getrandbits(64))


@dataclass(frozen=True)
class NumberStretch:
    """Random ones of the numbers `free`; units are numbers."""

    free: list[int]
    seed: int

    def take(self, amount: int) -> str:
        drawn = random.Random(self.seed).choices(self.free, k=amount)
        return "".join(f"{number} " for number in drawn)

    def places(self, text: str) -> list[int]:
        return [0, *(i + 1 for i, letter in enumerate(text) if letter == " ")]


@dataclass(frozen=True)
class ProseFiller:
    """Made-up sentences in English, for models of language when no text is given."""

    def holds(self, word: str) -> bool:
        return any(word in known for known in (*_WHO, *_DOES, *_WHAT, *_WHERE))

    def open(self, rng: random.Random, avoid: Sequence[str]) -> Stretch:
        return ProseStretch(rng.getrandbits(64))


@dataclass(frozen=True)
class ProseStretch:
    """Random sentences; units are letters, the last one is a newline."""

    seed: int

    def take(self, amount: int) -> str:
        if amount < 1:
            return ""
        rng, lines, size = random.Random(self.seed), [], 0
        while size < amount:
            words = (rng.choice(part) for part in (_WHO, _DOES, _WHAT, _WHERE))
            line = " ".join(words) + ".\n"
            lines.append(line[0].upper() + line[1:])
            size += len(line)
        return "".join(lines)[: amount - 1] + "\n"

    def places(self, text: str) -> list[int]:
        return _places(text) if text else [0]


_WHO = tuple(
    f"{which} {who}"
    for which in ("the old", "a young", "the quiet", "some other", "her", "the tall")
    for who in ("gardener", "captain", "teacher", "neighbour", "clerk", "sailor", "cousin", "judge")
)
_DOES = ("carried", "painted", "forgot", "measured", "sold", "repaired", "counted", "described")
_WHAT = (
    "a basket of apples",
    "the broken clock",
    "three letters",
    "an empty boat",
    "the wooden door",
    "a heavy coat",
    "the last of the bread",
    "a map of the coast",
)
_WHERE = (
    "before the rain came",
    "at the edge of the village",
    "without saying a word",
    "on the way to the station",
    "while the others were asleep",
    "behind the white house",
    "early in the morning",
    "as it was agreed",
)
