"""Random levels for generated kernels, poisoned: children to fold, and candidates to choose among.

Records are NaN wherever no child is complete, and children of groups that earlier calls completed
have left their table: a kernel that reads what it may not shows it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from tolerance import assert_close_to_float64
from torch import Tensor

from memcompile.codegen.spec import SCORE_TERMS, KernelSpec
from memcompile.models.memory import levels
from memcompile.models.memory.parts import INDEX_FIELDS, field_width

FOLDS = [
    KernelSpec("append_index", "bfloat16", 128, 128, fields=("mean", "value_mean", "log_count"),
               fold=True),
    KernelSpec("append_index", "float32", 40, 24, fields=INDEX_FIELDS, fold=True),
    KernelSpec("append_index", "float16", 80, 0, fields=("max", "min", "mean", "std"), fold=True),
    KernelSpec("append_index", "float16", 0, 8, fields=("value_mean", "log_count"), fold=True),
]  # fmt: skip


def draw(seed: int) -> KernelSpec:
    """One spec of a level's operations, drawn over the whole coverage: a function of the seed."""
    rng = random.Random(seed)
    dims = (8, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
    shape: dict[str, Any] = dict(
        dtype=rng.choice(("float32", "float16", "bfloat16")), key_dim=rng.choice(dims)
    )
    if rng.random() < 0.5:
        return KernelSpec(
            "score_select", **shape, group=rng.choice((1, 2, 3, 4, 5, 7, 8, 12, 16, 33, 71)),
            page_size=rng.choice((16, 64, 1000, 4096, 250_000, 1 << 20)), among=True,
            score=rng.choice([*SCORE_TERMS]),
        )  # fmt: skip
    some = {"mean", *(field for field in INDEX_FIELDS if rng.random() < 0.5)}
    fields = tuple(rng.sample(sorted(some), len(some)))
    value_dim = rng.choice(dims) if "value_mean" in fields else 0
    return KernelSpec("append_index", **shape, value_dim=value_dim, fields=fields, fold=True)


@dataclass
class Fold:
    """One call, by the names of its arguments; its index is all NaN."""

    spec: KernelSpec
    given: dict[str, Any]

    def pools(self, what: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The pools called `what` ("children", "index"), widened to `dtype`."""
        pools = [self.given[f"{what}_{field}"] for field in self.spec.fields]
        return [pool.to(dtype or pool.dtype) for pool in pools]

    def reference(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """What the reference writes, its inputs widened to `dtype` first."""
        g, index = self.given, [torch.full_like(pool, torch.nan) for pool in self.pools("index")]
        index = [pool.to(dtype or pool.dtype) for pool in index]
        levels.fold(
            self.pools("children", dtype), g["child_table"], g["page_table"], g["position"],
            g["lengths"], index, list(self.spec.fields), g["child_size"], g["ratio"],
        )  # fmt: skip
        return index

    def check(self) -> int:
        """Holds what was written to the reference in float64; returns how many records."""
        eager, truth = self.reference(), self.reference(torch.float64)
        written = ~truth[0].isnan().all(1)
        for field, *three in zip(self.spec.fields, self.pools("index"), eager, truth, strict=True):
            assert all(pool[~written].isnan().all() for pool in three), field
            assert_close_to_float64(
                *(pool[written] for pool in three),
                reduction=self.given["ratio"] * max(1, self.spec.key_dim),
                logarithm=field == "log_count",
            )
        return int(written.sum())


def lay_out_fold(
    spec: KernelSpec,
    position: tuple[int, ...],
    lengths: tuple[int, ...],
    child_size: int,
    ratio: int,
    kv_heads: int = 2,
    seed: int = 0,
) -> Fold:
    """A call that adds lengths[b] tokens to position[b], its children behind a permuted table."""
    make = torch.Generator().manual_seed(seed)
    batch = len(position)
    begin = torch.tensor(position)
    end = begin + torch.tensor(lengths)

    def table(columns: int) -> Tensor:
        count = batch * kv_heads * columns
        order = torch.randperm(count + 3, generator=make)[:count]
        return order.int().view(batch, kv_heads, columns)

    size = child_size * ratio
    page_table = table(int(end.max()) // size + 1)
    child_table = table(int(end.max()) // child_size + 2)
    child = torch.arange(child_table.shape[2])
    complete = (child < (end // child_size)[:, None])[:, None].expand_as(child_table)
    gone = (child < (begin // size * ratio)[:, None])[:, None].expand_as(child_table)
    known = torch.zeros(child_table.numel() + 3, dtype=torch.bool)
    known[child_table[complete & ~gone].long()] = True
    given: dict[str, Any] = {}
    for field in spec.fields:
        dtype = torch.float32 if field == "log_count" else spec.torch_dtype
        width = field_width(field, spec.key_dim, spec.value_dim)
        pool = torch.randn(len(known), width, generator=make)
        pool = pool.abs() if field in ("std", "radius") else pool
        given[f"children_{field}"] = torch.where(known[:, None], pool, torch.nan).to(dtype)
        given[f"index_{field}"] = torch.full(
            (page_table.numel() + 3, width), torch.nan, dtype=dtype
        )
    return Fold(spec, given | {
        "child_table": child_table.masked_fill(~complete | gone, -1),
        "page_table": page_table,
        "position": begin.int(),
        "lengths": (end - begin).int(),
        "child_size": child_size,
        "ratio": ratio,
    })  # fmt: skip


def candidates(table: Tensor, rows: int, width: int, seed: int = 0) -> Tensor:
    """Lists [B, Hkv, rows, width] of distinct pages, ascending, -1 strewn between them.

    Some lie past the table's end or have no page in it.
    """
    make = torch.Generator().manual_seed(seed)
    batch, heads, columns = table.shape
    lists = torch.full((batch, heads, rows, width), -1, dtype=torch.int32)
    for row in lists.flatten(0, 2):
        some = torch.randperm(columns + 3, generator=make)[:width].sort().values.int()
        keep = torch.rand(len(some), generator=make) < 0.8
        row[: len(some)] = torch.where(keep, some, -1)
    return lists
