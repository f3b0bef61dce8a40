"""Runs generated kernels on the memories of `paged_case`: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))

from paged_case import Case, Laid, attend_by_hand, page_lists

from memcompile.codegen.spec import KernelSpec
from memcompile.codegen.triton import load

__all__ = ["Case", "Laid", "attend_by_hand", "attend_spec", "page_lists", "punch_holes", "run"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 matrices wrongly.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(spec: KernelSpec, **given: Any) -> Any:
    """Calls the spec's operator with arguments by name; results come back to the CPU.

    What the operator writes is copied back into the tensors that were given.
    """
    there = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in given.items()}
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
