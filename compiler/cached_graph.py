"""From one of Dynamo's graphs to a run that reads its caches through a policy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..models.memory.spec import Memory
from ..passes.exact import HIDDEN_LOGIT
from ..passes.find_cached import CachedSite, find_cached, upstream
from ..passes.fold_attention import fold_attention
from ..passes.read_cached import group_sites, read_cached
from ..passes.result import Declined, PassResult
from ..passes.undo_repeat_kv import undo_repeat_kv
from ..runtime.cache_index import Indexes
from ..runtime.cached_run import CachedRun, GroupPlan, SitePlan
from .lower import SIXTEEN, Traced, load_linear, put_kernels
from .report import Lowered

aten = torch.ops.aten
Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass
class Found:
    """What one of Dynamo's graphs holds.

    Attributes:
        normal: the graph in ATen operations, nothing folded.
        folded: the same, every attention one node.
        attentions: how many there are.
        cached: those over a cache that the graph appends to.
        declined: what stopped the others, and softmax that is no attention.
    """

    normal: fx.GraphModule
    folded: fx.GraphModule
    attentions: int
    cached: list[CachedSite]
    declined: list[Declined]


def normal_form(gm: fx.GraphModule) -> fx.GraphModule | None:
    """The graph in ATen operations, with the modules and lines they came from; None where Dynamo
    gives no example values."""
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = [n.meta.get("example_value") for n in placeholders]
    if not inputs or any(value is None for value in inputs) or detect_fake_mode(inputs) is None:
        return None
    with preserve_node_meta():
        traced = make_fx(
            fx.Interpreter(gm).run,
            tracing_mode="symbolic",
            pre_dispatch=True,
            _allow_non_fake_inputs=True,
        )(*inputs)
    assert isinstance(traced, fx.GraphModule)
    for old, new in zip(placeholders, traced.graph.nodes, strict=False):
        given = old.meta.get("grapharg")
        new.meta["source"] = given.source.name if given is not None else ""
        new.meta["parameter"] = isinstance(old.meta.get("example_value"), torch.nn.Parameter)
    return traced


def find(normal: fx.GraphModule) -> Found:
    """The attentions of a graph in normal form."""
    folded, result = _folded(normal)
    cached, declined = find_cached(folded)
    return Found(normal, folded, result.applied, cached, [*result.declined, *declined])


def _folded(
    normal: fx.GraphModule, only: Collection[str] | None = None
) -> tuple[fx.GraphModule, PassResult]:
    """A copy whose attentions are one node each, those that begin at the calls named in `only`, and
    what came of folding them."""
    module = fx.GraphModule(normal, copy.deepcopy(normal.graph))
    with torch.no_grad():
        result = fold_attention(module, only)
        undo_repeat_kv(module)
    return module, result


def unserved(memory: Memory) -> str:
    """Why a memory cannot be read from a cache that somebody else owns, or nothing."""
    if memory.state is not None:
        return "keeps a state, for which a transformers cache has no place"
    if memory.account is not None:
        return "keeps an account of attention mass, for which a transformers cache has no place"
    return ""


def cached_run(
    found: Found,
    memories: dict[str, Memory],
    dense: Callable[[], Callable[..., Any]],
    compile_graph: Compile,
    indexes: Indexes,
    decode_tokens: int,
    kernels: str,
    lowered: Lowered,
) -> CachedRun:
    """The run of a graph whose cached attentions read through `memories`.

    Args:
        memories: by site name.
        dense: compiles the graph as it was.
        compile_graph: compiles a rewritten graph, given fake tensors for the inputs it has more.
        decode_tokens: calls of up to this many tokens read through the policy.
        lowered: is told of kernels and of what runs without them.
    """
    normal = found.normal
    sites, groups, names = _plans(found, memories)
    windows = [m.window_pages * m.page_size for m in memories.values() if m.fields]

    def read(aligned: bool) -> Callable[..., Any]:
        # Other attentions stay what they were: nothing is faster on them.
        module, _ = _folded(normal, {site.folds for site in found.cached})
        with torch.no_grad():
            made = read_cached(module, found.cached, memories, aligned)
        # Told once, though a graph may come in two forms.
        told = Lowered() if lowered.kernels else lowered
        if kernels == "off":
            told.references = ["kernels=off"]
        else:
            _stream_weights(module, kernels, told)
            traced = {"policy": Traced(module, [], {}, None)}
            put_kernels(traced, next(_tensors(module)).device, kernels, told)
        module.recompile()
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        held = sum(n.op == "placeholder" for n in normal.graph.nodes)
        return compile_graph(made.graph, [n.meta["val"] for n in inputs[held:]])

    return CachedRun(
        sites,
        groups,
        read,
        dense,
        _looker(found.folded, names),
        indexes,
        # Pages that fill during a call have no record yet: they must lie in every row's window.
        min([decode_tokens, *(1 + window for window in windows)]),
        HIDDEN_LOGIT,
    )


def likely_aligned(found: Found, memories: dict[str, Memory]) -> bool:
    """Whether the caches' sizes let pages lie in order, as far as the graph tells."""
    nodes = {n.name: n for n in found.normal.graph.nodes}
    for site in found.cached:
        length = nodes[site.keys].meta["val"].shape[2]
        memory = memories[site.site.name]
        sizes = (memory.page_size, *memory.levels)
        if site.grows or not isinstance(length, int) or any(length % s for s in sizes):
            return False
    return True


def _plans(
    found: Found, memories: dict[str, Memory]
) -> tuple[list[SitePlan], list[GroupPlan], list[str]]:
    folded = found.folded
    groups = group_sites(folded, found.cached, memories)
    inputs = [n.name for n in folded.graph.nodes if n.op == "placeholder"]
    output = next(n for n in reversed(folded.graph.nodes) if n.op == "output")
    nodes = {n.name: n for n in folded.graph.nodes}
    looked = [g.mask for g in groups] + [n for site in found.cached for n in site.places]
    names = list(dict.fromkeys(name for name in looked if name is not None))
    results = list(output.args[0])
    of_group = {name: number for number, group in enumerate(groups) for name in group.sites}
    by_name = {site.site.name: site for site in found.cached}
    sites = []
    for name, number in of_group.items():
        site = by_name[name]
        longer = [results.index(nodes[name]) for name in site.appends if site.grows]
        sites.append(
            SitePlan(
                name,
                site.site.layer,
                memories[name],
                number,
                inputs.index(site.keys),
                inputs.index(site.values),
                (longer[0], longer[1]) if longer else None,
                tuple(names.index(place) for place in site.places),
            )
        )
    plans = [
        GroupPlan(
            names.index(group.mask) if group.mask is not None else None,
            group.kv_heads,
            group.page_size,
            group.record_sizes,
        )
        for group in groups
    ]
    return sites, plans, names


def _looker(folded: fx.GraphModule, names: Sequence[str]) -> Callable[..., Any] | None:
    """A function from a graph's arguments to the values of some of its nodes."""
    if not names:
        return None
    nodes = {n.name: n for n in folded.graph.nodes}
    inputs = [n for n in folded.graph.nodes if n.op == "placeholder"]
    if all(nodes[name].op == "placeholder" for name in names):
        places = [inputs.index(nodes[name]) for name in names]
        return lambda *args: [args[place] for place in places]
    cone = {node for name in names for node in upstream(nodes[name])}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in folded.graph.nodes:
        if node.op == "placeholder" or node in cone:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output([copied[nodes[name]] for name in names])
    module = fx.GraphModule(folded, graph)

    def look(*args: Any) -> Any:
        with torch.no_grad():
            return module(*args)

    return look


def _stream_weights(module: fx.GraphModule, kernels: str, lowered: Lowered) -> None:
    """Lets linear layers with 16-bit weights read them as they lie, at few rows."""
    layers = [n for n in module.graph.nodes if _is_streamed(n)]
    if not layers:
        return
    linear, untold = load_linear(next(_tensors(module)).device, kernels)
    if untold:
        lowered.references.append(f"linear layers are torch's own: {untold}")
        warnings.warn(lowered.references[-1], stacklevel=2)
    if linear is None:
        return
    for node in layers:
        node.target, node.args = linear, (*node.args, None)[:3]


def _is_streamed(node: fx.Node) -> bool:
    if node.target is not aten.linear.default or node.kwargs:
        return False
    held = [n for n in node.args[1:] if isinstance(n, fx.Node)]
    values = [n.meta["val"] for n in held]
    return all(n.op == "placeholder" and n.meta.get("parameter") for n in held) and all(
        v.is_contiguous() and v.dtype in SIXTEEN for v in values
    )


def _tensors(module: fx.GraphModule) -> Any:
    for node in module.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta["val"], Tensor):
            yield node.meta["val"]
