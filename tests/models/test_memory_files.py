"""One vocabulary: a memory is one short file, and none has an operation or a kernel of its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from memcompile import codegen
from memcompile.models import ops
from memcompile.models.memory import PRESETS

ROOT = Path(codegen.__file__).parents[1]
FILES = sorted((ROOT / "models" / "memory").glob("*.py"))
PRESET_FILES = [
    ROOT / "models" / "memory" / f"{kind.__module__.rsplit('.', 1)[1]}.py"
    for kind in PRESETS.values()
]
# What KernelSpec.op may be; DESIGN names the same, and no others.
FAMILIES = {"append_index", "score_select", "attend", "combine", "state_step", "state_chunk"}


def test_every_preset_has_a_file_of_its_own() -> None:
    assert len({*PRESET_FILES}) == len(PRESETS)
    for path in PRESET_FILES:
        assert path in FILES


def test_files_of_memories_are_short() -> None:
    for files in (PRESET_FILES, FILES):
        lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
        assert sum(lines) / len(lines) <= 150


def test_kernels_are_generated_from_the_families_and_nothing_else() -> None:
    assert {*codegen.spec.OPS} == FAMILIES
    assert {name.split(".")[0] for name in ops.FAMILIES.values()} == FAMILIES


@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_no_memory_has_a_template(target: str) -> None:
    folder = ROOT / "codegen" / target
    templates = [path for path in folder.iterdir() if path.suffix == ".jinja"]
    parts = {"table", "append_index_fold", "score_select_among", "state_walk"} | {
        "state_chunk_backward"
    }
    stems = {path.name.split(".")[0] for path in templates}
    assert stems >= FAMILIES
    assert stems <= FAMILIES | parts
    for path in [*templates, ROOT / "codegen" / "spec.py", ROOT / "compiler" / "lower.py"]:
        text = path.read_text(encoding="utf-8").replace("_", "-")
        words = {*re.findall(r"[a-z-]+", text.lower())}
        assert not words & {*PRESETS} - {"dense", "window", "mixture"}, path


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_a_memory_calls_no_operation_that_only_it_has(path: Path) -> None:
    """A policy says what a memory is; what it reads and writes is emitted by `read.py` alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops.")
    }
    assert not used


def test_the_worked_example_is_the_file() -> None:
    text = (ROOT / "docs" / "adding_a_memory.md").read_text(encoding="utf-8")
    shown = text.split("<!-- quest -->\n```python\n")[1].split("\n```\n<!-- /quest -->")[0]
    assert shown == (ROOT / "models" / "memory" / "quest.py").read_text(encoding="utf-8").strip()
