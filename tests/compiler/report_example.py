"""A report with all its results, as a run on bytes-small left them, and pages read as trees."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from memcompile.compiler.bench_result import Bench
from memcompile.compiler.report import Lowered, Report
from memcompile.compiler.results import Quality, Results
from memcompile.models.memory import parse_policy
from memcompile.passes.result import Declined, MaskRule, Site

FOLDER = Path(__file__).with_name("report_bytes_small")
VOID = {"meta", "link", "br"}
SITE = Site(
    name="model.layers.0.self_attn",
    layer=0,
    node="attention",
    heads=32,
    kv_heads=8,
    key_dim=128,
    value_dim=128,
    rule=MaskRule("causal"),
    scale=0.1,
    softcap=0.0,
    dtype=torch.bfloat16,
)
DECLINED = Declined("the mask is data", "where_3", "derive mask rule", "model.py:12 in forward")


def load(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def measured() -> Results:
    return Results(Bench.from_json(load("bench")), Quality.from_json(load("quality")))


def compiled() -> Report:
    return Report.from_json(load("report"))


def of_policies(*policies: str, window: int = 0, **changes: Any) -> Report:
    """A layer a policy; `window` is the last layer's own sliding window."""
    sites = [replace(SITE, layer=i, name=f"model.layers.{i}.self_attn") for i in range(9)]
    sites = sites[: len(policies)]
    if window:
        sites[-1] = replace(sites[-1], rule=MaskRule("window", window))
    memories = {
        site.name: parse_policy(policy).memory(9, site.rule.window)
        for site, policy in zip(sites, policies, strict=True)
    }
    values: dict[str, Any] = {
        "model": "Toy",
        "policy": "mixture",
        "options": {"budget": 2048, "min_context": None, "compensate": True, "dense_layers": 1},
        "sites": sites,
        "memories": memories,
        "self_check": {"largest_difference": 1e-6},
        "lowered": Lowered(inductor={"dense": "lowered", "policy": "lowered"}),
    }
    return Report(**{**values, **changes})


def refused() -> Report:
    return Report("Toy", "scout", {"budget": 2048}, declined=[DECLINED])


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str = "") -> list[Element]:
        """Every element below, or those of a tag."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] if not tag or child.tag == tag else []
                found += child.all(tag)
        return found

    def one(self, name: str) -> Element | None:
        """The element whose id is `name`."""
        return next((e for e in self.all() if e.attributes.get("id") == name), None)

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes})
        assert len(element.attributes) == len(attributes), f"an attribute of <{tag}> twice"
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes})
        self.open[-1].children.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def tree(page: str) -> Element:
    """The page as elements; a tag that is not closed by its own fails."""
    parser = _Tree()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root], f"<{parser.open[-1].tag}> is left open"
    return parser.root
