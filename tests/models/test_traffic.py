"""Pages and bytes a read moves, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from memcompile.models.memory import Dense, Scout
from memcompile.models.memory.traffic import bytes_read, pages_read


@dataclass(frozen=True)
class Shape:
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 8
    dtype: torch.dtype = torch.float16


TOKEN = (16 + 8) * 2
SCOUT = Scout(page_size=8, budget=64, sinks=8, window=16, compensate=False).memory(2, 0)
DENSE = Dense(8).memory(0, 0)


@pytest.mark.parametrize("position", [0, 7, 8, 100])
def test_dense_reads_every_token(position: int) -> None:
    assert bytes_read(DENSE, Shape(), position) == (position + 1) * TOKEN * 2
    assert bytes_read(SCOUT, Shape(), position, read="dense") == (position + 1) * TOKEN * 2
    assert pages_read(DENSE, position) == position // 8 + 1


def test_a_sliding_window_reads_the_window() -> None:
    assert bytes_read(DENSE, Shape(), 100, window=20) == 20 * TOKEN * 2
    assert bytes_read(DENSE, Shape(), 5, window=20) == 6 * TOKEN * 2
    assert pages_read(DENSE, 100, window=20) == 3  # tokens 81 .. 100 lie in pages 10, 11, 12


def test_a_selection_reads_its_pages_and_the_records_that_competed() -> None:
    position = 1003  # page 125, of which 4 tokens are written
    exact = (7 * 8 + 4) * TOKEN
    records = (125 - 1 - 2) * (16 + 16) * 2  # mean and std of all but sinks, window, open page
    assert pages_read(SCOUT, position) == 8
    assert bytes_read(SCOUT, Shape(), position) == 2 * (exact + records)
    assert bytes_read(SCOUT, Shape(), position, selected=16) == 2 * (exact + records)
    assert bytes_read(SCOUT, Shape(), position, selected=10) < 2 * (exact + records)


def test_compensation_reads_a_summary_of_each_skipped_page() -> None:
    memory = Scout(page_size=8, budget=64, sinks=8, window=16).memory(2, 0)
    summary = (16 + 8) * 2 + 4
    more = bytes_read(memory, Shape(), 1003) - bytes_read(SCOUT, Shape(), 1003)
    assert more == 2 * (126 - 8) * summary


def test_while_everything_fits_no_record_is_read() -> None:
    assert bytes_read(SCOUT, Shape(), 63) == 64 * TOKEN * 2
    assert bytes_read(SCOUT, Shape(), 64) > 58 * TOKEN * 2
    late = Scout(page_size=8, budget=64, sinks=8, window=16, min_context=500).memory(2, 0)
    assert bytes_read(late, Shape(), 499) == 500 * TOKEN * 2
    assert pages_read(late, 499) == 63
    assert pages_read(late, 500) == 8
