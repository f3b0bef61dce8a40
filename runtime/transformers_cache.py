"""The memory of an engine as a transformers `Cache`: length, rows, rewinding, left padding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .engine import Engine


class EngineCache:
    """What `MemoryCache` adds to transformers' `Cache`.

    transformers counts columns of a batch, the engine each row's own tokens: a left-padded row
    holds as many fewer as it has columns of padding before it.

    Attributes:
        engine: remembers the tokens; its `stats` say what was read.
        padding: columns before each row's first token; empty before the first call.
    """

    engine: Engine
    padding: list[int]

    def __init__(self, engine: Engine) -> None:
        super().__init__(layers=[])  # type: ignore[call-arg]
        self.engine = engine
        held = engine.position
        self.padding = [max(held) - n for n in held]

    def __repr__(self) -> str:
        return f"MemoryCache(tokens={self.engine.position}, padding={self.padding})"

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineCache:
        """Independent from here on, as a prompt's cache is when it is copied to be used twice."""
        other = type(self)(self.engine.fork())
        other.padding = list(self.padding)
        return other

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held, padding included."""
        return self.engine.position[0] + self.padding[0] if self.padding else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens a row can hold; -1: any number."""
        return -1 if self.engine.limit is None else self.engine.limit

    @property
    def batch_size(self) -> int:
        return len(self.padding) or -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.padding)

    @property
    def is_croppable(self) -> bool:
        return self.engine.rewinds

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "a MemoryCache is written by the compiled model it belongs to; this model writes its "
            "keys and values itself: give it a cache of transformers, or none"
        )

    def reset(self) -> None:
        self.engine.reset()
        self.padding = []

    def crop(self, tokens_to_remove: int) -> None:
        """Forget ``-tokens_to_remove`` columns.

        Raises:
            ValueError: a positive number; or what `Engine.rewind` refuses.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to forget, negative"
            )
        if tokens_to_remove:
            self.engine.rewind(-tokens_to_remove)
        if self.engine.holds:
            self.engine.hold()

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs, from here on.

        Raises:
            ValueError: the memory cannot be rewound.
        """
        self.engine.hold()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        if self.padding:
            rows = beam_idx.tolist()
            self.engine.select(rows)
            self.padding = [self.padding[row] for row in rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.padding)).repeat_interleave(repeats)
        self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: their numbers, or a mask."""
        self.reorder_cache(torch.arange(len(self.padding))[indices.cpu()])


@functools.cache
def memory_cache() -> type[EngineCache]:
    """The class `MemoryCache`; made when transformers is there to derive it from."""
    from transformers import Cache

    return type("MemoryCache", (EngineCache, Cache), {"__module__": __name__})
