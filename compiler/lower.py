"""Lower step graphs: traced once with symbolic sizes, kernels put in, the rest through Inductor.

A traced graph takes the weights as inputs, so that Inductor's cache holds code and no constants and
two models of one architecture share an entry. Memory operations write their state in place: the
graph is not functionalised, and Inductor keeps the order of what reads and writes a tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .. import codegen
from ..codegen.spec import KernelSpec, NotCovered, bind, specialise
from ..models.ops import FAMILIES
from ..runtime import huge_pages
from ..runtime.page_table import TableKey
from ..runtime.site_layout import SiteLayout
from .report import Lowered, stage
from .settings import debug

Step = Callable[..., tuple[Tensor, ...]]
SIXTEEN = (torch.bfloat16, torch.float16)
# From a ShapeEnv to the inputs of a step graph, in a fake mode.
Example = Callable[[Any], list[Tensor]]


def lower(
    graphs: dict[str, fx.GraphModule],
    layouts: Sequence[SiteLayout],
    device: torch.device,
    kernels: str,
    timings: dict[str, float],
) -> tuple[dict[str, Step], Lowered]:
    """Step graphs as functions of the inputs they had.

    Args:
        graphs: step graphs by name ("dense", "policy"); one object under two names is lowered once.
        kernels: "auto", "required" or "off" (see `settings.kernels`).

    Raises:
        RuntimeError: kernels="required", and a kernel or a graph could not be made.
    """
    lowered = Lowered()
    why = "kernels=off" if kernels == "off" else uncovered(layouts)
    if why:
        if kernels == "required":
            raise RuntimeError(f"kernels='required', but {why}")
        lowered.references.append(why)
        lowered.inductor = dict.fromkeys(graphs, why)
        return {**graphs}, lowered
    names = {id(graph): name for name, graph in reversed(graphs.items())}
    traced: dict[str, Traced] = {}
    steps: dict[str, Step] = {}
    with stage(timings, "kernels"):
        held = (weight for graph in graphs.values() for weight in graph.parameters())
        linear, untold = None, ""
        if any(weight.dtype in SIXTEEN for weight in held):
            linear, untold = load_linear(device, kernels)
    with stage(timings, "trace"):
        for name, graph in graphs.items():
            if names[id(graph)] == name:
                made = try_trace(graph, partial(example_state, layouts, device), linear, kernels)
                if isinstance(made, Traced):
                    traced[name] = made
                else:
                    steps[name], lowered.inductor[name] = graph, made
                    lowered.references.append(f"the {name} step cannot be traced")
    with stage(timings, "kernels"):
        put_kernels(traced, device, kernels, lowered)
    if untold and untold not in lowered.references:
        lowered.references.append(f"linear layers are torch's own: {untold}")
        warnings.warn(lowered.references[-1], stacklevel=2)
    if linear is not None:
        streamed = [weight for step in traced.values() for weight in step.weights.values()]
        for weight in {weight.data_ptr(): weight for weight in streamed}.values():
            huge_pages.collapse(weight)
    with stage(timings, "inductor"):
        for name, graph in graphs.items():
            first = names[id(graph)]
            if name in traced:
                steps[name], lowered.inductor[name] = compile_step(traced[name], kernels)
            elif first != name:
                steps[name], lowered.inductor[name] = steps[first], lowered.inductor[first]
    return steps, lowered


def uncovered(layouts: Sequence[SiteLayout]) -> str:
    """Why a whole model runs on its references, or nothing."""
    if any(layout.dtype == torch.float64 for layout in layouts):
        return "the model is float64: what Inductor makes of its float32 parts is not eager's"
    return ""


@dataclass
class Traced:
    """A step graph in core ATen operations.

    Attributes:
        graph: takes the weights, then the step's inputs.
        inputs: fake tensors for all of them.
        weights: the tensors themselves, by the names that the step graph had for them.
        mode: what the fakes were made in.
    """

    graph: fx.GraphModule
    inputs: list[Tensor]
    weights: dict[str, Tensor]
    mode: Any


def try_trace(step: fx.GraphModule, example: Example, linear: Any, kernels: str) -> Traced | str:
    """`trace`, or why it cannot be done, where kernels are not required."""
    try:
        return trace(step, example, linear)
    except Exception as reason:  # the decompositions of any operation of any model run here
        text = f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
        if kernels == "required":
            raise RuntimeError(
                f"kernels='required', but the step cannot be traced: {text}"
            ) from reason
        warnings.warn(f"the step runs operation by operation, which is slow: {text}", stacklevel=2)
        return text


def trace(
    step: fx.GraphModule,
    example: Example,
    linear: Any,
    texts: Mapping[Any, Callable[..., Any]] | None = None,
) -> Traced:
    """Decomposes a step graph, with every size of the state symbolic.

    Args:
        example: makes tensors for its inputs, of sizes from `size`; called in a fake mode.
        linear: the operator for linear layers with 16-bit weights; None leaves them to Inductor.
        texts: what operators are decomposed to beside those that Inductor decomposes.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    lifted, weights = lift_weights(step, linear)
    # Sizes that happen to agree in the example must not become one symbol.
    mode = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False, duck_shape=False))
    with mode:
        inputs: list[Tensor]
        inputs = [mode.from_tensor(w, static_shapes=True) for w in weights.values()]
        inputs += example(mode.shape_env)
    table = {**select_decomp_table(), **(texts or {})}
    with torch.no_grad():
        traced = make_fx(lifted, table, tracing_mode="symbolic")(*inputs)
    # The traced module carries what no cache can take as a key.
    return Traced(fx.GraphModule({}, traced.graph), inputs, weights, mode)


def size(shape_env: Any, name: str, hint: int) -> Any:
    """A new size of any value, zero and one included."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = shape_env.create_symbol(
        hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True
    )
    return shape_env.create_symintnode(symbol, hint=hint, source=source)


def example_state(
    layouts: Sequence[SiteLayout], device: torch.device, shape_env: Any
) -> list[Tensor]:
    """Tensors of symbolic sizes for the inputs of a step graph, to be called in a fake mode."""
    batch, rows = size(shape_env, "batch", 2), size(shape_env, "rows", 3)
    columns: dict[TableKey, Any] = {}
    pages: dict[TableKey, Any] = {}

    def empty(*shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    inputs = [empty(batch, rows, dtype=torch.int64), empty(batch), empty(batch)]
    for layout in layouts:
        for key, pools in layout.stores():
            # Sites that share a page table have as many columns and pages as each other.
            if key not in columns:
                columns[key] = size(shape_env, f"columns{len(columns)}", 40)
                pages[key] = size(shape_env, f"pages{len(pages)}", 400)
            inputs.append(empty(batch, layout.kv_heads, columns[key]))
            inputs += [empty(pages[key], *shape, dtype=dtype) for shape, dtype in pools]
        if layout.memory.account is not None:
            shape = (batch, layout.kv_heads, columns[layout.table_key])
            inputs.append(empty(*shape, dtype=torch.float32))
        inputs += [empty(batch, *shape, dtype=dtype) for shape, dtype in layout.rows()]
    return inputs


def lift_weights(step: fx.GraphModule, linear: Any) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The step with its weights as first inputs, and the weights by their names."""
    graph = fx.Graph()
    weights: dict[str, Tensor] = {}
    copied: dict[fx.Node, fx.Node] = {}
    inputs: dict[str, fx.Node] = {}
    for node in step.graph.nodes:
        if node.op == "get_attr" and node.target not in weights:
            weights[node.target] = getattr(step, node.target).detach()
            inputs[node.target] = graph.placeholder(f"weight_{len(weights)}")
    for node in step.graph.nodes:
        if node.op == "get_attr":
            copied[node] = inputs[node.target]
        else:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
            if linear is not None and _streams_weights(node, weights):
                values = (*node.args, None)[:3]  # a bias may be left out
                copied[node].target = linear
                copied[node].args = fx.node.map_arg(values, lambda n: copied[n])
    return fx.GraphModule({}, graph), weights


def _streams_weights(node: fx.Node, weights: Mapping[str, Tensor]) -> bool:
    """Whether a node is a linear layer whose 16-bit weights our kernel reads as they lie."""
    if node.target is not torch.ops.aten.linear.default or node.kwargs:
        return False
    held = [n for n in node.args[1:] if isinstance(n, fx.Node)]
    if not all(n.op == "get_attr" for n in held):
        return False
    tensors = [weights[str(n.target)] for n in held]
    return all(t.is_contiguous() and t.dtype in SIXTEEN for t in tensors)


def load_linear(device: torch.device, kernels: str) -> tuple[Any, str]:
    """The operator that reads 16-bit weights at memory speed, or None; and why it is missing."""
    if device.type != "cpu":
        return None, ""
    try:
        return codegen.load_linear(), ""
    except (RuntimeError, OSError) as reason:
        if kernels == "required":
            raise RuntimeError(f"kernels='required', but {reason}") from reason
        return None, " ".join(str(reason).split())


def memory_calls(
    traced: Mapping[str, Traced],
) -> Iterator[tuple[str, fx.Node, KernelSpec | NotCovered, tuple[Any, ...]]]:
    """Every memory operation of traced graphs: the graph's name, the node, its kernel's spec and
    the fake arguments of that kernel; or why no template covers it, and none."""
    for name, step in traced.items():
        for node in step.graph.graph.nodes:
            if node.op != "call_function" or node.target not in FAMILIES:
                continue
            fakes = fx.node.map_arg(node.args, lambda n: n.meta["val"])
            try:
                spec, given = specialise(_family(node), fakes)
            except NotCovered as reason:
                yield name, node, reason, ()
                continue
            yield name, node, spec, given


def _family(node: fx.Node) -> str:
    name: str = FAMILIES[node.target]  # type: ignore[index]
    return name


def put_kernels(
    traced: dict[str, Traced], device: torch.device, kernels: str, lowered: Lowered
) -> None:
    """Replaces memory operations by generated kernels, all specs of a model built at once."""
    wanted: list[tuple[str, fx.Node, KernelSpec, dict[str, Any]]] = []
    for name, node, spec, _ in memory_calls(traced):
        if isinstance(spec, NotCovered):
            if kernels == "required":
                raise RuntimeError(f"kernels='required', but {spec}") from spec
            lowered.references.append(str(spec))
            continue
        wanted.append((name, node, spec, bind(_family(node), node.args)))
    lowered.references = [*dict.fromkeys(lowered.references)]
    if lowered.references:
        reasons = "; ".join(lowered.references)
        warnings.warn(
            f"parts of the memory run on references, which is slow: {reasons}", stacklevel=2
        )
    if not wanted:
        return
    operators = load_kernels({spec for _, _, spec, _ in wanted}, device, kernels, lowered)
    if operators is None:
        return
    calls: dict[KernelSpec, dict[str, int]] = {}
    for name, node, spec, given in wanted:
        node.target = operators[spec]
        node.args = tuple(given[argument] for _, argument in spec.arguments)
        # What the memory operation was traced with. Kernels take any strides, so that Inductor,
        # which would copy to keep those of the trace, is left free.
        node.meta.pop("eager_input_vals", None)
        counted = calls.setdefault(spec, {})
        counted[name] = counted.get(name, 0) + 1
    for step in traced.values():
        step.graph.recompile()  # the cache's key, and what runs without Inductor, is its code
    for spec, counted in sorted(calls.items(), key=lambda pair: pair[0].name):
        source = str(codegen.path(spec, device.type))
        debug(3, lambda s=spec, at=source: f"{s.name}: {at}")  # type: ignore[misc]
        lowered.kernels.append({"name": spec.name, "source": source, "calls": counted})


def load_kernels(
    specs: Iterable[KernelSpec], device: torch.device, kernels: str, lowered: Lowered
) -> Mapping[KernelSpec, Any] | None:
    """The kernels' operators, or None when they cannot be built and need not be."""
    try:
        return codegen.load(specs, device.type)
    except (RuntimeError, ImportError, OSError, NotCovered) as reason:
        if kernels == "required":
            raise RuntimeError(f"kernels='required', but {reason}") from reason
        text = " ".join(str(reason).split())
        lowered.references.append(text)
        warnings.warn(f"the memory runs on its references, which are slow: {text}", stacklevel=2)
        return None


def compile_step(traced: Traced, kernels: str) -> tuple[Step, str]:
    """The traced step through Inductor, or operation by operation where that fails."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner

    weights = [*traced.weights.values()]
    try:
        with tracing(TracingContext(traced.mode)), torch.no_grad():
            compiled = compile_fx_inner(traced.graph, traced.inputs)
    except Exception as reason:  # Inductor and the compilers below it may raise anything
        text = f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
        if kernels == "required":
            raise RuntimeError(f"kernels='required', but Inductor gave up: {text}") from reason
        warnings.warn(f"the step runs operation by operation, which is slow: {text}", stacklevel=2)
        graph = traced.graph

        def eager(*inputs: Tensor) -> tuple[Tensor, ...]:
            result: tuple[Tensor, ...] = graph(*weights, *inputs)
            return result

        return eager, text

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = compiled([*weights, *inputs])
        return result

    return step, "lowered"
