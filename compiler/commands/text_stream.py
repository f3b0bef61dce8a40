"""Tokens to text as they come: whole characters, and nothing that may belong to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Tokens of the prompt that are decoded before the first new one: whether that begins with a space
# is told by what stands before it. More than a character has bytes.
_BEFORE = 16


class TextStream:
    """The text of one sequence.

    Args:
        step: the text that a further token completes, or None.
        stop: texts at which the sequence ends; they are not part of it.

    Attributes:
        stopped: whether one of them was met.
    """

    def __init__(self, step: Callable[[int], str | None], stop: Sequence[str] = ()) -> None:
        self._step, self._stop = step, stop
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """What can be shown of the text now that `token` is in it."""
        self._held += self._step(token) or ""
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        longest = max((len(text) for text in self._stop), default=1) - 1
        # The longest end of the text that a stop string begins with.
        held = next(
            (
                n
                for n in range(min(longest, len(self._held)), 0, -1)
                if any(text.startswith(self._held[-n:]) for text in self._stop)
            ),
            0,
        )
        at = len(self._held) - held
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def rest(self) -> str:
        """What was held back, once no token follows. Bytes that are no whole character are not
        text, and are left out."""
        rest, self._held = self._held, ""
        return rest


def continue_text(tokenizer: Any, prompt: Sequence[int]) -> Callable[[int], str | None]:
    """A `TextStream`'s step: the text of what follows `prompt`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(ids=[*prompt[-_BEFORE:]], skip_special_tokens=True)

    def step(token: int) -> str | None:
        text: str | None = stream.step(tokenizer, token)
        return text

    return step
