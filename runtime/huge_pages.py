"""CPU tensors in 2 MB pages where the system has them: streaming a large pool misses no TLB."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
_MADV_COLLAPSE = 25  # Linux 6.1; Python has no name for it


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


def collapse(tensor: Tensor) -> int:
    """Asks the system to gather a CPU tensor's memory into huge pages, where it lies.

    Contents and addresses stay. Memory that is mapped from a file, and systems that cannot do it,
    keep their pages: only speed depends on it.

    Returns:
        bytes that lie in huge pages now, as far as this call knows.
    """
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if end <= begin:
        return 0
    libc = ctypes.CDLL(None)
    refused = libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_COLLAPSE)
    return 0 if refused else end - begin
