"""Reductions, cumulative operations and normalisations: over which axes they run."""

from __future__ import annotations

import torch
from torch import fx

from ..classify_tokens import Classified
from ..exact import Affine, Steps
from ..graph_tools import argument, target_name
from ..token_axes import TOKEN, Kind, Refused, Value
from .elementwise import pointwise
from .reading import HOLDS_POSITIONS, Rule, keeps_apart, known_exactly, rank_of, tensor_of, value_of


def _reduced_axes(node: fx.Node, value: Value) -> list[int]:
    dims = argument(node, "dim")
    if dims is None or dims == []:
        return list(range(rank_of(value)))
    dims = [dims] if isinstance(dims, int) else dims
    return [d % rank_of(value) for d in dims] if rank_of(value) else []


def _reduction(node: fx.Node, state: Classified) -> Value:
    """Sums, means, maxima and the like: local unless they run over tokens or rows."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if any(a.name == "other" for a in node.target._schema.arguments):
        return pointwise(node, state)
    value = tensor_of(node, state)
    reduced = _reduced_axes(node, value)
    keeps_apart(value, reduced, "reduces over")
    fake = node.meta["val"]
    first = fake[0] if isinstance(fake, tuple | list) else fake
    keep = first.dim() == rank_of(value)
    axes = tuple(
        () if i in reduced else axis
        for i, axis in enumerate(value.axes)
        if keep or i not in reduced
    )
    return Value(axes, value.kind)


def _along(node: fx.Node, state: Classified) -> Value:
    """Softmax, cumulative operations and sorts along one axis that holds no tokens."""
    value = tensor_of(node, state)
    if not value.axes:
        return value
    axis = argument(node, "dim") % rank_of(value)
    if "cumsum" in target_name(node) and any(isinstance(a, str) for a in value.axes[axis]):
        return _cumsum(node, state, value, axis)
    keeps_apart(value, [axis], "runs along")
    axes = list(value.axes)
    if "topk" in target_name(node):
        axes[axis] = (argument(node, "k"),)
    return Value(tuple(axes), value.kind)


def _cumsum(node: fx.Node, state: Classified, value: Value, axis: int) -> Value:
    exact = value.exact
    if not isinstance(exact, Steps) or not exact.is_uniform or value.axes[axis] != (TOKEN,):
        raise Refused("accumulates data along the token axis")
    if node.meta["val"].dtype not in HOLDS_POSITIONS:
        raise Refused("counts tokens in a type that cannot count them all")
    step = exact.value
    step = int(step) if isinstance(step, bool) else step
    return known_exactly(node, state, value.axes, Kind.POSITION, Affine.of(step, {axis: step}))


def _diff(node: fx.Node, state: Classified) -> Value:
    """``diff(position_ids, prepend=first - 1)``: how transformers finds packed sequences."""
    value = tensor_of(node, state)
    axis = argument(node, "dim") % rank_of(value)
    if not any(isinstance(a, str) for a in value.axes[axis]):
        raise Refused("diff over another axis")
    prepend = argument(node, "prepend")
    before = value_of(prepend, state).exact if prepend is not None else None
    exact = value.exact
    if (
        argument(node, "n") != 1
        or argument(node, "append") is not None
        or not isinstance(exact, Affine)
        or before is None
        or value.axes[axis] != (TOKEN,)
    ):
        raise Refused("takes differences along the token axis")
    slope = dict(exact.coefficients).get(axis, 0)
    expected = Affine.of(exact.offset - slope, {a: c for a, c in exact.coefficients if a != axis})
    if before != expected:
        raise Refused("takes differences along the token axis")
    return known_exactly(node, state, value.axes, Kind.POSITION, Steps.uniform(slope))


def _normalisation(node: fx.Node, state: Classified) -> Value:
    """Layer and RMS normalisation over the last axes."""
    value = tensor_of(node, state, "input")
    count = len(argument(node, "normalized_shape"))
    keeps_apart(value, range(rank_of(value) - count, rank_of(value)), "normalises over")
    return Value(value.axes, value.kind)


def _group_norm(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state, "input")
    keeps_apart(value, range(1, rank_of(value)), "normalises over")
    return Value(value.axes, value.kind)


def _batch_norm(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state, "input")
    if argument(node, "training"):
        raise Refused("normalises over the batch axis, which lets rows see each other")
    if any(isinstance(a, str) for a in value.axes[1]):
        raise Refused("batch normalisation with tokens as channels")
    return Value(value.axes, value.kind)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "aten.sum",
            "aten.mean",
            "aten.amax",
            "aten.amin",
            "aten.max",
            "aten.min",
            "aten.any",
            "aten.all",
            "aten.argmax",
            "aten.argmin",
            "aten.var",
            "aten.std",
            "aten.var_mean",
            "aten.norm",
            "aten.linalg_vector_norm",
            "aten.logsumexp",
            "aten.prod",
        ),
        _reduction,
    ),
    **dict.fromkeys(
        (
            "aten.softmax",
            "aten._softmax",
            "aten.log_softmax",
            "aten._log_softmax",
            "aten.cumsum",
            "aten.cumprod",
            "aten.sort",
            "aten.topk",
        ),
        _along,
    ),
    "aten.diff": _diff,
    **dict.fromkeys(
        ("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm"),
        _normalisation,
    ),
    "aten.group_norm": _group_norm,
    "aten.batch_norm": _batch_norm,
}
