"""Compiles generated kernels for a target, with or without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..spec import STATE_OPS, KernelSpec
from .blocks import Launch, architecture, launches
from .load import module

_TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# What pointers lead to, where it is not the spec's dtype.
_INTEGERS = (
    *("p_table", "p_list", "p_position", "p_lengths", "p_selected", "p_ranks"),
    *("p_record_table", "p_child_table", "p_candidates"),
)
_FLOATS = (
    *("p_out", "p_outs", "p_lse", "p_lses", "p_page_lse"),
    *("p_bias", "p_log_count", "p_page_bias", "p_page_logits", "p_logits"),
)
_SCALARS = ("scale", "softcap")


@dataclass(frozen=True)
class CompiledKernel:
    """One launch of a spec, compiled.

    Attributes:
        role: its name among the spec's launches (see `blocks.launches`).
        launch: constants, warps and stages.
        arguments: (name, type) of what it is launched with, constants left out.
        entry: the function's name in the binary.
        assembly: the text of what is passed on: PTX, or AMD assembly.
        binary: cubin or hsaco.
        shared: bytes of shared memory a program uses.
        threads: of one program.
    """

    role: str
    launch: Launch
    arguments: tuple[tuple[str, str], ...]
    entry: str
    assembly: str
    binary: bytes
    shared: int
    threads: int


def compile_for(spec: KernelSpec, target: str) -> list[CompiledKernel]:
    """Compiles every launch of a spec for a target.

    Args:
        target: "cuda:sm_90", "hip:gfx942", ...: a key of `blocks.ARCHITECTURES`.

    Raises:
        NotCovered: no template covers the spec on this target.
        ValueError: unknown target.
        ImportError: triton is not installed.
        RuntimeError: kernels were imported for the interpreter (TRITON_INTERPRET=1).
    """
    made = module(spec, target)
    return [
        compile_launch(spec, made, role, launch, target)
        for role, launch in launches(spec, target).items()
    ]


def compile_launch(
    spec: KernelSpec, made: Any, role: str, launch: Launch, target: str
) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(made, launch.kernel)
    if not isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            f"{launch.kernel} was imported for the interpreter; unset TRITON_INTERPRET, and "
            "compile in a new process"
        )
    signature = {
        name: "constexpr" if name in launch.constants else _type(spec, name)
        for name in kernel.arg_names
    }
    # Tensors are allocated at multiples of 16 bytes, and rows begin at such multiples.
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (at,): aligned
        for at, name in enumerate(kernel.arg_names)
        if name.startswith("p_") or name.endswith(("_batch", "_head", "_row"))
    }
    backend, arch = target.split(":")
    number = int(arch.removeprefix("sm_")) if backend == "cuda" else arch
    found = triton.compile(
        ASTSource(kernel, signature, dict(launch.constants), attributes),
        target=GPUTarget(backend, number, architecture(target).warp),
        options={
            "num_warps": launch.warps,
            "num_stages": launch.stages,
            "enable_fp_fusion": True,  # what launches use; Triton is about to change its default
        },
    )
    text, binary = ("ptx", "cubin") if backend == "cuda" else ("amdgcn", "hsaco")
    return CompiledKernel(
        role,
        launch,
        tuple((name, kind) for name, kind in signature.items() if kind != "constexpr"),
        found.metadata.name,
        found.asm[text],
        found.asm[binary],
        found.metadata.shared,
        launch.warps * architecture(target).warp,
    )


def _type(spec: KernelSpec, name: str) -> str:
    if name in _SCALARS:
        return "fp32"
    if not name.startswith("p_"):
        return "i32"
    if name in _INTEGERS:
        return "*i32"
    of_state = spec.op in STATE_OPS and name not in ("p_query", "p_key", "p_value")
    if name in _FLOATS or spec.op == "combine" or of_state:
        return "*fp32"
    return f"*{_TRITON_TYPES[spec.dtype]}"


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes a thread spills, of the kernel in a cubin.

    Returns:
        "registers", "stack" (bytes of local memory that hold spilled registers and arrays) and
        "shared" (bytes that the kernel declares; what a launch adds is not among them).

    Raises:
        ImportError: triton, whose cuobjdump reads it, is not installed.
        ValueError: no cubin.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True
        )
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", ran.stdout)
    if usage is None:
        raise ValueError(f"cuobjdump reads no kernel in this: {(ran.stderr or ran.stdout)[:200]}")
    registers, stack, shared, local = map(int, usage.groups())
    return {"registers": registers, "stack": stack + local, "shared": shared}
