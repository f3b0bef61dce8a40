"""Heavy hitters: the pages that got the most attention stay, the others go (H2O, 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .dense import Dense
from .names import whole
from .policy import Policy
from .spec import Account, Evict, Memory, Pages, Sinks, Window


@dataclass(frozen=True)
class HeavyHitter(Policy):
    """Preset `heavy-hitter`: each KV head keeps the pages with the largest attention mass.

    The mass that every query gives to a page is added up while the context is read. Before a read
    through the policy that would see more than the budget, the pages with the least are freed.

    Attributes:
        budget: tokens that a KV head keeps, sinks, window and open page included.
        page_size: tokens a page, 1 or a power of two from 8 to 1024.
        sinks, window: tokens at the start and before the query that are never freed.
        decay: factor that each further token applies to the mass so far; 1 keeps the plain sum.
        dense_layers: the first layers stay dense.
    """

    preset: ClassVar[str] = "heavy-hitter"
    budget: int = 2048
    page_size: int = 64
    sinks: int = 64
    window: int = 256
    decay: float = 1.0
    dense_layers: int = 2

    def __post_init__(self) -> None:
        for name in ("sinks", "window", "dense_layers"):
            whole(name, getattr(self, name), 0)
        self.memory(self.dense_layers, 0)

    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the site at `layer` whose own sliding window is `window` (0 = none)."""
        if layer < self.dense_layers or window:
            return Dense(self.page_size).memory(layer, window)
        return Memory(
            name="heavy-hitter",
            pages=Pages(self.page_size),
            sinks=Sinks(self.sinks) if self.sinks else None,
            window=Window(self.window) if self.window else None,
            account=Account("mass", self.decay),
            evict=Evict("lowest", tokens=self.budget),
        )


def reference(
    query: Tensor, key: Tensor, value: Tensor, memory: Memory, scale: float, dense: int
) -> Tensor:
    """Every token through the policy, one after another, in float32 and without pools.

    Args:
        query: [H, m, Dk]; key, value: [Hkv, m, Dk], [Hkv, m, Dv].
        dense: tokens at the start that were read densely, before anything was freed.

    Returns:
        [H, m, Dv] float32.
    """
    assert memory.account is not None
    group, m, size = query.shape[0] // key.shape[0], key.shape[1], memory.page_size
    pages = -(-m // size)
    outs = []
    for queries, keys, values in zip(query.float().split(group), key, value, strict=True):
        mass, held, rows = torch.zeros(pages), torch.zeros(pages, dtype=torch.bool), []
        page_of = torch.arange(m) // size
        for p in range(m):
            open_page = p // size
            held[open_page] = True
            if p >= dense:
                free = held.clone()
                free[: memory.sink_pages] = False
                free[max(0, open_page - memory.window_pages) :] = False
                while int(held.sum()) > memory.budget_pages:
                    gone = int(torch.where(free, mass, torch.inf).argmin())
                    held[gone] = free[gone] = False
            seen = held[page_of[: p + 1]].nonzero()[:, 0]
            weights = (scale * queries[:, p] @ keys[seen].float().T).softmax(-1)
            rows.append(weights @ values[seen].float())
            mass = memory.account.decay * mass
            mass.index_add_(0, page_of[seen], weights.sum(0))
        outs.append(torch.stack(rows, 1))
    return torch.cat(outs)
