"""How the tasks put what they state and what they ask: templates, names and values, in profiles."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from ..models.networks.recall import KEY_LETTERS, VALUE_DIGITS
from .filler import Filler

_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwxz", "aeiou"
_REDRAWN = 1000


@dataclass(frozen=True)
class Wording:
    """The lines of every task in one manner of speaking; an empty template: it has no such task.

    A statement is whole lines. A question is an unfinished line that the answer completes.

    Attributes:
        name: of the profile.
        fact, question: `{key}` has `{value}`; its value is asked for.
        note: a fact in passing, asked for like a fact (topic shift).
        item, items: one of the `{value}`s of `{key}`; all of them are asked for.
        many: the question for the values of all of `{keys}` at once; if empty, one after another.
        let, same, trace: `{key}` is `{value}`; `{key}` is `{other}`; the last `{key}` is followed
            back to the value, or, where the template has a `{value}`, its names are asked for.
        rule, obey, obeyed: from here on every answer starts with `{word}`; a question under that
            rule; its answer.
        pair, recall: a bare association and its question (MQAR); `pairs`: how many, 0 as many as
            fit.
        words, common, frequent: the line that opens a list of words; the `{count}` most common.
        listed: words that are asked for.
        joiner: between the parts of an answer; `chain`: between the links of a traced chain.
        before, end: what an answer begins and ends with; writing stops at a newline if `end` has
            one.
        patience, spare: an answer of n tokens is given n * patience + spare.
        name_of, value_of: draw a name and a value.
    """

    name: str
    name_of: Callable[[random.Random], str]
    value_of: Callable[[random.Random], str]
    fact: str = ""
    question: str = ""
    note: str = ""
    item: str = ""
    items: str = ""
    many: str = ""
    let: str = ""
    same: str = ""
    trace: str = ""
    rule: str = ""
    obey: str = ""
    obeyed: str = ""
    pair: str = ""
    recall: str = ""
    pairs: int = 0
    words: str = ""
    common: str = ""
    frequent: str = ""
    listed: int = 0
    joiner: str = " "
    chain: str = " "
    before: str = ""
    end: str = "\n"
    patience: float = 1.0
    spare: int = 0

    def names(self, rng: random.Random, filler: Filler) -> Names:
        """A source of names and values for one prompt."""
        return Names(self, rng, filler)

    def lacks(self, *templates: str) -> list[str]:
        """Which of the templates this profile leaves empty."""
        return [name for name in templates if not getattr(self, name)]


class Names:
    """Names and values of one prompt: no two alike, and no name that the filler holds.

    Raises:
        ValueError: no free one is found; the profile has too few for the task.
    """

    def __init__(self, wording: Wording, rng: random.Random, filler: Filler) -> None:
        self._wording, self._rng, self._filler = wording, rng, filler
        self._taken: set[str] = set()

    def name(self) -> str:
        return self._draw(self._wording.name_of, self._filler.holds)

    def value(self) -> str:
        return self._draw(self._wording.value_of, lambda value: False)

    @property
    def taken(self) -> tuple[str, ...]:
        """The words of all names and values drawn so far."""
        return tuple(sorted(self._taken))

    def _draw(self, draw: Callable[[random.Random], str], refused: Callable[[str], bool]) -> str:
        for _ in range(_REDRAWN):
            drawn = draw(self._rng)
            parts = drawn.split()
            if len({*parts}) == len(parts) and not self._taken & {*parts} and not refused(drawn):
                self._taken |= {*parts}
                return drawn
        raise ValueError(
            f"wording {self._wording.name!r} has no free name or value after {len(self._taken)} of "
            "them in one prompt; the vocabulary, or the filler, leaves too few for this task"
        )


def pronounceable(rng: random.Random) -> str:
    """A made-up word, consonants and vowels in turn."""
    return "".join(rng.choice((_CONSONANTS, _VOWELS)[i % 2]) for i in range(KEY_LETTERS))


def digits(count: int) -> Callable[[random.Random], str]:
    """Draws numbers of `count` digits, as text."""
    return lambda rng: "".join(rng.choice("0123456789") for _ in range(count))


# The lines that the shipped byte-level checkpoints are trained on; they know no lists of words.
BYTES = Wording(
    "bytes",
    pronounceable,
    digits(VALUE_DIGITS),
    fact="# fact: {key} = {value}\n",
    question="# recall: {key} = ",
    note="# note: {key} = {value}\n",
    item="# item: {key} = {value}\n",
    items="# items: {key} = ",
    let="# let: {key} = {value}\n",
    same="# let: {key} = {other}\n",
    trace="# trace: {key} = ",
    rule="# rule: {word}\n",
    obey="# obey: {key} = ",
    obeyed="{word} {value}",
    pair="{key} = {value}\n",
    recall="{key} = ",
    chain=" = ",
)

# For models of language, tuned to instructions or not: the question begins its own answer.
NATURAL = Wording(
    "natural",
    pronounceable,
    digits(7),
    fact="The secret number of {key} is {value}.\n",
    question="\nWhat is the secret number of {key}? The secret number of {key} is",
    note="By the way, the secret number of {key} is {value}.\n",
    item="One of the lucky numbers of {key} is {value}.\n",
    items="\nWhat are all the lucky numbers of {key}? The lucky numbers of {key} are",
    many="\nWhat are the secret numbers of {keys}? In this order, the secret numbers are",
    let="VARIABLE {key} = {value}\n",
    same="VARIABLE {key} = VARIABLE {other}\n",
    trace="\nWhich variables have the value {value}? The variables with the value {value} are",
    rule="From here on, every answer must begin with the word {word}.\n",
    obey="\nWhat is the secret number of {key}? Remember how every answer must begin. Answer:",
    obeyed="{word} {value}",
    pair="{key} is paired with {value}.\n",
    recall="\nWhat is {key} paired with? {key} is paired with",
    words="\nHere is a list of words.\n",
    common="\nWhich {count} words are the most common in the list? They are",
    frequent="\nWhich {count} words are the most frequent in the list? They are",
    listed=5,
    joiner=", ",
    chain=", ",
    before=" ",
    end=".\n",
    patience=1.5,
    spare=16,
)


def numbers(vocabulary: int, reserved: tuple[int, ...] = (), steps: int = 3) -> Wording:
    """Token ids for a model without a tokenizer: a name is one id, a value `steps` ids in a row.

    No id of a statement occurs in it twice, in another statement, or in the filler.
    """
    free = [token for token in range(vocabulary) if token not in reserved]
    # Names and values may use half of the ids, the other half is left for filler.
    at_most = len(free) // (2 * (1 + steps))
    return Wording(
        "ids",
        lambda rng: str(rng.choice(free)),
        lambda rng: " ".join(str(rng.choice(free)) for _ in range(steps)),
        fact="{key} {value} ",
        question="{key} ",
        pair="{key} {value} ",
        recall="{key} ",
        pairs=max(1, min(16, at_most)),
        end="",
    )


PROFILES = {wording.name: wording for wording in (NATURAL, BYTES)}


def templates(wording: Wording) -> dict[str, str | int | float]:
    """What the profile's prompts depend on, for a run's record of itself."""
    kept = replace(wording, name_of=str, value_of=str)
    return {f.name: v for f in fields(kept) if not callable(v := getattr(kept, f.name))}
