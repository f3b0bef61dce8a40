"""Hierarchical: one softmax over several resolutions, from single tokens to groups of pages.

Every token is read once: exactly, or in the summary (mean key, log count, mean value) of its page,
of a group of pages, or of a group of groups. A centroid with the bias log(count) is what
H-Transformer-1D (2107.11906) reads for a block, in one softmax instead of one a level; going down
from the best groups to the best pages is the tree search of HiP (2406.09827).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .dense import Dense
from .names import flag, whole
from .parts import SUMMARY_FIELDS, fields_for
from .policy import Policy
from .scout import page_score
from .spec import Evict, Index, Memory, Pages, Read, Score, Select, Sinks, Window


@dataclass(frozen=True)
class Hierarchical(Policy):
    """Preset `hierarchical`: sinks and window exactly, the rest in summaries, the best refined.

    Attributes:
        refine: tokens that are read exactly because their pages scored best; 0 reads summaries.
        levels: tokens that a summary stands for, level by level; the first is the page size.
        sinks, window: tokens at the start and before the query that are always read exactly. What
            stands near them is read a level finer than the rest.
        keep: keep exact keys and values of every page; False frees those that are only read as
            summaries (refine=0).
        dense_layers: the first layers stay dense.
        score: mean, mean-std, box or ball; how a summary is ranked for refinement.
    """

    preset: ClassVar[str] = "hierarchical"
    refine: int = 1024
    levels: tuple[int, ...] = (64, 512, 4096)
    sinks: int = 64
    window: int = 256
    keep: bool = True
    dense_layers: int = 2
    score: str = "mean-std"

    def __post_init__(self) -> None:
        if isinstance(self.levels, list):  # as JSON and command lines have it
            object.__setattr__(self, "levels", tuple(self.levels))
        for name in ("refine", "sinks", "window", "dense_layers"):
            whole(name, getattr(self, name), 0)
        flag("keep", self.keep)
        if not self.levels:
            raise ValueError("levels must name at least the page size, got (); (64,) is one level")
        if not self.keep and self.refine:
            raise ValueError(
                f"keep=False frees the pages that refine={self.refine} reads exactly; "
                "give refine=0, or keep=True"
            )
        self.memory(self.dense_layers, 0)

    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the site at `layer` whose own sliding window is `window` (0 = none)."""
        size = self.levels[0]
        if layer < self.dense_layers or window:
            return Dense(size).memory(layer, window)
        fields = fields_for(self.score, compensate=True) if self.refine else SUMMARY_FIELDS
        held = -(-self.sinks // size) + -(-self.window // size) + 1
        return Memory(
            name="hierarchical",
            pages=Pages(size),
            sinks=Sinks(self.sinks) if self.sinks else None,
            window=Window(self.window) if self.window else None,
            index=Index(fields, self.levels),
            score=Score(self.score) if self.refine else None,
            select=(
                Select("top-k", held * size + self.refine) if self.refine else Select("held", None)
            ),
            read=Read(compensate=True),
            evict=None if self.keep else Evict("oldest"),
        )


def reference(query: Tensor, key: Tensor, value: Tensor, memory: Memory, scale: float) -> Tensor:
    """One decoded token through the levels, in float32 and without pages, tables or pools.

    A group's spread is taken from its tokens; what a step stores of it is rounded level by level.

    Args:
        query: [H, Dk], standing at the last of m tokens.
        key, value: [Hkv, m, Dk], [Hkv, m, Dv].

    Returns:
        [H, Dv] float32.
    """
    heads, group = [], query.shape[0] // key.shape[0]
    last = key.shape[1] - 1
    for queries, keys, values in zip(
        query.float().split(group), key.float(), value.float(), strict=True
    ):
        triples = []  # (keys, bias, values) of what is read
        spans = [(at, at + memory.levels[-1]) for at in range(0, last + 1, memory.levels[-1])]
        for number in reversed(range(len(memory.levels))):
            level = memory.level(number)
            standing = last // level.size
            scores = {}
            for start, stop in spans:
                at = start // level.size
                if at < level.sinks or at >= standing - level.window:
                    scores[start, stop] = float("inf")
                elif memory.score is not None:
                    inside = keys[start:stop]
                    scores[start, stop] = float(
                        page_score(queries, inside, memory.score.kind).max()
                    )
            ranked = sorted(scores, key=lambda span: (-scores[span], span[0]))
            opened = sorted(ranked[: level.budget])
            for start, stop in spans:
                if (start, stop) not in opened:
                    mean = keys[start:stop].mean(0, keepdim=True)
                    count = torch.tensor([float(stop - start)])
                    triples.append((mean, count.log(), values[start:stop].mean(0, keepdim=True)))
            finer = memory.levels[number - 1] if number else 1
            spans = [
                (at, at + finer)
                for start, stop in opened
                for at in range(start, min(stop, last + 1), finer)
            ]
        triples += [(keys[a:b], torch.zeros(b - a), values[a:b]) for a, b in spans]
        k, bias, v = (torch.cat(parts) for parts in zip(*triples, strict=True))
        heads.append((scale * queries @ k.T + bias).softmax(-1) @ v)
    return torch.cat(heads)
