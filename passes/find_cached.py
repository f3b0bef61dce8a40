"""Find the attentions of a graph that read a cache which the graph appends to."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from .graph_tools import (
    argument,
    aten,
    calls,
    changes_something,
    describe,
    extent,
    extents,
    module_path,
    source_line,
)
from .result import Declined, MaskRule, Site

_APPENDS = (aten.index_copy_.default, aten.index_copy.default)
_SAME_VALUE = (aten.contiguous.default, aten.clone.default, aten.alias.default)


@dataclass(frozen=True)
class CachedSite:
    """An attention over a cache that is an input of the graph.

    Attributes:
        site: its shapes. The mask rule says causal: which keys a query sees is read from the mask's
            values when the graph runs, not from how it was made.
        folds: name of the node that the attention stood for before it was folded.
        keys, values: names of the inputs that hold what was cached before the call.
        grows: whether the graph makes longer caches of them; else it writes into them.
        mask: name of the mask's node in the normal form, or None.
    """

    site: Site
    folds: str
    keys: str
    values: str
    grows: bool
    mask: str | None


def find_cached(module: fx.GraphModule) -> tuple[list[CachedSite], list[Declined]]:
    """The attentions whose keys and values are a cache with the call's tokens appended.

    Args:
        module: the normal form of one of Dynamo's graphs: `memcompile.attention` nodes over
            the keys and values from before they were repeated over heads.

    Returns:
        the sites, and what stopped each of the others.
    """
    found: list[CachedSite] = []
    declined: list[Declined] = []
    names: dict[str, int] = {}
    for order, node in enumerate(calls(module.graph, torch.ops.memcompile.attention.default)):
        reason = ""
        rows = extent(node.args[0].meta["val"].shape[2])  # type: ignore[union-attr]
        caches = [_appended(node.args[i], rows) for i in (1, 2)]
        if None in caches:
            reason = "its keys and values are no cache that the graph appends to"
        keys, values = caches
        if keys is not None and values is not None:
            reason = _unfit(node, keys, values)
        if reason:
            declined.append(Declined(reason, describe(node), "find_cached", source_line(node)))
            continue
        assert keys is not None and values is not None
        base = module_path(node) or "attention"
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}.{names[base]}"
        query, key, value = (node.args[i].meta["val"] for i in range(3))  # type: ignore[union-attr]
        mask = argument(node, "mask")
        site = Site(
            name=name,
            layer=_layer(base, order),
            node=node.name,
            heads=int(query.shape[1]),
            kv_heads=int(key.shape[1]),
            key_dim=int(key.shape[3]),
            value_dim=int(value.shape[3]),
            rule=MaskRule("causal"),
            scale=float(argument(node, "scale")),
            softcap=float(argument(node, "softcap")),
            dtype=key.dtype,
        )
        folds = str(node.meta["folds"])
        found.append(
            CachedSite(site, folds, keys[0], values[0], keys[1], mask.name if mask else None)
        )
    return found, declined


def _layer(path: str, order: int) -> int:
    """The layer that a module path names; a graph break leaves one attention a graph."""
    number = re.search(r"\.(\d+)(\.|$)", path)
    return int(number[1]) if number else order


def _appended(node: object, rows: sympy.Expr) -> tuple[str, bool] | None:
    """The input behind a cache with `rows` new rows, and whether the result is a tensor of its
    own."""
    while isinstance(node, fx.Node) and node.target in _SAME_VALUE:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_function" or not node.args:
        return None
    if node.target in _APPENDS:
        cache, axis, _, new = node.args
        grows = False
    elif node.target is aten.cat.default:
        parts, axis = (*node.args, 0)[:2]
        if not isinstance(parts, list | tuple) or len(parts) != 2:
            return None
        (cache, new), grows = parts, True
        # A rolling window keeps only the last rows: what leaves the graph is then a slice.
        if not any(user.op == "output" for user in node.users):
            return None
    else:
        return None
    if not isinstance(cache, fx.Node) or cache.op != "placeholder" or axis not in (2, -2):
        return None
    fits = isinstance(new, fx.Node) and len(extents(new)) == 4 and extents(new)[2] == rows
    return (cache.name, grows) if fits else None


def _unfit(node: fx.Node, keys: tuple[str, bool], values: tuple[str, bool]) -> str:
    """Why a cached attention cannot be read through a memory, or nothing."""
    query, key, value = (node.args[i].meta["val"] for i in range(3))  # type: ignore[union-attr]
    if keys[1] != values[1] or keys[0] == values[0]:
        return "its keys and values are not cached alike"
    if argument(node, "is_causal"):
        return "it is masked by is_causal, which over a cache hides the newest keys"
    if not (key.is_contiguous() and value.is_contiguous()):
        return "the cache is not contiguous"
    if argument(node, "scale") <= 0:
        return "the scale is not positive"
    mask = argument(node, "mask")
    if mask is None:
        rows = extent(query.shape[2])
        return "" if rows == 1 else "several queries see every key: it is not causal"
    shape = extents(mask)
    sizes = (extent(query.shape[0]), 1, extent(query.shape[2]), extent(key.shape[2]))
    fits = len(shape) == 4 and shape[0] in (1, sizes[0]) and shape[1] == 1 and shape[2] == sizes[2]
    if not fits:
        return f"its mask is {list(shape)}; expected one for all heads, {list(sizes)}"
    return _unreadable(mask)


def _unreadable(mask: fx.Node) -> str:
    """Why the mask cannot be computed before the graph runs, or nothing."""
    cone = upstream(mask)
    if any(changes_something(node) for node in cone):
        return "its mask depends on what the graph writes"
    inputs = {node for node in cone if node.op == "placeholder"}
    for node in mask.graph.nodes:
        if node is mask:
            break
        # A view of the input, made before, would show it too.
        if any(inputs & upstream(written) for written in _written(node)):
            return "its mask is read from an input that the graph writes before"
    return ""


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    named = zip(node.target._schema.arguments, node.args, strict=False)
    changed = [given for known, given in named if known.alias_info and known.alias_info.is_write]
    return [given for given in changed if isinstance(given, fx.Node)]


def upstream(node: fx.Node) -> set[fx.Node]:
    """`node` and everything it is computed from."""
    seen: set[fx.Node] = set()
    left = [node]
    while left:
        at = left.pop()
        if at not in seen:
            seen.add(at)
            left += at.all_input_nodes
    return seen
