"""Quest: pages are ranked by the box that holds their keys, the best are read (2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .dense import Dense
from .names import whole
from .parts import fields_for
from .policy import Policy
from .spec import Index, Memory, Pages, Score, Select


@dataclass(frozen=True)
class Quest(Policy):
    """Preset `quest`: the top pages by an upper bound of their logits; the others are left out.

    Attributes:
        budget: tokens a query reads, the open page included.
        page_size: tokens a page, 1 or a power of two from 8 to 1024.
        dense_layers: the first layers stay dense, as in the paper.
    """

    preset: ClassVar[str] = "quest"
    budget: int = 2048
    page_size: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        whole("dense_layers", self.dense_layers, 0)
        self.memory(self.dense_layers, 0)

    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the site at `layer` whose own sliding window is `window` (0 = none)."""
        if layer < self.dense_layers or window:
            return Dense(self.page_size).memory(layer, window)
        return Memory(
            name="quest",
            pages=Pages(self.page_size),
            index=Index(fields_for("box", compensate=False)),
            score=Score("box"),
            select=Select("top-k", self.budget),
        )
