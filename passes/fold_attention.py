"""Fold every spelling of softmax attention into one node, `memcompile.attention`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from ..models import ops as _registered  # noqa: F401 (registers memcompile.attention)
from .exact import HIDDEN_LOGIT
from .graph_tools import (
    argument,
    aten,
    calls,
    copy_origin,
    describe,
    emit,
    extent,
    extents,
    remove_dead,
    scalar_value,
    source_line,
)
from .result import Declined, PassResult

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_SAME_VALUE = (
    aten.to.dtype,
    aten.type_as.default,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.dropout.default,
)
_RESHAPE = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_MATMUL = (aten.matmul.default, aten.bmm.default)


class _Unmatched(Exception):
    """One alternative did not match; carries the decline for the nearest miss."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.declined = Declined(reason, describe(node), "fold_attention", source_line(node))


def fold_attention(module: fx.GraphModule, only: Collection[str] | None = None) -> PassResult:
    """Rewrite SDPA calls, and matmul - scale - mask - softmax - dropout - matmul, to one node.

    The node takes query ``[B, H, n, Dk]``, key ``[B, Hkv, n, Dk]``, value ``[B, Hkv, n, Dv]``, one
    mask, the scale and the soft cap; its meta "folds" names the call it began with. Spelled-out
    softmax that is not attention is left alone and listed with the point where the match ended.

    Args:
        only: names of the SDPA or softmax calls to fold; None: all.
    """
    graph, result = module.graph, PassResult(module)
    sizes = _Sizes(graph)
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        if only is None or node.name in only:
            _attempt(result, _fold_sdpa, graph, node, sizes)
    for node in calls(graph, *_SOFTMAX):
        if node.users and (only is None or node.name in only):
            _attempt(result, _fold_spelled, graph, node, sizes)
    remove_dead(graph)
    module.recompile()
    return result


def _attempt(
    result: PassResult,
    rewrite: Callable[[fx.Graph, fx.Node, _Sizes], None],
    graph: fx.Graph,
    node: fx.Node,
    sizes: _Sizes,
) -> None:
    try:
        rewrite(graph, node, sizes)
        result.applied += 1
    except _Unmatched as miss:
        result.declined.append(miss.declined)


class _Sizes:
    """Symbolic batch and token sizes as graph nodes, made once, for the views this pass inserts."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        # Dynamo's graphs may begin with a size; only three-axis attention asks for tokens [B, n].
        self.tokens = next((n for n in inputs if _is_matrix(n)), inputs[0])
        self.made: dict[int, fx.Node] = {}

    def axis(self, axis: int) -> fx.Node:
        if axis not in self.made:
            with self.graph.inserting_after(self.tokens):
                self.made[axis] = emit(self.graph, aten.sym_size.int, self.tokens, axis)
        return self.made[axis]

    def extent(self, axis: int) -> Any:
        return extent(self.tokens.meta["val"].shape[axis])


def _is_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.dtype == torch.int64


def _fold_sdpa(graph: fx.Graph, node: fx.Node, sizes: _Sizes) -> None:
    if argument(node, "dropout_p") != 0:
        raise _Unmatched("dropout is on; call model.eval() before compiling", node)
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    scale = argument(node, "scale")
    width = query.meta["val"].shape[-1]
    if scale is None:
        scale = 1 / math.sqrt(width)
    if not isinstance(scale, int | float):
        raise _Unmatched("the scale is computed in the graph, not a number", node)
    mask, causal = argument(node, "attn_mask"), argument(node, "is_causal")
    with graph.inserting_before(node):
        new = _replace(graph, node, query, key, value, mask, causal, float(scale), 0.0, sizes)
        new.meta["folds"] = node.name


@dataclass
class _Logits:
    """What was found between the scores' matmul and the softmax."""

    scale: float = 1.0
    softcap: float = 0.0
    masks: list[tuple[str, tuple[Any, ...], float]] = field(default_factory=list)
    product: fx.Node | None = None


def _fold_spelled(graph: fx.Graph, softmax: fx.Node, sizes: _Sizes) -> None:
    scores = softmax.args[0]
    assert isinstance(scores, fx.Node)
    axis, rank = softmax.args[1], scores.meta["val"].dim()
    if axis not in (-1, rank - 1) or rank < 3:
        raise _Unmatched("a softmax over another axis than the last is no attention", softmax)
    found = _Logits()
    _walk_up(scores, found)
    assert found.product is not None
    end, narrowest = _walk_down(softmax)
    with graph.inserting_before(end):
        query, key = _scores_operands(graph, found.product)
        value = _value_operand(graph, end)
        # Models that compute scores in float32 may round the probabilities to the values' type.
        if narrowest < min(_precision(found.product), _precision(value)):
            raise _Unmatched("the probabilities are rounded to a narrower type", softmax)
        mask = _one_mask(graph, found, softmax)
        cap = found.softcap
        new = _replace(graph, end, query, key, value, mask, False, found.scale, cap, sizes)
        new.meta["folds"] = softmax.name


def _walk_up(node: fx.Node, found: _Logits) -> None:
    """Follow the scores from the softmax to their matmul, collecting scale, masks and cap."""
    narrowest = _precision(node)
    while True:
        if node.op != "call_function":
            raise _Unmatched("the softmax's input is no product of queries and keys", node)
        target = node.target
        if target in _SAME_VALUE or target in _RESHAPE:
            narrowest = min(narrowest, _precision(node))
            if target is aten.dropout.default and argument(node, "train"):
                raise _Unmatched("dropout is on; call model.eval() before compiling", node)
            before, after = extents(node.args[0]), extents(node)  # type: ignore[arg-type]
            if target in _RESHAPE and before[-2:] != after[-2:]:
                raise _Unmatched("the scores are reshaped across the query or key axis", node)
            node = node.args[0]  # type: ignore[assignment]
        elif target is aten.tanh.default:
            if found.softcap:
                raise _Unmatched("two soft caps on one attention", node)
            if not found.scale:
                raise _Unmatched("the soft cap is zero", node)
            found.softcap, found.scale = found.scale, 1.0
            node = node.args[0]  # type: ignore[assignment]
        elif (factor := _factor(node)) is not None:
            found.scale *= factor[1]
            node = factor[0]
        elif target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            scores, mask, fill = node.args
            _note_mask(found, node, "fill", (mask, fill))
            node = scores  # type: ignore[assignment]
        elif target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            at, (condition, shown, other) = node, node.args
            if scalar_value(other) is not None or not _leads_to_product(other):
                _note_mask(found, node, "keep", (condition, other))
                node = shown  # type: ignore[assignment]
            else:
                _note_mask(found, node, "fill", (condition, shown))
                node = other  # type: ignore[assignment]
            if not isinstance(node, fx.Node):
                raise _Unmatched("a where without scores", at)
        elif target in (aten.add.Tensor, aten.sub.Tensor) and node.kwargs.get("alpha", 1) == 1:
            left, right = node.args
            if _leads_to_product(left):
                _note_mask(found, node, "add" if target is aten.add.Tensor else "sub", (right,))
                node = left  # type: ignore[assignment]
            elif target is aten.add.Tensor and _leads_to_product(right):
                _note_mask(found, node, "add", (left,))
                node = right  # type: ignore[assignment]
            else:
                raise _Unmatched("a sum in which neither side is a product of q and k", node)
        elif target in (*_MATMUL, aten.baddbmm.default, aten.einsum.default):
            found.product = node
            if narrowest < _precision(node):
                raise _Unmatched("the scores are rounded to a narrower type", node)
            if target is aten.baddbmm.default:
                _take_baddbmm(node, found)
            if found.softcap:
                found.scale *= found.softcap
            return
        else:
            raise _Unmatched("this operation stands between the scores and the softmax", node)


def _precision(node: fx.Node) -> int:
    """Bytes of an element, 0 if it holds no fractions."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype.itemsize if dtype.is_floating_point else 0


def _note_mask(found: _Logits, node: fx.Node, kind: str, operands: tuple[Any, ...]) -> None:
    if found.softcap:
        raise _Unmatched("the mask is applied inside the soft cap", node)
    found.masks.append((kind, operands, found.scale))


def _factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The tensor and the number of ``x * c``, ``c * x`` or ``x / c``."""
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        for tensor, number in (node.args, tuple(reversed(node.args))):
            factor = scalar_value(number)
            if factor is not None and isinstance(tensor, fx.Node):
                return tensor, factor
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        factor = scalar_value(node.args[1])
        if factor:
            return node.args[0], 1 / factor  # type: ignore[return-value]
    return None


def _leads_to_product(node: Any) -> bool:
    """Whether following the first tensor operand ends at a product of two token-sized operands."""
    for _ in range(16):
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return False
        if node.target in (*_MATMUL, aten.baddbmm.default, aten.einsum.default):
            shape = extents(node)
            token_sized = bool(shape[-1].free_symbols) or _tokens_are_fixed(node.graph)
            return len(shape) >= 3 and token_sized
        if node.target in (aten.where.self, aten.where.ScalarOther):
            node = node.args[1]
            continue
        factor = _factor(node)
        node = factor[0] if factor else (node.args[0] if node.args else None)
    return False


def _tokens_are_fixed(graph: fx.Graph) -> bool:
    """Whether the graph is of one number of tokens, so that no axis can be told for theirs. Other
    sizes may be symbolic all the same: a cache's, a mask's."""
    tokens = next((n for n in graph.nodes if n.op == "placeholder" and _is_matrix(n)), None)
    return tokens is None or not extents(tokens)[1].free_symbols


def _take_baddbmm(node: fx.Node, found: _Logits) -> None:
    beta, alpha = argument(node, "beta"), argument(node, "alpha")
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        raise _Unmatched("baddbmm with a computed alpha or beta", node)
    if beta != 0:
        bias = scalar_value(node.args[0])
        zeros = isinstance(node.args[0], fx.Node) and node.args[0].target in (
            aten.zeros.default,
            aten.new_zeros.default,
            aten.zeros_like.default,
        )
        if not zeros and bias != 0:
            _note_mask(found, node, "add", (node.args[0],))
            if beta != 1:
                raise _Unmatched("baddbmm adds a scaled bias", node)
    found.scale *= float(alpha)


def _walk_down(softmax: fx.Node) -> tuple[fx.Node, int]:
    """The product of the probabilities with the values, and the narrowest type on the way there."""
    node, narrowest = softmax, _precision(softmax)
    while True:
        users = [user for user in node.users if user.users]
        products = [user for user in users if _is_value_product(user, node)]
        if len(products) == 1:
            return products[0], narrowest
        onward = [u for u in users if u.target in (*_SAME_VALUE, *_RESHAPE)]
        if len(onward) != 1:
            raise _Unmatched("the probabilities are not multiplied with values", node)
        if onward[0].target in _RESHAPE and extents(node)[-2:] != extents(onward[0])[-2:]:
            raise _Unmatched("the probabilities are reshaped across queries or keys", onward[0])
        if onward[0].target is aten.dropout.default and argument(onward[0], "train"):
            raise _Unmatched("dropout is on; call model.eval() before compiling", onward[0])
        node = onward[0]
        narrowest = min(narrowest, _precision(node))


def _is_value_product(user: fx.Node, probabilities: fx.Node) -> bool:
    if user.target in _MATMUL:
        return user.args[0] is probabilities
    return user.target is aten.einsum.default and user.args[1][0] is probabilities  # type: ignore[index]


def _scores_operands(graph: fx.Graph, product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Query and key, both with the token axis before the width."""
    if product.target is aten.einsum.default:
        return _einsum_operands(graph, product)
    query, transposed = product.args[-2:]
    assert isinstance(query, fx.Node) and isinstance(transposed, fx.Node)
    rank = transposed.meta["val"].dim()
    if transposed.target is aten.transpose.int and _last_two(transposed.args[1:], rank):
        return query, transposed.args[0]  # type: ignore[return-value]
    return query, emit(graph, aten.transpose.int, transposed, rank - 2, rank - 1)


def _last_two(axes: Any, rank: int) -> bool:
    return {axis % rank for axis in axes} == {rank - 1, rank - 2}


def _einsum_operands(graph: fx.Graph, product: fx.Node) -> tuple[fx.Node, fx.Node]:
    equation, operands = str(product.args[0]), cast(list[fx.Node], product.args[1])
    left, right, out = _einsum_parts(equation, product)
    batch, row, col = out[:-2], out[-2], out[-1]
    first, second = operands
    if row in right and col in left:
        left, right, first, second = right, left, second, first
    summed = [c for c in left if c in right and c not in out]
    if len(summed) != 1 or row not in left or col not in right:
        raise _Unmatched(f"einsum {equation!r} is no product of queries and keys", product)
    width = summed[0]
    return (
        _permuted(graph, first, left, batch + row + width, product),
        _permuted(graph, second, right, batch + col + width, product),
    )


def _einsum_parts(equation: str, node: fx.Node) -> tuple[str, str, str]:
    text = equation.replace(" ", "")
    inputs, arrow, out = text.partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2 or "." in text or any(len(set(p)) != len(p) for p in parts):
        raise _Unmatched(f"einsum {equation!r} is not of two operands with named axes", node)
    return parts[0], parts[1], out


def _permuted(graph: fx.Graph, node: fx.Node, have: str, want: str, at: fx.Node) -> fx.Node:
    if sorted(have) != sorted(want):
        raise _Unmatched(f"einsum operand {have!r} lacks axes of {want!r}", at)
    if have == want:
        return node
    return emit(graph, aten.permute.default, node, [have.index(c) for c in want])


def _value_operand(graph: fx.Graph, product: fx.Node) -> fx.Node:
    if product.target is not aten.einsum.default:
        value = product.args[1]
        assert isinstance(value, fx.Node)
        return value
    equation, operands = str(product.args[0]), cast(list[fx.Node], product.args[1])
    left, right, out = _einsum_parts(equation, product)
    batch, col = left[:-2], left[-1]
    width = [c for c in right if c not in left]
    if len(width) != 1 or sorted(out) != sorted(left[:-1] + width[0]):
        raise _Unmatched(f"einsum {equation!r} is no product of probabilities and values", product)
    return _permuted(graph, operands[1], right, batch + col + width[0], product)


def _one_mask(graph: fx.Graph, found: _Logits, at: fx.Node) -> fx.Node | None:
    """All masks of one attention as one additive mask, in the units of the final logits.

    Masks are taken in the order they are applied; one that replaces logits replaces what was added
    to them before.
    """
    total: fx.Node | None = None
    for kind, operands, outer in reversed(found.masks):
        mask = operands[0]
        if not isinstance(mask, fx.Node):
            raise _Unmatched("the mask is a number", at)
        if kind in ("fill", "keep"):
            fill = scalar_value(operands[1])
            if fill is None:
                raise _Unmatched("masked logits are replaced by a tensor, not a number", mask)
            fill *= outer
            if not fill <= HIDDEN_LOGIT:
                raise _Unmatched(
                    f"masked logits are replaced by {fill:g}, which does not hide them", mask
                )
            before: Any = 0.0 if total is None else total
            pair = (fill, before) if kind == "fill" else (before, fill)
            tensors = aten.where.ScalarSelf if kind == "fill" else aten.where.ScalarOther
            total = emit(graph, aten.where.Scalar if total is None else tensors, mask, *pair)
            continue
        if not mask.meta["val"].is_floating_point():
            # Added, True is 1 and hides nothing; as a mask it would be visibility.
            assert found.product is not None
            mask = emit(graph, aten.to.dtype, mask, found.product.meta["val"].dtype)
        term = emit(graph, aten.neg.default, mask) if kind == "sub" else mask
        if outer != 1.0:
            term = emit(graph, aten.mul.Tensor, term, outer)
        total = term if total is None else emit(graph, aten.add.Tensor, total, term)
    return total


def _replace(
    graph: fx.Graph,
    node: fx.Node,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None,
    causal: bool,
    scale: float,
    softcap: float,
    sizes: _Sizes,
) -> fx.Node:
    """Put the attention node in place of `node`, through 4-D views where the model is 3-D."""
    shape = extents(query)
    tensors = [query, key, value]
    flat = len(shape) == 3
    if len(shape) not in (3, 4):
        raise _Unmatched(
            f"queries have {len(shape)} axes; known are [B, H, n, D] and [B*H, n, D]", node
        )
    if len(extents(key)) != len(shape) or len(extents(value)) != len(shape):
        raise _Unmatched("queries, keys and values have different numbers of axes", node)
    if flat and not _is_matrix(sizes.tokens):
        raise _Unmatched("three axes, and no input [B, n] of tokens to tell the batch by", node)
    if mask is not None and flat and mask.meta["val"].dim() == 3:
        mask = _mask_to_heads(graph, mask, sizes, node)
    if flat:
        tensors = [_split_heads(graph, t, sizes, node) for t in tensors]
    heads = tuple(extents(t)[1] for t in tensors)
    if not all(h.is_Integer for h in heads) or heads[1] != heads[2] or heads[0] % heads[1]:
        raise _Unmatched(
            f"{heads[0]} query heads, {heads[1]} key heads, {heads[2]} value heads", node
        )
    new = emit(
        graph,
        torch.ops.memcompile.attention.default,
        *tensors,
        mask,
        causal,
        scale,
        softcap,
    )
    copy_origin(new, node)
    out: fx.Node = new
    if node.target is aten.einsum.default:
        left, right, wanted = _einsum_parts(str(node.args[0]), node)
        have = left[:-1] + next(c for c in right if c not in left)
        if flat:
            raise _Unmatched("einsum attention over three axes", node)
        out = _permuted(graph, new, have, wanted, node)
    if flat:
        lead = [sizes.axis(0)] if heads[0] == 1 else [-1]
        width = new.meta["val"].shape[-1]
        out = emit(graph, aten.reshape.default, out, [*lead, sizes.axis(1), width])
    elif extents(out) != extents(node):
        raise _Unmatched("the mask or the values spread one head or row over several", node)
    if out.meta["val"].dtype != node.meta["val"].dtype:
        out = emit(graph, aten.to.dtype, out, node.meta["val"].dtype)
    node.replace_all_uses_with(out)
    return new


def _heads_of(node: fx.Node, sizes: _Sizes, at: fx.Node) -> int:
    ratio = extents(node)[0] / sizes.extent(0)
    if not ratio.is_Integer:
        raise _Unmatched("the first axis is no multiple of the batch", at)
    return int(ratio)


def _split_heads(graph: fx.Graph, node: fx.Node, sizes: _Sizes, at: fx.Node) -> fx.Node:
    heads, width = _heads_of(node, sizes, at), node.meta["val"].shape[-1]
    if extents(node)[1] != sizes.extent(1):
        raise _Unmatched("the second of three axes is not the token axis", at)
    shape = [sizes.axis(0), heads, sizes.axis(1), width]
    return emit(graph, aten.reshape.default, node, shape)


def _mask_to_heads(graph: fx.Graph, mask: fx.Node, sizes: _Sizes, at: fx.Node) -> fx.Node:
    shape = extents(mask)
    if shape[0] == 1:
        return emit(graph, aten.unsqueeze.default, mask, 0)
    heads = _heads_of(mask, sizes, at)
    view = [sizes.axis(0), heads, *mask.meta["val"].shape[1:]]
    if any(isinstance(size, torch.SymInt) for size in view[2:]):
        view[2:] = [sizes.axis(1) if isinstance(s, torch.SymInt) else s for s in view[2:]]
    return emit(graph, aten.reshape.default, mask, view)
