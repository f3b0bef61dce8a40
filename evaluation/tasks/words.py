"""Aggregation: a long list of words, of which the most common are asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..prompts import Outline
from .needles import RULER
from .task import Draw, Task

_A_LINE = 10
# How much more often a common word occurs than any other.
COMMON_RATIO = 10
# Frequencies fall as rank ** -ZETA.
ZETA = 2.0


@dataclass(frozen=True)
class CommonStretch:
    """Half of the words are the common ones, all equally often; units are words."""

    common: tuple[str, ...]
    others: tuple[str, ...]
    seed: int

    def take(self, amount: int) -> str:
        each = max(1, amount // (2 * len(self.common)))
        counts = dict.fromkeys(self.common, each if amount else 0)
        rest = max(0, amount - each * len(self.common))
        most = max(1, each // COMMON_RATIO)
        for word in self.others:
            taken = min(most, rest)
            if taken:
                counts[word] = taken
            rest -= taken
        return _shuffled(counts, self.seed)

    def places(self, text: str) -> list[int]:
        return [0]


@dataclass(frozen=True)
class FrequentStretch:
    """Frequencies after a zeta distribution, each rank's higher than the next; units are words."""

    ranked: tuple[str, ...]
    seed: int

    def take(self, amount: int) -> str:
        weights = [(rank + 1) ** -ZETA for rank in range(len(self.ranked))]
        shares = [int(amount * weight / sum(weights)) for weight in weights]
        if amount:
            shares[0] += amount - sum(shares)
        return _shuffled(dict(zip(self.ranked, shares, strict=True)), self.seed)

    def places(self, text: str) -> list[int]:
        return [0]


def _shuffled(counts: dict[str, int], seed: int) -> str:
    words = [word for word, count in counts.items() for _ in range(count)]
    random.Random(seed).shuffle(words)
    lines = [" ".join(words[i : i + _A_LINE]) for i in range(0, len(words), _A_LINE)]
    return "".join(f"{line}\n" for line in lines)


def _common(draw: Draw) -> Outline:
    count = draw.wording.listed
    common = tuple(draw.names.name() for _ in range(count))
    # As many others as fill the second half, each at most once for ten of a common one.
    others = tuple(draw.names.name() for _ in range(2 * COMMON_RATIO * count))
    stretch = CommonStretch(common, others, draw.rng.getrandbits(64))
    question = draw.ask(draw.wording.common.format(count=count), common)
    # Every common word twice at least, where the others occur once.
    return Outline(stretch, (), (question,), draw.wording.words, least=4 * count)


def _frequent(draw: Draw) -> Outline:
    count = draw.wording.listed
    ranked = tuple(draw.names.name() for _ in range(8 * count))
    stretch = FrequentStretch(ranked, draw.rng.getrandbits(64))
    question = draw.ask(draw.wording.frequent.format(count=count), ranked[:count])
    total = sum((rank + 1) ** -ZETA for rank in range(len(ranked)))
    # The last word that is asked for is more frequent by one at least than the first that is not.
    step = (count**-ZETA - (count + 1) ** -ZETA) / total
    return Outline(stretch, (), (question,), draw.wording.words, least=1 + int(1 / step))


COMMON_WORDS = Task(
    "common-words",
    "a list with a few words that are common",
    RULER,
    needs=("words", "common"),
    deep=False,
    outline=_common,
)
FREQUENT_WORDS = Task(
    "frequent-words",
    "a list whose words are distributed as rank^-2",
    RULER,
    needs=("words", "frequent"),
    deep=False,
    outline=_frequent,
)
