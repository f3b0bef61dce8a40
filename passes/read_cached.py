"""Rewrite attentions over caches into reads of a memory whose pages are the cache itself.

Nothing is copied: a cache [B, Hkv, L, D] of contiguous rows is a pool of pages, and what a memory
needs beside it (page tables, the index) comes in as inputs that the host keeps
(`runtime.cache_index`). The graph writes its new rows as it did before.

A pool is laid out in one of two ways. *Aligned*: L is a multiple of the page size and every row of
the batch begins at key 0; pages follow each other and records have their pages' numbers. Else pages
may begin at any key: their number is the key they begin at, over all rows of the cache; records
have a table of their own; and the last keys of a row, which no whole page holds, are read as a
*tail*, in pages of one key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._guards import detect_fake_mode

from ..models.memory.cached import emit_cached_read, record_sizes
from ..models.memory.parts import field_width
from ..models.memory.spec import Memory
from .find_cached import CachedSite
from .graph_tools import aten, calls, copy_origin, emit, extent, remove_dead

# What every group of sites that share mask, shape and page size gets as inputs, in order.
HOST_INPUTS = ("position", "lengths", "page_table")
TAIL_INPUTS = ("tail_position", "tail_table")


@dataclass(frozen=True)
class Group:
    """Sites whose pages have the same numbers.

    Attributes:
        mask: name of the mask's node, or None.
        kv_heads, page_size: of the sites.
        keys: the first site's cache, whose shape is that of all.
        record_sizes: tokens of the records that have a table of their own, in order.
        sites: names of the sites.
    """

    mask: str | None
    kv_heads: int
    page_size: int
    keys: str
    record_sizes: tuple[int, ...]
    sites: tuple[str, ...]


@dataclass
class CachedRead:
    """A graph that reads caches through memories.

    Attributes:
        graph: takes the inputs it had, then for every group `HOST_INPUTS`, a table for each of its
            record sizes and, unless aligned, `TAIL_INPUTS`; then for every site its records, size
            by size, field by field. Returns what it returned and, where something is selected, the
            pages each selecting site read in each row, int64 [sites, B].
        groups: in the order of their inputs.
        counted: names of the sites that the counts are of.
    """

    graph: fx.GraphModule
    groups: list[Group]
    counted: list[str]


def read_cached(
    module: fx.GraphModule,
    cached: Sequence[CachedSite],
    memories: Mapping[str, Memory],
    aligned: bool,
) -> CachedRead:
    """Let the attentions of `cached` read what `memories` select.

    Args:
        module: its normal form, with these attentions folded; changed in place.
        memories: by site name; without account or state.
        aligned: the layout of pages, see above.
    """
    builder = _Builder(module, cached, memories, aligned)
    return builder.build()


def attentions(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The attention nodes, by the name of the call that each was folded from."""
    found = calls(module.graph, torch.ops.memcompile.attention.default)
    return {str(node.meta["folds"]): node for node in found}


def group_sites(
    module: fx.GraphModule, cached: Sequence[CachedSite], memories: Mapping[str, Memory]
) -> list[Group]:
    """The sites by what their page tables depend on."""
    nodes = attentions(module)
    members: dict[Any, list[CachedSite]] = {}
    for site in cached:
        shape = nodes[site.folds].args[1].meta["val"].shape  # type: ignore[union-attr]
        key = (site.mask, site.site.kv_heads, extent(shape[2]), memories[site.site.name].page_size)
        members.setdefault(key, []).append(site)
    groups = []
    for (mask, kv_heads, _, page_size), sites in members.items():
        names = tuple(site.site.name for site in sites)
        sizes = sorted({size for name in names for size in record_sizes(memories[name])})
        groups.append(Group(mask, kv_heads, page_size, sites[0].keys, tuple(sizes), names))
    return groups


class _Builder:
    def __init__(
        self,
        module: fx.GraphModule,
        cached: Sequence[CachedSite],
        memories: Mapping[str, Memory],
        aligned: bool,
    ) -> None:
        self.module, self.graph = module, module.graph
        self.cached = {site.site.name: site for site in cached}
        self.memories, self.aligned = memories, aligned
        self.nodes = attentions(module)
        fakes = [n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"]
        self.mode = detect_fake_mode([f for f in fakes if isinstance(f, torch.Tensor)])
        self.last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        self.counts: list[fx.Node] = []
        self.counted: list[str] = []

    def build(self) -> CachedRead:
        groups = group_sites(self.module, list(self.cached.values()), self.memories)
        inputs = [self._group_inputs(number, group) for number, group in enumerate(groups)]
        records = {name: self._records(name) for group in groups for name in group.sites}
        for group, given in zip(groups, inputs, strict=True):
            for name in group.sites:
                self._read(self.cached[name], group, given, records[name])
        if self.counts:
            output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
            with self.graph.inserting_before(output):
                counted = emit(self.graph, aten.stack.default, self.counts)
            output.args = ((*output.args[0], counted),)
        remove_dead(self.graph)
        self.graph.lint()
        self.module.recompile()
        return CachedRead(self.module, groups, self.counted)

    # --- inputs ---

    def _input(self, name: str, shape: Sequence[Any], dtype: torch.dtype) -> fx.Node:
        with self.graph.inserting_after(self.last):
            made: fx.Node = self.graph.placeholder(name)
        with self.mode or contextlib.nullcontext():
            made.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=self.first.device)
        self.last = made
        return made

    def _group_inputs(self, number: int, group: Group) -> dict[str, fx.Node]:
        self.first = self._keys(group.sites[0]).meta["val"]
        batch, kv_heads, length = self.first.shape[:3]
        shapes: dict[str, tuple[Any, ...]] = {
            "position": (batch,),
            "lengths": (batch,),
            "page_table": (batch, kv_heads, _pages(length, group.page_size)),
        }
        for size in group.record_sizes:
            shapes[f"table_{size}"] = (batch, kv_heads, _pages(length, size))
        if not self.aligned:
            shapes["tail_position"] = (batch,)
            shapes["tail_table"] = (batch, kv_heads, group.page_size)
        return {
            name: self._input(f"group{number}_{name}", shape, torch.int32)
            for name, shape in shapes.items()
        }

    def _records(self, name: str) -> dict[int, tuple[fx.Node, ...]]:
        """A site's records by their size, each field an input."""
        memory, site = self.memories[name], self.cached[name].site
        self.first = self._keys(name).meta["val"]
        rows = self.first.shape[0] * self.first.shape[1]
        made = {}
        for size in record_sizes(memory):
            pages = rows * _pages(self.first.shape[2], size)
            made[size] = tuple(
                self._input(
                    f"site{site.layer}_{field}_{size}",
                    (pages, field_width(field, site.key_dim, site.value_dim)),
                    torch.float32 if field == "log_count" else site.dtype,
                )
                for field in memory.fields
            )
        return made

    # --- reads ---

    def _keys(self, name: str) -> fx.Node:
        node = self.nodes[self.cached[name].folds].args[1]
        assert isinstance(node, fx.Node)
        return node

    def _read(
        self,
        cached: CachedSite,
        group: Group,
        given: Mapping[str, fx.Node],
        records: Mapping[int, tuple[fx.Node, ...]],
    ) -> None:
        site, memory = cached.site, self.memories[cached.site.name]
        node = self.nodes[cached.folds]
        query, keys, values = cast(tuple[fx.Node, ...], node.args[:3])

        def call(target: Any, *args: Any) -> fx.Node:
            new = emit(self.graph, target, *args)
            copy_origin(new, node)
            return new

        with self.graph.inserting_before(node):
            caches = (keys, values)
            sizes = (self._sizes(call, keys), self._sizes(call, values))
            out, pages = emit_cached_read(
                call,
                memory,
                query,
                caches,
                sizes,
                given,
                records,
                aligned=self.aligned,
                scale=site.scale,
                softcap=site.softcap,
                dtype=node.meta["val"].dtype,
            )
            if pages is not None:
                read_pages = call(aten.ge.Scalar, pages, 0)
                self.counts.append(call(aten.sum.dim_IntList, read_pages, [1, 2, 3]))
                self.counted.append(site.name)
        node.replace_all_uses_with(out)

    def _sizes(self, call: Any, cache: fx.Node) -> list[Any]:
        """The sizes of a cache: numbers, or nodes where they are symbolic."""
        shape = cache.meta["val"].shape
        return [
            size if isinstance(size, int) else call(aten.sym_size.int, cache, axis)
            for axis, size in enumerate(shape)
        ]


def _pages(length: Any, size: int) -> Any:
    return (length + size - 1) // size
