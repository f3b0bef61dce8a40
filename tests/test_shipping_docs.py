"""docs/shipping.md and the page of each runtime: what they show is run as it stands, in order.

Blocks marked `bash` and `python` are run; what cannot run here is marked `text`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transcript_case import Shell
from transformers import AttentionInterface, AttentionMaskInterface

from memcompile.compiler.cli import commands
from memcompile.compiler.export.formats import FORMATS, known_formats

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs/shipping.md"
PAGES = sorted((ROOT / "docs/shipping").glob("*.md"))
# What another block of the guide has built already.
SHIPPED = "shipped"
RUN = ("bash", "python")


def blocks(page: Path, kinds: Sequence[str] = RUN) -> list[tuple[str, str]]:
    """(language, text) of each block of these kinds, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found if language in kinds]


def lines(text: str) -> list[str]:
    whole = text.replace("\\\n", " ").splitlines()
    plain = [re.sub(r"\s+#.*", "", line).strip() for line in whole]
    return [line for line in plain if line and not line.startswith("#")]


def run(page: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Runs a page in `folder`, which looks like the checkout to whoever reads from it."""
    patch.chdir(folder)
    for name in ("models", "examples"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    names: dict[str, Any] = {"__name__": f"{page.stem}_md"}
    shell = Shell(folder, patch)
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for line in lines(text):
            said = shell.run(line)
            assert shell.code == 0, f"{line}\n{said[-3000:]}"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where the guide's own commands have run."""
    folder = tmp_path_factory.mktemp("guide")
    with pytest.MonkeyPatch.context() as patch:
        run(GUIDE, folder, patch)
    yield folder / SHIPPED


@pytest.fixture
def unregistered() -> Iterator[None]:
    yield
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop("memcompile", None)


def test_every_command_is_one_that_there_is() -> None:
    """Parsed, not run: names of commands, options and formats."""
    parsed = []
    for page in (GUIDE, *PAGES):
        for language, text in blocks(page, (*RUN, "text")):
            if language == "python":
                compile(text, page.name, "exec")
                continue
            for line in lines(text):
                if line.startswith("memcompile "):
                    words = shlex.split(line)[1:]
                    name = words.pop(0) if words[0] in commands.commands else "build"
                    context = commands.commands[name].make_context(name, words)
                    parsed.append((page.stem, name))
                    known_formats((context.params.get("emit") or "onnx").split(","))
    assert {"build", "verify"} <= {name for page, name in parsed if page == "shipping"}


def test_every_format_has_a_page() -> None:
    text = GUIDE.read_text()
    rows = dict(
        re.findall(r"^\| `([a-z-]+)` \|.*\]\(shipping/(\w+)\.md(?:#\w+)?\) \|$", text, re.MULTILINE)
    )
    assert list(rows) == list(FORMATS)
    assert {path.stem for path in PAGES} == {*rows.values()}
    for page in PAGES:
        assert f"shipping/{page.name}" in text


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_guide_runs(shipped: Path) -> None:
    assert (shipped / "onnx/model.onnx").is_file()


@pytest.mark.long
@pytest.mark.timeout(1800)  # some build several packages, on two busy cores
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda path: path.stem
)
def test_every_page_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    unregistered: None,
) -> None:
    torch._dynamo.reset()
    if f"{SHIPPED}/" in page.read_text():
        (tmp_path / SHIPPED).symlink_to(request.getfixturevalue("shipped"))
    run(page, tmp_path, monkeypatch)
