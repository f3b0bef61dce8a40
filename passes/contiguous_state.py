"""Step graphs without a host: state is contiguous, and there are no page tables to be given.

What `make_functional` and `make_paged` share. Both results take tokens, position, lengths and, for
every site, what `places.contiguous_names` lists.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..models import portable
from ..models.memory.places import (
    Place,
    SitePlaces,
    contiguous_name,
    contiguous_names,
    is_table,
)
from ..models.memory.site import state_names
from .graph_tools import aten
from .remember import _is_write

ops = torch.ops.memcompile


@dataclass(frozen=True)
class Slot:
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


class Rewriter(ABC):
    """Copies a step graph, state inputs replaced by contiguous ones."""

    def __init__(self, step: fx.GraphModule, sites: Sequence[SitePlaces], ragged: bool) -> None:
        self.step, self.sites = step, sites
        self.graph = fx.Graph()
        self.copied: dict[fx.Node, Any] = {}
        self.slots: dict[fx.Node, Slot] = {}
        self.state: dict[tuple[int, str], fx.Node] = {}  # as it stands at this point of the graph
        inputs = [node for node in step.graph.nodes if node.op == "placeholder"]
        for node in inputs[: 3 if ragged else 2]:
            self.copied[node] = self.graph.placeholder(node.name)
        self.tokens, self.position = (self.copied[node] for node in inputs[:2])
        given = iter(inputs[3:])
        for number, site in enumerate(sites):
            for slot in slots_of(number, site):
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

    def slot(self, node: Any) -> Slot:
        found = self.slots.get(node)
        if found is None:
            raise AssertionError(f"{node}: expected an input of the step graph")
        return found

    def held(self, slot: Slot) -> fx.Node:
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

    def place(self, slot: Slot) -> Place:
        return self.sites[slot.site].places[slot.store]

    def run(self) -> fx.GraphModule:
        for node in self.step.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                self.output(node)
            elif node.target is operator.getitem and isinstance(
                parts := self.copied.get(node.args[0]), tuple
            ):
                self.copied[node] = parts[node.args[1]]
            elif any(source in self.slots for source in node.all_input_nodes):
                self.rewrite(node)
            else:
                self.copied[node] = self.keep(node)
        self.graph.eliminate_dead_code(is_impure_node=writes)
        self.graph.lint()
        return fx.GraphModule(self.step, self.graph, "Step")

    def keep(self, node: fx.Node) -> fx.Node:
        """Copies an operation that touches no state."""
        return self.graph.node_copy(node, lambda n: self.copied[n])

    @abstractmethod
    def rewrite(self, node: fx.Node) -> None:
        """Copies an operation that touches state."""

    @abstractmethod
    def output(self, node: fx.Node) -> None:
        """Copies the output."""


def writes(node: fx.Node) -> bool:
    return _is_write(node) or node.target is aten.copy_.default


def slots_of(number: int, site: SitePlaces) -> list[Slot]:
    """What the step graph's inputs for a site are, in the order of `state_names`."""
    slots, store, names = [], -1, state_names(site.memory)
    for at, name in enumerate(names):
        table = is_table(name)
        store += table
        # A table stands before the tensors that its pages number.
        slots.append(Slot(number, store, contiguous_name(names[at + table]), table))
    return slots
