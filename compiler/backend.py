"""The `torch.compile` backend: `torch.compile(model, backend="memcompile", options={...})`."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx

from ..runtime.cache_index import CacheIndex, Indexes
from .cached_graph import Found, cached_run, find, likely_aligned, normal_form, unserved
from .graph_report import GraphReport, remember_report
from .settings import kernels as kernels_setting

log = logging.getLogger("memcompile")

# What one policy of a process has found out about caches, for as long as a graph of it lives.
_indexes: weakref.WeakValueDictionary[tuple[type, str], Indexes] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def memcompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs; registered as an entry point, hence without a decorator.

    A graph that appends its keys and values to a cache it is given (transformers' StaticCache and
    DynamicCache do) reads that cache through the policy. Every other graph is compiled as Inductor
    would: without a cache there is nothing to remember between calls, and training needs gradients
    of every key. `memcompile.graphs()` tells what became of each.

    Args:
        gm, example_inputs: what Dynamo hands to a backend.
        mode: as for Inductor, forwarded.
        options: ``policy``, by name or file, and its fields, or a `Policy`; ``kernels`` as for
            `memcompile.compile`; ``decode_tokens``: calls of up to this many tokens, 16 if not
            given, read through the policy, longer ones densely.

    Raises:
        ValueError: an unknown policy or option (the known ones are listed), or a policy that a
            cache cannot serve.
    """
    from torch._inductor import list_mode_options

    from .policy_file import choose, policy_name

    given = dict(options or {})
    policy = given.pop("policy", "scout")
    kernels = kernels_setting(given.pop("kernels", None))
    decode_tokens = given.pop("decode_tokens", 16)
    if type(decode_tokens) is not int or decode_tokens < 1:
        raise ValueError(f"decode_tokens is {decode_tokens!r}; give a whole number of at least 1")
    chosen = choose(policy, given, ("policy", "kernels", "decode_tokens"))
    patches = list_mode_options(mode) if mode else {}
    name = policy_name(policy)
    report = GraphReport(name, chosen.to_json())
    inputs = list(example_inputs)

    def dense() -> Callable[..., Any]:
        return _compiled(gm, inputs, patches)

    if torch.is_grad_enabled() and any(_wants_gradient(x) for x in inputs):
        report.kind = "training"
        report.attentions = _count(gm)
        return _finish(report, dense())
    found = _find(gm, report)
    if found is None or not found.cached:
        if not report.kind:
            report.kind = "cacheless" if report.attentions else "no attention"
        return _finish(report, dense())
    report.kind = "cached"
    memories = {}
    for site in found.cached:
        memory = chosen.memory_at(site.site.layer, 0)
        memory.check_lowered()
        if why := unserved(memory):
            raise ValueError(
                f"policy {name!r} {why}; give one that selects pages (scout, hierarchical, "
                "quest, window), or use memcompile.compile(model)"
            )
        memories[site.site.name] = memory
    report.sites = [site.site for site in found.cached]
    report.memories = memories
    # Two policies of users' own may look alike and differ in what their classes do.
    key = (type(chosen), f"{chosen.to_json()}")
    with _lock:
        indexes = _indexes.get(key) or Indexes()
        _indexes[key] = indexes

    def compile_graph(module: fx.GraphModule, more: Sequence[Any]) -> Callable[..., Any]:
        return _compiled(module, [*inputs, *more], patches)

    run = cached_run(
        found, memories, dense, compile_graph, indexes, decode_tokens, kernels, report.lowered
    )
    report.calls = run.calls
    rows = _rows(found)
    # What the first call will need is made now, while Dynamo waits for it.
    run.graph(likely_aligned(found, memories) if rows <= run.most_rows else None)
    return _finish(report, run)


def invalidate(cache: Any) -> int:
    """See `memcompile.invalidate`."""
    places = {(t.untyped_storage()._cdata, t.storage_offset()) for t in _cached_tensors(cache)}

    def is_named(index: CacheIndex) -> bool:
        return not index.gone and (index.storage.cdata, index.offset) in places

    return sum(indexes.drop(is_named) for indexes in Indexes.everywhere())


def _cached_tensors(cache: Any) -> Iterator[torch.Tensor]:
    if isinstance(cache, torch.Tensor):
        yield cache
    elif isinstance(cache, list | tuple):
        for part in cache:
            yield from _cached_tensors(part)
    elif hasattr(cache, "layers"):
        for layer in cache.layers:
            # A layer that holds nothing yet has no keys.
            keys = getattr(layer, "keys", None)
            if isinstance(keys, torch.Tensor):
                yield keys
    else:
        raise TypeError(
            f"expected a cache of transformers, or tensors of one, got {type(cache).__name__}"
        )


def _finish(report: GraphReport, compiled: Callable[..., Any]) -> Callable[..., Any]:
    remember_report(report)
    line = report.line()
    if line:
        log.info("%s", line)
    return compiled


def _find(gm: fx.GraphModule, report: GraphReport) -> Found | None:
    """What the graph holds, or None, and the report says why, where it cannot be looked into."""
    from torch._subclasses.fake_tensor import DataDependentOutputException

    try:
        normal = normal_form(gm)
        if normal is None:
            report.attentions = _count(gm)
            return None
        found = find(normal)
    except Exception as reason:  # any operation of any user's graph is traced here
        report.attentions = _count(gm)
        report.kind = "hidden"
        text = " ".join(str(reason).split("Original traceback")[0].split())
        if isinstance(reason, DataDependentOutputException):
            text = (
                "it computes with a number that only a run knows. With dynamic=True every number "
                "of a module is one, an attention's scale too: leave dynamic out, sizes that "
                f"change are found without it ({text})"
            )
        report.notes.append(text or type(reason).__name__)
        return None
    report.attentions = found.attentions
    report.declined = found.declined
    return found


def _count(gm: fx.GraphModule) -> int:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sum(node.target is sdpa for node in gm.graph.nodes)


def _rows(found: Found) -> int:
    """Queries a row of the first cached attention, as far as Dynamo knows."""
    query = next(n for n in found.normal.graph.nodes if n.name == found.cached[0].folds).args[0]
    shape = query.meta["val"].shape
    size = shape[-2]
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(size) if isinstance(size, int) else int(hint or 1)


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _compiled(gm: fx.GraphModule, inputs: list[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """A graph through Inductor, now, or later when Dynamo has gone on."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor.compile_fx import compile_fx

    mode = detect_fake_mode(inputs)
    if TracingContext.try_get() is not None or mode is None:
        return cast(Callable[..., Any], compile_fx(gm, inputs, config_patches=patches))
    guards = len(mode.shape_env.guards) if mode.shape_env is not None else 0
    with tracing(TracingContext(mode)):
        compiled = compile_fx(gm, inputs, config_patches=patches)
    if mode.shape_env is not None and len(mode.shape_env.guards) > guards:
        # It holds for some sizes only, and nothing would notice the others.
        log.info("a graph runs uncompiled: compiled late, it would hold for some sizes only")
        return cast(Callable[..., Any], gm)
    return cast(Callable[..., Any], compiled)
