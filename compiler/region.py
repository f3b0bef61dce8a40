"""The part of a normal-form graph around one node, as a module that can be compiled by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..passes.classify_tokens import Classified
from ..passes.graph_tools import calls, module_path
from ..passes.result import Declined, Site
from ..passes.token_axes import BATCH, TOKEN, Kind, Mixed, Value
from .arguments import nearest

_ROWS = 64
_FORWARD = 8  # calls after a node that no attention was made of


@dataclass(frozen=True)
class Graph:
    """A model's normal form, and what the passes said of it.

    Attributes:
        module, classified, sites, declined: as the pipeline has them.
        vocabulary: rows of the table that the tokens index.
    """

    module: fx.GraphModule
    classified: Classified
    sites: list[Site]
    declined: list[Declined]
    vocabulary: int

    def named(self) -> dict[str, fx.Node]:
        """Every attention by its site's name; those that are no site by their module's path."""
        nodes = {node.name: node for node in self.module.graph.nodes}
        found = {site.name: nodes[site.node] for site in self.sites}
        for node in calls(self.module.graph, torch.ops.memcompile.attention.default):
            if node not in found.values():
                found.setdefault(module_path(node) or node.name, node)
        return found

    def focus(self, site: str | None) -> tuple[fx.Node, Declined | None]:
        """The node that a region is cut around, and the decline that names it: the attention called
        `site`; else the first decline that has a node in the graph; else the first attention.

        Raises:
            ValueError: there is no such attention, or nothing to cut around.
        """
        named = self.named()
        if site is not None:
            if site not in named:
                raise ValueError(f"no attention is called {site!r}{nearest(site, named)}")
            return named[site], None
        nodes = {node.name: node for node in self.module.graph.nodes}
        for declined in self.declined:
            name = declined.node.removeprefix("%").split(" ")[0]
            if name in nodes:
                return nodes[name], declined
        if self.declined:
            raise ValueError(
                f"what was declined has no node of its own ({self.declined[0].node}): "
                f"{self.declined[0].reason}; name an attention: {', '.join(named) or 'none found'}"
            )
        if not named:
            raise ValueError("the graph holds no attention and nothing was declined")
        return next(iter(named.values())), None


def sinks(focus: fx.Node, declined: Declined | None) -> list[fx.Node]:
    """The values that a region computes, so that it declines what the whole model does."""
    attention = torch.ops.memcompile.attention.default
    if focus.target is attention or declined is None:
        return [focus]
    if declined.rule == "find_sites":
        for node in _onward([focus], 64):
            if node.target is attention:
                return [node]
    if declined.rule in ("fold_attention", "undo_repeat_kv"):
        near = _onward([focus], _FORWARD)
        # Those at the end: another user of a node on the way would be another graph.
        return [
            node for node in near if _is_tensor(node) and not any(u in near for u in node.users)
        ]
    if not _is_tensor(focus):
        return [node for node in _onward([focus], 4) if _is_tensor(node)] or [focus]
    return [focus]


def _onward(start: list[fx.Node], most: int) -> list[fx.Node]:
    """Nodes that are computed from `start`, nearest first."""
    found, seen = list(start), set(start)
    for node in found:
        for user in node.users:
            if user not in seen and user.op == "call_function" and len(found) <= most:
                seen.add(user)
                found.append(user)
    return found


@dataclass
class Cut:
    """A region: nodes in graph order, and the values at its edge that random tables replace."""

    nodes: list[fx.Node]
    edge: list[fx.Node]
    sinks: list[fx.Node]
    whole: bool
    graph: Graph
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = min(_ROWS, self.graph.vocabulary)

    @property
    def takes_positions(self) -> bool:
        inputs = [n for n in self.graph.module.graph.nodes if n.op == "placeholder"]
        return len(inputs) > 1 and inputs[1] in self.nodes


def cut(graph: Graph, ends: list[fx.Node], depth: int) -> Cut:
    """What `ends` are computed from. Beyond `depth` operations a value that belongs to its own
    token is not followed further: it becomes a part of the edge."""
    levels = dict.fromkeys(ends, 0)
    waiting, edge, whole = list(ends), [], True
    for node in waiting:
        for source in node.all_input_nodes:
            if source in levels:
                continue
            levels[source] = levels[node] + 1
            if levels[source] > depth and _cuttable(source, graph.classified):
                edge.append(source)
                whole = False
            else:
                waiting.append(source)
    kept = set(waiting)
    order = list(graph.module.graph.nodes)
    return Cut(
        [n for n in order if n in kept], [n for n in order if n in set(edge)], ends, whole, graph
    )


def _cuttable(node: fx.Node, classified: Classified) -> bool:
    known = classified.values.get(node)
    return (
        node.op == "call_function"
        and _is_tensor(node)
        and node.meta["val"].is_floating_point()
        and isinstance(known, Value)
        and known.kind is Kind.LOCAL
        and known.exact is None
        and sum(axis.count(TOKEN) for axis in known.axes) == 1
        and sum(axis.count(BATCH) for axis in known.axes) == 1
    )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


@dataclass(frozen=True)
class Edge:
    """How a table's row becomes the value of a token at the edge: `[B, T, *numbers]`, permuted, and
    merged to the axes of the value (-1 for B, -2 for T)."""

    numbers: tuple[int, ...]
    order: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, value: Value) -> Edge:
        numbers: list[int] = []
        order: list[int] = []
        axes: list[tuple[int, ...]] = []
        for axis in value.axes:
            sizes = []
            for atom in axis:
                if isinstance(atom, int):
                    order.append(2 + len(numbers))
                    numbers.append(atom)
                    sizes.append(atom)
                else:
                    order.append(0 if atom == BATCH else 1)
                    sizes.append(-1 if atom == BATCH else -2)
            axes.append(tuple(sizes))
        return cls(tuple(numbers), tuple(order), tuple(axes))

    @property
    def width(self) -> int:
        width = 1
        for number in self.numbers:
            width *= number
        return width

    def value(self, rows: Tensor) -> Tensor:
        """The value, of ``rows[B, T, width]``."""
        batch, tokens = rows.shape[:2]
        spread = rows.reshape(batch, tokens, *self.numbers).permute(self.order)
        sizes: list[Any] = []
        for axis in self.axes:
            size: Any = 1
            for part in axis:
                size = size * {-1: batch, -2: tokens}.get(part, part)
            sizes.append(size)
        return spread.reshape(sizes)


def edge_of(node: fx.Node, classified: Classified) -> Edge:
    known = classified.values[node]
    assert isinstance(known, Value)
    return Edge.of(known)


class Part(nn.Module):
    """A region run by itself: the random weights of `values`, its nodes in order, logits out."""

    def __init__(self, region: Cut, values: dict[fx.Node, Tensor]) -> None:
        super().__init__()
        self.region = region
        self.held: dict[fx.Node, str] = {}
        for node, tensor in values.items():
            name = f"value_{len(self.held)}"
            self.held[node] = name
            if (tensor.is_floating_point() and node.op != "get_attr") or is_parameter(node):
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        self.base = nn.Parameter(torch.randn(region.rows, 8), False)

    def run(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        region, known = self.region, dict[fx.Node, Any]()
        inputs = [n for n in region.graph.module.graph.nodes if n.op == "placeholder"]
        known[inputs[0]] = input_ids
        if len(inputs) > 1:
            known[inputs[1]] = position_ids
        rows = input_ids % region.rows
        for node in region.edge:
            looked = nn.functional.embedding(rows, self.get_parameter(self.held[node]))
            known[node] = edge_of(node, region.graph.classified).value(looked)
        for node in region.nodes:
            if node.op == "get_attr":
                known[node] = getattr(self, self.held[node])
            elif node.op == "call_function":
                arguments, named = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                target: Callable[..., Any] = node.target  # type: ignore[assignment]
                known[node] = target(*arguments, **named)
        made = [known[node] for node in region.sinks]
        if is_site(region):
            return made[0].transpose(1, 2).flatten(2)  # type: ignore[no-any-return]
        if is_output(region):
            return made[0]  # type: ignore[no-any-return]
        logits = nn.functional.embedding(rows, self.base)
        for value in made:
            # Its own decline, were there no other, is of words that no other operation has.
            logits = logits + value.to(logits.dtype).median()
        return logits


class TokensPart(Part):
    """Of a model that takes tokens alone."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, None)


class PositionsPart(Part):
    """Of a model that takes positions too."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.run(input_ids, position_ids)


def is_site(region: Cut) -> bool:
    """Whether the region ends in one attention and nothing else."""
    return [n.target for n in region.sinks] == [torch.ops.memcompile.attention.default]


def is_parameter(node: fx.Node) -> bool:
    """Whether a weight was a parameter of the model, and not a constant or buffer."""
    owner = node.graph.owning_module
    return isinstance(getattr(owner, str(node.target), None), nn.Parameter)


def is_output(region: Cut) -> bool:
    """Whether the region ends in the model's own logits, and they are what was declined."""
    output = next(n for n in reversed(region.graph.module.graph.nodes) if n.op == "output")
    return region.sinks == [output.args[0]] and not mixed(region.sinks[0], region.graph.classified)


def part(region: Cut, values: dict[fx.Node, Tensor]) -> Part:
    """The region as a module in eval mode."""
    kind: Callable[..., Part] = partial(PositionsPart if region.takes_positions else TokensPart)
    return kind(region, values).eval()


def mixed(node: fx.Node, classified: Classified) -> bool:
    """Whether no step is known for the node's value."""
    return isinstance(classified.values.get(node), Mixed)
