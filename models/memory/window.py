"""The window: attention sinks and the most recent tokens; the rest is forgotten (2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .dense import Dense
from .names import whole
from .policy import Policy
from .spec import Evict, Memory, Pages, Select, Sinks, Window


@dataclass(frozen=True)
class Recent(Policy):
    """Preset `window`: sinks and a window, read exactly; their pages alone are kept.

    Tokens keep the positions they had. (StreamingLLM numbers them anew inside its cache, to run
    beyond the positions a model was trained on.)

    Attributes:
        window: tokens before the query that are read, rounded up to pages.
        sinks: tokens at the start that are read, rounded up to pages.
        page_size: tokens a page, 1 or a power of two from 8 to 1024.
        dense_layers: the first layers stay dense.
    """

    preset: ClassVar[str] = "window"
    window: int = 1024
    sinks: int = 64
    page_size: int = 64
    dense_layers: int = 0

    def __post_init__(self) -> None:
        whole("window", self.window, 1)
        for name in ("sinks", "dense_layers"):
            whole(name, getattr(self, name), 0)
        self.memory(self.dense_layers, 0)

    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the site at `layer` whose own sliding window is `window` (0 = none)."""
        if layer < self.dense_layers or window:
            return Dense(self.page_size).memory(layer, window)
        return Memory(
            name="window",
            pages=Pages(self.page_size),
            sinks=Sinks(self.sinks) if self.sinks else None,
            window=Window(self.window),
            select=Select("held", None),
            evict=Evict("oldest"),
        )


def reference(query: Tensor, key: Tensor, value: Tensor, memory: Memory, scale: float) -> Tensor:
    """One decoded token through the window, in float32 and without pages, tables or pools.

    Args:
        query: [H, Dk], standing at the last of m tokens.
        key, value: [Hkv, m, Dk], [Hkv, m, Dv].

    Returns:
        [H, Dv] float32.
    """
    group, m, size = query.shape[0] // key.shape[0], key.shape[1], memory.page_size
    page = torch.arange(m) // size
    kept = (page < memory.sink_pages) | (page >= (m - 1) // size - memory.window_pages)
    keys, values = (x[:, kept].float().repeat_interleave(group, 0) for x in (key, value))
    weights = (scale * query.float()[:, None] @ keys.transpose(-1, -2)).softmax(-1)
    return (weights @ values)[:, 0]
