"""Step graphs without a host: state is contiguous, and there are no page tables to be given.

Both results take tokens, position, lengths and, for every site, what `places.contiguous_names`
lists. `make_functional` reads and writes it in the operations of `models.portable` and returns the
new state behind the logits; `make_paged` gives the memory operations views of it as pages, and
tables that follow from the position, and updates it in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..models import contiguous, portable
from ..models.memory import lists
from ..models.memory.places import Place, SitePlaces, contiguous_names
from ..models.memory.site import state_names
from .graph_tools import aten
from .remember import _is_write
from .result import Declined, NotRewritten

ops = torch.ops.memcompile


@dataclass(frozen=True)
class _Slot:
    """What an input of the step graph was: a table, or a tensor of the state.

    Attributes:
        site: its number in the list of sites.
        store: which of the site's places.
        name: of the contiguous tensor; of the table's own first tensor for a table.
        table: whether it is one.
    """

    site: int
    store: int
    name: str
    table: bool


class _Rewriter:
    """Copies a step graph, state inputs replaced by contiguous ones."""

    def __init__(self, step: fx.GraphModule, sites: Sequence[SitePlaces], ragged: bool) -> None:
        self.step, self.sites = step, sites
        self.graph = fx.Graph()
        self.copied: dict[fx.Node, Any] = {}
        self.slots: dict[fx.Node, _Slot] = {}
        self.state: dict[tuple[int, str], fx.Node] = {}  # as it stands at this point of the graph
        inputs = [node for node in step.graph.nodes if node.op == "placeholder"]
        for node in inputs[: 3 if ragged else 2]:
            self.copied[node] = self.graph.placeholder(node.name)
        self.tokens, self.position = (self.copied[node] for node in inputs[:2])
        given = iter(inputs[3:])
        for number, site in enumerate(sites):
            for slot in _slots(number, site):
                self.slots[next(given)] = slot
            for name in contiguous_names(site.memory):
                node = self.graph.placeholder(f"site{site.layer}_{name}")
                self.state[number, name] = node
        self.given = dict(self.state)
        self.made_room: dict[int, fx.Node] = {}
        if not ragged:
            count, batch = (self.call(aten.sym_size.int, self.tokens, i) for i in (1, 0))
            device = self.device()
            self.copied[inputs[2]] = self.call(
                aten.full.default, [batch], count, dtype=torch.int32, device=device
            )
        self.lengths = self.copied[inputs[2]]

    def device(self) -> torch.device:
        weights = [*self.step.parameters(), *self.step.buffers()]
        return weights[0].device if weights else torch.device("cpu")

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def parts(self, node: fx.Node, count: int) -> list[fx.Node]:
        return [self.call(operator.getitem, node, i) for i in range(count)]

    def slot(self, node: Any) -> _Slot:
        found = self.slots.get(node)
        if found is None:
            raise AssertionError(f"{node}: expected an input of the step graph")
        return found

    def held(self, slot: _Slot) -> fx.Node:
        return self.state[slot.site, slot.name]

    def evicted(self, number: int) -> fx.Node:
        """The account of a site once the new tokens have room."""
        if number not in self.made_room:
            memory = self.sites[number].memory
            room = (memory.sink_pages, memory.window_pages, memory.budget_pages)
            given = (self.state[number, "account"], self.position, self.lengths)
            made = self.call(portable.operator("evict"), *given, memory.page_size, *room)
            self.made_room[number] = self.state[number, "account"] = made
        return self.made_room[number]

    def place(self, slot: _Slot) -> Place:
        return self.sites[slot.site].places[slot.store]

    def run(self) -> fx.GraphModule:
        for node in self.step.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                self.output(node)
            elif node.target is operator.getitem and isinstance(
                parts := self.copied.get(node.args[0]),
                tuple,
            ):
                self.copied[node] = parts[node.args[1]]
            elif any(source in self.slots for source in node.all_input_nodes):
                self.rewrite(node)
            else:
                self.copied[node] = self.graph.node_copy(node, lambda n: self.copied[n])
        self.graph.eliminate_dead_code(is_impure_node=_writes)
        self.graph.lint()
        return fx.GraphModule(self.step, self.graph, "Step")

    def rewrite(self, node: fx.Node) -> None:
        raise NotImplementedError

    def output(self, node: fx.Node) -> None:
        raise NotImplementedError


def _writes(node: fx.Node) -> bool:
    return _is_write(node) or node.target is aten.copy_.default


def _slots(number: int, site: SitePlaces) -> list[_Slot]:
    """What the step graph's inputs for a site are, in the order of `state_names`."""
    slots, store, first = [], 0, "keys"
    names = {"key_pages": "keys", "value_pages": "values"}
    for name in state_names(site.memory):
        if name == "page_table" or name.startswith("table_"):
            if name != "page_table":
                store += 1
                first = f"{site.memory.fields[0]}_{name.removeprefix('table_')}"
            slots.append(_Slot(number, store, first, True))
        else:
            slots.append(_Slot(number, store, names.get(name, name), False))
    return slots


class _Functional(_Rewriter):
    """`make_functional`."""

    delta = False

    def rewrite(self, node: fx.Node) -> None:
        write = _WRITES.get(node.target)
        if write is not None:
            write(self, *node.args)
            return
        if node.target is aten.unsqueeze.default:
            return  # records as pages of one slot; a read takes them as they are
        read = _READS.get(node.target)
        if read is None:
            raise NotRewritten(
                "no engine without a host can be exported",
                [Declined(f"{node.target} reads pages by their tables", f"%{node}", "export")],
            )
        self.copied[node] = read(self, *node.args)

    def old(self, value: Any) -> Any:
        """An argument of the step graph, as it stands in this one."""
        return fx.node.map_arg(
            value, lambda n: self.held(self.slots[n]) if n in self.slots else self.copied[n]
        )

    def new(self, name: str, *args: Any) -> fx.Node:
        return self.call(portable.operator(name), *args)

    def append(
        self, key: Any, value: Any, table: Any, position: Any, lengths: Any, keys: Any,
        values: Any, index: Any, fields: Any, record_table: Any = None,
    ) -> None:  # fmt: skip
        place, number = self.place(self.slot(table)), self.slot(table).site
        records = self.place(self.slot(record_table)) if record_table is not None else place
        written = [keys, values, *index]
        given = self.old((key, value, position, lengths, keys, values, [*index]))
        if self.sites[number].memory.account is not None:
            self.evicted(number)
            inside = self.call(contiguous.within_page, *given[2:4], place.size)
            given = (*given[:2], inside, *given[3:])
        made = self.new(
            "append_index",
            *given,
            *(fields, place.size, place.pinned, place.reach, records.pinned),
        )
        for old, new in zip(written, self.parts(made, len(written)), strict=True):
            slot = self.slot(old)
            self.state[slot.site, slot.name] = new
        self.new_keys = self.copied[key]

    def append_apart(
        self, key: Any, value: Any, table: Any, record_table: Any, position: Any, lengths: Any,
        keys: Any, values: Any, index: Any, fields: Any,
    ) -> None:  # fmt: skip
        self.append(
            *(key, value, table, position, lengths, keys, values, index, fields, record_table)
        )

    def fold(
        self, children: Any, child_table: Any, table: Any, position: Any, lengths: Any,
        index: Any, fields: Any, child_size: Any, ratio: Any,
    ) -> None:  # fmt: skip
        below, place = (self.place(self.slot(t)) for t in (child_table, table))
        made = self.new(
            "fold",
            self.new_keys,
            *self.old(([*children], position, lengths, [*index])),
            *(fields, child_size, ratio, below.pinned, place.pinned),
        )
        for old, new in zip(index, self.parts(made, len(index)), strict=True):
            slot = self.slot(old)
            self.state[slot.site, slot.name] = new

    def select(self, name: str) -> Callable[..., fx.Node]:
        def made(query: Any, index: Any, fields: Any, table: Any, *rest: Any) -> fx.Node:
            place = self.place(self.slot(table))
            if not place.grows:
                raise AssertionError(f"{name}: records of a whole table cannot take turns")
            return self.new(name, *self.old((query, [*index])), fields, *self.old(rest))

        return made

    def among(self, query: Any, index: Any, fields: Any, table: Any, *rest: Any) -> fx.Node:
        place = self.place(self.slot(table))
        candidates, *others = self.old(rest)
        return self.new(
            "score_select.among",
            *self.old((query, [*index])),
            *(fields, self.long(candidates), *others, place.pinned),
        )

    def attend(
        self, query: Any, keys: Any, values: Any, bias: Any, table: Any, pages: Any, exclude: Any,
        position: Any, lengths: Any, scale: Any, softcap: Any, window: Any, span: Any,
    ) -> fx.Node:  # fmt: skip
        place = self.place(self.slot(table))
        keys, values = (self.whole(x) for x in (keys, values))
        if bias is not None:
            bias = self.call(aten.squeeze.dims, self.whole(bias), [3])
        pages = None if pages is None else self.long(self.old(pages))
        return self.new(
            "attend",
            *(self.old(query), keys, values, bias, pages, exclude, *self.old((position, lengths))),
            *(scale, softcap, window, place.size, place.size // span, place.pinned),
        )

    def attend_page_lse(
        self, query: Any, keys: Any, values: Any, bias: Any, table: Any, pages: Any, exclude: Any,
        position: Any, lengths: Any, scale: Any, softcap: Any, window: Any, span: Any,
    ) -> fx.Node:  # fmt: skip
        if bias is not None or pages is not None or span != 1:
            raise AssertionError("attend.page_lse: expected a read of every page of keys")
        account = self.evicted(self.slot(table).site)
        given = self.old((query, keys, values))
        return self.new(
            "attend.page_lse",
            *(*given, account, *self.old((position, lengths)), scale, softcap, window),
            self.place(self.slot(table)).size,
        )

    def account(self, account: Any, *rest: Any) -> fx.Node:
        slot = self.slot(account)
        made = self.new("account", self.held(slot), *self.old(rest))
        self.state[slot.site, slot.name] = made
        return made  # stands for the pages that were read, which nothing is told of

    def whole(self, node: fx.Node) -> fx.Node:
        """A tensor of the state; records, which reads take as pages of one slot, as they are."""
        if node in self.slots:
            return self.held(self.slots[node])
        if node.target is not aten.unsqueeze.default:
            raise AssertionError(f"{node}: expected keys and values, or their records")
        return self.held(self.slot(node.args[0]))

    def summaries(
        self, query: Any, keys: Any, values: Any, table: Any, pages: Any, logits: Any,
        value_mean: Any, log_count: Any, *rest: Any,
    ) -> fx.Node:  # fmt: skip
        given = self.old((query, keys, values, pages, logits, value_mean, log_count))
        return self.new(
            "attend.summaries", *given, *self.old(rest), self.place(self.slot(table)).size
        )

    def lists_held(self, query: Any, table: Any, *rest: Any) -> fx.Node:
        # Of the table only its sequences and heads count.
        keys = self.held(self.slot(table))
        return self.call(lists.held, self.old(query), keys, *self.old(rest))

    def entering(
        self, query: Any, keys: Any, values: Any, table: Any, position: Any, lengths: Any,
        window: Any,
    ) -> fx.Node:  # fmt: skip
        place = self.place(self.slot(table))
        given = self.old((query, keys, values, position, lengths))
        return self.new("entering", *given, window, place.size, place.pinned)

    def state_step(
        self, query: Any, key: Any, value: Any, decay: Any, beta: Any, lengths: Any, state: Any,
        norm: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        if beta is not None and not self.delta:
            raise NotRewritten(
                "no portable engine can be exported",
                [
                    Declined(
                        "a delta rule needs its rows one after the other, for which standard "
                        "operations have no form; export aoti or onnx-ort, or a policy with "
                        "write='additive'",
                        "state_step",
                        "export",
                    )
                ],
            )
        written = [state] if norm is None else [state, norm]
        if beta is None:
            given = self.old((query, key, value, decay, lengths, state, norm))
            made = self.new("additive_state", *given)
        else:
            given = self.old((query, key, value, decay, beta, lengths, state))
            made = self.new("delta_state", *given)
        out, lse, *kept = self.parts(made, 2 + len(written))
        for old, new in zip(written, kept, strict=True):
            slot = self.slot(old)
            self.state[slot.site, slot.name] = new
        return out, lse

    def long(self, node: fx.Node) -> fx.Node:
        return self.call(aten.to.dtype, node, torch.int64)

    def output(self, node: fx.Node) -> None:
        (results,) = node.args
        logits = self.copied[results[0]]  # type: ignore[index]
        self.graph.output((logits, *self.state.values()))


_WRITES: Mapping[Any, Callable[..., None]] = {
    ops.append_index.default: _Functional.append,
    ops.append_index.record_table: _Functional.append_apart,
    ops.append_index.fold: _Functional.fold,
}
_READS: Mapping[Any, Callable[..., Any]] = {
    ops.score_select.default: lambda self, *args: self.select("score_select")(*args),
    ops.score_select.page_logits: lambda self, *args: self.select("score_select.page_logits")(
        *args
    ),
    ops.score_select.among: _Functional.among,
    ops.attend.default: _Functional.attend,
    ops.attend.summaries: _Functional.summaries,
    ops.attend.page_lse: _Functional.attend_page_lse,
    lists.account: _Functional.account,
    lists.held: _Functional.lists_held,
    lists.entering: _Functional.entering,
    ops.state_step.default: _Functional.state_step,
    ops.state_chunk.default: _Functional.state_step,
}


class _Paged(_Rewriter):
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

    def view(self, slot: _Slot) -> fx.Node:
        """The tensor as the memory operations take it: pages, or rows of an index."""
        key = (slot.site, slot.name)
        if slot.name in ("state", "norm"):
            return self.held(slot)
        if key not in self.views:
            size = self.place(slot).size if slot.name in ("keys", "values") else 0
            self.views[key] = self.call(contiguous.as_pages, self.held(slot), size)
        return self.views[key]

    def table(self, slot: _Slot) -> tuple[fx.Node, fx.Node]:
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
                top = next(s for s in _slots(slot.site, site) if s.table and s.store == anchor)
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


def make_functional(
    step: fx.GraphModule, sites: Sequence[SitePlaces], ragged: bool, delta: bool = False
) -> fx.GraphModule:
    """A step graph on contiguous state, in portable operations.

    Args:
        step: a graph of `remember.StepGraph`.
        sites: its sites, in order.
        ragged: whether it takes lengths; otherwise every row is valid.
        delta: the runtime has the delta rule as an operator, for which standard ones have no form.

    Returns:
        (tokens, position, lengths if ragged, state...) -> (logits, new state...), pure.

    Raises:
        NotRewritten: a memory that no portable operation covers; the reason is said.
    """
    rewriter = _Functional(step, sites, ragged)
    rewriter.delta = delta
    return rewriter.run()


def make_paged(step: fx.GraphModule, sites: Sequence[SitePlaces], ragged: bool) -> fx.GraphModule:
    """A step graph on contiguous state, in the memory operations of `models.ops`.

    Returns:
        (tokens, position, lengths if ragged, state...) -> (logits,), the state written in place.
    """
    return _Paged(step, sites, ragged).run()
