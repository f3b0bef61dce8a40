"""The scout: a query scores every page's record, then reads exactly only the pages that win."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .dense import Dense
from .names import whole
from .parts import fields_for
from .policy import Policy
from .spec import Index, Memory, Pages, Read, Score, Select, Sinks, Window


@dataclass(frozen=True)
class Scout(Policy):
    """Preset `scout`: sinks, window and open page always, the other pages by their score.

    Attributes:
        budget: tokens a query reads, sinks, window and open page included; None reads everything.
        page_size: tokens a page, 1 or a power of two from 8 to 1024.
        sinks, window: tokens at the start and before the query that are always read.
        dense_layers: the first layers stay dense (their attention is the least concentrated).
        score: mean, mean-std, box or ball.
        compensate: skipped pages enter the softmax as one key, their mean, with bias log(count).
        min_context: below this many tokens the memory is dense; None means the budget.
    """

    preset: ClassVar[str] = "scout"
    budget: int | None = 2048
    page_size: int = 64
    sinks: int = 64
    window: int = 256
    dense_layers: int = 2
    score: str = "mean-std"
    compensate: bool = True
    min_context: int | None = None

    def __post_init__(self) -> None:
        for name in ("sinks", "window", "dense_layers"):
            whole(name, getattr(self, name), 0)
        fields_for(self.score, self.compensate)
        Read(self.compensate)
        if self.budget is None and self.min_context is not None:
            raise ValueError(
                f"min_context needs a budget: with budget=None every page is read at any length, "
                f"got min_context={self.min_context!r}; give a budget or leave min_context out"
            )
        self.memory(self.dense_layers, 0)

    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the site at `layer` whose own sliding window is `window` (0 = none)."""
        if layer < self.dense_layers or window:
            return Dense(self.page_size).memory(layer, window)
        if self.budget is None:
            return Memory("scout", Pages(self.page_size))
        return Memory(
            name="scout",
            pages=Pages(self.page_size),
            sinks=Sinks(self.sinks) if self.sinks else None,
            window=Window(self.window) if self.window else None,
            index=Index(fields_for(self.score, self.compensate)),
            score=Score(self.score),
            select=Select("top-k", self.budget),
            read=Read(self.compensate),
            min_context=self.min_context,
        )


def reference(query: Tensor, key: Tensor, value: Tensor, memory: Memory, scale: float) -> Tensor:
    """One decoded token through the scout, in float32 and without pages, tables or pools.

    Args:
        query: [H, Dk], standing at the last of m tokens.
        key, value: [Hkv, m, Dk], [Hkv, m, Dv].
        memory: a scout's memory (`memory.selects`).

    Returns:
        [H, Dv] float32.
    """
    assert memory.score is not None
    heads = []
    group, tokens, size = query.shape[0] // key.shape[0], key.shape[1], memory.page_size
    for queries, keys, values in zip(
        query.float().split(group), key.float(), value.float(), strict=True
    ):
        pages = list(zip(keys.split(size), values.split(size), strict=True))
        last = len(pages) - 1
        scores = [float(page_score(queries, k, memory.score.kind).max()) for k, _ in pages]
        kept = {p for p in range(last + 1) if p < memory.sink_pages}
        kept |= {p for p in range(last + 1) if p >= last - memory.window_pages}
        rest = sorted({*range(last)} - kept, key=lambda p: (-scores[p], p))
        kept |= {*rest[: max(0, memory.budget_pages - len(kept))]}
        if tokens - 1 < memory.dense_below:
            kept = {*range(last + 1)}
        summaries = [
            (k.mean(0, keepdim=True), v.mean(0, keepdim=True), torch.tensor([float(len(k))]).log())
            for page, (k, v) in enumerate(pages)
            if memory.compensate and page not in kept
        ]
        exact = [(*pages[page], torch.zeros(len(pages[page][0]))) for page in sorted(kept)]
        k, v, bias = (torch.cat(parts) for parts in zip(*exact, *summaries, strict=True))
        heads.append((scale * queries @ k.T + bias).softmax(-1) @ v)
    return torch.cat(heads)


def page_score(queries: Tensor, keys: Tensor, score: str) -> Tensor:
    """The score [G] each of `queries` [G, Dk] gives the page that holds `keys` [c, Dk]."""
    mean = keys.mean(0)
    if score == "mean":
        return queries @ mean
    if score == "mean-std":
        return queries @ mean + queries.abs() @ keys.std(0, correction=0)
    if score == "box":
        return torch.maximum(queries * keys.amin(0), queries * keys.amax(0)).sum(-1)
    ball: Tensor = queries @ mean + queries.norm(dim=-1) * (keys - mean).norm(dim=-1).max()
    return ball
