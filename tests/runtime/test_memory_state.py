"""Page assignment: owners, growth, recycling, rewind, fork; and that no history leaks."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_float64
from torch import Tensor

from memcompile.models.memory import Dense, Scout
from memcompile.models.memory.read import eager, emit_read, emit_write
from memcompile.models.memory.site import SiteTensors
from memcompile.models.memory.spec import Archive, Memory, Pages
from memcompile.runtime.memory_state import MemoryState
from memcompile.runtime.page_table import TableKey
from memcompile.runtime.site_layout import SiteLayout, Store

DENSE = Dense(8).memory(0, 0)
SCOUT = Scout(budget=32, page_size=8, sinks=8, window=8).memory(2, 0)
HEADS, KEY, VALUE = 2, 6, 5


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMCOMPILE_POISON", "1")
        yield


def layout(name: str, memory: Memory = DENSE, window: int = 0) -> SiteLayout:
    return SiteLayout(name, HEADS, KEY, VALUE, torch.float64, memory, window)


SITES = [layout("dense"), layout("scout", SCOUT), layout("sliding", DENSE, 13)]


def states(batch: int = 3, max_context: int | None = None) -> MemoryState:
    return MemoryState(SITES, batch, "cpu", max_context)


class Driven:
    """A state together with every token its sequences were given."""

    def __init__(self, state: MemoryState, seed: int = 0) -> None:
        self.state = state
        self.make = torch.Generator().manual_seed(seed)
        self.tokens: list[list[Tensor]] = [[] for _ in range(state.batch)]

    def append(self, lengths: list[int], tokens: list[list[Tensor]] | None = None) -> list[Tensor]:
        """Appends random tokens, or the given ones, and reads; one output [B,H,n,Dv] a site."""
        start = self.state.position
        for b, n in enumerate(lengths):
            del self.tokens[b][start[b] :]
            for i in range(n):
                drawn = torch.randn(3, 6, generator=self.make, dtype=torch.float64)
                self.tokens[b].append(tokens[b][start[b] + i] if tokens else drawn)
        width = max(lengths)
        new = torch.full((len(lengths), HEADS, width, 3, 6), torch.nan, dtype=torch.float64)
        for b, n in enumerate(lengths):
            for i in range(n):
                for head in range(HEADS):
                    new[b, head, i] = self.tokens[b][start[b] + i] * (head + 1)
        at = torch.tensor(start, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
        self.state.reserve(lengths)
        flat, outs = self.state.tensors(), []
        for site in self.state.layouts:
            mine = SiteTensors.take(site.memory, flat)
            flat = flat[3 + len(site.memory.fields) :]
            query, key, value = new[..., 0, :], new[..., 1, :], new[..., 2, :VALUE]
            emit_write(eager, site.memory, mine, key, value, *at)
            outs.append(emit_read(
                eager, site.memory, mine, "policy", query, *at,
                scale=0.4, softcap=0.0, window=site.window, dtype=query.dtype,
            )[0])  # fmt: skip
        self.state.advance(lengths)
        return outs

    def check_pages(self) -> None:
        """Every page has one owner or is free, and exactly the pages in use are assigned."""
        state = self.state
        for key, table in state._tables.items():
            size, reach = key.page_size, key.reach
            assert torch.equal(table.table, torch.from_numpy(table.host))
            owned = table.host[table.host >= 0].tolist()
            assert sorted([*owned, *table.free.tolist()]) == list(range(table.pages))
            for b, position in enumerate(state.position):
                assigned = (table.host[b] >= 0).all(0)
                assert (assigned == (table.host[b] >= 0).any(0)).all()
                pages = assigned.nonzero()[0].tolist()
                assert pages == list(range(int(table.first[b]), int(table.held[b])))
                assert int(table.held[b]) * size >= position
                oldest = 0 if reach is None else max(0, position - reach)
                assert not position or int(table.first[b]) * size <= oldest
        for site, pools in zip(state.layouts, state._pools, strict=True):
            assert {len(p) for p in pools[0]} == {state._tables[site.table_key].pages}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 21), min_size=3, max_size=3)),
        st.tuples(st.just("rewind"), st.lists(st.floats(0, 1), min_size=3, max_size=3)),
        st.tuples(st.just("fork"), st.none()),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(steps, st.booleans())
def test_any_history_ends_as_if_only_its_tokens_had_been_written(
    steps: list[tuple[str, list[float] | None]], fixed: bool
) -> None:
    driven = Driven(states(max_context=250 if fixed else None))
    for kind, given_ in steps:
        state = driven.state
        if kind == "append" and any(given_ or ()):
            driven.append([int(n) for n in given_ or ()])
        elif kind == "rewind":
            wanted = [int(p * f) for p, f in zip(state.position, given_ or (), strict=True)]
            sliding = state._tables[TableKey(HEADS, 8, reach=12)]
            lost = (
                sliding.first_needed(torch.tensor(wanted).numpy(), True) < sliding.first
            ).tolist()
            kept = [
                p if gone else w for p, w, gone in zip(state.position, wanted, lost, strict=True)
            ]
            state.rewind(kept)
            assert state.position == kept
            driven.tokens = [t[:p] for t, p in zip(driven.tokens, kept, strict=True)]
        elif kind == "fork":
            parent = driven
            driven = copy.copy(driven)
            driven.state, driven.tokens = state.fork(), [list(t) for t in driven.tokens]
            parent.append([5, 5, 5])  # what is written to the other is never seen here
        elif kind == "select":
            rows = [int(row) for row in given_ or ()]
            state.select(rows)
            driven.tokens = [list(driven.tokens[row]) for row in rows]
        elif kind == "reset":
            state.reset()
            driven.tokens = [[], [], []]
            assert state.position == [0, 0, 0]
        driven.check_pages()
    fresh = Driven(states())
    held = driven.state.position
    if any(held):
        fresh.append(held, driven.tokens)
    question = [[*t, *(torch.ones(3, 6, dtype=torch.float64),) * 9] for t in driven.tokens]
    for n in ([3, 3, 3], [6, 1, 0]):
        for one, two in zip(driven.append(n, question), fresh.append(n, question), strict=True):
            assert_close_to_float64(one, two, two, reduction=300)
    assert_same_full_records(driven.state, fresh.state)


@pytest.mark.parametrize("fixed", [None, 120])
def test_rows_are_repeated_dropped_and_reordered(fixed: int | None) -> None:
    driven = Driven(states(2, fixed))
    driven.append([60, 21])
    for rows in ([1, 0, 1, 1], [2, 1, 1, 3, 0], [1], [0, 0]):
        driven.state.select(rows)
        driven.tokens = [list(driven.tokens[row]) for row in rows]
        driven.check_pages()
        driven.append([int(n) for n in range(3, 3 + len(rows))])
        driven.check_pages()
        fresh = Driven(states(len(rows)))
        fresh.append(driven.state.position, driven.tokens)
        question = [[*t, torch.ones(3, 6, dtype=torch.float64)] for t in driven.tokens]
        ones = [1] * len(rows)
        for one, two in zip(
            driven.append(ones, question), fresh.append(ones, question), strict=True
        ):
            assert_close_to_float64(one, two, two, reduction=300)
        assert_same_full_records(driven.state, fresh.state)


def test_a_preallocated_memory_stays_so_for_more_rows() -> None:
    state = states(1, 120)
    driven = Driven(state)
    driven.append([20])
    state.select([0, 0, 0])
    driven.tokens = [list(driven.tokens[0]) for _ in range(3)]
    places = [t.data_ptr() for t in state.tensors()]
    driven.append([100] * 3)
    dense, sliding = slice(0, 3), slice(-3, None)
    assert [t.data_ptr() for t in state.tensors()[dense]] == places[dense]
    assert len(state.tensors()[sliding]) == 3


def test_reordering_rows_copies_no_page() -> None:
    state = states(3)
    Driven(state).append([30, 30, 30])
    before, table = [t.clone() for t in state.tensors()], state.tensors()[0].clone()
    state.select([2, 0, 1])
    assert torch.equal(state.tensors()[0], table[[2, 0, 1]])
    for one, two in zip(before[1:3], state.tensors()[1:3], strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


def test_what_is_held_can_be_taken_back() -> None:
    state = MemoryState([layout("sliding", DENSE, 13)], 1, "cpu")
    driven = Driven(state)
    driven.append([40])
    state.hold()
    for _ in range(30):
        driven.append([1])
    table = next(iter(state._tables.values()))
    assert table.first.tolist() == [(40 - 12) // 8]
    state.rewind(41)
    fresh = Driven(MemoryState([layout("sliding", DENSE, 13)], 1, "cpu"))
    fresh.append([41], driven.tokens)
    for one, two in zip(driven.append([9]), fresh.append([9], driven.tokens), strict=True):
        assert_close_to_float64(one, two, two, reduction=300)
    state.hold()
    driven.append([1])
    driven.check_pages()
    assert table.first.tolist() == [(50 - 12) // 8]


def assert_same_full_records(one: MemoryState, two: MemoryState) -> None:
    """Index records of full pages agree bit by bit, wherever the pages lie."""
    mine, theirs = (SiteTensors.take(SCOUT, state.tensors()[3:]) for state in (one, two))
    for b, position in enumerate(one.position):
        full = position // 8
        at = [site.page_table[b, :, :full].long() for site in (mine, theirs)]
        for field, other in zip(mine.index, theirs.index, strict=True):
            assert torch.equal(field[at[0]], other[at[1]])


def test_sliding_windows_keep_memory_bounded_without_end() -> None:
    state = MemoryState([layout("sliding", DENSE, 13)], 2, "cpu")
    driven = Driven(state)
    pages = set()
    for _ in range(40):
        driven.append([10, 6])
        driven.check_pages()
        pages.add(next(iter(state._tables.values())).pages)
    assert max(pages) <= 2 * 2 * 2 * (13 // 8 + 4)
    assert next(iter(state._tables.values())).first.tolist() == [47, 27]


def test_a_fixed_context_allocates_once_and_then_refuses() -> None:
    state = MemoryState([layout("a"), layout("b", SCOUT)], 2, "cpu", max_context=20)
    before = state.memory_bytes()
    places = [t.data_ptr() for t in state.tensors()]
    driven = Driven(state)
    driven.append([20, 5])
    assert [t.data_ptr() for t in state.tensors()] == places
    assert state.memory_bytes() == before
    table = state.tensors()[0].clone()
    with pytest.raises(ValueError, match="sequence 1 would hold 21 tokens, but max_context is 20"):
        state.reserve([0, 16])
    assert state.position == [20, 5]
    assert torch.equal(state.tensors()[0], table)
    state.reserve([0, 15])


def test_a_sliding_site_grows_within_a_fixed_context_only_for_long_calls() -> None:
    state = MemoryState([layout("a", DENSE, 13)], 1, "cpu", max_context=400)
    driven, small = Driven(state), state.memory_bytes()
    for _ in range(30):
        driven.append([8])
    assert state.memory_bytes() == small
    driven.append([100])
    assert state.memory_bytes() > small


def test_growth_doubles_and_keeps_what_was_written() -> None:
    state = MemoryState([layout("a")], 1, "cpu")
    driven = Driven(state)
    sizes = []
    for _ in range(20):
        driven.append([8])
        sizes.append((state.tensors()[0].shape[2], len(state.tensors()[1])))
    assert sorted(set(sizes)) == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)]
    driven.check_pages()
    for page in range(20):
        for head in range(HEADS):
            at = int(state.tensors()[0][0, head, page])
            written = torch.stack(driven.tokens[0][8 * page : 8 * page + 8])[:, 1] * (head + 1)
            assert torch.equal(state.tensors()[1][at], written)


def test_running_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = states()
    Driven(state).append([9, 9, 9])
    before = [t.clone() for t in state.tensors()]
    made = MemoryState._new_pools

    def exhausted(self: MemoryState, store: Store, pages: int) -> list[Tensor]:
        if store.key.reach is not None:
            raise MemoryError
        return made(self, store, pages)

    monkeypatch.setattr(MemoryState, "_new_pools", exhausted)
    with pytest.raises(MemoryError):
        state.reserve([500, 0, 0])
    monkeypatch.undo()
    monkeypatch.setenv("MEMCOMPILE_POISON", "1")
    for one, two in zip(before, state.tensors(), strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))
    state.reserve([500, 0, 0])


def test_sites_alike_share_one_table() -> None:
    wide = Dense(16).memory(0, 0)
    state = MemoryState(
        [layout("a"), layout("b", SCOUT), layout("c", DENSE, 13), layout("d", wide)], 1, "cpu"
    )
    state.reserve([30])
    flat = state.tensors()
    b, c, d = 3, 6 + len(SCOUT.fields), 9 + len(SCOUT.fields)
    assert flat[0] is flat[b]
    assert len({id(flat[i]) for i in (0, c, d)}) == 3
    assert flat[0].shape[2] == 4
    assert flat[d].shape[2] == 2


def test_fresh_and_freed_pages_are_poisoned_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    state = states(batch=1)
    Driven(state).append([40])
    assert not state.tensors()[1].isnan().all()
    state.reset()
    assert all(t.isnan().all() for t in state.tensors() if t.is_floating_point())
    monkeypatch.setenv("MEMCOMPILE_POISON", "0")
    clean = states(batch=1)
    clean.reserve([40])
    assert not any(t.isnan().any() for t in clean.tensors() if t.is_floating_point())


def test_memory_bytes_are_the_bytes_of_what_is_held() -> None:
    state = MemoryState([layout("a")], 1, "cpu", max_context=64)
    pages = 8 * HEADS
    assert state.memory_bytes() == pages * 8 * (KEY + VALUE) * 8 + pages * 4


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MemoryState([], 1, "cpu"), r"names must be unique and at least one, got \[\]"),
        (lambda: MemoryState([layout("a")] * 2, 1, "cpu"), r"unique .* got \['a', 'a'\]"),
        (lambda: MemoryState(SITES, 0, "cpu"), r"batch must be at least 1, got 0"),
        (lambda: states(max_context=0), r"max_context must be at least 1 or None, got 0"),
        (
            lambda: MemoryState(
                [layout("a", Memory("m", Pages(), archive=Archive("states", 1)))], 1, "cpu"
            ),
            r"memory 'm' cannot be built",
        ),
        (lambda: states().reserve([1]), r"expected 3 whole numbers .* got \[1\]"),
        (lambda: states().reserve([1, 1, -1]), r"of at least 0, one a sequence"),
        (lambda: states().reserve([1.0, 1, 1]), r"expected 3 whole numbers"),
        (lambda: states().select([]), r"expected the numbers of one or more sequences, got \[\]"),
        (lambda: states().select([0.5]), r"one or more sequences, got \[0.5\]"),
        (lambda: states().select([0, 3]), r"rows \[0, 3\]: give numbers of 0 .. 2"),
        (lambda: states().advance([1, 0, 0]), r"advancing to \[1, 0, 0\] .* reserve the tokens"),
        (lambda: states().rewind(1), r"cannot rewind to \[1, 1, 1\]: .* hold \[0, 0, 0\] tokens"),
    ],
)  # fmt: skip
def test_refusals_say_what_was_given_and_how_to_mend(act: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()  # type: ignore[operator]


def test_a_state_goes_on_under_memories_that_need_no_more_than_it_holds() -> None:
    state = states()
    driven = Driven(state)
    driven.append([20, 3, 9])
    plain = [layout(site.name, DENSE, site.window) for site in SITES]
    forked = state.fork(plain)
    assert forked.layouts == tuple(plain) and forked.position == state.position
    # A page table, keys and values a site, and no index.
    assert [len(pools) for (pools,) in forked._pools] == [2, 2, 2]
    assert state.layouts == tuple(SITES)
    other = Driven(forked)
    other.tokens = copy.deepcopy(driven.tokens)
    other.append([1, 1, 1])
    other.check_pages()
    assert state.position == [20, 3, 9]
    driven.check_pages()
    sixteen = layout("dense", Dense(16).memory(0, 0))
    for sites in (SITES[:2], [*SITES[:2], layout("other")], [sixteen, *SITES[1:]]):
        with pytest.raises(ValueError, match="cannot go on as one of"):
            state.fork(sites)
    with pytest.raises(ValueError, match="cannot go on as one of"):
        forked.fork(SITES)


def test_rewinding_into_recycled_pages_is_refused_but_to_the_start_is_not() -> None:
    state = MemoryState([layout("sliding", DENSE, 13)], 1, "cpu")
    driven = Driven(state)
    driven.append([60])
    driven.append([1])
    with pytest.raises(ValueError, match=r"cannot rewind to \[30\].* slid out of a window of 13"):
        state.rewind(30)
    assert state.position == [61]
    state.rewind(60)
    state.rewind([0])
    assert state.position == [0]
    driven.check_pages()
