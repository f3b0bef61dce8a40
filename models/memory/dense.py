"""The dense memory: every key and value of the past, in pages, read exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .policy import Policy
from .spec import Memory, Pages


@dataclass(frozen=True)
class Dense(Policy):
    """Preset `dense`: nothing is skipped; pages of `page_size` tokens only change the layout."""

    preset: ClassVar[str] = "dense"
    page_size: int = 64

    def __post_init__(self) -> None:
        self.memory(0, 0)

    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the site at `layer` whose own sliding window is `window` (0 = none)."""
        return Memory("dense", Pages(self.page_size))


def reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float = 0, window: int = 0
) -> Tensor:
    """Causal attention in float32, in one piece: what any paged read of everything must equal.

    Args:
        query: [H, n, Dk], the last n of m tokens.
        key, value: [Hkv, m, Dk], [Hkv, m, Dv]; query head h reads KV head h // (H // Hkv).
        window: keys at a distance of `window` or more are not read; 0 reads all.

    Returns:
        [H, n, Dv] float32.
    """
    group, (n, m) = query.shape[0] // key.shape[0], (query.shape[1], key.shape[1])
    keys, values = (x.float().repeat_interleave(group, 0) for x in (key, value))
    logits = scale * query.float() @ keys.transpose(-1, -2)  # [H, n, Dk] @ [H, Dk, m]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
    hidden = (distance < 0) | ((distance >= window) if window else False)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1) @ values
