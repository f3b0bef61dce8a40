"""Step graphs in the operations of `models.ops`, contiguous state as pages, written in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ..models import contiguous, portable
from ..models.memory import lists
from ..models.memory.places import SitePlaces
from .contiguous_state import Rewriter, Slot, slots_of
from .graph_tools import aten


class _Paged(Rewriter):
    """`make_paged`."""

    def __init__(self, step: fx.GraphModule, sites: Sequence[SitePlaces], ragged: bool) -> None:
        super().__init__(step, sites, ragged)
        self.views: dict[tuple[int, str], fx.Node] = {}
        self.tables: dict[Any, tuple[fx.Node, fx.Node]] = {}

    def rewrite(self, node: fx.Node) -> None:
        if node.target is lists.account:
            slot = self.slot(node.args[0])
            rest = fx.node.map_arg(node.args[1:], lambda n: self.copied[n])
            made = self.call(portable.operator("account"), self.evicted(slot.site), *rest)
            self.call(aten.copy_.default, self.given[slot.site, slot.name], made)
            self.copied[node] = made  # stands for the pages read, which nothing is told of
            return
        tables = [self.slots[n] for n in node.all_input_nodes if self._is_table(n)]
        position = self.table(tables[0])[1] if tables else self.position

        def given(source: fx.Node) -> fx.Node:
            slot = self.slots.get(source)
            if slot is None:
                made: fx.Node = self.copied[source]
                return position if made is self.position else made
            return self.table(slot)[0] if slot.table else self.view(slot)

        self.copied[node] = self.graph.node_copy(node, given)

    def _is_table(self, node: fx.Node) -> bool:
        return node in self.slots and self.slots[node].table

    def view(self, slot: Slot) -> fx.Node:
        """The tensor as the memory operations take it: pages, or rows of an index."""
        key = (slot.site, slot.name)
        if slot.name in ("state", "norm"):
            return self.held(slot)
        if key not in self.views:
            size = self.place(slot).size if slot.name in ("keys", "values") else 0
            self.views[key] = self.call(contiguous.as_pages, self.held(slot), size)
        return self.views[key]

    def table(self, slot: Slot) -> tuple[fx.Node, fx.Node]:
        """A page table [B, Hkv, pages], and the position [B] by whose pages it is numbered."""
        place, site = self.place(slot), self.sites[slot.site]
        held, exact = self.held(slot), slot.name == "keys"
        anchor = None
        if not place.grows:
            grown = [i for i, other in enumerate(site.places) if other.grows]
            anchor = grown[-1] if grown else None
        # Sites alike share a table, as they do in an engine.
        above = site.places[anchor] if anchor is not None else None
        key: Any = (place, above, exact, site.kv_heads)
        if site.memory.account is not None:
            key = slot.site
            if key not in self.tables:
                given = (self.evicted(key), self.position, self.lengths, place.size)
                self.tables[key] = (
                    self.call(contiguous.table_of_resident, *given),
                    self.position,
                )
        if key not in self.tables:
            slots = place.size if exact else 1
            if anchor is None:
                made = self.call(
                    contiguous.page_table,
                    *(held, self.position, self.lengths, place.size, slots, place.pinned),
                    place.reach,
                )
            else:
                top = next(s for s in slots_of(slot.site, site) if s.table and s.store == anchor)
                made = self.call(
                    contiguous.page_table_under,
                    *(held, self.held(top), self.position, self.lengths, place.size, slots),
                    *(place.pinned, place.reach, site.places[anchor].size // place.size),
                )
            table, position = self.parts(made, 2)
            self.tables[key] = (table, position)
        return self.tables[key]

    def output(self, node: fx.Node) -> None:
        (results,) = node.args
        self.graph.output((self.copied[results[0]],))  # type: ignore[index]


def make_paged(step: fx.GraphModule, sites: Sequence[SitePlaces], ragged: bool) -> fx.GraphModule:
    """A step graph on contiguous state, in the memory operations of `models.ops`.

    Returns:
        (tokens, position, lengths if ragged, state...) -> (logits,), the state written in place.
    """
    return _Paged(step, sites, ragged).run()
