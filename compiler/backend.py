"""The `torch.compile` backend: `torch.compile(model, backend="memcompile", options={...})`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

log = logging.getLogger("memcompile")


def memcompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs; registered as an entry point, hence without a decorator.

    A graph that keeps no cache reads every key of its own inputs: there is nothing to remember
    between calls, so its attentions stay dense. That is said at INFO level, with their number.

    Args:
        gm, example_inputs: what Dynamo hands to a backend.
        mode: as for Inductor, forwarded.
        options: ``policy``, by name or file, and the fields of that policy.

    Raises:
        ValueError: an unknown policy or option; the message lists the known ones.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    from .policy_file import choose

    given = dict(options or {})
    policy = given.pop("policy", "scout")
    choose(policy, given)
    count = attentions(gm)
    if count:
        log.info(
            "%d attentions in a graph without a cache stay dense: policy %r has nothing to "
            "remember between calls. Use memcompile.compile(model) for an engine with a memory",
            count,
            policy,
        )
    patches = list_mode_options(mode) if mode else None
    compiled = compile_fx(gm, list(example_inputs), config_patches=patches)
    return cast(Callable[..., Any], compiled)


def attentions(gm: fx.GraphModule) -> int:
    """How many attentions the normal form of one of Dynamo's graphs holds."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.fx.experimental.proxy_tensor import make_fx

    from ..passes.fold_attention import fold_attention
    from ..passes.strip_asserts import strip_asserts

    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = [n.meta.get("example_value") for n in placeholders]
    if not inputs or any(value is None for value in inputs) or detect_fake_mode(inputs) is None:
        return 0
    try:
        traced = make_fx(
            gm, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True
        )(*inputs)
    except DataDependentOutputException:
        # With dynamic=True Dynamo hands over the scale as an unknown number: count the calls then.
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sum(node.target is sdpa for node in gm.graph.nodes)
    if not isinstance(traced, fx.GraphModule):
        return 0
    with torch.no_grad():
        return fold_attention(strip_asserts(traced).graph).applied
