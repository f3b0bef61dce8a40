"""`memcompile.register_attention`: a policy as an entry of transformers' attention functions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..models.memory import Policy
from ..models.memory.spec import Memory
from ..passes.exact import HIDDEN_LOGIT
from .cached_graph import unserved
from .settings import kernels as kernels_setting

if TYPE_CHECKING:
    from ..runtime.attention_interface import CachedAttention

# Layers that a policy is asked about before any model is there.
ASKED = 64


def register_attention(
    policy: Policy | str | os.PathLike[str], name: str, options: dict[str, Any]
) -> CachedAttention:
    """See `memcompile.register_attention`."""
    from ..runtime.attention_interface import CachedAttention
    from .policy_file import choose, policy_name

    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "register_attention needs transformers with its AttentionInterface: "
            "pip install 'memcompile[hf]'"
        ) from error
    import torch

    given = dict(options)
    kernels = kernels_setting(given.pop("kernels", None))
    decode_tokens = given.pop("decode_tokens", 16)
    if type(decode_tokens) is not int or decode_tokens < 1:
        raise ValueError(f"decode_tokens is {decode_tokens!r}; give a whole number of at least 1")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name is {name!r}; give what attn_implementation is to say")
    taken = AttentionInterface().get(name)
    if name == "eager" or (taken is not None and not getattr(taken, "memcompile", None)):
        raise ValueError(f"{name!r} is an attention function of somebody else's; give another name")
    chosen = choose(policy, given, ("kernels", "decode_tokens"))
    called = policy_name(policy)

    def check(memory: Memory) -> None:
        memory.check_lowered()
        if why := unserved(memory):
            raise ValueError(
                f"policy {called!r} {why}; give one that selects pages (scout, hierarchical, "
                "quest, window), or use memcompile.compile(model)"
            )

    for layer in range(ASKED):
        check(chosen.memory_at(layer, 0))
    made = CachedAttention(chosen, check, decode_tokens, kernels, HIDDEN_LOGIT)

    def attention(*args: Any, **kwargs: Any) -> Any:
        return made(*args, **kwargs)

    # What the host does beside a graph is no part of one: Dynamo breaks here.
    attention = torch.compiler.disable(attention)
    attention.memcompile = made  # type: ignore[attr-defined]
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return made
