"""Large CPU tensors lie on huge pages where the system grants them, and are tensors like others."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from memcompile.runtime import huge_pages

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("rows", [0, 3, 70_001])
def test_a_tensor_of_zeros_that_is_contiguous_and_writable(rows: int, dtype: torch.dtype) -> None:
    made = huge_pages.zeros((rows, 5, 8), dtype, CPU)
    assert made.shape == (rows, 5, 8) and made.dtype == dtype and made.is_contiguous()
    assert not made.any()
    if rows * 40 * dtype.itemsize >= huge_pages.HUGE_PAGE:
        assert made.data_ptr() % huge_pages.HUGE_PAGE == 0
    made += 1
    assert bool((made == 1).all())


def test_memory_outlives_the_name_that_made_it() -> None:
    part = huge_pages.zeros((1 << 21,), torch.float32, CPU)[5:9]
    part += 2
    assert part.tolist() == [2.0] * 4


def test_a_system_without_them_gives_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    made = huge_pages.zeros((1 << 20,), torch.float32, CPU)
    assert not made.any()


def test_the_system_grants_them_where_it_has_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    made = huge_pages.zeros((16 * huge_pages.HUGE_PAGE,), torch.uint8, CPU)
    made += 1
    start = f"{made.data_ptr():x}"
    maps = Path("/proc/self/smaps").read_text().split("VmFlags")
    mine = [block for block in maps if holds(block, int(start, 16))]
    kilobytes = [
        int(line.split()[1])
        for block in mine
        for line in block.splitlines()
        if line.startswith("AnonHugePages")
    ]
    assert sum(kilobytes) > 0


@pytest.mark.parametrize("elements", [0, 100, 1 << 20, (1 << 22) + 7])
def test_collapsing_changes_no_content_and_no_address(elements: int) -> None:
    tensor = torch.arange(elements, dtype=torch.float32)
    copy, address = tensor.clone(), tensor.data_ptr()
    gathered = huge_pages.collapse(tensor)
    assert 0 <= gathered <= tensor.nbytes and gathered % huge_pages.HUGE_PAGE == 0
    assert tensor.data_ptr() == address and torch.equal(tensor, copy)


def holds(block: str, address: int) -> bool:
    for line in block.splitlines():
        bounds = line.split(" ")[0].split("-")
        if len(bounds) == 2 and all(set(b) <= set("0123456789abcdef") for b in bounds):
            return int(bounds[0], 16) <= address < int(bounds[1], 16)
    return False
