"""The page of a report: what it shows is what there is, safe, whole, and readable by anyone."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_example import DECLINED, Element, compiled, measured, of_policies, refused, tree

from memcompile.compiler.report import Lowered, bytes_of
from memcompile.compiler.report_html import TEMPLATE, render
from memcompile.compiler.results import Results

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }}", "</style>"]
ALWAYS = ["unverified", "memory", "bytes", "build"]
OPTIONAL = ["time", "quality", "declined", "kernels", "self-check", "notes", "timings"]
KERNEL = {"name": "attend_x", "source": "/nowhere/attend_x.cpp", "calls": {"dense": 2, "policy": 3}}


def sections(page: str) -> set[str]:
    root = tree(page)
    return {name for name in (*ALWAYS, *OPTIONAL) if root.one(name) is not None}


def unverified(page: str) -> str:
    found = tree(page).one("unverified")
    assert found is not None
    return found.text


def pages() -> dict[str, str]:
    return {
        "whole": render(compiled(), measured(), "0.1.0"),
        "mixture": render(
            of_policies("dense", "scout", "hierarchical", "heavy-hitter", "hybrid:state_layers=9")
        ),
        "refused": render(refused()),
    }


@pytest.fixture(params=["whole", "mixture", "refused"])
def page(request: pytest.FixtureRequest) -> str:
    return pages()[request.param]


# --- what is shown ---


def test_each_section_comes_and_goes_with_what_it_shows() -> None:
    bare = of_policies("scout", self_check={})
    assert sections(render(bare)) == {*ALWAYS}
    results = measured()
    for name, changed, found in (
        ("time", {}, Results(bench=results.bench)),
        ("quality", {}, Results(quality=results.quality)),
        ("declined", {"declined": [DECLINED]}, None),
        ("kernels", {"lowered": Lowered(kernels=[KERNEL])}, None),
        ("self-check", {"self_check": {"tokens": 65}}, None),
        ("notes", {"notes": ["contexts up to 512 tokens"]}, None),
        ("timings", {"timings": {"export": 1.25}}, None),
    ):
        assert sections(render(replace(bare, **changed), found)) == {*ALWAYS, name}, name
    assert sections(render(compiled(), results)) == {*ALWAYS, *OPTIONAL} - {"declined", "notes"}
    assert sections(render(refused())) == {"unverified", "declined", "build"}


def test_the_headline_has_bytes_and_time_beside_dense() -> None:
    report, results = compiled(), measured()
    header = tree(render(report, results)).all("header")[0].text
    for context in (8192, 131072):
        for count in (report.step_bytes, lambda site, n: site.dense_bytes(n)):
            assert bytes_of(sum(count(site, context) for site in report.sites)) in header
    assert "bytes-small" in header and "scout" in header and "4 of 4" in header
    assert "2.42 ms" in header and "2.66 × faster" in header
    assert "11 pages of 8 by mean-std, compensated" in header


def test_a_memory_that_reads_more_than_dense_says_more() -> None:
    header = tree(render(compiled())).all("header")[0].text  # records are held beside the keys
    assert "3.93 × less" in header and "1.19 × more" in header
    assert "the same" in tree(render(of_policies("dense"))).all("header")[0].text


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        ("dense", {"pages"}),
        ("scout", {"sinks", "pages", "summaries", "index", "window"}),
        ("hierarchical", {"sinks", "pages", "levels", "window"}),
        ("window", {"sinks", "freed", "window"}),
        ("heavy-hitter", {"sinks", "pages", "account", "freed", "window"}),
        ("quest", {"pages", "index", "window"}),
        ("hybrid:state_layers=9", {"state", "window"}),
    ],
)
def test_a_memory_draws_its_tiers(policy: str, kinds: set[str]) -> None:
    memory = tree(render(of_policies(policy))).one("memory")
    assert memory is not None
    legend, bars = [e for e in memory.all("ul") if e.attributes["class"] in ("legend", "rows")]
    for shown in (legend, bars):
        drawn = {tuple(e.attributes["class"].split()) for e in shown.all("i")}
        assert drawn == {("t", kind) for kind in kinds}
    (bar,) = [e for e in bars.all("div") if e.attributes.get("role") == "img"]
    label = bar.attributes["aria-label"]
    assert label.startswith("layer 0, ") and label.endswith("of 32 MiB")


def test_layers_stand_one_a_row_and_to_scale() -> None:
    report = of_policies("dense", "scout", "hybrid:state_layers=9", "scout", window=1024)
    memory = tree(render(report)).one("memory")
    assert memory is not None
    rows = [e for e in memory.all("li") if any(c.attributes.get("class") == "who" for c in e.all())]
    assert [row.all("span")[0].text.split() for row in rows] == [
        ["0", "dense"],
        ["1", "scout"],
        ["2", "hybrid"],
        ["3", "dense"],
    ]
    for site, row in zip(report.sites, rows, strict=True):
        tokens, read = (e for e in row.all("span") if "track" in e.attributes["class"])
        grow = [int(re.sub(r"\D", "", e.attributes["style"])) for e in tokens.all("i")]
        assert sum(grow) == 8192
        counted = sum(int(re.sub(r"\D", "", e.attributes["style"])) for e in read.all("i"))
        assert counted == report.step_bytes(site, 8192)
        share = float(re.findall(r"[\d.]+", read.attributes["style"])[0])
        assert share == round(100 * site.dense_bytes(8192) / report.sites[0].dense_bytes(8192), 2)
    assert "model.layers.1.self_attn" in {
        e.attributes.get("title") for row in rows for e in row.all("span")
    }


def test_layers_that_are_alike_share_their_figures() -> None:
    memory = tree(render(of_policies("dense", "scout", "dense", "dense"))).one("memory")
    assert memory is not None
    captions = [e.text for e in memory.all("caption")]
    assert captions[0].startswith("Layers 0, 2-3, each: dense: every page of 64")
    assert captions[1].startswith("Layer 1: scout: 32 pages of 64")
    assert "Budget: 2,048 tokens, 8 MiB of keys and values a layer" in captions[1]


def test_levels_are_listed_with_what_they_stand_for() -> None:
    memory = tree(render(of_policies("hierarchical"))).one("memory")
    assert memory is not None
    for size in (64, 512, 4096):
        assert f"read in groups of {size}" in memory.text


def test_bytes_stand_against_the_context_from_1k_to_1m() -> None:
    report = of_policies("scout", "dense")
    section = tree(render(report)).one("bytes")
    assert section is not None
    titles = [e.text for e in section.all("title")]
    for name, count in (("mixture", report.step_bytes), ("dense", lambda s, n: s.dense_bytes(n))):
        for context, label in ((1024, "1K"), (131072, "128K"), (1 << 20, "1M")):
            total = bytes_of(sum(count(site, context) for site in report.sites))
            assert f"{name}, {label} tokens: {total}" in titles
    (table,) = section.all("table")
    assert len(table.all("tr")) == 1 + 11


def test_where_tables_end_is_drawn() -> None:
    page = render(of_policies("scout", max_context=16384))
    assert 'class="limit"' in page and "tables hold for 16384 tokens" in page
    assert 'class="limit"' not in render(of_policies("scout"))


def test_time_says_on_what_when_and_how() -> None:
    section = tree(render(compiled(), measured())).one("time")
    assert section is not None
    for part in (
        "2026-11-29",
        "AMD EPYC, 2 cores, AVX512",
        "1 thread, cpu",
        "memcompile bench bytes-small.scout",
        "random keys and values were written into the memory",
        "the same engine, which reads every page",
        "10.39 GB/s",
        "2.22 to 2.87 ms",
        "tokens a second",
    ):
        assert part in section.text, part


def test_quality_has_intervals_and_a_source() -> None:
    section = tree(render(compiled(), measured())).one("quality")
    assert section is not None
    for part in ("95.8[79.2, 100.0]", "bytes-small.scout.eval", "8 prompts for each", "seed 0"):
        assert part in section.text, part
    own = [row for row in section.all("tr") if row.attributes.get("class") == "own"]
    assert [row.all("td")[2].text for row in own] == ["scoutno layer dense"] * 2
    assert "dense4/4 layers dense" in section.text
    captions = [caption.text.split(".")[0] for caption in section.all("caption")]
    assert captions == ["More is better", "Less is better"]


def test_declines_have_reason_rule_node_and_line() -> None:
    section = tree(render(refused())).one("declined")
    assert section is not None
    for part in ("the mask is data", "derive mask rule", "where_3", "model.py:12 in forward"):
        assert part in section.text


def test_a_kernel_is_a_link_while_its_source_is_there(tmp_path: Path) -> None:
    source = tmp_path / "attend <x>.cpp"
    kernels = [{**KERNEL, "source": str(source)}]
    report = of_policies("scout", lowered=Lowered(kernels=kernels))
    section = tree(render(report)).one("kernels")
    assert section is not None and not section.all("a")
    assert "attend_x (attend <x>.cpp: gone)" in section.text
    assert "1 of 1 kernel sources are not where they were" in unverified(render(report))
    source.write_text("// a kernel")
    section = tree(render(report)).one("kernels")
    assert section is not None
    (link,) = section.all("a")
    assert link.attributes["href"] == source.as_uri() and link.text == "attend_x"
    assert "dense 2, policy 3" in section.text


# --- what is unverified ---


def test_what_is_unverified_is_told_from_the_data() -> None:
    told = unverified(render(of_policies("scout", self_check={})))
    for part in (
        "the step was not held against the model's own forward",
        "what the memory costs in answers is not known; memcompile eval DIR measures it",
        "fewer bytes are no promise of less time; memcompile bench DIR measures it",
        "no figure here comes from a GPU",
    ):
        assert part in told, part
    for part in ("Kernels", "Sources", "States", "Context", "Results"):
        assert part not in told
    report, results = compiled(), measured()
    told = unverified(render(report, results))
    assert "memcompile eval" not in told and "memcompile bench" not in told
    assert "Correctness" not in told
    assert "measured over random keys" in told and "no figure here comes from a GPU" in told
    assert "1 of 2 rows are no evidence: no claim: dense 88% < 90%" in told


def test_what_was_verified_is_not_called_unverified() -> None:
    results = measured()
    assert results.bench is not None and results.quality is not None
    bench = replace(results.bench, device="cuda:0", fill="random tokens were read by the model")
    quality = replace(results.quality, rows=[r for r in results.quality.rows if r.claim])
    whole = of_policies("scout")
    assert "unverified" not in sections(render(whole, Results(bench, quality)))
    told = unverified(render(whole, Results(bench, replace(quality, own=""))))
    assert " ".join(told.split()) == (
        "What is unverified Quality other policies were evaluated, not this one; "
        "memcompile eval DIR measures it"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"lowered": Lowered(references=["no compiler"])},
            "references run in their place: no",
        ),
        (
            {"lowered": Lowered(inductor={"policy": "gave up"})},
            "the step graph runs operation by operation: gave up",
        ),
        ({"max_context": 4096}, "tables hold for 4096 tokens"),
    ],
)
def test_what_runs_in_place_of_kernels(changes: dict[str, Any], text: str) -> None:
    assert text in unverified(render(of_policies("scout", **changes)))
    assert text not in unverified(render(of_policies("scout")))


def test_states_and_damaged_results_are_named() -> None:
    told = unverified(
        render(of_policies("hybrid:state_layers=9"), Results(faults=["bench.json: x"]))
    )
    assert "not that they answer as the attention they stand for" in told
    assert "bench.json: x" in told
    assert "nothing was rewritten" in unverified(render(refused()))


# --- what may not be ---


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text(name: str) -> None:
    results = measured()
    assert results.bench is not None and results.quality is not None
    plain = of_policies("scout", "hybrid:state_layers=9")
    sites = [replace(site, name=f"{name}{site.layer}") for site in plain.sites]
    report = replace(
        plain,
        model=name,
        policy=name,
        options={name: name},
        sites=sites,
        memories={
            new.name: replace(plain.memories[old.name], name=name)
            for new, old in zip(sites, plain.sites, strict=True)
        },
        declined=[replace(DECLINED, reason=name, node=name, rule=name, source=name)],
        timings={name: 1.0},
        self_check={name: name},
        notes=[name],
        lowered=Lowered([{**KERNEL, "name": name, "source": name}], [name], {"policy": name}),
    )
    words = {"date": name, "command": name, "policy": name, "processor": name, "torch": name}
    bench = replace(results.bench, **words, fill=name, baseline=name, notes=[name], kernels=name)
    rows = [replace(row, task=name, policy=name, verdict=name) for row in results.quality.rows]
    quality = replace(results.quality, rows=rows, title=name, folder=name, own=name, notes=[name])
    page = render(report, Results(bench, quality, [name]), name)
    root = tree(page)
    assert not root.all("script") and not root.all("img")
    assert page.count("</style>") == 1 and "49" not in root.all("h1")[0].text
    assert root.all("h1")[0].text == name
    for element in root.all():
        assert not [key for key in element.attributes if key.startswith("on")]


@pytest.mark.parametrize(
    "source",
    [
        "javascript:alert(1)",
        "https://example.org/x.cpp",
        "data:text/html,x",
        "report.html",
        "\0",
        "",
    ],
)
def test_no_link_but_to_a_file(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.html").write_text("x")
    (tmp_path / "javascript:alert(1)").write_text("x")
    report = of_policies("scout", lowered=Lowered(kernels=[{**KERNEL, "source": source}]))
    assert not tree(render(report)).all("a")


def test_the_page_needs_nothing_else(page: str) -> None:
    root = tree(page)
    for tag in ("script", "iframe", "object", "embed", "img", "audio", "video"):
        assert not root.all(tag)
    addresses = [
        value
        for element in root.all()
        for key, value in element.attributes.items()
        if key in ("href", "src", "action", "srcset", "data", "xlink:href")
    ]
    assert all(address.startswith(("data:,", "file://")) for address in addresses)
    style = root.all("style")[0].text
    assert "url(" not in style and "@import" not in style and "http" not in style
    (policy,) = [
        e.attributes["content"]
        for e in root.all("meta")
        if e.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


# --- who can read it ---


def test_headings_go_down_one_at_a_time(page: str) -> None:
    levels = [int(e.tag[1]) for e in tree(page).all() if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_tables_drawings_and_ids_are_named(page: str) -> None:
    root = tree(page)
    for table in root.all("table"):
        assert isinstance(table.children[1], Element) and table.children[1].tag == "caption"
        assert table.children[1].text.strip()
        assert all(head.attributes.get("scope") in ("col", "row") for head in table.all("th"))
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(ids) == len({*ids})
    for element in root.all():
        for name in element.attributes.get("aria-labelledby", "").split():
            assert name in ids
        if element.attributes.get("role") in ("img", "region"):
            assert {"aria-label", "aria-labelledby"} & element.attributes.keys()
    assert root.all("html")[0].attributes["lang"] == "en"


def test_drawings_are_xml_with_title_and_description(page: str) -> None:
    drawings = re.findall(r"<svg viewBox.*?</svg>", page, re.DOTALL)
    for text in drawings:
        drawing = ElementTree.fromstring(text)
        assert drawing.find("title") is not None and drawing.find("desc") is not None
        left, top, width, height = map(float, drawing.attrib["viewBox"].split())
        for element in drawing.iter():
            for key in ("x", "x1", "x2", "cx"):
                assert left <= float(element.get(key, left)) <= left + width
            for key in ("y", "y1", "y2", "cy"):
                assert top <= float(element.get(key, top)) <= top + height
    assert bool(drawings) == ("tokens of context" in page)


def colours(style: str) -> dict[str, dict[str, str]]:
    """The variables of both themes."""
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    return {
        theme: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", text))
        for theme, text in (("light", light), ("dark", dark))
    }


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme: str) -> None:
    names = colours(TEMPLATE.read_text())
    assert names["light"].keys() == names["dark"].keys()
    found = names[theme]
    for back in ("page", "card", "note"):
        for text in ("ink", "soft", "link"):
            assert contrast(found[text], found[back]) >= 4.5, (text, back)
    # WCAG asks 3 of what is drawn.
    drawn = ("sinks", "pages", "window", "summary", "record", "state", "account", "ours", "other")
    for name in drawn:
        assert contrast(found[name], found["card"]) >= 3, name


def test_no_tier_is_told_by_its_colour_alone() -> None:
    """Without colours each tier's fill is still one of its own; the three that are read exactly
    differ by their place and shade."""
    style = tree(render(of_policies("scout"))).all("style")[0].text
    fills = dict(re.findall(r"^\.(\w+) \{ ((?:background|border).*?) \}$", style, re.MULTILINE))
    kinds = ("pages", "window", "summaries", "levels", "index", "state", "account", "freed")
    shapes = [re.sub(r"var\(--(?!card)[\w-]+\)", "X", fills[kind]) for kind in kinds]
    assert len({*shapes}) == len(kinds)
    for theme in colours(style).values():
        assert contrast(theme["sinks"], theme["pages"]) > 1.5
