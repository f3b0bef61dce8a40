"""Random memories for generated kernels, poisoned, and what the references make of them.

Pools are NaN wherever no token was written, queries are NaN in padding rows: a kernel that reads
what it may not see shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from tolerance import assert_close_to_float64
from torch import Tensor

from memcompile.codegen.spec import KernelSpec
from memcompile.models.memory import paged


@dataclass(frozen=True)
class Shape:
    """Sequences of position[b] + lengths[b] tokens; the last lengths[b] are the query rows.

    Attributes:
        rows: extent of the row axis; at least max(lengths).
        holes: of hundred pages, how many are missing from the page table.
        listed: width of each row's list of pages.
    """

    position: tuple[int, ...] = (137,)
    lengths: tuple[int, ...] = (1,)
    kv_heads: int = 2
    rows: int = 1
    holes: int = 0
    listed: int = 4
    spare_columns: int = 1
    seed: int = 0

    @property
    def tokens(self) -> int:
        return max(p + n for p, n in zip(self.position, self.lengths, strict=True))


def shapes(
    longest: int = 300, rows: tuple[int, ...] = (1, 1, 2, 5, 19), batch: tuple[int, ...] = (1, 2, 3)
) -> st.SearchStrategy[Shape]:
    """Ragged batches at any position, some sequences without a new token, tables with holes."""

    @st.composite
    def build(draw: st.DrawFn) -> Shape:
        count, most = draw(st.sampled_from(batch)), draw(st.sampled_from(rows))
        return Shape(
            position=tuple(draw(st.integers(0, longest)) for _ in range(count)),
            lengths=tuple(draw(st.integers(0, most)) for _ in range(count)),
            kv_heads=draw(st.integers(1, 3)),
            rows=most,
            holes=draw(st.sampled_from((0, 0, 30))),
            listed=draw(st.integers(1, 6)),
            spare_columns=draw(st.integers(0, 2)),
            seed=draw(st.integers(0, 2**31)),
        )

    return build()


@dataclass
class Laid:
    """Everything an operation of a spec may be given, by the name of its argument."""

    spec: KernelSpec
    shape: Shape
    given: dict[str, Any]

    def arguments(self) -> tuple[Any, ...]:
        """What the kernel of the spec takes."""
        return tuple(self.given[name] for _, name in self.spec.arguments)

    def attend(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The reference's results, its inputs widened to `dtype` first."""
        g, spec = self.given, self.spec
        keys = g["key_pages"].to(dtype)
        values = keys[..., : spec.value_dim] if spec.shared_kv else g["value_pages"].to(dtype)
        if spec.summaries:
            return paged.attend_summaries(
                *(g["query"].to(dtype), keys, values, g["page_table"], g["pages"]),
                *(g["page_logits"].to(dtype), g["page_values"].to(dtype)),
                *(g["page_bias"].to(dtype), g["position"], g["lengths"], g["scale"]),
                g["softcap"] if spec.softcap else 0.0,
            )
        reference = paged.attend_page_lse if spec.page_lse else paged.attend
        return reference(
            g["query"].to(dtype),
            keys,
            values,
            g["bias"].to(dtype) if spec.bias else None,
            g["page_table"],
            None if spec.pages == "all" else g["pages"],
            spec.pages == "unlisted",
            g["position"],
            g["lengths"],
            g["scale"],
            g["softcap"] if spec.softcap else 0.0,
            g["window"] if spec.window else 0,
            spec.span,
        )


def check_attend(laid: Laid, results: tuple[Tensor, ...]) -> None:
    """Holds what attend returns for a laid-out memory to the reference in float64."""
    spec = laid.spec
    truth, eager = laid.attend(torch.float64), laid.attend(torch.float32)
    reduction = max(1, laid.shape.tokens // spec.span) * spec.key_dim
    out = eager[0].to(spec.torch_dtype)
    assert_close_to_float64(results[0], out, truth[0], reduction=reduction)
    # Logits are summed in float32 whatever the inputs are.
    for one, plain, right in zip(results[1:], eager[1:], truth[1:], strict=True):
        assert_close_to_float64(one, plain, right, reduction=reduction, logarithm=True)


def by_slot(pages: Tensor, shift: int = 0) -> Tensor:
    """A view of pools [P, s, D] in which page p begins at slot p * s + shift, and one at each."""
    size, width = pages.shape[1:]
    before = pages.new_full((shift, width), torch.nan)
    slots = torch.cat([before, pages.flatten(0, 1)])
    return slots.as_strided((len(slots) - size + 1, size, width), (width, width, 1))


def lay_out(spec: KernelSpec, shape: Shape) -> Laid:
    """Memory of the shape under the spec, its pools and inputs rounded to the spec's dtype."""
    make = torch.Generator().manual_seed(shape.seed)
    slots = -(-shape.tokens // spec.span)
    columns = max(1, -(-slots // spec.page_size) + shape.spare_columns)
    batch, heads = len(shape.position), shape.kv_heads
    pool = batch * heads * columns + 3
    order = torch.randperm(pool, generator=make)[: batch * heads * columns]
    table = order.int().view(batch, heads, columns)
    lengths = torch.tensor(shape.lengths, dtype=torch.int32)
    position = torch.tensor(shape.position, dtype=torch.int32)
    held = (position + lengths).long() // spec.span  # complete slots
    slot = torch.arange(columns * spec.page_size).view(columns, spec.page_size)
    written = (slot < held[:, None, None])[:, None].expand(-1, heads, -1, -1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make, dtype=torch.float32).to(spec.torch_dtype)

    shift = 5 if spec.by_slot else 0  # pages then begin at odd slots

    def poisoned(width: int) -> Tensor:
        full = torch.full((pool, spec.page_size, width), torch.nan, dtype=spec.torch_dtype)
        values = normal(*written.shape, width)
        full[order] = torch.where(written[..., None], values, torch.nan).flatten(0, 2)
        return by_slot(full, shift) if spec.by_slot else full

    query = normal(batch, shape.rows, heads * spec.group, spec.key_dim).transpose(1, 2)
    query.masked_fill_((torch.arange(shape.rows) >= lengths[:, None])[:, None, :, None], torch.nan)
    key_pages = poisoned(spec.key_dim)
    bias = torch.full((pool, spec.page_size), torch.nan)
    bias[order] = torch.where(written, torch.randn(written.shape, generator=make), torch.nan).view(
        -1, spec.page_size
    )
    gone = torch.rand(table.shape, generator=make) * 100 < shape.holes
    lists = torch.full((batch, heads, shape.rows, shape.listed), -1, dtype=torch.int32)
    for row in lists.view(-1, shape.listed):
        some = torch.randperm(columns, generator=make)[: shape.listed].int()
        keep = torch.rand(len(some), generator=make) < 0.7
        row[: len(some)] = torch.where(keep, some, -1)
    # Records exist of full pages only, and logits of those that a row could read by their record.
    full = ((torch.arange(columns) + 1) * spec.page_size <= held[:, None])[:, None]  # [B, 1, pages]
    full = full.expand(-1, heads, -1)
    page_values = torch.full((pool, spec.value_dim), torch.nan, dtype=spec.torch_dtype)
    page_values[order] = torch.where(
        full[..., None], normal(*full.shape, spec.value_dim), torch.nan
    ).flatten(0, 2)
    page_bias = torch.full((pool, 1), torch.nan)
    counts = 3 * torch.rand(full.shape, generator=make)
    page_bias[order, 0] = torch.where(full, counts, torch.nan).flatten()
    token = position[:, None] + torch.arange(shape.rows)  # [B, n]
    seen = ((torch.arange(columns) + 1) * spec.page_size - 1 <= token[..., None])[:, None]
    seen = seen & (table >= 0)[:, :, None] & ~gone[:, :, None] & ~paged.listed(lists, 0, columns)
    seen = seen & (torch.arange(shape.rows) < lengths[:, None])[:, None, :, None]
    logits = torch.randn(batch, heads * spec.group, shape.rows, columns, generator=make)
    logits *= spec.key_dim**0.5
    logits.masked_fill_(~seen.repeat_interleave(spec.group, 1), torch.nan)
    if spec.by_slot:
        table = table * spec.page_size + shift
    given = {
        "page_logits": logits,
        "page_values": page_values,
        "page_bias": page_bias,
        "query": query,
        "key_pages": key_pages,
        "value_pages": poisoned(spec.value_dim),
        "bias": bias,
        "page_table": torch.where(gone, -1, table),
        "pages": lists,
        "position": position,
        "lengths": lengths,
        "scale": spec.key_dim**-0.5,
        "softcap": 1.5,
        "window": int(torch.randint(1, max(2, shape.tokens), (), generator=make)),
        "record_table": torch.randperm(pool + 2, generator=make)[: len(order)].int().view_as(table),
    }
    return Laid(spec, shape, given)
