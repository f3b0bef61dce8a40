"""CPU tensors in 2 MB pages where the system has them: streaming a large pool misses no TLB."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on the CPU from memory of its own, advised to be huge pages.

    The memory is zero because it was never touched: a pool costs nothing until it is written.
    Smaller tensors than a huge page, and systems without them, get ordinary memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    # Private: shared anonymous memory is a file, which the advice does not reach. One page more, to
    # start on a boundary: only whole aligned pages become huge ones.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE_PAGE
    # A kernel built without them refuses the advice; the memory is as good as any other then.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return raw[start : start + size].view(dtype).view(shape)
