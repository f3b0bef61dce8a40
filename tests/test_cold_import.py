"""`import memcompile` loads no compiler and costs next to nothing."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

HEAVY = ("triton", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime")
HEAVY += ("scipy", "matplotlib", "lm_eval")
# Classes of a library's own kind: nothing but that library, or who has it, loads them.
ADAPTERS = ("memcompile.compiler.harness", "memcompile.evaluation.lm_eval")
COMPILERS = ("torch._inductor", "torch._dynamo", "torch.export", "memcompile.compiler")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str, roots: tuple[str, ...]) -> set[str]:
    names = json.loads(
        python(f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))")
    )
    return {root for root in roots for name in names if (name + ".").startswith(root + ".")}


def test_import_loads_no_compiler() -> None:
    # torch brings some of its own compiler along; that is the bar, not more.
    assert not loaded_by("import memcompile", HEAVY + COMPILERS)


def test_no_module_of_the_package_loads_a_heavy_library() -> None:
    baseline = loaded_by("import torch, torch.export, torch.fx.experimental.proxy_tensor", HEAVY)
    walk = (
        "import importlib, pkgutil, memcompile\n"
        "for folder in ('models', 'passes', 'codegen', 'runtime', 'evaluation', 'compiler'):\n"
        "    package = importlib.import_module(f'memcompile.{folder}')\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        f"        if found.name not in {ADAPTERS}:\n"
        "            importlib.import_module(found.name)\n"
    )
    assert loaded_by(walk, HEAVY) <= baseline


def test_import_is_as_quick_as_torch() -> None:
    timed = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    runs = [(float(python(timed.format(m))), m) for _ in range(3) for m in ("torch", "memcompile")]
    torch, ours = (
        statistics.median(seconds for seconds, name in runs if name == wanted)
        for wanted in ("torch", "memcompile")
    )
    assert ours < 1.5 * torch, f"import memcompile {ours:.2f} s, import torch {torch:.2f} s"
