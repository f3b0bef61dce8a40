"""What runtimes have as one operator of their own, on contiguous state: append and read, records
apart from the append, reads of listed pages, and the delta rule. Texts of operators that only such
a runtime is given."""

from __future__ import annotations

from torch import Tensor

from ..memory.recurrent import recurrence
from .reading import attend
from .writing import append


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float,
    window: int,
    size: int,
    pinned: int,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Appends key and value [B, Hkv, n, D], then reads all that query [B, H, n, D] may see.

    Returns:
        out [B, H, n, D] in the summing type, and the caches [B, Hkv, capacity, D].
    """
    where = (position, lengths, size, pinned, reach)
    keys, values = (append(cache, new, *where) for cache, new in ((keys, key), (values, value)))
    out, _ = attend(
        *(query, keys, values, None, None, False, position, lengths),
        *(scale, softcap, window, size, size, pinned),
    )
    return out, keys, values


def listed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    position: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    size: int,
) -> Tensor:
    """Reads listed pages of caches into which the new rows were put before.

    Args:
        query: [B, H, n, D].
        key, value: the new rows [B, Hkv, n, D] once more, for runtimes that read a row's own token
            from them.
        pages: int64 [B, Hkv, n, S], ascending, -1 behind them. A row's own page is the last, the
            only one that it sees a part of.
        position, lengths: int32 [B].
        keys, values: [B, Hkv, capacity, D].

    Returns:
        out [B, H, n, D] in the summing type. Of rows of padding nothing is promised.
    """
    out, _ = attend(
        *(query, keys, values, None, pages, False, position, lengths, scale, 0.0, 0),
        *(size, size, -1),
    )
    return out


def delta_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    lengths: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`state_step` of `ops.py` with the delta rule: out, lse and the state after it."""
    state = state.clone()
    out, lse = recurrence(query, key, value, decay, beta, lengths, state, None)
    return out, lse, state
