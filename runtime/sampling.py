"""Which token follows: penalty, temperature, cut-offs, and draws from generators of one's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

_SEEDS = 2**63


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Applied in this order, each as transformers does: repetition penalty, temperature, top-k,
    top-p, min-p.

    Attributes:
        temperature: what the logits are divided by; 0 takes the largest, first of equals.
        top_k: only the k largest logits (and ties with the last of them) are drawn from.
        top_p: only the fewest tokens whose probabilities sum to at least this are.
        min_p: only tokens at least this times as probable as the most probable are.
        repetition_penalty: logits of tokens that the row has seen are divided by this, or
            multiplied if negative; 1 changes nothing.
        seed: what the draws come from, 0 .. 2**63 - 1; None: another one each time.

    Raises:
        ValueError: a value out of its range, or a cut-off without a temperature to draw at.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._number("temperature", 0.0, math.inf, "a finite number; 0 is greedy")
        self._whole("top_k", 1, None, "a whole number of at least 1")
        self._number("top_p", 0.0, 1.0, "a number above 0, at most 1", above=True)
        self._number("min_p", 0.0, 1.0, "a number of 0 .. 1")
        self._number("repetition_penalty", 0.0, math.inf, "a finite number above 0", above=True)
        self._whole("seed", 0, _SEEDS - 1, "a whole number of 0 .. 2**63 - 1")
        cuts = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and cuts:
            raise ValueError(
                f"{' and '.join(cuts)} cut what is drawn from, but temperature 0 draws nothing: "
                "give a temperature above 0, 1 for the model's own probabilities"
            )

    @classmethod
    def of(cls, **options: Any) -> Sampling:
        """From keywords.

        Raises:
            ValueError: an unknown one, or a value as above.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"no sampling option {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**options)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def warp(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The float32 logits ``[B, V]`` to draw from; -inf where nothing may be drawn.

        Args:
            logits: ``[B, V]``.
            seen: bool ``[B, V]``, which tokens each row has seen; None: none.
        """
        scores = logits.float()
        if self.repetition_penalty != 1 and seen is not None:
            penalty = self.repetition_penalty
            penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(seen, penalised, scores)
        if self.greedy:
            return scores
        scores = scores / self.temperature
        if self.top_k is not None:
            last = scores.topk(min(self.top_k, scores.shape[-1]), -1).values[:, -1:]
            scores = scores.masked_fill(scores < last, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ascending, order = scores.sort(-1)
            cut = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            cut[:, -1] = False
            scores = scores.masked_fill(cut.scatter(1, order, cut), -math.inf)
        if self.min_p is not None:
            shares = scores.softmax(-1)
            least = self.min_p * shares.amax(-1, keepdim=True)
            scores = scores.masked_fill(shares < least, -math.inf)
        return scores

    def _number(
        self, name: str, low: float, high: float, expected: str, *, above: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None and name in ("top_p", "min_p"):
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (
            number
            and math.isfinite(value)
            and low <= value <= high
            and not (above and value == low)
        ):
            raise ValueError(f"{name} is {value!r}; give {expected}")

    def _whole(self, name: str, low: int, high: int | None, expected: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if type(value) is not int or value < low or (high is not None and value > high):
            raise ValueError(f"{name} is {value!r}; give {expected}")


class Sampler:
    """Chooses the tokens of a batch, step by step.

    Each row draws from a generator of its own, whose seed follows from the seed and the row's
    number alone: what a row draws does not depend on how many others there are, or on whether they
    have ended. torch's global generators are neither read nor moved.

    Args:
        batch, vocabulary: shape of the logits.
        device: where they are.
    """

    def __init__(
        self, sampling: Sampling, batch: int, vocabulary: int, device: torch.device | str
    ) -> None:
        self.sampling = sampling
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        self._generators: list[torch.Generator] = []
        if not sampling.greedy:
            base = torch.Generator()
            if sampling.seed is None:
                base.seed()
            else:
                base.manual_seed(sampling.seed)
            for _ in range(batch):
                seed = int(torch.randint(_SEEDS - 1, (), generator=base))
                self._generators.append(torch.Generator().manual_seed(seed))

    def see(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Count ``tokens[B, n]`` as seen, the first `lengths` of each row."""
        if self._seen is None:
            return
        for row, ids in enumerate(tokens.to(self._seen.device)):
            self._seen[row, ids if lengths is None else ids[: lengths[row]]] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """int64 ``[B]``: a token for each row of ``logits[B, V]``."""
        scores = self.sampling.warp(logits, self._seen)
        if self.sampling.greedy:
            return scores.argmax(-1)
        draws = [torch.rand((), generator=g, dtype=torch.float64) for g in self._generators]
        # The first token at which the sum of probabilities exceeds the draw: one of probability 0
        # adds nothing to the sum, so that it is never the first.
        sums = scores.double().softmax(-1).cumsum(-1)
        total = sums[:, -1:]
        point = torch.stack(draws).to(sums.device)[:, None] * total
        point = torch.minimum(point, total.nextafter(torch.zeros_like(total)))
        return torch.searchsorted(sums, point, right=True)[:, 0]
