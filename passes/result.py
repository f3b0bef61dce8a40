"""What a pass returns: the graph, how often it applied, and what it declined and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Declined:
    """A place that was looked at and left alone.

    Attributes:
        reason: what stood in the way, in words a user can act on.
        node: the graph node (its printed form) that stopped the rule.
        rule: the rule that came nearest to applying.
        source: the user's own line that made the node, or "" if the graph does not carry one.
    """

    reason: str
    node: str
    rule: str
    source: str = ""

    def __str__(self) -> str:
        where = f"\n    at {self.source}" if self.source else ""
        return f"{self.rule}: {self.reason} [node {self.node}]{where}"

    def to_json(self) -> dict[str, str]:
        return {
            "reason": self.reason,
            "node": self.node,
            "rule": self.rule,
            "source": self.source,
        }


class NotRewritten(ValueError):
    """Raised when nothing, or not everything that was asked for, could be rewritten."""

    def __init__(self, message: str, declined: list[Declined]) -> None:
        lines = [message, *(f"  - {d}" for d in declined)]
        super().__init__("\n".join(lines))
        self.declined = declined


@dataclass(frozen=True)
class MaskRule:
    """Which keys a query may read, as a function of distance = query position - key position.

    `causal`: distance >= 0. `window`: 0 <= distance < window. `full`: every key.
    """

    kind: str
    window: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("causal", "window", "full"):
            raise ValueError(f"mask rule {self.kind!r}: known rules are causal, window, full")
        if (self.kind == "window") != (self.window > 0):
            raise ValueError(f"mask rule {self.kind!r} with window={self.window}")

    def __str__(self) -> str:
        return f"window({self.window})" if self.kind == "window" else self.kind


@dataclass(frozen=True)
class Site:
    """One attention of the model, in the normal form.

    Attributes:
        name: module path of the attention, made unique (``model.layers.0.self_attn``).
        layer: index of the site in graph order.
        node: name of the attention node in the normal-form graph.
        heads, kv_heads: query heads, key/value heads; heads % kv_heads == 0.
        key_dim, value_dim: width of one key and one value.
        rule: which keys a query may read.
        scale, softcap: logits are ``softcap(scale * q.k)``; softcap 0 means none.
        dtype: element type of keys and values.
    """

    name: str
    layer: int
    node: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    rule: MaskRule
    scale: float
    softcap: float
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def dense_bytes(self, context: int) -> int:
        """Bytes of keys and values one decoded token reads from a dense cache of `context`."""
        seen = min(context, self.rule.window) if self.rule.kind == "window" else context
        return seen * self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layer": self.layer,
            "node": self.node,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "rule": self.rule.kind,
            "window": self.rule.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass
class PassResult:
    """A graph after one pass.

    Attributes:
        graph: the module that holds the graph after the pass.
        applied: how many times the pass changed it.
        declined: places the pass looked at and left alone.
    """

    graph: torch.fx.GraphModule
    applied: int = 0
    declined: list[Declined] = field(default_factory=list)
