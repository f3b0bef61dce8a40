"""Checks a call before anything changes: the same rules for every engine that takes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """What the calls of one engine have to keep to.

    Attributes:
        vocabulary: tokens are 0 .. vocabulary - 1.
        ragged: whether rows may stand at different positions.
        limit: most tokens a row can hold, or None.
        limited_by: what sets the limit, for the message.
    """

    vocabulary: int
    ragged: bool
    limit: int | None
    limited_by: str

    def admit(
        self, tokens: Tensor, lengths: Sequence[int] | Tensor | None, held: Sequence[int]
    ) -> list[int]:
        """Valid tokens a row of ``tokens[B, n]``.

        Args:
            lengths: of the call; None: all of them.
            held: tokens that each row holds; empty before the first call.

        Raises:
            ValueError: what is wrong with the call.
        """
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype != torch.int64:
            got = (tokens.dtype, tuple(tokens.shape)) if isinstance(tokens, Tensor) else tokens
            raise ValueError(f"expected tokens[B, n] as an int64 tensor, got {got!r:.80}")
        batch, n = tokens.shape
        if n < 1 or batch < 1:
            raise ValueError(f"tokens[{batch}, {n}] holds no token; give at least one a row")
        if held and batch != len(held):
            raise ValueError(
                f"this engine remembers {len(held)} rows, got {batch}; call reset() first, "
                "or make a second engine"
            )
        # On another device the check would make every step wait for it.
        if tokens.device.type == "cpu":
            low, high = (int(t) for t in tokens.aminmax())
            if low < 0 or high >= self.vocabulary:
                raise ValueError(
                    f"token {low if low < 0 else high} is not in the vocabulary of "
                    f"{self.vocabulary}; are the tokens meant for another model?"
                )
        if isinstance(lengths, Tensor):
            lengths = lengths.tolist()
        counts = [n] * batch if lengths is None else [int(c) for c in lengths]
        if len(counts) != batch or any(not 0 <= c <= n for c in counts) or not any(counts):
            raise ValueError(f"lengths {counts} for tokens[{batch}, {n}]: give one of 0..{n} a row")
        if not self.ragged and len(set(counts)) > 1:
            raise ValueError(
                f"lengths {counts} differ, but this model counts positions by itself, so the rows "
                "of a batch share one position: give rows of one length, or a model that takes "
                "position_ids"
            )
        longest = max(h + c for h, c in zip(held or [0] * batch, counts, strict=True))
        if self.limit is not None and longest > self.limit:
            raise ValueError(
                f"{longest} tokens exceed the context of {self.limit} ({self.limited_by}); "
                "reset or rewind the engine, or, if max_context is the limit, compile with more"
            )
        return counts
