"""Indexes beside caches: records of full pages, and whether a changed cache is noticed."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memcompile.models.memory import preset
from memcompile.models.memory.records import page_records
from memcompile.models.memory.spec import Memory
from memcompile.runtime.cache_index import CacheIndex, Indexes

SCOUT = preset("scout", budget=64, page_size=8, sinks=8, window=8, dense_layers=0).memory(0, 0)
LEVELS = preset(
    "hierarchical", levels=(8, 32), refine=16, sinks=8, window=8, dense_layers=0
).memory(0, 0)
HEADS, DIM = 2, 4


def cache(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, length, DIM, generator=make) for _ in range(2))


def check(index: CacheIndex, keys: Tensor, values: Tensor, start: list[int], held: list[int]):
    """Every full group has the record that its own keys and values give."""
    length, fields = keys.shape[2], list(index.memory.fields)
    for size in index.sizes:
        pools = index.pools(size, length)
        for b, (first, tokens) in enumerate(zip(start, held, strict=True)):
            for h in range(HEADS):
                for group in range(tokens // size):
                    at = slice(first + group * size, first + (group + 1) * size)
                    own = page_records(keys[None, b, h, at], values[None, b, h, at], fields)
                    row = b * HEADS + h
                    if index.aligned:
                        place = row * (length // size) + group
                    else:
                        place = group * len(start) * HEADS + row
                    for pool, record in zip(pools, own, strict=True):
                        assert torch.equal(pool[place], record[0].to(pool.dtype))


def find(
    indexes: Indexes,
    pair: tuple[Tensor, Tensor],
    start: list[int],
    held: list[int],
    memory: Memory = SCOUT,
    aligned: bool = False,
    name: str = "a",
) -> tuple[CacheIndex, int]:
    (index,), rebuilt = indexes.find([(name, memory, aligned)], [pair], [start], [held])
    check(index, *pair, start, held)
    return index, rebuilt


@pytest.mark.parametrize("memory", [SCOUT, LEVELS], ids=["pages", "levels"])
@pytest.mark.parametrize("aligned", [False, True])
def test_records_follow_a_cache_that_grows(memory: Memory, aligned: bool) -> None:
    indexes, (keys, values) = Indexes(), cache(2, 96)
    start = [0, 0] if aligned else [3, 0]
    made = None
    for tokens in (1, 7, 8, 9, 40, 41, 93):
        index, rebuilt = find(indexes, (keys, values), start, [tokens] * 2, memory, aligned)
        assert made in (None, index)
        assert not rebuilt
        made = index


def test_another_tensor_with_the_same_rows_takes_the_index_along() -> None:
    """A growing cache is a new tensor at every token."""
    indexes, (keys, values) = Indexes(), cache(1, 96)
    index, _ = find(indexes, (keys[:, :, :40], values[:, :, :40]), [0], [40])
    writes = []
    index.fill, fill = lambda *a: writes.append(fill(*a)), index.fill
    longer = tuple(torch.cat([x[:, :, :40], x[:, :, 40:41]], 2) for x in (keys, values))
    index.bind(*longer, [41])
    again, rebuilt = find(indexes, longer, [0], [41])
    assert again is index
    assert rebuilt == 0
    assert writes == [0]


@settings(max_examples=40)
@given(data=st.data())
def test_any_history(data: st.DataObject) -> None:
    """Crop, reorder, repeat, refill, replace: records are those of what the cache holds now."""
    aligned = data.draw(st.booleans())
    indexes, length = Indexes(), 64
    keys, values = cache(2, length)
    held = data.draw(st.integers(1, length))
    for step in range(data.draw(st.integers(1, 6))):
        match data.draw(st.sampled_from(["more", "crop", "order", "refill", "middle", "copy"])):
            case "more":
                held = data.draw(st.integers(held, length))
            case "crop":
                held = data.draw(st.integers(1, held))
            case "order":
                rows = data.draw(st.lists(st.integers(0, len(keys) - 1), min_size=1, max_size=3))
                keys, values = keys[rows].clone(), values[rows].clone()
            case "refill":
                fresh = cache(len(keys), length, seed=100 + step)
                keys.copy_(fresh[0]), values.copy_(fresh[1])
            case "middle":
                # From some page on it is another text.
                fresh, at = cache(len(keys), length, seed=200 + step), data.draw(st.integers(0, 63))
                keys[:, :, at:], values[:, :, at:] = fresh[0][:, :, at:], fresh[1][:, :, at:]
            case "copy":
                keys, values = keys.clone(), values.clone()
        start = [0] * len(keys)
        if not aligned:
            start = data.draw(st.sampled_from([start, [min(3, held - 1)] * len(keys)]))
        find(indexes, (keys, values), start, [held - start[0]] * len(keys), aligned=aligned)


def test_a_layer_whose_keys_are_the_same_is_told_by_the_others() -> None:
    """The first layer's keys depend on their token alone: texts that differ early agree later."""
    indexes = Indexes()
    first, second = cache(1, 64, seed=1), cache(1, 64, seed=2)
    sites = [("a", SCOUT, False), ("b", SCOUT, False)]

    def both() -> tuple[list[CacheIndex], int]:
        return indexes.find(sites, [first, second], [[0], [0]], [[64], [64]])

    both()
    # Another token at 9: one row of the first layer, every row from there on of the second.
    for x, at in ((first, slice(9, 10)), (second, slice(9, 64))):
        for part in x:
            part[:, :, at] += 1
    found, rebuilt = both()
    assert rebuilt == 2 * 7  # all but the first page, at both
    for index, pair in zip(found, (first, second), strict=True):
        check(index, *pair, [0], [64])


def test_a_reordered_batch_keeps_its_records() -> None:
    indexes, (keys, values) = Indexes(), cache(3, 64)
    find(indexes, (keys, values), [0] * 3, [64] * 3)
    rows = [2, 0, 2]
    pair = keys[rows].clone(), values[rows].clone()
    del keys, values
    (index,), rebuilt = indexes.find([("a", SCOUT, False)], [pair], [[0] * 3], [[64] * 3])
    assert rebuilt == 0
    assert index.fill(*pair, [64] * 3) == 0
    check(index, *pair, [0] * 3, [64] * 3)


def test_indexes_go_with_their_caches() -> None:
    indexes = Indexes()
    pair = cache(1, 160)
    find(indexes, pair, [0], [160])
    one = indexes.nbytes
    assert one > 0
    for seed in range(5):
        pair = cache(1, 160, seed)
        gc.collect()
        find(indexes, pair, [0], [160])
    assert indexes.nbytes <= 2 * one


def test_an_index_can_be_dropped() -> None:
    indexes, pair = Indexes(), cache(1, 64)
    index, _ = find(indexes, pair, [0], [64])
    assert indexes in Indexes.everywhere()
    pair[0][:, :, 8:12] += 1  # in the midst of a page, between the rows that are marked
    pair[1][:, :, 8:12] += 1
    assert indexes.drop(lambda held: held is index) == 1
    other, _ = find(indexes, pair, [0], [64])
    assert other is not index


def test_inference_mode_and_back() -> None:
    indexes = Indexes()
    with torch.inference_mode():
        pair = cache(1, 96)
        find(indexes, pair, [0], [20])
    with torch.no_grad():
        find(indexes, pair, [0], [60])
    with torch.inference_mode():
        index, rebuilt = find(indexes, pair, [0], [96])
    assert rebuilt == 0
    assert not any(pool.is_inference() for pool in index.records[8])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_marks_see_a_single_bit(dtype: torch.dtype) -> None:
    keys, values = (x.to(dtype) for x in cache(1, 64))
    index = CacheIndex(SCOUT, False, keys, values)
    index.fill(keys, values, [64])
    assert bool(index.last_page_holds(keys, values, [0]))
    integers = {2: torch.int16, 8: torch.int64}[dtype.itemsize]
    values[0, 1, 63, 2].view(integers).bitwise_xor_(1)
    assert not bool(index.last_page_holds(keys, values, [0]))
