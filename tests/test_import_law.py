"""Which folder may import which: the table, and a walk over every import that holds it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The longest matching folder counts. "" is the root's own file, the face.
#                     folders of the package it may import   libraries beside the standard one
LAW: dict[str, tuple[set[str], set[str]]] = {
    "": ({"compiler", "models", "runtime"}, {"torch"}),
    "compiler": (
        {"compiler", "evaluation", "runtime", "passes", "codegen", "models"},
        {"torch", "numpy", "networkx", "safetensors", "rich", "click", "jinja2", "transformers"}
        | {"tokenizers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "torch_tensorrt"}
        | {"lm_eval", "sympy"},
    ),
    "evaluation": (
        {"evaluation", "runtime", "models"},
        {"torch", "numpy", "rich", "matplotlib", "scipy", "lm_eval"},
    ),
    "runtime": ({"runtime", "models", "codegen"}, {"torch", "numpy", "transformers"}),
    "passes": ({"passes", "models"}, {"torch", "networkx", "sympy"}),
    "codegen": ({"codegen", "models"}, {"torch", "jinja2", "triton"}),
    "models": ({"models"}, {"torch", "numpy"}),
    # Networks are files to compile and test on: they are written in a model library's format.
    "models/networks": (
        {"models"},
        {"torch", "numpy", "safetensors", "transformers", "tokenizers"},
    ),
    # Examples see what a user sees: the face, the words that a policy of one's own is made of, and
    # the networks, to have something to run; benchmarks also the parts whose time they take.
    "benchmarks": (
        {"", "benchmarks", "runtime", "codegen", "models", "models/networks"},
        {"torch", "numpy", "rich", "click", "transformers", "triton", "onnx", "onnxruntime"},
    ),
    # What is copied to where neither memcompile nor torch is.
    "examples/onnx": (set(), {"numpy", "onnxruntime"}),
    "examples": ({"", "models", "models/networks"}, {"torch", "numpy", "rich", "transformers"}),
}
# Slow to load or absent: only inside a function.
LAZY = {"transformers", "tokenizers", "triton", "onnx", "onnx_ir", "onnxscript", "onnxruntime"} | {
    "torch_tensorrt",
    "torch._inductor",
    "matplotlib",
    "scipy",
}
NOT_SOURCES = {"tests", "docs", "build", "dist", "out"}


@dataclass(frozen=True)
class Import:
    """One imported module: a path inside the package, or a library's dotted name."""

    file: str
    line: int
    target: str
    inside: bool
    lazy: bool
    names: tuple[str, ...] = ()


def sources() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if not any(
            part.startswith(".") or part in NOT_SOURCES
            for part in path.relative_to(ROOT).parts[:-1]
        )
    ]


def imports(file: str, text: str) -> Iterator[Import]:
    """Every import of one file, relative ones resolved to a path from the package's root."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) in (
                "TYPE_CHECKING",
                "typing.TYPE_CHECKING",
            ):
                for inner in child.body:
                    yield inner, True
                    yield from walk(inner, True)
                continue
            yield child, lazy
            yield from walk(
                child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            )

    here = Path(file).parent
    for node, lazy in walk(ast.parse(text), False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                inside = alias.name.split(".")[0] == "memcompile"
                target = "/".join(alias.name.split(".")[1:]) if inside else alias.name
                yield Import(file, node.lineno, target, inside, lazy)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = tuple(alias.name for alias in node.names)
            if node.level:
                base = here
                for _ in range(node.level - 1):
                    base = base.parent
                target = (base / module.replace(".", "/")).as_posix().removeprefix(".")
                inside = True
            else:
                inside = module.split(".")[0] == "memcompile"
                target = "/".join(module.split(".")[1:]) if inside else module
            # `from .. import models` names a folder, not a thing of the face.
            for name in names:
                folder = f"{target}/{name}".lstrip("/")
                is_module = inside and (
                    (ROOT / folder).is_dir() or (ROOT / f"{folder}.py").is_file()
                )
                yield Import(
                    file, node.lineno, folder if is_module else target, inside, lazy, (name,)
                )


def place(path: str) -> str:
    """The entry of the table that a path from the root falls under."""
    parts = path.split("/")
    known = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in known if name in LAW), "")


def broken(item: Import) -> str | None:
    """Why the table does not allow the import; None when it does."""
    folders, libraries = LAW[place(str(Path(item.file).parent).removeprefix("."))]
    where = f"{item.file}:{item.line}"
    if item.inside:
        target = place(item.target)
        allowed = target in folders or target.split("/")[0] in folders
        # The version is a fact, not a part of the face.
        if not allowed and not (target == "" and item.names == ("__version__",)):
            return f"{where} imports {target or 'the face'}; allowed: {sorted(folders)}"
        return None
    top = item.target.split(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if top not in libraries:
        return f"{where} imports {item.target}; allowed: {sorted(libraries)}"
    late = top in LAZY or any(item.target.startswith(name) for name in LAZY)
    if late and not item.lazy and not item.file.startswith(("benchmarks/", "examples/")):
        return f"{where} imports {item.target} when it is loaded; import it inside a function"
    return None


def test_every_import_is_allowed_by_the_table() -> None:
    found = [
        item
        for path in sources()
        for item in imports(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert len(found) > 50, "the walk found hardly an import: it looks in the wrong place"
    problems = [problem for item in found if (problem := broken(item))]
    assert not problems, "\n".join(problems)


def test_folders_import_each_other_relatively() -> None:
    absolute = [
        f"{name}:{node.lineno}"
        for path in sources()
        if not (name := path.relative_to(ROOT).as_posix()).startswith("examples/")
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            (isinstance(node, ast.ImportFrom) and not node.level and node.module)
            and node.module.split(".")[0] == "memcompile"
        )
        or (
            isinstance(node, ast.Import)
            and any(alias.name.split(".")[0] == "memcompile" for alias in node.names)
        )
    ]
    assert not absolute, f"write them as `from ..folder import name`: {absolute}"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("models/ops.py", "from ..passes.result import Site"),
        ("models/ops.py", "from .. import passes"),
        ("models/memory/scout.py", "import safetensors"),
        ("models/networks/induction.py", "import transformers"),
        ("passes/find.py", "from ..runtime.engine import Engine"),
        ("passes/find.py", "import rich"),
        ("codegen/spec.py", "def f():\n    from ..passes import result"),
        ("runtime/engine.py", "from ..compiler import report"),
        ("runtime/engine.py", "from .. import compile"),
        ("compiler/cli.py", "import transformers"),
        ("compiler/cli.py", "import torch._inductor.config"),
        ("benchmarks/step.py", "from ..compiler import pipeline"),
        ("examples/demo.py", "from memcompile.compiler.pipeline import build"),
        ("examples/demo.py", "from memcompile.runtime.engine import Engine"),
        ("__init__.py", "from .passes.result import Site"),
    ],
)
def test_a_forbidden_import_is_found(file: str, text: str) -> None:
    assert [problem for item in imports(file, text) if (problem := broken(item))]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("models/networks/induction.py", "def f():\n    import transformers"),
        ("compiler/cli.py", "from .. import __version__"),
        ("compiler/cli.py", "if TYPE_CHECKING:\n    import transformers"),
        ("compiler/pipeline.py", "from ..passes.result import Site"),
        ("examples/demo.py", "import memcompile\nfrom memcompile import explain"),
        ("examples/own_memory.py", "from memcompile.models.memory.spec import Memory"),
        ("runtime/engine.py", "from ..models.memory import PRESETS\nimport torch.fx"),
    ],
)
def test_an_allowed_import_is_let_through(file: str, text: str) -> None:
    assert not [problem for item in imports(file, text) if (problem := broken(item))]
