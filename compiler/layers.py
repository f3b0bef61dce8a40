"""Where the boxes of a drawn graph stand: layers by longest path, few crossings, bent lines."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

_SWEEPS = 12
_BEND = 18.0  # room that a line passing a layer takes


@dataclass(frozen=True)
class Layout:
    """Centres of the boxes and the points each line goes through, in pixels.

    Attributes:
        at: node -> (x, layer).
        lines: (source, target) -> x of the line in each layer, from the source's on.
        width: of the whole.
        layers: how many.
    """

    at: Mapping[Any, tuple[float, int]]
    lines: Mapping[tuple[Any, Any], list[tuple[float, int]]]
    width: float
    layers: int


def layout(flow: nx.DiGraph, widths: Mapping[Any, float], gap: float) -> Layout:
    """Lays out an acyclic graph from top to bottom.

    Args:
        widths: width of each node's box.
        gap: least distance between two boxes of a layer.
    """
    rank = {node: i for i, layer in enumerate(nx.topological_generations(flow)) for node in layer}
    for node in reversed(list(nx.topological_sort(flow))):
        # A source stands right above what reads it.
        if not flow.in_degree(node) and flow.out_degree(node):
            rank[node] = min(rank[user] for user in flow.successors(node)) - 1
    chains: dict[tuple[Any, Any], list[Hashable]] = {}
    bent = nx.DiGraph()
    bent.add_nodes_from(flow)
    for source, target in flow.edges:
        bends = [("bend", source, target, i) for i in range(rank[source] + 1, rank[target])]
        rank.update({bend: bend[3] for bend in bends})
        chains[source, target] = [source, *bends, target]
        nx.add_path(bent, chains[source, target])
    layers: list[list[Any]] = [[] for _ in range(max(rank.values(), default=0) + 1)]
    for node in nx.lexicographical_topological_sort(bent, key=str):
        layers[rank[node]].append(node)
    _untangle(bent, layers)
    size = {node: widths.get(node, _BEND) for node in rank}
    x = _place(bent, layers, size, gap)
    left = min((x[node] - size[node] / 2 for node in x), default=0.0)
    right = max((x[node] + size[node] / 2 for node in x), default=0.0)
    return Layout(
        {node: (x[node] - left, rank[node]) for node in flow},
        {edge: [(x[node] - left, rank[node]) for node in chain] for edge, chain in chains.items()},
        right - left,
        len(layers),
    )


def _untangle(flow: nx.DiGraph, layers: list[list[Any]]) -> None:
    """Orders every layer by the mean place of its neighbours, down and up again."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        neighbours = flow.predecessors if down else flow.successors
        pairs = list(itertools.pairwise(layers))
        for above, below in pairs if down else reversed(pairs):
            fixed, moved = (above, below) if down else (below, above)
            place = {node: i for i, node in enumerate(fixed)}
            old = {node: i for i, node in enumerate(moved)}

            def mean(
                node: Any,
                place: dict[Any, int] = place,
                old: dict[Any, int] = old,
                neighbours: Any = neighbours,
            ) -> float:
                found = [place[other] for other in neighbours(node) if other in place]
                return sum(found) / len(found) if found else float(old[node])

            moved.sort(key=mean)


def _place(
    flow: nx.DiGraph, layers: list[list[Any]], size: Mapping[Any, float], gap: float
) -> dict[Any, float]:
    """Centres near those of the neighbours, in the order of each layer and without overlap."""
    x: dict[Any, float] = {}
    for layer in layers:
        for node, centre in zip(layer, _apart(layer, [0.0] * len(layer), size, gap), strict=True):
            x[node] = centre
    for sweep in range(2 * _SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            near = flow.predecessors if sweep % 2 == 0 else flow.successors
            wanted = []
            for node in layer:
                others = list(near(node)) or [node]
                wanted.append(sum(x[other] for other in others) / len(others))
            x.update(zip(layer, _apart(layer, wanted, size, gap), strict=True))
    return x


def _apart(
    layer: list[Any], wanted: list[float], size: Mapping[Any, float], gap: float
) -> list[float]:
    """Places near the wanted ones that keep their distance: the mean of two packings."""
    ahead, back = list(wanted), list(wanted)
    for i in range(1, len(layer)):
        least = (size[layer[i]] + size[layer[i - 1]]) / 2 + gap
        ahead[i] = max(ahead[i], ahead[i - 1] + least)
    for i in reversed(range(len(layer) - 1)):
        least = (size[layer[i]] + size[layer[i + 1]]) / 2 + gap
        back[i] = min(back[i], back[i + 1] - least)
    return [(one + other) / 2 for one, other in zip(ahead, back, strict=True)]
