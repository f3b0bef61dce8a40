"""Compiles generated kernels for a target, with or without a GPU."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..spec import STATE_OPS, KernelSpec
from . import ptx
from .blocks import Launch, architecture, launches
from .load import module

TORCH_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32"}
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
        shared: bytes of shared memory a program is given when it is launched.
        threads: of one program.
        multiples: by argument, what it is taken to be a multiple of: bytes of a pointer, elements
            of a stride.
        written_for: what the assembly is written for, with its version: "sm_90a, PTX 8.7".
        triton: the version that compiled it.
    """

    role: str
    launch: Launch
    arguments: tuple[tuple[str, str], ...]
    entry: str
    assembly: str
    binary: bytes
    shared: int
    threads: int
    multiples: dict[str, int] = field(default_factory=dict, hash=False)
    written_for: str = ""
    triton: str = ""


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
    multiples = {name: _multiple(spec, name) for name in kernel.arg_names}
    return compile_kernel(kernel, signature, multiples, launch, role, target)


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    multiples: dict[str, int],
    launch: Launch,
    role: str,
    target: str,
) -> CompiledKernel:
    """One kernel for a target.

    Args:
        signature: the type of each parameter, in order.
        multiples: by name, what a parameter is taken to be a multiple of.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {
        (at,): [["tt.divisibility", multiples[name]]]
        for at, name in enumerate(signature)
        if multiples.get(name, 1) > 1
    }
    backend, arch = target.split(":")
    number = int(arch.removeprefix("sm_")) if backend == "cuda" else arch
    with triton.knobs.compilation.scope():
        # The lines of a file that is on this machine alone, with its path, are nothing to ship.
        triton.knobs.compilation.disable_line_info = True
        found = triton.compile(
            ASTSource(kernel, signature, dict(launch.constants), attributes),
            target=GPUTarget(backend, number, architecture(target).warp),
            options={
                "num_warps": launch.warps,
                "num_stages": launch.stages,
                "enable_fp_fusion": True,  # as in launches; Triton is about to change its default
            },
        )
    text, binary = ("ptx", "cubin") if backend == "cuda" else ("amdgcn", "hsaco")
    arguments = tuple((name, kind) for name, kind in signature.items() if kind != "constexpr")
    written_for = _check_launch(found, found.asm[text], backend, len(arguments))
    return CompiledKernel(
        role,
        launch,
        arguments,
        found.metadata.name,
        found.asm[text],
        found.asm[binary],
        found.metadata.shared,
        launch.warps * architecture(target).warp,
        {name: multiples[name] for name, _ in arguments if multiples.get(name, 1) > 1},
        written_for,
        triton.__version__,
    )


def _multiple(spec: KernelSpec, name: str) -> int:
    """What an argument is taken to be a multiple of.

    Tensors are allocated at multiples of 16 bytes. Heads of queries, keys and values lie their
    width apart, or a multiple of it.
    """
    if name.startswith("p_"):
        return 16
    what, _, axis = name.partition("_")
    if what not in ("query", "key", "value") or axis not in ("batch", "head", "row"):
        return 1
    return math.gcd(spec.value_dim if what == "value" else spec.key_dim, 16)


def _check_launch(found: Any, text: str, backend: str, arguments: int) -> str:
    """Holds a compiled kernel to what our launches pass it; what its assembly is written for.

    Triton adds two pointers behind the arguments, to memory of which our kernels take none.
    """
    facts = found.metadata
    for name in ("global_scratch_size", "profile_scratch_size"):
        if size := getattr(facts, name, 0):
            raise RuntimeError(f"{facts.name} has a {name} of {size}, and is given none")
    for name in ("launch_cooperative_grid", "launch_pdl"):
        if getattr(facts, name, False):
            raise RuntimeError(f"{facts.name} asks for {name}; our launches are plain ones")
    if facts.num_ctas != 1:
        raise RuntimeError(f"{facts.name} has clusters of {facts.num_ctas}; our launches have none")
    if backend == "cuda":
        entry = ptx.entry(text)
        count, written_for = len(entry.parameters), f"{entry.target}, PTX {entry.version}"
    else:
        told = re.findall(r"^\s+\.value_kind:\s+(\w+)", text, re.M)
        count = sum(not kind.startswith("hidden_") for kind in told)
        target = re.search(r'\.amdgcn_target "([^"]+)"', text)
        written_for = target[1] if target else ""
    if count != arguments + len(ptx.HIDDEN):
        raise RuntimeError(
            f"{facts.name} takes {count} parameters; expected {arguments} and Triton's "
            f"{' and '.join(ptx.HIDDEN)}"
        )
    return written_for


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
    return f"*{TORCH_TYPES[spec.dtype]}"


def used(compiled: CompiledKernel) -> dict[str, int]:
    """`resources` of a kernel of either vendor; for AMD of vector registers, with "scalar" ones.

    Raises:
        ImportError, ValueError: as `resources`.
    """
    if compiled.binary[:4] != b"\x7fELF":
        raise ValueError(f"{compiled.entry}: no binary")
    if ".amdgcn_target" not in compiled.assembly:
        return resources(compiled.binary)
    found = {}
    for name, key in _AMD_COUNTS.items():
        told = re.search(rf"^\s+(?:- )?\.{key}:\s+(\d+)", compiled.assembly, re.M)
        if told is None:
            raise ValueError(f"{compiled.entry}: its assembly does not tell {key}")
        found[name] = int(told[1])
    return found


_AMD_COUNTS = {
    "registers": "vgpr_count",
    "stack": "private_segment_fixed_size",
    "shared": "group_segment_fixed_size",
    "scalar": "sgpr_count",
}


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
