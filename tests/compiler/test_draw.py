"""Drawings: every operation once, with its shape and class, nothing over anything else."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest
from test_repro import HOSTILE, decoder, graph_of

import memcompile
from memcompile.compiler.draw import CLASSES, drawing
from memcompile.compiler.layers import layout

SVG = "{http://www.w3.org/2000/svg}"


def groups(text: str) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(text)
    return {g.get("id", ""): g for g in root.iter(f"{SVG}g") if g.get("id")}


def test_the_region_around_a_decline(tmp_path: Path) -> None:
    path = tmp_path / "graph.svg"
    report = memcompile.explain(decoder("TurnedTriangle"), dump_graph=path)
    text = path.read_text()
    boxes = groups(text)
    assert report.notes == [f"{path}: {len(boxes)} operations around attention_default"]
    (focus,) = (g for g in boxes.values() if "focus" in g.get("class", ""))
    assert focus.get("id") == "node-attention_default" and "site" in focus.get("class", "")
    assert report.declined[0].reason.split(":")[0] in text
    for group in boxes.values():
        kind = group.get("class", "").split()[0]
        words = [element.text for element in group.iter(f"{SVG}text")]
        # The colour is never the only sign.
        assert kind in CLASSES and kind in words
        assert any(word and word.startswith("[") for word in words)
    kinds = {g.get("class", "").split()[0] for g in boxes.values()}
    assert {"local", "position", "table", "keys", "site"} <= kinds
    source = focus.find(f"{SVG}title")
    assert source is not None and ".py:" in (source.text or "")
    assert "prefers-color-scheme: dark" in text


def test_what_mixes_tokens_is_marked() -> None:
    graph = graph_of("ShiftByRoll")
    text, count = drawing(graph, *graph.focus(None))
    kinds = [g.get("class", "").split()[0] for g in groups(text).values()]
    assert len(kinds) == count and "mixed" in kinds
    (focus,) = (g for g in groups(text).values() if "focus" in g.get("class", ""))
    assert focus.get("class") == "mixed focus"


def test_a_graph_is_drawn_the_same_each_time() -> None:
    graph = graph_of("TurnedTriangle")
    assert drawing(graph, *graph.focus(None)) == drawing(graph, *graph.focus(None))


def test_hostile_names_stay_text() -> None:
    graph = graph_of.__wrapped__("CentredPositions")
    focus, declined = graph.focus(None)
    for node in graph.module.graph.nodes:
        node.name += '"/><script>x</script>\x00' + HOSTILE
        node.meta["nn_module_stack"] = {"k": ("</title><script>", object)}
    text, _ = drawing(graph, focus, declined)
    assert not [*ElementTree.fromstring(text).iter(f"{SVG}script")]


def test_boxes_do_not_overlap_and_lines_go_down() -> None:
    flow = nx.gnp_random_graph(30, 0.12, seed=3, directed=True)
    flow = nx.DiGraph((a, b) for a, b in flow.edges if a < b)
    widths = {node: 40.0 + 7 * (node % 9) for node in flow}
    made = layout(flow, widths, 20)
    for one, other in combinations(flow, 2):
        (x, row), (y, other_row) = made.at[one], made.at[other]
        if row == other_row:
            assert abs(x - y) >= (widths[one] + widths[other]) / 2 + 19.9
    for line in made.lines.values():
        rows = [row for _, row in line]
        assert rows == list(range(rows[0], rows[-1] + 1)) and len(rows) > 1
    assert all(0 <= x <= made.width for x, _ in made.at.values())


def test_a_single_box_has_a_place() -> None:
    flow = nx.DiGraph()
    flow.add_node("only")
    made = layout(flow, {"only": 50.0}, 20)
    assert made.at == {"only": (25.0, 0)} and made.width == pytest.approx(50)
