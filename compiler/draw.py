"""The graph around a node as an SVG: operations, shapes, and what is known of the token axis."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import torch
from torch import Tensor, fx

from ..evaluation.records import write_whole
from ..passes.classify_tokens import Gather
from ..passes.graph_tools import describe, module_path, source_line, target_name
from ..passes.result import Declined
from ..passes.token_axes import Kind, Mixed, Value
from .layers import layout
from .region import Graph, is_parameter

_NEAR = 44  # boxes at most
_UP, _DOWN = 9, 5  # operations before and after the node
_CHARACTER = 7.3
_BOX, _LAYER, _GAP, _MARGIN = 42, 98, 22, 28
_SHAPE = 22  # the line of text below a box

CLASSES = {
    "local": "each token by itself",
    "position": "a function of the position",
    "table": "rows of a table, by position",
    "keys": "a function of query and key positions",
    "site": "an attention",
    "mixed": "mixes tokens: no step is known",
    "constant": "the same for every token",
}
_STYLE = """
svg { background: #ffffff; font: 12px ui-monospace, Menlo, Consolas, monospace; }
text { fill: #1c2330; }
.what { font-weight: 600; }
.class, .key { font-size: 10.5px; fill: #4c566a; }
.shape { font-size: 10.5px; fill: #4c566a; }
.shape { stroke: #ffffff; stroke-width: 4px; paint-order: stroke; }
.title { font-size: 15px; font-weight: 600; }
.reason { fill: #9b1c31; }
.line { fill: none; stroke: #8a94a6; stroke-width: 1.3px; }
.stub { stroke-dasharray: 3 3; }
.arrow { fill: #8a94a6; }
.box { stroke-width: 1.3px; }
.focus .box { stroke-width: 3px; }
.local .box { fill: #eaf2fd; stroke: #4c83c3; }
.position .box { fill: #e9f7ee; stroke: #3d9463; }
.table .box { fill: #fdf4dc; stroke: #b5892a; }
.keys .box { fill: #f2ecfb; stroke: #8360c3; }
.site .box { fill: #ffe3cf; stroke: #d9661f; }
.mixed .box { fill: #fde4e7; stroke: #c22f47; }
.constant .box { fill: #f1f3f6; stroke: #98a2b3; }
@media (prefers-color-scheme: dark) {
  svg { background: #14181f; }
  text { fill: #e6eaf2; }
  .class, .key { fill: #a9b4c6; }
  .shape { fill: #a9b4c6; stroke: #14181f; }
  .reason { fill: #ff8fa0; }
  .line { stroke: #66728a; }
  .arrow { fill: #66728a; }
  .local .box { fill: #17263b; stroke: #5f9ae0; }
  .position .box { fill: #142b20; stroke: #52b47f; }
  .table .box { fill: #2f2711; stroke: #d3a640; }
  .keys .box { fill: #261d38; stroke: #a585e6; }
  .site .box { fill: #3a2313; stroke: #f0803c; }
  .mixed .box { fill: #3b171d; stroke: #ef5a70; }
  .constant .box { fill: #20252e; stroke: #77839a; }
}
"""


def write_drawing(path: str | os.PathLike[str], graph: Graph, site: str | None = None) -> str:
    """Draws the graph around an attention, or around what was declined first.

    Args:
        site: name of the attention.

    Returns:
        One line about what was drawn.

    Raises:
        ValueError: there is no such attention, or nothing to draw around.
    """
    focus, declined = graph.focus(site)
    text, count = drawing(graph, focus, declined)
    write_whole(Path(path), text.encode())
    return f"{count} operations around {focus.name}"


def class_of(node: fx.Node, graph: Graph) -> str:
    """What is known of a node's token axis: a key of `CLASSES`."""
    known = graph.classified.values.get(node)
    if isinstance(known, Mixed):
        return "mixed"
    if node.target is torch.ops.memcompile.attention.default:
        return "site"
    if isinstance(graph.classified.rewrites.get(node), Gather):
        return "table"
    if not isinstance(known, Value):
        return "constant"
    if known.exact is not None and len(known.token_axes) > 1:
        return "keys"
    if known.cut or (known.kind is Kind.CONSTANT and known.tensor is not None):
        return "table"
    return {Kind.LOCAL: "local", Kind.POSITION: "position"}.get(known.kind, "constant")


def drawing(graph: Graph, focus: fx.Node, declined: Declined | None) -> tuple[str, int]:
    """The SVG's text, and how many boxes it has."""
    shown = _around(focus)
    flow = nx.DiGraph()
    flow.add_nodes_from(shown)
    flow.add_edges_from((s, n) for n in shown for s in n.all_input_nodes if s in shown)
    labels = {node: (_what(node), class_of(node, graph)) for node in shown}
    widths = {node: max(map(len, label)) * _CHARACTER + 28 for node, label in labels.items()}
    slots = {node: max(widths[node], len(_shape(node)) * 6.6) for node in shown}
    places = layout(flow, slots, _GAP)
    head = _head(focus, declined)
    used = [name for name in CLASSES if any(name == kind for _, kind in labels.values())]
    keys = _keys(used)
    top = _MARGIN + 22 * len(head) + 22 * len(keys) + 44
    wide = max(len(line) * 8.2 for _, line in head)
    width = max(places.width, wide, *(x for row in keys for _, _, x in row)) + 2 * _MARGIN
    height = top + (places.layers - 1) * _LAYER + _BOX + _MARGIN
    shift = (width - places.width) / 2
    root = ElementTree.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
    )
    ElementTree.SubElement(root, "title").text = _plain(head[0][1])
    ElementTree.SubElement(root, "style").text = _STYLE
    for i, (kind, line) in enumerate(head):
        _text(root, _MARGIN, _MARGIN + 10 + 22 * i, line, kind)
    for row, entries in enumerate(keys):
        for name, x, _ in entries:
            y = _MARGIN + 22 * (len(head) + row) + 4
            swatch = ElementTree.SubElement(root, "g", {"class": name})
            _box(swatch, _MARGIN + x + 7, y, 14, 14)
            _text(root, _MARGIN + x + 22, y + 4, f"{name}: {CLASSES[name]}", "key")
    for edge, points in places.lines.items():
        _line(root, [(x + shift, top + layer * _LAYER) for x, layer in points], edge)
    for node in shown:
        x, layer = places.at[node]
        y = top + layer * _LAYER
        _node(root, node, x + shift, y, widths[node], labels[node], focus, shown)
    return ElementTree.tostring(root, encoding="unicode") + "\n", len(shown)


def _around(focus: fx.Node) -> list[fx.Node]:
    """The nearest values before and after a node; weights and sizes are no boxes of their own."""
    distance = {focus: 0}
    waiting = [(focus, True), (focus, False)]
    for node, up in waiting:
        far = distance[node] + 1
        for other in node.all_input_nodes if up else node.users:
            drawn = _drawn(other)
            if drawn and other not in distance and far <= (_UP if up else _DOWN):
                distance[other] = far
                waiting.append((other, up))
    near = set(sorted(distance, key=lambda node: distance[node])[:_NEAR])
    return [node for node in focus.graph.nodes if node in near]


def _drawn(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return not is_parameter(node)
    return node.op in ("call_function", "placeholder") and isinstance(
        node.meta.get("val"), Tensor | list | tuple
    )


def _head(focus: fx.Node, declined: Declined | None) -> list[tuple[str, str]]:
    where = module_path(focus)
    lines = [("title", f"{_what(focus)}{f' in {where}' if where else ''}")]
    if declined is not None:
        said = textwrap.wrap(f"{declined.rule}: {declined.reason}", 96)
        lines += [("reason", line) for line in said[:4]]
    return lines


def _keys(names: list[str]) -> list[list[tuple[str, float, float]]]:
    """The legend in rows: name, where it begins and where it ends."""
    rows: list[list[tuple[str, float, float]]] = [[]]
    x = 0.0
    for name in names:
        width = 40 + len(f"{name}: {CLASSES[name]}") * 6.6
        if x + width > 760 and rows[-1]:
            rows.append([])
            x = 0.0
        rows[-1].append((name, x, x + width))
        x += width
    return rows


def _what(node: fx.Node) -> str:
    if node.op == "placeholder":
        return node.name
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[2][-28:]
    name = target_name(node).removeprefix("aten.").removesuffix(".default")
    weights = [n for n in node.all_input_nodes if n.op == "get_attr" and is_parameter(n)]
    held = f" {_shape(weights[0])}" if weights else ""
    return f"{name}{held}"[:44]


def _shape(node: fx.Node) -> str:
    """``[B, T, 24]`` and the type, where it is not float32."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return f"{len(value)} tensors" if isinstance(value, list | tuple) else ""
    kind = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
    sizes = [str(size) if isinstance(size, int) else _size(size, node) for size in value.shape]
    return f"[{', '.join(sizes)}]" + ("" if kind == "f32" else f" {kind}")


def _size(size: Any, node: fx.Node) -> str:
    """A size in B and T, the symbols of the model's first input."""
    tokens = next(n for n in node.graph.nodes if n.op == "placeholder").meta["val"]
    text = str(size)
    for symbol, name in zip(tokens.shape, ("B", "T"), strict=True):
        text = re.sub(rf"\b{re.escape(str(symbol))}\b", name, text)
    return text


def _node(
    root: ElementTree.Element,
    node: fx.Node,
    x: float,
    y: float,
    width: float,
    label: tuple[str, str],
    focus: fx.Node,
    shown: list[fx.Node],
) -> None:
    what, kind = label
    group = ElementTree.SubElement(
        root,
        "g",
        {"class": f"{kind} focus" if node is focus else kind, "id": _plain(f"node-{node.name}")},
    )
    source = source_line(node)
    told = [describe(node), f"{kind}: {CLASSES[kind]}", module_path(node), source]
    title = ElementTree.SubElement(group, "title")
    title.text = _plain("\n".join(line for line in told if line))
    _box(group, x, y, width, _BOX)
    _text(group, x, y - 3, what, "what", "middle")
    _text(group, x, y + 13, kind, "class", "middle")
    users = [user for user in node.users if _drawn(user) or user.op == "output"]
    if any(user not in shown for user in users):
        points = f"M{x:.1f},{y + _BOX / 2 + _SHAPE:.1f}v12"
        ElementTree.SubElement(group, "path", {"class": "line stub", "d": points})
    missing = [n for n in node.all_input_nodes if _drawn(n) and n not in shown]
    if missing:
        points = f"M{x - width / 4:.1f},{y - _BOX / 2 - 18:.1f}V{y - _BOX / 2:.1f}"
        ElementTree.SubElement(group, "path", {"class": "line stub", "d": points})
    _text(group, x, y + _BOX / 2 + 16, _shape(node), "shape", "middle")


def _line(
    root: ElementTree.Element, points: list[tuple[float, float]], edge: tuple[fx.Node, fx.Node]
) -> None:
    """A line from the shape below one box to the upper edge of another, bent softly."""
    (x, y), end = points[0], points[-1]
    y += _BOX / 2 + _SHAPE
    path = f"M{x:.1f},{y:.1f}"
    for i, (next_x, next_y) in enumerate(points[1:], 1):
        stop = next_y - (_BOX / 2 + 6 if i == len(points) - 1 else 0)
        half = (y + stop) / 2
        path += f"C{x:.1f},{half:.1f} {next_x:.1f},{half:.1f} {next_x:.1f},{stop:.1f}"
        x, y = next_x, stop
    line = ElementTree.SubElement(root, "path", {"class": "line", "d": path})
    ElementTree.SubElement(line, "title").text = _plain(f"{edge[0].name} {_shape(edge[0])}")
    tip = end[1] - _BOX / 2
    arrow = f"M{end[0]:.1f},{tip:.1f}l-4,-8h8z"
    ElementTree.SubElement(root, "path", {"class": "arrow", "d": arrow})


def _box(parent: ElementTree.Element, x: float, y: float, width: float, height: float) -> None:
    ElementTree.SubElement(
        parent,
        "rect",
        {
            "class": "box",
            "x": f"{x - width / 2:.1f}",
            "y": f"{y - height / 2:.1f}",
            "width": f"{width:.1f}",
            "height": f"{height:.1f}",
            "rx": "6" if height > 20 else "3",
        },
    )


def _text(
    parent: ElementTree.Element, x: float, y: float, text: str, kind: str, anchor: str = "start"
) -> None:
    given = {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ElementTree.SubElement(parent, "text", given).text = _plain(text)


def _plain(text: str) -> str:
    """`text` without what XML cannot hold."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
