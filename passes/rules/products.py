"""Products and attention: which axis is summed, and which tokens meet."""

from __future__ import annotations

from torch import fx

from ..classify_tokens import Classified
from ..graph_tools import argument
from ..token_axes import BATCH, TOKEN, Axis, Kind, Refused, Value, broadcast
from .reading import Rule, keeps_apart, rank_of, tensor_of, value_of


def _product_axes(left: Value, right: Value) -> Value:
    """``left @ right``: local when the summed axis holds no tokens and rows keep their token."""
    a = left.axes if rank_of(left) > 1 else ((), *left.axes)
    b = right.axes if rank_of(right) > 1 else (*right.axes, ())
    for summed in (a[-1], b[-2]):
        if TOKEN in summed:
            raise Refused("sums over the token axis")
        if BATCH in summed:
            raise Refused("sums over the batch axis, which lets rows see each other")
    out = [*broadcast([a[:-2], b[:-2]]), a[-2], b[-1]]
    if rank_of(left) == 1:
        del out[-2]
    if rank_of(right) == 1:
        del out[-1]
    return Value(tuple(out), max(left.kind, right.kind))


def _matmul(node: fx.Node, state: Classified) -> Value:
    left, right = (value_of(n, state) for n in node.args[-2:])
    value = _product_axes(left, right)
    extra = [value_of(n, state) for n in node.args[:-2] if isinstance(n, fx.Node)]
    if not extra:
        return value
    axes = broadcast([value.axes, *(v.axes for v in extra)])
    return Value(axes, max(value.kind, *(v.kind for v in extra)))


def _linear(node: fx.Node, state: Classified) -> Value:
    value, weight = tensor_of(node, state, "input"), tensor_of(node, state, "weight")
    if weight.kind is not Kind.CONSTANT or weight.token_axes:
        raise Refused("a linear layer whose weights depend on tokens")
    keeps_apart(value, [rank_of(value) - 1], "sums over")
    bias = argument(node, "bias")
    added = value_of(bias, state) if bias is not None else Value(())
    axes = broadcast([(*value.axes[:-1], *weight.axes[:-1]), added.axes])
    return Value(axes, max(value.kind, weight.kind, added.kind))


def _outer(node: fx.Node, state: Classified) -> Value:
    left, right = (value_of(n, state) for n in node.args)
    return Value((*left.axes, *right.axes), max(left.kind, right.kind))


def _einsum(node: fx.Node, state: Classified) -> Value:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "." in equation or "->" not in equation:
        raise Refused(f"einsum {equation!r} with unnamed axes")
    inputs, out = equation.split("->")
    letters: dict[str, Axis] = {}
    values = [value_of(n, state) for n in operands]  # type: ignore[union-attr]
    for names, value in zip(inputs.split(","), values, strict=True):
        for letter, axis in zip(names, value.axes, strict=True):
            known = letters.get(letter, ())
            if known and axis and known != axis:
                raise Refused("two different axes meet in one einsum letter")
            letters[letter] = known or axis
    for letter, axis in letters.items():
        if letter not in out and TOKEN in axis:
            raise Refused("sums over the token axis")
        if letter not in out and BATCH in axis:
            raise Refused("sums over the batch axis, which lets rows see each other")
    return Value(tuple(letters[c] for c in out), max(v.kind for v in values))


def _conv(node: fx.Node, state: Classified) -> Value:
    value, weight = tensor_of(node, state, "input"), tensor_of(node, state, "weight")
    pointwise_kernel = all(size == () for size in weight.axes[2:])
    padding, stride = argument(node, "padding"), argument(node, "stride")
    if not pointwise_kernel or any(p not in (0,) for p in padding) or any(s != 1 for s in stride):
        raise Refused("a convolution over tokens")
    if any(isinstance(a, str) for a in value.axes[1]):
        raise Refused("a convolution with tokens as channels")
    axes = (value.axes[0], *weight.axes[:1], *value.axes[2:])
    return Value(axes, value.kind)


def _attention(node: fx.Node, state: Classified) -> Value:
    """The one operation that may look at other tokens; `find_sites` judges its mask."""
    query, key, value = (value_of(n, state) for n in node.args[:3])
    for name, operand in (("queries", query), ("keys", key), ("values", value)):
        if len(operand.axes) != 4 or operand.axes[2] != (TOKEN,):
            raise Refused(f"{name} are not [batch, heads, tokens, width] with all tokens")
        if operand.axes[0] != (BATCH,):
            raise Refused(f"the first axis of {name} is not the batch")
        if any(isinstance(a, str) for a in (*operand.axes[1], *operand.axes[3])):
            raise Refused(f"heads or width of {name} hold tokens or rows")
    return Value((*query.axes[:3], value.axes[3]), Kind.LOCAL)


RULES: dict[str, Rule] = {
    "memcompile.attention": _attention,
    **dict.fromkeys(
        ("aten.matmul", "aten.bmm", "aten.mm", "aten.addmm", "aten.baddbmm", "aten.mv", "aten.dot"),
        _matmul,
    ),
    "aten.linear": _linear,
    "aten.einsum": _einsum,
    **dict.fromkeys(("aten.outer", "aten.ger"), _outer),
    **dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.convolution"), _conv),
}
