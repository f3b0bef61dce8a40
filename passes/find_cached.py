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
        appends: names of the nodes that append keys and values: what they give are the longer
            caches, where the graph makes some.
        places: names of the nodes that say which rows of keys and values are written, where the
            graph writes into its caches.
    """

    site: Site
    folds: str
    keys: str
    values: str
    grows: bool
    mask: str | None
    appends: tuple[str, str]
    places: tuple[str, ...]


@dataclass(frozen=True)
class _Append:
    """The node that appends new rows to a cache, which is an input of the graph."""

    cache: fx.Node
    node: fx.Node

    @property
    def grows(self) -> bool:
        """Whether the result is a tensor of its own."""
        return self.node.target is aten.cat.default


NO_CACHE = "its keys and values are no cache that the graph appends to"


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
            reason = NO_CACHE
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
            layer=_layer(base, keys.cache, order),
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
        places = [] if keys.grows else [c.node.args[2] for c in (keys, values)]
        found.append(
            CachedSite(
                site,
                str(node.meta["folds"]),
                keys.cache.name,
                values.cache.name,
                keys.grows,
                mask.name if mask else None,
                (keys.node.name, values.node.name),
                tuple(place.name for place in places if isinstance(place, fx.Node)),
            )
        )
    return found, declined


def _layer(path: str, cache: fx.Node, order: int) -> int:
    """The layer that a module's path names, or else the place the cache was taken from: graph
    breaks leave one attention a graph, within it perhaps."""
    texts = (path, r"\.(\d+)(?:\.|$)"), (str(cache.meta.get("source", "")), r"layers\[(\d+)\]")
    numbers = [re.search(pattern, text) for text, pattern in texts]
    return next((int(number[1]) for number in numbers if number), order)


def _appended(node: object, rows: sympy.Expr) -> _Append | None:
    """How `rows` new rows got into a cache, or None."""
    while isinstance(node, fx.Node) and node.target in _SAME_VALUE:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_function" or not node.args:
        return None
    if node.target in _APPENDS:
        cache, axis, _, new = node.args
    elif node.target is aten.cat.default:
        parts, axis = (*node.args, 0)[:2]
        if not isinstance(parts, list | tuple) or len(parts) != 2:
            return None
        cache, new = parts
        # A rolling window keeps only the last rows: what leaves the graph is then a slice.
        if not any(user.op == "output" for user in node.users):
            return None
    else:
        return None
    if not isinstance(cache, fx.Node) or cache.op != "placeholder" or axis not in (2, -2):
        return None
    fits = isinstance(new, fx.Node) and len(extents(new)) == 4 and extents(new)[2] == rows
    return _Append(cache, node) if fits else None


def _unfit(node: fx.Node, keys: _Append, values: _Append) -> str:
    """Why a cached attention cannot be read through a memory, or nothing."""
    query, key, value = (node.args[i].meta["val"] for i in range(3))  # type: ignore[union-attr]
    if keys.grows != values.grows or keys.cache is values.cache:
        return "its keys and values are not cached alike"
    if _written_otherwise(node, keys, values):
        return "the graph writes into its cache in another place, too"
    for place in () if keys.grows else (keys.node.args[2], values.node.args[2]):
        if why := _unreadable(place, "where the cache is written"):  # type: ignore[arg-type]
            return why
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
    return _unreadable(mask, "its mask")


def _unreadable(wanted: fx.Node, what: str) -> str:
    """Why a value cannot be computed before the graph runs, or nothing."""
    cone = upstream(wanted)
    if any(changes_something(node) for node in cone):
        return f"{what} depends on what the graph writes"
    left = len(cone)
    written: set[int] = set()
    for node in wanted.graph.nodes:
        if node in cone:
            left -= 1
            if written & {memory for n in node.all_input_nodes for memory in _memory(n)}:
                return f"{what} is read from an input that the graph writes before"
        if not left:
            break
        written |= _writes(node)
    return ""


def _written_otherwise(attention: fx.Node, keys: _Append, values: _Append) -> bool:
    """Whether anything but the appends writes to the caches, before the attention or after it."""
    read = [n for n in attention.args[1:3] if isinstance(n, fx.Node)]
    caches = {
        memory
        for node in (keys.cache, values.cache, keys.node, values.node, *read)
        for memory in _memory(node)
    }
    return any(
        caches & _writes(node)
        for node in attention.graph.nodes
        if node is not keys.node and node is not values.node
    )


def _writes(node: fx.Node) -> set[int]:
    """The memory that a call writes to: of everything it is given, where its schema is unknown."""
    if not changes_something(node):
        return set()
    given = node.all_input_nodes
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        names = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
        written = [argument(node, name) for name in names]
        given = [n for w in written for n in (w if isinstance(w, list | tuple) else [w])]
    return {memory for n in given if isinstance(n, fx.Node) for memory in _memory(n)}


def _memory(node: fx.Node) -> set[int]:
    """What tells the memory of a node's tensor from that of others; views share theirs."""
    value = node.meta.get("val")
    return {value.untyped_storage()._cdata} if isinstance(value, torch.Tensor) else set()


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
