"""Derive the step graph: the stateless forward, run on new tokens with a memory in every site."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from ..models.memory import lists
from ..models.memory.read import emit_read, emit_write
from ..models.memory.site import SiteTensors, state_names
from ..models.memory.spec import Memory
from ..models.memory.state import Weights, state_weights
from .classify_tokens import Classified, Gather, Rematerialise
from .exact import Affine
from .graph_tools import argument, aten, extents
from .result import Declined, Site
from .token_axes import BATCH, TOKEN, Mixed


@dataclass
class StepGraph:
    """The two step graphs of a model; both take the same inputs.

    Inputs: ``tokens[B, n]`` int64, ``position[B]`` and ``lengths[B]`` int32, then for every site,
    in order, what `site.state_names` lists.
    Outputs: ``logits[B, n, V]`` and, for the policy read, the number of pages each selecting site
    read for each sequence, int64 ``[sites, B]``.

    Attributes:
        dense: reads every page that is there ("dense"), writes pages and index; for many tokens.
        policy: reads what each memory selects; the same object as `dense` if no site selects or
            keeps a state.
        ragged: whether rows may stand at different positions and have different lengths.
    """

    dense: fx.GraphModule
    policy: fx.GraphModule
    ragged: bool


def decline_step(module: fx.GraphModule, classified: Classified) -> list[Declined]:
    """Why no step graph can be derived, apart from the sites' masks; empty if one can."""
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    logits = output.args[0]
    known = classified.values[logits]
    if isinstance(known, Mixed):
        return [known.declined]
    if known.axes[:2] != ((BATCH,), (TOKEN,)) or len(known.axes) != 3:
        shown = ", ".join("*".join(str(a) for a in axis) or "1" for axis in known.axes)
        return [
            Declined(
                f"the output is [{shown}]; expected logits [batch, token, vocabulary]",
                f"%{logits.name}",
                "derive_step",
            )
        ]
    return []


def remember(
    module: fx.GraphModule,
    classified: Classified,
    sites: list[Site],
    memories: Mapping[str, Memory],
    fitted: Mapping[str, Weights] | None = None,
) -> StepGraph:
    """Rewrite the normal form into step graphs.

    Every node keeps its operation except three kinds: attentions become writes and reads of the
    site's memory; values that were shown to be functions of the position alone are computed from
    ``position``; token-long slices of tables are gathered at the tokens' positions.

    Args:
        fitted: weights of states by site name (`hybrid.state_weights`); those of the other sites
            are fitted to nothing.
    """
    weights = {
        site.name: (fitted or {}).get(site.name) or _unfitted(site, memories[site.name])
        for site in sites
        if memories[site.name].state is not None
    }
    given = (module, classified, sites, memories, weights)
    dense = _Builder(*given, "dense").build()
    if not any(memories[site.name].selects or memories[site.name].state for site in sites):
        return StepGraph(dense.result, dense.result, not dense.shared)
    policy = _Builder(*given, "policy").build()
    return StepGraph(dense.result, policy.result, not dense.shared)


def _unfitted(site: Site, memory: Memory) -> Weights:
    return state_weights(memory, site.heads, site.kv_heads, site.key_dim)


class _Builder:
    """Builds one step graph."""

    def __init__(
        self,
        module: fx.GraphModule,
        classified: Classified,
        sites: list[Site],
        memories: Mapping[str, Memory],
        weights: Mapping[str, Weights],
        read: str,
    ) -> None:
        self.module, self.classified, self.read = module, classified, read
        self.sites = {site.node: site for site in sites}
        self.memories, self.weights = memories, weights
        self.added: dict[str, torch.Tensor] = {}  # tensors of states, by the name of their node
        self.graph = fx.Graph()
        self.copied: dict[fx.Node, fx.Node] = {}
        self.counts: list[fx.Node] = []
        self.shared = False  # whether a value without a batch axis was computed from the position
        self.result = module

    def build(self) -> _Builder:
        old = self.module.graph
        inputs = [n for n in old.nodes if n.op == "placeholder"]
        live = _live(old, self.classified)
        self.tokens = self.graph.placeholder("tokens")
        self.position = self.graph.placeholder("position")
        self.lengths = self.graph.placeholder("lengths")
        self.state = {site.name: self._state(site) for site in self.sites.values()}
        self.copied[inputs[0]] = self.tokens
        self.iota_made: fx.Node | None = None
        self.base_made: fx.Node | None = None
        if len(inputs) > 1:
            self.copied[inputs[1]] = self._position_ids()
        for node in old.nodes:
            if node.op == "output":
                self._output(node)
            elif node in live and node.op != "placeholder":
                self.copied[node] = self._step(node)
        self.graph.eliminate_dead_code(is_impure_node=_is_write)
        self.graph.lint()
        root = _weights(self.module, self.graph, self.added)
        self.result = fx.GraphModule(root, self.graph, "Step")
        return self

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _state(self, site: Site) -> SiteTensors:
        memory, prefix = self.memories[site.name], f"site{site.layer}_"
        state = [self.graph.placeholder(prefix + name) for name in state_names(memory)]
        return SiteTensors.take(memory, state)

    def _step(self, node: fx.Node) -> fx.Node:
        rewrite = self.classified.rewrites.get(node)
        if isinstance(rewrite, Gather):
            new = self._gather(node, rewrite)
        elif isinstance(rewrite, Rematerialise):
            new = self._rematerialise(node, rewrite)
        elif node.name in self.sites:
            new = self._attention(node, self.sites[node.name])
        else:
            new = self.graph.node_copy(node, lambda n: self.copied[n])
            if new.target in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
                # A step may run one token or one row, whose axes must stay.
                sizes = extents(node.args[0])  # type: ignore[arg-type]
                wanted = _squeezed(node, len(sizes))
                single = [axis for axis in wanted if sizes[axis] == 1]
                new.target, new.args, new.kwargs = aten.squeeze.dims, (new.args[0], single), {}
            if new.target is aten.view.default:
                # A site's output has strides of its own, which a view may not be able to follow.
                new.target = aten.reshape.default
        for key in ("stack_trace", "nn_module_stack"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
        return new

    def _attention(self, node: fx.Node, site: Site) -> fx.Node:
        query, key, value = (self.copied[n] for n in node.args[:3])  # type: ignore[index]
        memory, state = self.memories[site.name], self.state[site.name]
        for name, weight in self.weights.get(site.name, {}).items():
            target = f"site{site.layer}_{name}"
            self.added[target] = weight.to(self._device())
            state = replace(state, weights={**state.weights, name: self.graph.get_attr(target)})
        emit_write(self.call, memory, state, key, value, self.position, self.lengths)
        out, pages = emit_read(
            self.call,
            memory,
            state,
            self.read,
            query,
            self.position,
            self.lengths,
            scale=site.scale,
            softcap=site.softcap,
            window=site.rule.window,
            dtype=node.meta["val"].dtype,
        )
        if self.read == "policy" and pages is not None:
            read = self.call(aten.ge.Scalar, pages, 0)
            self.counts.append(self.call(aten.sum.dim_IntList, read, [1, 2, 3]))
        made: fx.Node = out
        return made

    # --- values of the position ---

    def _iota(self) -> fx.Node:
        """0 .. n-1, int64."""
        if self.iota_made is None:
            count = self.call(aten.sym_size.int, self.tokens, 1)
            device = self._device()
            self.iota_made = self.call(aten.arange.default, count, dtype=torch.int64, device=device)
        return self.iota_made

    def _device(self) -> torch.device:
        first = next(iter(self.module.graph.nodes))
        device: torch.device = first.meta["val"].device
        return device

    def _position_ids(self) -> fx.Node:
        """position[b] + i, int64 [B, n]; padding repeats the row's last position, in any table."""
        last = self.call(aten.clamp.default, self.call(aten.sub.Tensor, self.lengths, 1), 0)
        inside = self.call(
            aten.minimum.default, self._iota(), self.call(aten.unsqueeze.default, last, 1)
        )
        base = self.call(aten.unsqueeze.default, self.position, 1)
        return self.call(aten.to.dtype, self.call(aten.add.Tensor, inside, base), torch.int64)

    def _positions(self) -> fx.Node:
        """The positions of the new tokens, int64 [n], the same for every row."""
        self.shared = True
        if self.base_made is None:
            first = self.call(aten.select.int, self.position, 0, 0)
            self.base_made = self.call(aten.add.Tensor, self._iota(), first)
        return self.base_made

    def _gather(self, node: fx.Node, gather: Gather) -> fx.Node:
        source = self.copied[node.args[0]]  # type: ignore[index]
        rows = self._positions()
        if gather.start:
            rows = self.call(aten.add.Tensor, rows, gather.start)
        return self.call(aten.index_select.default, source, gather.axis, rows)

    def _rematerialise(self, node: fx.Node, known: Rematerialise) -> fx.Node:
        fake = node.meta["val"]
        sizes = [self._size(axis) for axis in known.axes]
        kind = {"dtype": fake.dtype, "device": fake.device}
        exact = known.exact
        if not isinstance(exact, Affine):
            return self.call(aten.full.default, sizes, exact.value, **kind)
        ((axis, slope),) = exact.coefficients
        if known.axes[axis] != (TOKEN,):
            raise AssertionError(f"{node.format_node()}: depends on the batch index")
        by_row = (BATCH,) in known.axes[:axis]
        rows = self._position_ids() if by_row else self._positions()
        value = self.call(aten.to.dtype, rows, fake.dtype)
        value = self.call(aten.add.Tensor, self.call(aten.mul.Tensor, value, slope), exact.offset)
        shape: list[Any] = [1] * len(sizes)
        shape[axis] = sizes[axis]
        if by_row:
            batch = known.axes.index((BATCH,))
            shape[batch] = sizes[batch]
        value = self.call(aten.reshape.default, value, shape)
        return self.call(aten.to.dtype, self.call(aten.expand.default, value, sizes), fake.dtype)

    def _size(self, axis: tuple[Any, ...]) -> Any:
        size: Any = 1
        for atom in axis:
            if isinstance(atom, int):
                factor: Any = atom
            else:
                factor = self.call(aten.sym_size.int, self.tokens, int(atom == TOKEN))
            if isinstance(size, int) and size == 1:
                size = factor
            elif isinstance(size, int) and isinstance(factor, int):
                size *= factor
            else:
                size = self.call(operator.mul, size, factor)
        return size

    def _output(self, node: fx.Node) -> None:
        logits = self.copied[node.args[0]]  # type: ignore[index]
        counts = [self.call(aten.stack.default, self.counts)] if self.counts else []
        self.graph.output((logits, *counts))


def _squeezed(node: fx.Node, rank: int) -> list[int]:
    """The axes that a squeeze drops if they are of size one."""
    dims = argument(node, "dim")
    if dims is None:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)] if rank else []


def _is_write(node: fx.Node) -> bool:
    """Whether a node stays though nothing reads it."""
    append = torch.ops.memcompile.append_index
    return node.op in ("placeholder", "output") or (
        node.target in (append.default, append.record_table, append.fold, lists.account)
    )


def _live(graph: fx.Graph, classified: Classified) -> set[fx.Node]:
    """Nodes the step needs: masks are not walked into, nor what an exact value replaces."""
    flow = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((source, node) for source in _needed(node, classified))
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return {*nx.ancestors(flow, output), output}


def _needed(node: fx.Node, classified: Classified) -> list[fx.Node]:
    rewrite = classified.rewrites.get(node)
    if isinstance(rewrite, Rematerialise):
        return []
    if isinstance(rewrite, Gather):
        return node.all_input_nodes[:1]
    if node.target is torch.ops.memcompile.attention.default:
        return [n for n in node.args[:3] if isinstance(n, fx.Node)]
    return node.all_input_nodes


def _weights(
    module: fx.GraphModule, graph: fx.Graph, added: Mapping[str, torch.Tensor]
) -> nn.Module:
    """A root that holds just the weights the graph reads, the model's and the `added`."""
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr" and not hasattr(root, node.target):
            weight = added[node.target] if node.target in added else getattr(module, node.target)
            if isinstance(weight, nn.Parameter):
                root.register_parameter(node.target, weight)
            else:
                root.register_buffer(node.target, weight)
    return root
