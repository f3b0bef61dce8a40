"""Runs generated kernels on the memories of `paged_case`: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))

from paged_case import Case, Laid, attend_by_hand, page_lists

from memcompile.codegen.spec import KernelSpec
from memcompile.codegen.triton import load
from memcompile.models.memory.parts import SCORE_FIELDS, field_width

__all__ = [
    "Case",
    "Laid",
    "attend_by_hand",
    "attend_spec",
    "page_lists",
    "punch_holes",
    "quantised",
    "run",
    "summaries_by_hand",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 matrices wrongly.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def long(*values: Any, **options: Any) -> Any:
    """A parameter for GPUs and the long suite: the interpreter is slow."""
    return pytest.param(*values, marks=pytest.mark.long, **options)


def run(spec: KernelSpec, **given: Any) -> Any:
    """Calls the spec's operator with arguments by name; results come back to the CPU.

    What the operator writes is copied back into the tensors that were given.
    """
    there = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in given.items()}
    if spec.by_slot:
        for name in ("key_pages", "value_pages"):
            pages = given[name]  # moving them would make them as many copies as they overlap
            slots = torch.cat([pages[:, 0], pages[-1, 1:]]).to(DEVICE)
            there[name] = slots.as_strided(pages.shape, pages.stride())
    out = load([spec])[spec](*(there[name] for _, name in spec.arguments))
    for kind, name in spec.arguments:
        if kind.endswith("!)"):
            given[name].copy_(there[name])
    if out is None or isinstance(out, Tensor):
        return None if out is None else out.cpu()
    return tuple(tensor.cpu() for tensor in out)


def punch_holes(laid: Laid, every: int) -> None:
    """Takes away every so manyth page: its tokens become invisible."""
    laid.table[:, :, ::every] = -1


def attend_spec(case: Case, **options: Any) -> KernelSpec:
    return KernelSpec(
        "attend",
        dtype=dtype_name(case.dtype),
        key_dim=case.key_dim,
        value_dim=case.value_dim,
        group=case.group,
        page_size=options.pop("page_size", case.page_size),
        **options,
    )


def quantised(laid: Laid, score: str, mean: bool = False) -> dict[str, Tensor]:
    """Whole records and queries of norm 5: scores are exact in every precision, ties frequent.

    Records of pages that are not full are poison. With `mean`, there are means for any score.
    """
    case = laid.case
    make = torch.Generator().manual_seed(case.seed)
    records = {
        name: torch.randint(-2, 3, (len(laid.key_pages), width), generator=make).to(case.dtype)
        for name in dict.fromkeys((*(("mean",) if mean else ()), *SCORE_FIELDS[score]))
        for width in [field_width(name, case.key_dim, case.value_dim)]
    }
    if score == "box":
        low, high = records["min"], records["max"]
        records |= {"min": torch.minimum(low, high), "max": torch.maximum(low, high)}
    live = laid.query.isfinite()
    laid.query = torch.zeros_like(laid.query)
    for row in laid.query.view(-1, case.key_dim):
        row[torch.randperm(case.key_dim, generator=make)[:2]] = torch.tensor(
            [3.0, -4.0], dtype=case.dtype
        )
    laid.query[~live] = torch.nan
    held = torch.tensor([len(k[0]) for k in laid.keys])
    page = torch.arange(case.columns)
    for b, h in torch.cartesian_prod(
        torch.arange(case.batch), torch.arange(case.kv_heads)
    ).tolist():
        unfilled = laid.table[b, h][(page + 1) * case.page_size > held[b]]
        for pool in records.values():
            pool[unfilled[unfilled >= 0].long()] = torch.nan
    return records


def summaries_by_hand(
    laid: Laid,
    dtype: torch.dtype,
    lists: Tensor,
    page_logits: Tensor,
    page_values: Tensor,
    page_bias: Tensor,
    *,
    values: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What `attend.summaries` promises, one row and one page at a time, computed in `dtype`."""
    c, size = laid.case, laid.case.page_size
    heads = c.kv_heads * c.group
    out = torch.zeros(c.batch, heads, c.rows, values.shape[2], dtype=dtype)
    lse = torch.full((c.batch, heads, c.rows), -torch.inf, dtype=dtype)
    for b, head, i in torch.cartesian_prod(*map(torch.arange, (c.batch, heads, c.rows))).tolist():
        kv, held = head // c.group, c.position[b] + i + 1  # tokens that the row sees
        listed = {*lists[b, kv, i].tolist()}
        keys, read = [], []  # logits of keys, and what they stand for
        for page in range(c.columns) if i < c.lengths[b] else ():
            at = int(laid.table[b, kv, page])
            seen = min(size, held - page * size)
            if at < 0 or seen <= 0:
                continue
            if page in listed:
                products = laid.key_pages[at, :seen].to(dtype) @ laid.query[b, head, i].to(dtype)
                read.append(values[at, :seen])
            elif seen == size:
                products = page_logits[b, head, i, page].to(dtype)[None]
                read.append(page_values[at][None])
            else:
                continue
            logits = scale * products
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            keys.append(logits if page in listed else logits + page_bias[at].to(dtype))
        logits = torch.cat(keys) if keys else torch.empty(0)
        if logits.gt(-torch.inf).any():
            out[b, head, i] = logits.softmax(0) @ torch.cat(read).to(dtype)
            lse[b, head, i] = logits.logsumexp(0)
    return out, lse
