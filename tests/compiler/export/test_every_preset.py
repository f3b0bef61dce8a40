"""Every kernel of every shipped preset, compiled for every family of GPUs.

`pytest --long -s tests/compiler/export/test_every_preset.py` prints the table of docs/kernels.md.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import memcompile
from memcompile.codegen.spec import KernelSpec
from memcompile.codegen.triton.blocks import ARCHITECTURES
from memcompile.compiler.export.targets import Binaries, Needed, compile_needed, needed
from memcompile.compiler.pipeline import build

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120", "hip:gfx942")
LATENT: dict[str, Any] = dict(
    dtype="bfloat16", key_dim=576, value_dim=512, shared_kv=True, page_size=64
)
# Of latent attention, which no preset lays out yet: as far as templates cover it.
BESIDE = (
    Needed(KernelSpec("attend", group=16, **LATENT), {None}),
    Needed(KernelSpec("attend", group=16, pages="listed", summaries=True, **LATENT), {32}),
    Needed(KernelSpec("append_index", fields=("mean", "std", "log_count"), **LATENT), {None}),
)


@pytest.fixture(scope="module")
def binaries() -> list[Binaries]:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=64,
        max_position_embeddings=4096,
    )
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    wanted: dict[KernelSpec, Needed] = {need.spec: need for need in BESIDE}
    for name in memcompile.policies():
        compiled = build(model, name, kernels="off", check=False)
        assert compiled.step is not None and compiled.program is not None
        graphs = {"dense": compiled.step.dense, "policy": compiled.step.policy}
        found, missing = needed(graphs, compiled.program.layouts, compiled.program.device)
        assert found and not missing, name
        for need in found:
            wanted.setdefault(need.spec, need).widths.update(need.widths)
    return compile_needed([*wanted.values()], TARGETS, required=True)


def test_every_kernel_is_there_and_fits(binaries: list[Binaries]) -> None:
    assert [made.target for made in binaries] == [*TARGETS]
    names = {name for name in binaries[0].kernels}
    assert len(names) > 30
    for made in binaries:
        assert not made.uncovered and {*made.kernels} == names
        for name, kernel in made.kernels.items():
            binary, assembly = made.files[kernel["binary"]], made.files[kernel["assembly"]]
            assert binary[:4] == b"\x7fELF" and kernel["entry"].encode() in assembly, name
            assert kernel["shared"] <= ARCHITECTURES[made.target].shared, name
            assert 0 < kernel["registers"] <= (512 if "hip" in made.target else 255), name


def test_the_table(binaries: list[Binaries]) -> None:
    lines = table(binaries)
    assert len(lines) == len(binaries[0].kernels) + 2
    print("\n" + "\n".join(lines))


def table(binaries: list[Binaries]) -> list[str]:
    """Markdown: registers, spilled bytes, KiB of shared memory and KiB of the binary, by target."""
    lines = ["| kernel | " + " | ".join(made.target for made in binaries) + " |"]
    lines += ["|---" * (len(binaries) + 1) + "|"]
    for name in binaries[0].kernels:
        cells = []
        for made in binaries:
            kernel = made.kernels[name]
            spilled = f" ({kernel['spilled']})" if kernel["spilled"] else ""
            sizes = (round(kernel[key] / 1024) for key in ("shared", "bytes"))
            cells.append(f"{kernel['registers']}{spilled}, {', '.join(map(str, sizes))}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines
