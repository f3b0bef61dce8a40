"""The rules of the proof: for each operation, when its result stays with its own token."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..classify_tokens import Classified
from ..graph_tools import target_name
from ..token_axes import Kind, Refused, Value
from . import elementwise, factories, lookups, pieces, products, reductions, views
from .reading import Rule, flat, fresh_axes, symbolic_argument, value_of

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **views.RULES,
    **pieces.RULES,
    **reductions.RULES,
    **products.RULES,
    **lookups.RULES,
    **factories.RULES,
}
_TAKES_SIZES: frozenset[Rule] = (
    frozenset({elementwise.pointwise})
    | views.TAKES_SIZES
    | pieces.TAKES_SIZES
    | factories.TAKES_SIZES
)


def apply_rule(node: fx.Node, state: Classified) -> Value:
    """What is known of `node`, given its inputs; raises `Refused` with the reason."""
    fake = node.meta.get("val")
    if isinstance(fake, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
        return Value(())
    rule = _rule(node)
    if rule is None:
        return _constant_only(node, state)
    if rule not in _TAKES_SIZES and any(symbolic_argument(a, state) for a in flat(node)):
        raise Refused(f"the number of tokens or rows is used as data by {target_name(node)}")
    return rule(node, state)


def _rule(node: fx.Node) -> Rule | None:
    target = node.target
    if target is operator.getitem:
        return pieces.getitem
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = f"{target.namespace}.{target._schema.name.split('::')[1]}"
    if name in RULES:
        return RULES[name]
    tags = target.tags
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return elementwise.pointwise
    return None


def _constant_only(node: fx.Node, state: Classified) -> Value:
    """An operation without a rule is fine on constants alone, sizes included."""
    inputs = [value_of(n, state) for n in node.all_input_nodes]
    fake = node.meta.get("val")
    plain = all(
        isinstance(n.meta.get("val"), torch.Tensor)
        and v.kind is Kind.CONSTANT
        and not any(isinstance(a, str) for axis in v.axes for a in axis)
        for n, v in zip(node.all_input_nodes, inputs, strict=True)
    )
    if inputs and plain and not _draws(node) and isinstance(fake, torch.Tensor):
        axes = fresh_axes(node, state)
        if not any(isinstance(a, str) for axis in axes for a in axis):
            return Value(axes, Kind.CONSTANT)
    raise Refused(f"{target_name(node)} is not known to keep tokens apart")


def _draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers, which differ from call to call."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "dropout" in target_name(node)
