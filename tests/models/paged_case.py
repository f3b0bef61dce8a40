"""Random paged memories laid out by hand, poisoned, and the straight-line truth about them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """Sequences of position[b] + lengths[b] tokens, the last of which are the new rows."""

    position: tuple[int, ...] = (13, 5)
    lengths: tuple[int, ...] = (5, 3)
    kv_heads: int = 2
    group: int = 3
    key_dim: int = 7
    value_dim: int = 5
    page_size: int = 4
    dtype: torch.dtype = torch.float32
    seed: int = 0
    spare_columns: int = 1

    @property
    def batch(self) -> int:
        return len(self.position)

    @property
    def rows(self) -> int:
        return max(1, *self.lengths)

    @property
    def columns(self) -> int:
        held = max(p + n for p, n in zip(self.position, self.lengths, strict=True))
        return -(-held // self.page_size) + self.spare_columns


def cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> st.SearchStrategy[Case]:
    """Odd groups, ragged lengths, key_dim != value_dim, every dtype."""
    rows = st.lists(
        st.tuples(st.integers(0, 21), st.integers(0, 6)), min_size=1, max_size=3
    ).filter(lambda pairs: any(n for _, n in pairs))
    return rows.flatmap(
        lambda pairs: st.builds(
            Case,
            position=st.just(tuple(p for p, _ in pairs)),
            lengths=st.just(tuple(n for _, n in pairs)),
            kv_heads=st.integers(1, 3),
            group=st.sampled_from((1, 3, 5)),
            key_dim=st.sampled_from((3, 8)),
            value_dim=st.sampled_from((2, 5)),
            page_size=st.sampled_from((4, 8)),
            dtype=st.sampled_from(dtypes),
            seed=st.integers(0, 2**31),
            spare_columns=st.integers(0, 2),
        )
    )


@dataclass
class Laid:
    """A case laid out in pools behind a permuted table; unwritten slots and padding are NaN."""

    case: Case
    query: Tensor = field(init=False)
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)
    table: Tensor = field(init=False)
    key_pages: Tensor = field(init=False)
    value_pages: Tensor = field(init=False)

    def __post_init__(self) -> None:
        c = self.case
        make = torch.Generator().manual_seed(c.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64).to(c.dtype)

        held = [p + n for p, n in zip(c.position, c.lengths, strict=True)]
        self.query = normal(c.batch, c.kv_heads * c.group, c.rows, c.key_dim)
        self.keys = [normal(c.kv_heads, m, c.key_dim) for m in held]
        self.values = [normal(c.kv_heads, m, c.value_dim) for m in held]
        for b, n in enumerate(c.lengths):
            self.query[b, :, n:] = torch.nan
        self.table = torch.full((c.batch, c.kv_heads, c.columns), -1, dtype=torch.int32)
        count = c.batch * c.kv_heads * c.columns + 3
        order = torch.randperm(count, generator=make).tolist()
        self.key_pages = torch.full((count, c.page_size, c.key_dim), torch.nan, dtype=c.dtype)
        self.value_pages = torch.full((count, c.page_size, c.value_dim), torch.nan, dtype=c.dtype)
        for b in range(c.batch):
            for h in range(c.kv_heads):
                for page in range(-(-held[b] // c.page_size)):
                    self.table[b, h, page] = order.pop()
                for token in range(held[b]):
                    at = self.table[b, h, token // c.page_size], token % c.page_size
                    self.key_pages[at] = self.keys[b][h, token]
                    self.value_pages[at] = self.values[b][h, token]

    @property
    def position(self) -> Tensor:
        return torch.tensor(self.case.position, dtype=torch.int32)

    @property
    def lengths(self) -> Tensor:
        return torch.tensor(self.case.lengths, dtype=torch.int32)


def attend_by_hand(
    laid: Laid,
    dtype: torch.dtype,
    *,
    pools: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    pages: Tensor | None = None,
    exclude: bool = False,
    scale: float = 0.4,
    softcap: float = 0.0,
    window: int = 0,
    span: int = 1,
) -> tuple[Tensor, Tensor]:
    """What `attend` promises, one row and one key at a time, computed in `dtype`."""
    c = laid.case
    key_pages, value_pages = pools or (laid.key_pages, laid.value_pages)
    slots, heads = key_pages.shape[1], c.kv_heads * c.group
    out = torch.zeros(c.batch, heads, c.rows, value_pages.shape[2], dtype=dtype)
    lse = torch.full((c.batch, heads, c.rows), -math.inf, dtype=dtype)
    for b, head, i in torch.cartesian_prod(*map(torch.arange, (c.batch, heads, c.rows))).tolist():
        if i >= c.lengths[b]:
            continue
        kv, at = head // c.group, c.position[b] + i
        listed = set(range(c.columns)) if pages is None else {*pages[b, kv, i].tolist()}
        found = []
        for page in range(c.columns):
            physical = int(laid.table[b, kv, page])
            if physical < 0 or (page in listed) == (exclude and pages is not None):
                continue
            for slot in range(slots):
                age = at - ((page * slots + slot + 1) * span - 1)
                if age >= 0 and (not window or age < window):
                    found.append((physical, slot))
        if not found:
            continue
        where = tuple(torch.tensor(found).T)
        logits = scale * (key_pages[where].to(dtype) @ laid.query[b, head, i].to(dtype))
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[where].to(dtype)
        out[b, head, i] = logits.softmax(0) @ value_pages[where].to(dtype)
        lse[b, head, i] = logits.logsumexp(0)
    return out, lse


def page_lists(laid: Laid, width: int) -> Tensor:
    """Random distinct pages a row, -1 strewn between them, not all of them assigned."""
    c = laid.case
    make = torch.Generator().manual_seed(c.seed + 1)
    lists = torch.full((c.batch, c.kv_heads, c.rows, width), -1, dtype=torch.int32)
    for row in lists.view(-1, width):
        pages = torch.randperm(c.columns, generator=make)[:width].int()
        keep = torch.rand(len(pages), generator=make) < 0.7
        row[: len(pages)] = torch.where(keep, pages, -1)
    return lists
