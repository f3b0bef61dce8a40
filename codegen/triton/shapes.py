"""What launchers decide from shapes alone, concrete or symbolic: no tensor is ever read."""

from __future__ import annotations

import torch


def known_at_most(size: int | torch.SymInt, most: int) -> bool:
    """Whether `size` is known to be at most `most`, without a guard on a symbolic size."""
    if isinstance(size, int):
        return size <= most
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size <= most)


def split_count(
    programs: int | torch.SymInt, pages: int | torch.SymInt, share_pages: int, wanted: int
) -> int | torch.SymInt:
    """Into how many parts each program's pages are split, so that a GPU is filled.

    Args:
        programs: programs without a split.
        pages: pages a program may read at most, from the shape of the table or the list. How many
            it does read is known on the device only, which shares them out evenly.
        share_pages: pages that are worth a program.
        wanted: programs that fill the GPU.
    """
    worth = (pages + share_pages - 1) // share_pages
    split: int | torch.SymInt = torch.sym_max(1, torch.sym_min(wanted // programs, worth))
    return split


def list_block(width: int | torch.SymInt) -> int:
    """The least power of two, 16 or above, that holds a list of `width` pages.

    A kernel is compiled for it: a symbolic width is fixed, with a guard. The width of a memory's
    lists is a setting of the memory, the same in every call.
    """
    return max(16, 1 << (int(width) - 1).bit_length())
