"""Find the attention sites of a classified graph and derive each one's mask rule."""

from __future__ import annotations

import torch
from torch import fx

from .classify_tokens import Classified
from .exact import Steps, mask_rule
from .graph_tools import argument, calls, describe, module_path, source_line
from .result import Declined, MaskRule, Site
from .token_axes import Mixed, Value


def find_sites(module: fx.GraphModule, classified: Classified) -> tuple[list[Site], list[Declined]]:
    """Every attention node as a `Site`, or declined with the rule that came nearest.

    Only reads that a growing memory can serve become sites: causal, or a sliding window. A mask is
    what its exact value says, or it is not understood.
    """
    sites: list[Site] = []
    declined: list[Declined] = []
    names: dict[str, int] = {}
    for layer, node in enumerate(calls(module.graph, torch.ops.memcompile.attention.default)):
        rule = _rule(node, classified)
        if isinstance(rule, Declined):
            declined.append(rule)
            continue
        base = module_path(node) or "attention"
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}.{names[base]}"
        query, key, value = (node.args[i].meta["val"] for i in range(3))  # type: ignore[union-attr]
        sites.append(
            Site(
                name=name,
                layer=layer,
                node=node.name,
                heads=int(query.shape[1]),
                kv_heads=int(key.shape[1]),
                key_dim=int(key.shape[3]),
                value_dim=int(value.shape[3]),
                rule=rule,
                scale=float(argument(node, "scale")),
                softcap=float(argument(node, "softcap")),
                dtype=key.dtype,
            )
        )
    return sites, declined


def _rule(node: fx.Node, classified: Classified) -> MaskRule | Declined:
    mask = argument(node, "mask")
    known = classified.values[node]
    masked = classified.values[mask] if mask is not None else None
    if isinstance(masked, Mixed):
        return Declined(
            f"the mask is not understood: {masked.declined.reason}",
            masked.declined.node,
            "find_sites",
            masked.declined.source or source_line(node),
        )
    if isinstance(known, Mixed):
        return known.declined

    def decline(reason: str) -> Declined:
        return Declined(reason, describe(node), "find_sites", source_line(node))

    rule: MaskRule | str = MaskRule("causal") if argument(node, "is_causal") else MaskRule("full")
    if isinstance(masked, Value):
        if argument(node, "is_causal"):
            return decline("both is_causal and a mask are given")
        if not isinstance(masked.exact, Steps):
            return decline(
                "the mask is not understood: it is no function of query minus key position"
            )
        rule = mask_rule(masked.exact, len(masked.axes))
    if isinstance(rule, str):
        return decline(f"the mask is not understood: {rule}")
    if rule.kind == "full":
        return decline(
            "the read is not causal: earlier tokens see later ones, so no step can reproduce it"
        )
    if argument(node, "scale") <= 0:
        return decline("the scale is not positive")
    return rule
