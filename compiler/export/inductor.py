"""Step graphs of engines as AOTInductor packages: one graph for any sizes, state written in place.

The graph goes to Inductor as `lower` hands it over, not through torch.export, which would make it
functional: what is written in place stays so, and no copy of a cache comes into being. Nor do the
passes run there that take a counter for a constant.
"""

from __future__ import annotations

import itertools
import json
import platform
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...models.portable import TEXTS
from ...passes.remember import StepGraph
from ...runtime.engine import Program
from ..lower import Traced, size, trace
from .against_graph import Run
from .contract import Contract, prefill_of

PACKAGE = "engine.pt2"
PREFILL = "prefill.pt2"
TORCH = ("aten", "prims", "prim")
X86 = ("x86_64", "amd64")
# Any x86 machine of the last ten years, not this one; our kernels choose for themselves.
BASELINE = {"cpp.simdlen": 256, "cpp.march": "x86-64-v3"}
_SIZES = (2, 3, 4, 5, 8, 12, 64, 1000)  # that conditions on sizes are tried with


def example(contract: Contract, device: torch.device) -> Callable[[Any], list[Tensor]]:
    """What `lower.trace` takes: inputs of the contract, batch, tokens and capacity symbolic."""

    def inputs(shape_env: Any) -> list[Tensor]:
        batch, rows = size(shape_env, "batch", 2), size(shape_env, "rows", 3)
        units = size(shape_env, "units", 40)

        def empty(*shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        made = [empty(batch, rows, dtype=torch.int64), empty(batch)]
        if contract.lengths is not None:
            made.append(empty(batch))
        for tensor in contract.state:
            shape: list[Any] = [*tensor.shape]
            shape[tensor.batch_axis] = batch
            if tensor.grows is not None:
                assert contract.capacity is not None
                each = contract.capacity.multiple // tensor.grows.tokens
                shape[tensor.grows.axis] = units * each
            made.append(empty(*shape, dtype=tensor.torch_dtype))
        return made

    return inputs


def trace_flat(
    step: fx.GraphModule,
    contract: Contract,
    device: torch.device,
    linear: Any = None,
) -> Traced:
    """`lower.trace` of a step on contiguous state, for sizes of any value.

    Raises:
        RuntimeError: an operation was traced for some sizes alone.
    """
    with any_size():
        traced = trace(step, example(contract, device), linear, TEXTS)
    check_sizes(traced)
    return traced


def any_size() -> AbstractContextManager[Any]:
    """While it lasts, no size is compared with one to find what is broadcast."""
    from torch.fx.experimental import _config

    held: AbstractContextManager[Any]
    held = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return held


def check_sizes(traced: Traced) -> None:
    """Nobody checks the sizes that a package is called with: it must hold for all of them.

    Left are those that say that a size is not one, and so is not broadcast; where it is one, both
    come to the same (and `against_graph.check` calls it with ones).

    Raises:
        RuntimeError: it was made for some sizes alone.
    """
    env = traced.mode.shape_env
    bound = [str(guard.expr) for guard in env.guards if not _not_one(guard.expr)]
    bound += [f"{symbol} is {value}" for symbol, value in env.replacements.items()]
    if bound:
        raise RuntimeError(
            f"the step was traced for some sizes alone: {'; '.join(bound[:5])}; please report this "
            "model"
        )


def _not_one(guard: Any) -> bool:
    """Whether a condition on sizes holds wherever they are not zero or one: tried, not proved."""
    import sympy

    symbols = sorted(guard.free_symbols, key=str)
    tries = itertools.product(_SIZES, repeat=len(symbols))
    return all(guard.subs(dict(zip(symbols, sizes, strict=True))) == sympy.true for sizes in tries)


def check_operations(traced: Traced, beside: Collection[str] = ()) -> None:
    """A process that has loaded nothing of ours has torch's own operations alone; here, where
    others are registered, a package that calls them would work all the same.

    Args:
        beside: namespaces that come in a library beside the package.

    Raises:
        RuntimeError: the step calls an operation of another namespace.
    """
    for node in traced.graph.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            continue
        if target.namespace not in (*TORCH, *beside):
            raise RuntimeError(
                f"the step calls {target}, which no process has that loads the package alone"
            )


def with_weights(traced: Traced) -> fx.GraphModule:
    """The traced graph with its weights as attributes, which Inductor stores with the code."""
    root = torch.nn.Module()
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    names = iter(traced.weights.items())
    for node in traced.graph.graph.nodes:
        name, weight = next(names, ("", None)) if node.op == "placeholder" else ("", None)
        if weight is None:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
            continue
        root.register_buffer(name, weight)
        copied[node] = graph.get_attr(name)
        copied[node].meta = dict(node.meta)
    return fx.GraphModule(root, graph)


def graphs(step: StepGraph, program: Program) -> dict[str, fx.GraphModule]:
    """The packages of an engine, and the graph of each."""
    made = {PACKAGE: step.policy}
    prompt = prefill_of(step, program)
    return made if prompt is None else {**made, PREFILL: prompt}


def eager(graph: fx.GraphModule) -> Run:
    """The graph as a function of its inputs in order."""
    return lambda inputs: [*graph(*inputs)]


def on(device: torch.device, run: Run) -> Run:
    """A function of tensors on a device as one of tensors on the CPU, written in place there."""
    if device.type == "cpu":
        return run

    def moved(inputs: list[Tensor]) -> list[Tensor]:
        there = [tensor.to(device) for tensor in inputs]
        made = [tensor.cpu() for tensor in run(there)]
        for tensor, written in zip(inputs, there, strict=True):
            tensor.copy_(written)
        return made

    return moved


def elsewhere(device: torch.device) -> str:
    """Why nothing can be compiled for a device on this machine, or nothing."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()):
        return ""
    return (
        f"the model is on {device}, and there is none here, which its code has to be compiled on; "
        "move it to the CPU with model.cpu(), or export where the device is"
    )


def compile_package(traced: Traced, package: Path) -> None:
    """Compiles a traced step and writes its package.

    Args:
        package: the file to write; its folder exists. PREFILL is written without weights: whoever
            loads it gives it those of PACKAGE, which are in memory already.

    Raises:
        RuntimeError: Inductor, or the compiler below it, cannot do it.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner, get_cpp_wrapper_config
    from torch._inductor.package.package import package_aoti
    from torch._inductor.virtualized import V
    from torch.utils import _pytree as pytree

    module = with_weights(traced)
    inputs = traced.inputs[len(traced.weights) :]
    outputs = module.graph.output_node().args[0]
    takes = pytree.tree_structure((tuple(range(len(inputs))), {}))
    gives = pytree.tree_structure(tuple(range(len(outputs))))  # type: ignore[arg-type]
    build = package.with_suffix(".build")
    settings: dict[str, Any] = {
        "cpp_wrapper": True,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": package.name != PREFILL,
        "aot_inductor.output_path": str(build),
        "aot_inductor.serialized_in_spec": pytree.treespec_dumps(takes),
        "aot_inductor.serialized_out_spec": pytree.treespec_dumps(gives),
        **(BASELINE if platform.machine().lower() in X86 else {}),
    }
    traced.mode.allow_non_fake_inputs = True  # the weights, which are attributes
    try:
        with (
            any_size(),
            config.patch(settings),
            config.patch(get_cpp_wrapper_config()),
            V.set_aot_compilation(True),
            V.set_real_inputs(inputs),
            tracing(TracingContext(traced.mode)),
            torch.no_grad(),
        ):
            made: Any = compile_fx_inner(module, inputs, cpp_wrapper=True)
        files: list[Any] = made.filename
        check_sizes(traced)
        _forget_machine(files)
        package_aoti(str(package), files)
    except Exception as reason:  # Inductor and the compilers below it may raise anything
        text = f"{type(reason).__name__}: {' '.join(str(reason).split())[:600]}"
        raise RuntimeError(f"{package.name} cannot be compiled: {text}") from reason
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _forget_machine(files: Sequence[Any]) -> None:
    """Drops the instruction set from what the package says of itself: torch holds it against the
    machine's best one when it loads the package, and warns of machines that can do more."""
    for file in files:
        if isinstance(file, str) and file.endswith("_metadata.json"):
            told = json.loads(Path(file).read_text(encoding="utf-8"))
            told.pop("AOTI_CPU_ISA", None)
            Path(file).write_text(json.dumps(told), encoding="utf-8")


def load(package: Path, weights: Mapping[str, Tensor]) -> Run:
    """A package as a function of its inputs in order; what it keeps in place is written there.

    Args:
        weights: for a package that has none.
    """
    from torch._inductor import aoti_load_package

    model = aoti_load_package(str(package))
    if package.name == PREFILL:
        needed = {name: weights[name] for name in model.get_constant_fqns()}
        model.load_constants(needed, check_full_update=True, user_managed=True)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        made: list[Tensor] = model.loader.run(inputs)
        return made

    return run


def notes(folder: Path, device: torch.device) -> list[str]:
    """What the user of the packages in a folder has to know."""
    said = ["the state is updated in place; every input is contiguous"]
    if device.type != "cpu":
        said.append("its kernels are inside; unverified on GPU")
    elif platform.machine().lower() in X86:
        said.append("made for x86-64 with AVX2")
    if (folder / PREFILL).exists():
        said.append(
            f"{PREFILL} reads everything: feed it the prompt, and {PACKAGE} what follows; give it "
            f"the weights that {PACKAGE} holds (AOTIModelPackageLoader::load_constants)"
        )
    return said
