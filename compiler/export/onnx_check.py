"""Holds a written ONNX model to its contract: nothing lost, nothing folded, the same answers.

An exporter drops what it does not understand without a word: a cache that is written in place, a
position that looks constant. Here that is an error, before anyone is handed the model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .contract import Contract, StateTensor
from .driver import Driver
from .onnx_model import device_of
from .onnx_session import load_model
from .runners import RUNNERS

if TYPE_CHECKING:
    import onnx_ir as ir

# Of the largest value: what separates rounding from an answer that is another one.
_ALLOWED = {torch.float16: 0.05, torch.float32: 0.002, torch.float64: 1e-6}


def check_model(path: Path) -> None:
    """ONNX's own checker with shape inference, strict and with sizes followed through.

    Raises:
        RuntimeError: it refuses the model.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        bare = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RuntimeError(f"{path.name}: ONNX's checker refuses it: {error}") from error


def check_interface(model: ir.Model, contract: Contract, name: str = "model.onnx") -> None:
    """Whether inputs and outputs are those of the contract: names, order, types, sizes.

    Raises:
        RuntimeError: one is missing, or another than expected.
    """
    for kind, values, wanted in (
        ("inputs", model.graph.inputs, contract.inputs),
        ("outputs", model.graph.outputs, contract.outputs),
    ):
        have = [value.name for value in values]
        if have != wanted:
            lost = [x for x in wanted if x not in have]
            added = [x for x in have if x not in wanted]
            what = f"lacks {', '.join(lost)}" if lost else f"has {', '.join(map(str, added))} too"
            if not lost and not added:
                what = "has them in another order"
            raise RuntimeError(f"{name}: its {kind} are not the contract's: it {what}")
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = {
        contract.tokens: ("INT64", (None, None)),
        contract.position: ("INT32", (None,)),
    }
    if contract.lengths is not None:
        expected[contract.lengths] = ("INT32", (None,))
    for tensor in contract.state:
        for key in (tensor.input, tensor.output):
            expected[key] = (_ONNX_NAMES[tensor.dtype], _sizes(tensor))
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name not in expected:
            continue
        dtype, sizes = expected[value.name]
        have_sizes = tuple(d if isinstance(d, int) else None for d in value.shape or ())
        if value.dtype is None or value.dtype.name != dtype or have_sizes != sizes:
            raise RuntimeError(
                f"{name}: {value.name} is {value.dtype} {value.shape}; the contract says {dtype} "
                f"{['?' if size is None else size for size in sizes]}"
            )


_ONNX_NAMES = {
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "int32": "INT32",
    "int64": "INT64",
}


def _sizes(tensor: StateTensor) -> tuple[int | None, ...]:
    free = {tensor.batch_axis, *([tensor.grows.axis] if tensor.grows else [])}
    return tuple(None if axis in free else size for axis, size in enumerate(tensor.shape))


def check_depends(model: ir.Model, contract: Contract, name: str = "model.onnx") -> None:
    """Whether each output follows from the inputs it must follow from.

    The new state from the old one, the tokens and the position; the logits from tokens, position,
    and what each site holds.

    Raises:
        RuntimeError: one does not: it was lost, or a number that changes was taken for a constant.
    """
    sites = dict.fromkeys(tensor.input.split("_")[0] for tensor in contract.state)
    held = [next(t.input for t in contract.state if t.input.split("_")[0] == s) for s in sites]
    wanted = {contract.logits: [contract.tokens, contract.position, *held]}
    for tensor in contract.state:
        wanted[tensor.output] = [tensor.input, contract.tokens, contract.position]
    if contract.lengths is not None:
        for sources in wanted.values():
            sources.append(contract.lengths)
    sources_of: dict[str, frozenset[str]] = {}
    for value in model.graph.inputs:
        sources_of[str(value.name)] = frozenset([str(value.name)])
    for node in model.graph:
        each = [sources_of.get(str(x.name), frozenset()) for x in node.inputs if x is not None]
        found = frozenset().union(*each)
        for output in node.outputs:
            sources_of[str(output.name)] = found
    for output_name, sources in wanted.items():
        missing = [x for x in sources if x not in sources_of.get(output_name, frozenset())]
        if missing:
            raise RuntimeError(
                f"{name}: {output_name} does not follow from {', '.join(missing)}: it was lost, or "
                "taken for a constant, on the way to ONNX"
            )


def can_run() -> bool:
    """Whether onnxruntime is here."""
    return importlib.util.find_spec("onnxruntime") is not None


def check_answers(
    path: Path, graph: torch.nn.Module, contract: Contract, opaque: Collection[str] = ()
) -> float:
    """Runs the model beside the graph it was made from: a chunk, then single tokens.

    Args:
        opaque: state inputs that the runtime keeps in an order of its own; what is read of them
            shows in the logits.

    Returns:
        the largest difference, as a part of the largest value.

    Raises:
        RuntimeError: logits or state differ by more than rounding; which, and in which call.
    """

    device = device_of(graph)

    def eager(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            made = graph(*[given[name].to(device) for name in contract.inputs])
        return {name: x.cpu() for name, x in zip(contract.outputs, made, strict=True)}

    capacity = None
    if contract.capacity is not None:
        capacity = min(contract.capacity.tokens, 2 * contract.capacity.multiple)
    truth = Driver(contract, eager, batch=2, capacity=capacity)
    made = Driver(contract, RUNNERS["onnx"](path, contract), batch=2, capacity=capacity)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for number, n in enumerate(_calls(contract)):
        tokens = torch.randint(contract.vocabulary, (2, n), generator=generator)
        lengths = None
        if contract.lengths is not None and n > 2:
            lengths = [n, n - 2]
        pairs = {contract.logits: (made(tokens, lengths), truth(tokens, lengths))}
        if lengths is not None:
            rows = torch.arange(n) < torch.tensor(lengths)[:, None]
            have, want = pairs[contract.logits]
            pairs[contract.logits] = (have[rows], want[rows])
        for tensor in contract.state:
            if tensor.input in opaque:
                continue
            have, want = (
                tensor.filled(x.state[tensor.input], torch.tensor(truth.position))
                for x in (made, truth)
            )
            pairs[tensor.output] = (have, want)
        for name, (have, want) in pairs.items():
            worst = max(worst, compared(f"{path.name}: {name}", have, want, f"call {number + 1}"))
    return worst


def _calls(contract: Contract) -> list[int]:
    """Tokens of each call: enough to fill a page, then step by step."""
    first = contract.capacity.multiple + 3 if contract.capacity is not None else 67
    most = min(contract.longest_call or 512, 512, (contract.context or 512) - 4)
    return [max(1, min(first, most)), 1, 1, 1]


def compared(what: str, have: Tensor, want: Tensor, when: str) -> float:
    """The largest difference of two tensors, as a part of the largest value wanted.

    Raises:
        RuntimeError: it is more than rounding, or they are of other types or shapes.
    """
    if have.shape != want.shape or have.dtype != want.dtype:
        raise RuntimeError(
            f"{what} is {have.dtype} {list(have.shape)} in {when}; eager has {want.dtype} "
            f"{list(want.shape)}"
        )
    if not want.numel():
        return 0.0
    size = max(float(want.double().abs().max()), 1e-30)
    error = float((have.double() - want.double()).abs().max()) / size
    if not error <= _ALLOWED[want.dtype]:
        raise RuntimeError(
            f"{what} differs from eager by {error:.3g} of its largest value in {when}; up to "
            f"{_ALLOWED[want.dtype]} is rounding"
        )
    return error


def check_resolves(path: Path, missing: str) -> None:
    """Whether onnxruntime takes a model up to the kernels of an operator that its CPU provider
    lacks: every node keeps to its operator's schema, types and sizes can be inferred.

    Args:
        missing: the operator.

    Raises:
        RuntimeError: it refuses the model for something else.
    """
    try:
        load_model(path)
    except ValueError as error:
        if "NOT_IMPLEMENTED" not in str(error) or f"{missing}(" not in str(error):
            raise RuntimeError(str(error)) from error
