"""What the evaluation needs of a tokenizer, and one for models that have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        start: tokens that open every sequence (a BOS), not part of any text.
    """

    @property
    def start(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class NumberTokenizer:
    """Texts that are token ids in decimal, each followed by a space: for models without text.

    Args:
        vocabulary: ids are 0 .. vocabulary - 1.
        start: ids that open every sequence.

    Raises:
        ValueError: an id in `start` outside of the vocabulary.
    """

    def __init__(self, vocabulary: int, start: Sequence[int] = ()) -> None:
        wrong = [token for token in start if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(f"token {wrong[0]} is not in the vocabulary of {vocabulary}")
        self.vocabulary, self.start = vocabulary, [*start]

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f"{token} " for token in tokens)


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens `a` and `b` have in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
