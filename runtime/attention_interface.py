"""An attention function of transformers' `AttentionInterface` that reads caches through a policy.

transformers calls it once a layer, when the layer's cache has the new tokens already. What the
host does beside it is what `cached_run` does for compiled graphs: what the queries see is read off
the mask's values, records of the cache's full pages are kept and made true, tables say where pages
lie. A call that cannot be read so reads everything, through transformers' own `sdpa`; that is said
once, and counted.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from .. import codegen
from ..codegen.spec import NotCovered, specialise
from ..models.memory import Policy
from ..models.memory.cached import emit_cached_read, record_sizes
from ..models.memory.spec import Memory
from ..models.ops import FAMILIES
from .cache_index import Indexes
from .cached_run import Calls, GroupPlan, Seen, Tables, seen_through

log = logging.getLogger("memcompile")
# Tables that are kept: layers of one step share theirs, some conversations may take turns.
TABLES = 16
# What a layer may be given that no memory reads, nor the dense read of a prompt.
_REFUSED = {
    "softcap": "caps its attention logits (softcap)",
    "s_aux": "has learned attention sinks (s_aux)",
    "position_bias": "adds a bias to its attention logits (position_bias)",
    "cache": "reads the paged cache of continuous batching (cache)",
}


class CachedAttention:
    """What `memcompile.register_attention` registers.

    Args:
        policy: without state or account.
        check: raises ValueError for a memory that a cache cannot serve.
        decode_tokens: calls of up to this many tokens a row read through the policy.
        kernels: "auto", "required" or "off".
        hidden: added logits hide a key when they are not above this.

    Attributes:
        calls: what has run, an attention a call.
        memories: of the layers that have run, by number.
    """

    def __init__(
        self,
        policy: Policy,
        check: Callable[[Memory], None],
        decode_tokens: int,
        kernels: str,
        hidden: float,
    ) -> None:
        self.policy, self.decode_tokens, self.hidden = policy, decode_tokens, hidden
        self.calls = Calls()
        self.memories: dict[int, Memory] = {}
        self.indexes = Indexes()
        self._check = check
        self._emit = _Kernels(kernels)
        self._tables: OrderedDict[Any, Tables] = OrderedDict()
        self._mask: tuple[Any, ...] = (None,)
        self._lock = threading.Lock()

    def __str__(self) -> str:
        calls = self.calls
        lines = [
            f"policy {self.policy.preset!r}: {calls.policy} attentions through the policy, "
            f"{calls.dense} dense; {calls.pages_read} of {calls.pages_held} pages read"
        ]
        lines += [f"dense, {count} times: {why}" for why, count in calls.why_dense.items()]
        if calls.rebuilt:
            lines.append(f"records written again for changed caches: {calls.rebuilt}")
        return "\n".join(lines)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls its attention functions.

        Args:
            query: [B, H, n, Dk], of the last n tokens.
            key, value: [B, Hkv, L, D], what the layer's cache gave.
            attention_mask: [B or 1, 1, n, L], bool or added to the logits; None: causal.

        Returns:
            [B, n, H, Dv], and None where others return attention weights.

        Raises:
            ValueError: the layer is given something that neither the policy nor `sdpa` reads, or
                weights are asked for.
        """
        for name, what in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"layer {getattr(module, 'layer_idx', '?')} {what}, which memcompile's "
                    "attention does not read; set another attn_implementation for this model"
                )
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions=True: memcompile's attention has no weights to return; set "
                "attn_implementation='eager' to look at them"
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        why, seen, memory = self._look(module, query, key, value, attention_mask, causal, kwargs)
        if dropout:
            why = why or "attention has dropout"
        if why or seen is None or memory is None:
            return self._dense(
                why, module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
            )
        scale = 1 / math.sqrt(query.shape[3]) if scaling is None else float(scaling)
        return self._read(module, memory, query, key, value, seen, scale), None

    def memory_of(self, layer: int) -> Memory:
        """The memory of a layer.

        Raises:
            ValueError: the policy gives it one that a cache cannot serve.
        """
        memory = self.memories.get(layer)
        if memory is None:
            memory = self.policy.memory_at(layer, 0)
            self._check(memory)
            self.memories[layer] = memory
        return memory

    def _look(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        kwargs: Mapping[str, Any],
    ) -> tuple[str, Seen | None, Memory | None]:
        """Why this call reads densely; or what its queries see, and the layer's memory."""
        batch, heads, rows, _ = query.shape
        length = key.shape[2]
        layer = getattr(module, "layer_idx", None)
        why = ""
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
            why = "it is differentiated: for inference, call the model under torch.no_grad()"
        elif not isinstance(layer, int):
            why = "its module has no layer_idx to find its cache by"
        elif not causal:
            why = "it is not causal"
        elif kwargs.get("sliding_window"):
            why = "its layer has a sliding window of its own"
        elif heads % key.shape[1] or not (key.is_contiguous() and value.is_contiguous()):
            why = "its keys and values are no contiguous cache"
        elif mask is None and rows > 1:
            why = "the first tokens of a context"
        elif mask is not None and (
            mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (rows, length)
        ):
            why = f"its mask is {list(mask.shape)}; expected one for all heads"
        if why:
            return why, None, None
        memory = self.memory_of(int(layer))  # type: ignore[arg-type]
        most = self.decode_tokens
        if memory.fields:
            # Pages that fill during a call have no record yet: they must lie in every window.
            most = min(most, 1 + memory.window_pages * memory.page_size)
        if rows > most:
            return f"more than {most} tokens at a time", None, None
        if length < memory.page_size:
            return f"the cache is shorter than a page of {memory.page_size}", None, None
        seen = self._seen(mask, batch, length)
        if seen is None:
            return "the mask hides keys in the midst of a context", None, None
        return "", seen, memory

    def _seen(self, mask: Tensor | None, batch: int, length: int) -> Seen | None:
        if mask is None:
            return Seen((0,) * batch, (length - 1,) * batch, 1)
        # All layers of a step are given one mask.
        version = None if mask.is_inference() else mask._version
        known = self._mask
        if known[0] is not mask or known[1:3] != (version, batch):
            known = (mask, version, batch, seen_through(mask, batch, self.hidden))
            self._mask = known
        found: Seen | None = known[3]
        return found

    def _dense(
        self,
        why: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        scaling: float | None,
        is_causal: bool | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, None]:
        from transformers import AttentionInterface

        with self._lock:
            first = why not in self.calls.why_dense
            self.calls.dense += 1
            self.calls.why_dense[why] = self.calls.why_dense.get(why, 0) + 1
        if first:
            log.info("attention of %s reads densely: %s", type(module).__name__, why)
        self.indexes.distrust([key])
        made: tuple[Tensor, None] = AttentionInterface()["sdpa"](
            module,
            *(query, key, value, mask),
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return made

    @torch.no_grad()
    def _read(
        self,
        module: nn.Module,
        memory: Memory,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Seen,
        scale: float,
    ) -> Tensor:
        length, sizes = key.shape[2], record_sizes(memory)
        layer: int = module.layer_idx  # type: ignore[assignment]
        held = [position + seen.rows for position in seen.position]
        fits = all(length % size == 0 for size in (memory.page_size, *sizes))
        room = length > max(held)  # a cache that has room is one that is written in place
        known = self.indexes.knows((layer, memory, True), key)
        aligned = fits and not any(seen.start) and (room or known)
        site = (layer, memory, aligned)
        group = GroupPlan(None, key.shape[1], memory.page_size, sizes)
        with self.indexes.lock:
            tables = self._tables_of(group, seen, length, aligned, key.device)
            given = dict(zip(_names(group, aligned), tables.inputs(seen), strict=True))
            records: dict[int, tuple[Tensor, ...]] = {}
            index = None
            if memory.fields:
                pair, start, before = (key, value), seen.start, seen.position
                if layer:
                    self.indexes.follow(site, pair, start, before)
                (index,), rebuilt = self.indexes.find(
                    [site], [pair], [start], [before], deep=layer > 0
                )
                self.calls.rebuilt += rebuilt
                records = {size: tuple(index.pools(size, length)) for size in sizes}
        out, pages = emit_cached_read(
            self._emit,
            memory,
            query,
            (key, value),
            (key.shape, value.shape),
            given,
            records,
            aligned=aligned,
            scale=scale,
            softcap=0.0,
            dtype=query.dtype,
        )
        if index is not None:
            # The cache writes the next tokens before the next call.
            index.bind(key, value, held, writes=1 if room or known else 0)
        with self._lock:
            self.calls.policy += 1
            if pages is not None:
                self.calls.note((pages >= 0).sum((1, 2, 3)))
                for position in seen.position:
                    shown = sum((position + i) // memory.page_size + 1 for i in range(seen.rows))
                    self.calls.pages_held += key.shape[1] * shown
        result: Tensor = out.transpose(1, 2).contiguous()
        return result

    def _tables_of(
        self, group: GroupPlan, seen: Seen, length: int, aligned: bool, device: torch.device
    ) -> Tables:
        key = (group, seen.start, length, aligned, device)
        tables = self._tables.pop(key, None) or Tables(group, seen, length, aligned, device)
        self._tables[key] = tables
        if len(self._tables) > TABLES:
            self._tables.popitem(last=False)
        return tables


def _names(group: GroupPlan, aligned: bool) -> list[str]:
    """What `Tables.inputs` gives, by the names of `emit_cached_read`."""
    names = ["position", "lengths", "page_table"]
    names += [f"table_{size}" for size in group.record_sizes]
    return names if aligned else [*names, "tail_position", "tail_table"]


class _Kernels:
    """The emit that runs, memory operations by generated kernels where there are some."""

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self._operators: dict[Any, Any] = {}
        self._said: set[str] = set()

    def __call__(self, target: Callable[..., Any], *args: Any) -> Any:
        family = FAMILIES.get(target) if isinstance(target, OpOverload) else None
        if family is None or self.kernels == "off":
            return target(*args)
        try:
            spec, given = specialise(family, args)
            device = next(arg for arg in given if isinstance(arg, Tensor)).device.type
            operator = self._operators.get((spec, device))
            if operator is None:
                operator = codegen.load([spec], device)[spec]
                self._operators[spec, device] = operator
        except (NotCovered, RuntimeError, ImportError, OSError) as reason:
            if self.kernels == "required":
                raise RuntimeError(f"kernels='required', but {reason}") from reason
            text = " ".join(str(reason).split())
            if text not in self._said:
                self._said.add(text)
                warnings.warn(f"the memory runs on references, which is slow: {text}", stacklevel=2)
            return target(*args)
        return operator(*given)
