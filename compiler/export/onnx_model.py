"""From a step graph on contiguous state to an ONNX model with its memory operations as nodes."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ...models import portable
from .contract import Contract

if TYPE_CHECKING:
    import onnx_ir as ir

# What onnxruntime, TensorRT and TensorRT-RTX all read; later ones have nothing that is needed here.
OPSET = 20
OPSETS = range(20, 26)
DOMAIN = "memcompile"
# As TensorRT's parser finds a plug-in; it takes the node's body where none is registered.
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}

# TensorRT's parser goes by names alone, whatever their domain: none may be a standard operator's.
NODES: dict[str, str] = {
    "append_index": "MemcAppendIndex",
    "fold": "MemcFold",
    "score_select": "MemcScoreSelect",
    "score_select.page_logits": "MemcScoreSelectLogits",
    "score_select.among": "MemcScoreSelectAmong",
    "attend": "MemcAttend",
    "attend.summaries": "MemcSummaries",
    "attend.page_lse": "MemcAttendPageLse",
    "evict": "MemcEvict",
    "account": "MemcAccount",
    "combine": "MemcCombine",
    "entering": "MemcEntering",
    "additive_state": "MemcState",
    "page_records": "MemcPageRecords",
}
BATCH, COUNT, UNITS = "batch", "n", "units"
# Sizes that the graph is traced with; they are symbols, so any would do.
_TRACED = {BATCH: 3, COUNT: 5, UNITS: 4}

CPU = torch.device("cpu")

# Gives the outputs of a node, as the exporter's translations do.
Translation = Callable[..., Any]


def require_onnx() -> None:
    """Imports nothing; looks whether what is needed to write ONNX is there.

    Raises:
        ImportError: it is not; the message names the extra.
    """
    missing = [x for x in ("onnx", "onnx_ir", "onnxscript") if importlib.util.find_spec(x) is None]
    if missing:
        raise ImportError(
            f"exporting ONNX needs {', '.join(missing)}, which cannot be imported here; "
            "pip install 'memcompile[onnx]'"
        )


def check_opset(opset: int) -> None:
    """Refuses an opset that models would be silently broken in.

    Raises:
        ValueError: it is not one of OPSETS.
    """
    if opset not in OPSETS:
        raise ValueError(
            f"opset {opset!r} cannot be written; known: {OPSETS.start} to {OPSETS.stop - 1}"
        )


def example(
    contract: Contract, device: torch.device = CPU
) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Inputs of an engine by its contract, and which of their axes are symbols.

    Returns:
        zeros in the order of `Contract.inputs`; for each, axis -> torch.export's Dim.
    """
    from torch.export import Dim

    dims = {name: Dim(name) for name in _TRACED}
    batch, n = _TRACED[BATCH], _TRACED[COUNT]
    given = [torch.zeros(batch, n, dtype=torch.int64), torch.zeros(batch, dtype=torch.int32)]
    axes: list[dict[int, Any]] = [{0: dims[BATCH], 1: dims[COUNT]}, {0: dims[BATCH]}]
    if contract.lengths is not None:
        given.append(torch.full((batch,), n, dtype=torch.int32))
        axes.append({0: dims[BATCH]})
    for tensor in contract.state:
        shape, symbols = [*tensor.shape], {tensor.batch_axis: dims[BATCH]}
        shape[tensor.batch_axis] = batch
        if tensor.grows is not None:
            assert contract.capacity is not None
            times = contract.capacity.multiple // tensor.grows.tokens
            shape[tensor.grows.axis] = times * _TRACED[UNITS]
            symbols[tensor.grows.axis] = times * dims[UNITS] if times > 1 else dims[UNITS]
        given.append(torch.zeros(shape, dtype=tensor.torch_dtype))
        axes.append(symbols)
    return [tensor.to(device) for tensor in given], axes


def device_of(graph: torch.nn.Module) -> torch.device:
    """Where a graph's weights are."""
    weights = [*graph.parameters(), *graph.buffers()]
    return weights[0].device if weights else CPU


def _dim_names(contract: Contract) -> dict[str, str]:
    """Names that people read for the sizes of growing axes, by the exporter's."""
    if contract.capacity is None:
        return {}
    names = {}
    multiple = contract.capacity.multiple
    for tensor in contract.state:
        if tensor.grows is not None:
            times, tokens = multiple // tensor.grows.tokens, tensor.grows.tokens
            traced = f"{times}*{UNITS}" if times > 1 else UNITS
            names[traced] = "capacity" if tokens == 1 else f"capacity/{tokens}"
    return names


def onnx_models(
    graphs: Mapping[str, fx.GraphModule],
    contract: Contract,
    *,
    opset: int = OPSET,
    translations: Mapping[str, Translation] | None = None,
    branches: bool = True,
) -> dict[str, ir.Model]:
    """`onnx_model` of each graph, complete: with bodies, shared by name, and readable sizes.

    Args:
        branches: whether bodies may hold an If, which spares a step what only full pages need.
    """
    from .onnx_bodies import attach_bodies

    models = {
        name: onnx_model(graph, contract, opset=opset, translations=translations)
        for name, graph in graphs.items()
    }
    attach_bodies(list(models.values()), branches)
    for model in models.values():
        rename_dims(model, contract)
    return models


def onnx_model(
    graph: fx.GraphModule,
    contract: Contract,
    *,
    opset: int = OPSET,
    translations: Mapping[str, Translation] | None = None,
) -> ir.Model:
    """An ONNX model of a graph of `make_functional`, inputs and outputs named by the contract.

    Its memory operations are nodes of DOMAIN without bodies; `onnx_bodies.attach_bodies` adds them.

    Args:
        opset: one of OPSETS.
        translations: operators of `models.portable.OPS` by name -> what is to stand in a node's
            place: called with the operator's arguments, tensors as `onnx_ir` values, it gives its
            outputs. None of it: the node.

    Raises:
        ImportError: the libraries are not installed.
        ValueError: an opset that is not known.
    """
    require_onnx()
    check_opset(opset)
    given, axes = example(contract, device_of(graph))
    model = exported(
        graph,
        given,
        axes,
        translation_table(translations),
        opset,
        input_names=contract.inputs,
        output_names=contract.outputs,
    )
    clean(model)
    return model


def translation_table(
    translations: Mapping[str, Translation] | None = None,
) -> dict[Any, Translation]:
    """What stands in the place of each operator of `models.portable`; see `onnx_model`."""
    table = {portable.operator(name): _as_node(name) for name in NODES}
    for name, translation in (translations or {}).items():
        table[portable.operator(name)] = _checked(name, translation)
    return table


def clean(model: ir.Model) -> None:
    """Makes an exported model one that is handed on: folded, named, nothing of this machine."""
    transpose_weights(model)
    optimise(model)
    strip(model)
    for node in model.graph:
        model.opset_imports.setdefault(node.domain, 1)
    model.producer_name, model.producer_version = "memcompile", None
    model.graph.name = "step"


def exported(
    module: torch.nn.Module,
    given: Sequence[Any],
    axes: Sequence[Any],
    table: Mapping[Any, Translation],
    opset: int,
    **names: Any,
) -> ir.Model:
    """`torch.onnx.export`, quietly; nothing is optimised yet."""
    whole = {**_OWN, **table}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(given),
            dynamo=True,
            dynamic_shapes=tuple(axes),
            custom_translation_table=whole,
            opset_version=opset,
            optimize=False,
            verbose=False,
            **names,
        )
    assert program is not None
    model: ir.Model = program.model
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on libraries that are not there."""
    import warnings

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- memory operations as nodes ---


@dataclass(frozen=True)
class Operands:
    """The arguments of an operator, tensors apart from the rest.

    Attributes:
        names: of the tensors that are there, in order; those of a list are numbered.
        tensors: in the same order.
        static: the others by name.
    """

    names: tuple[str, ...]
    tensors: tuple[Any, ...]
    static: dict[str, Any]


def operands(operator: torch._ops.OpOverload, args: Sequence[Any]) -> Operands:
    """Sorts the arguments of an operator of `models.portable`."""
    names: list[str] = []
    tensors: list[Any] = []
    static: dict[str, Any] = {}
    for argument, value in zip(operator._schema.arguments, args, strict=True):
        kind = str(argument.type)
        if kind == "List[Tensor]":
            names += [f"{argument.name}_{i}" for i in range(len(value))]
            tensors += value
        elif "Tensor" not in kind:
            static[argument.name] = value
        elif value is not None:
            names.append(argument.name)
            tensors.append(value)
    return Operands(tuple(names), tuple(tensors), static)


def output_count(operator: torch._ops.OpOverload, given: Operands) -> int:
    """How many tensors an operator gives; lists are as long as what they renew."""
    returns = operator._schema.returns
    if str(returns[0].type) != "List[Tensor]":
        return len(returns)
    renewed = sum(name.startswith("index_") for name in given.names)
    if "key" in given.names and "keys" in given.names:
        return 2 + renewed
    return renewed or 3 + ("norm" in given.names)  # fold; else out, lse, state and perhaps norm


def _as_node(name: str) -> Translation:
    operator = portable.operator(name)

    def translate(*args: Any, **kwargs: Any) -> Any:
        import onnx_ir as ir
        from onnxscript import evaluator

        assert not kwargs, f"{name}: arguments by keyword"
        given = operands(operator, args)
        # An empty list has no type in ONNX: an attribute that is not there stands for one.
        static = {key: value for key, value in given.static.items() if value != []}
        attributes = {**static, "inputs": list(given.names), **PLUGIN}
        node = ir.Node(
            DOMAIN,
            NODES[name],
            list(given.tensors),
            ir.convenience.convert_attributes(attributes),
            num_outputs=output_count(operator, given),
            version=1,
        )
        evaluator.default().nodes.append(node)
        outputs = node.outputs
        single = str(operator._schema.returns[0].type) == "Tensor" and len(outputs) == 1
        return outputs[0] if single else list(outputs)

    return translate


def _checked(name: str, translation: Translation) -> Translation:
    """What a flavour puts in a node's place, or the node where it gives None."""
    node = _as_node(name)

    def translate(*args: Any, **kwargs: Any) -> Any:
        made = translation(*args, **kwargs)
        return node(*args, **kwargs) if made is None else made

    return translate


def _divided(value: Any, by: Any, *, rounding_mode: str | None = None) -> Any:
    """Whole division as it is: the exporter's own goes through float32, which has 24 bits."""
    from onnxscript import opset18 as op

    if value.dtype.is_integer() and rounding_mode is not None:
        if rounding_mode == "floor":
            value = op.Sub(value, op.Mod(value, by))
        return op.Div(value, by)  # of whole numbers: towards zero
    made = op.Div(value, by)
    if rounding_mode == "floor":
        return op.Floor(made)
    if rounding_mode == "trunc":
        return op.Mul(op.Floor(op.Abs(made)), op.Sign(made))
    return made


def _where(condition: Any, first: Any, second: Any) -> Any:
    """A choice between booleans in words that onnxruntime has kernels for."""
    from onnxscript import opset18 as op

    if first.dtype.name == "BOOL":
        return op.Or(op.And(condition, first), op.And(op.Not(condition), second))
    return op.Where(condition, first, second)


# The exporter's own translations of these are wrong or do not run.
_OWN: dict[Any, Translation] = {
    torch.ops.aten.where.self: _where,
    torch.ops.aten.div.Tensor_mode: _divided,
    torch.ops.aten.div.Scalar_mode: _divided,
}


# --- cleaning up ---


def transpose_weights(model: ir.Model) -> None:
    """Weights that are only read transposed are kept so: a runtime then has nothing to turn at
    every start. Each is turned when it is written, not before."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "Transpose" or node.domain:
            continue
        (weight,) = node.inputs
        if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
            continue
        old = weight.const_value
        assert old is not None and weight.name is not None
        order = node.attributes["perm"].as_ints()
        shape = ir.Shape([old.shape[axis] for axis in order])

        def turned(old: Any = old, order: Sequence[int] = order) -> Any:
            return ir.Tensor(old.numpy().transpose(order))

        name = f"{weight.name}.transposed"
        tensor = ir.LazyTensor(turned, dtype=old.dtype, shape=shape, name=name)
        source = origin(old)
        if source is not None:
            tensor.meta["source"] = (*source, tuple(order))
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(old.dtype), const_value=tensor)
        model.graph.initializers.add(value)
        node.outputs[0].replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
        del model.graph.initializers[weight.name]


def origin(tensor: Any) -> tuple[Any, ...] | None:
    """Where a weight lies in torch's memory, the same for every model that it is in; None where it
    was made on the way."""
    raw: Any = getattr(tensor, "raw", None)
    if not isinstance(raw, Tensor):
        return None
    return raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride()


def optimise(model: ir.Model) -> None:
    """Folds what is constant and drops what is not read; weights are left as they are."""
    from onnxscript import optimizer, rewriter

    optimizer.optimize_ir(model, output_size_limit=1024, inline=True)
    rewriter.onnx_fusions.fuse(model)


def strip(model: ir.Model) -> None:
    """Drops what the exporter noted of the machine it ran on: stack traces, paths of files."""
    import onnx_ir.passes.common as passes

    passes.ClearMetadataAndDocStringPass()(model)


def rename_dims(model: ir.Model, contract: Contract) -> None:
    """Gives the sizes of growing axes names that people read; last, bodies need the others."""
    import onnx_ir as ir

    names = _dim_names(contract)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in model.graph for output in node.outputs]
    for value in values:
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value in names:
                value.shape[axis] = names[dim.value]
