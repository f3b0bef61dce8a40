"""A layer's state: its weights, the features of its queries and keys, and its join with the window.

The state is linear attention over what left the window (2006.16236), read in one softmax with it as
LoLCATs does (2410.10254): a feature product of query and key stands for the exponential of their
logit, so that the read has the log-sum-exp log(q.z) and merges like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .features import feature_map
from .spec import Memory

Weights = Mapping[str, Tensor]


def state_weights(memory: Memory, heads: int, kv_heads: int, key_dim: int) -> dict[str, Tensor]:
    """Weights of a state that nothing was fitted to, float32; the same ones at every call.

    Projections are the identity, as far as their width goes; gates stand open.

    Returns:
        query_map [H, Dk, r], key_map [Hkv, Dk, r]; normalised: mass [H], added to the state's
        log-sum-exp, and temper [H], factor of the window's, else mix [H], the logit of the state's
        share; decay "constant": decay [Hkv], "gate": gate_weight [Hkv, Dk] and gate_bias [Hkv],
        logits of what is kept; write "delta": beta_weight [Hkv, Dk] and beta_bias [Hkv], logits of
        the share that is written.
    """
    state = memory.state
    assert state is not None
    width = state.features or key_dim
    eye = torch.eye(key_dim, width)
    weights = {
        "query_map": eye.repeat(heads, 1, 1),
        "key_map": eye.repeat(kv_heads, 1, 1),
        "mass" if state.normalised else "mix": torch.zeros(heads),
    }
    if state.normalised:
        weights["temper"] = torch.ones(heads)
    if state.decay == "constant":
        # Half-lives from 22 tokens to thousands, head by head (RetNet's 1 - 2^(-5-h)).
        kept = 1 - 2.0 ** -(5 + torch.arange(kv_heads) % 8)
        weights["decay"] = kept.logit()
    if state.decay == "gate":
        weights["gate_weight"] = torch.zeros(kv_heads, key_dim)
        weights["gate_bias"] = torch.full((kv_heads,), 6.0)  # keeps 0.998
    if state.write == "delta":
        weights["beta_weight"] = torch.zeros(kv_heads, key_dim)
        weights["beta_bias"] = torch.zeros(kv_heads)
    return weights


def state_features(memory: Memory, key_dim: int) -> int:
    """Features m of a key in a state."""
    assert memory.state is not None
    return (memory.state.features or key_dim) * feature_map(memory.state.feature_map).width


class Mapped(NamedTuple):
    """What a state's recurrence takes: see `state_step` in `ops.py`."""

    query: Tensor
    key: Tensor
    decay: Tensor | None
    beta: Tensor | None


def mapped(
    name: str, weights: Weights, query: Tensor, key: Tensor, live: Tensor, scale: float
) -> Mapped:
    """Queries and keys as features, and the gates that a key sets.

    Args:
        name: of the feature map.
        weights: of `state_weights`; which there are says what the state does.
        query: [B, H, n, Dk]; key: [B, Hkv, n, Dk], those that enter the state with each row.
        live: bool [B, n], which rows have such a key; the others write nothing.
    """
    apply, root = feature_map(name).apply, scale**0.5
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    queries, keys = (
        # Products of two roots of the scale are logits, for any map.
        apply((x.to(wide) * root) @ weights[side].to(wide))
        for x, side in ((query, "query_map"), (key, "key_map"))
    )
    here = live[:, None, :]

    def logit(kind: str) -> Tensor:  # [B, Hkv, n]
        weight, bias = weights[f"{kind}_weight"].to(wide), weights[f"{kind}_bias"].to(wide)
        return (key.to(wide) * weight[:, None]).sum(-1) + bias[:, None]

    decay = beta = None
    if "decay" in weights:
        decay = torch.nn.functional.logsigmoid(weights["decay"].to(wide))
    elif "gate_weight" in weights:
        decay = torch.nn.functional.logsigmoid(logit("gate")).masked_fill(~here, 0)
    if "beta_weight" in weights:
        beta = torch.sigmoid(logit("beta")).masked_fill(~here, 0)
        # A write of a key of length one replaces what the state answers to it, and no more.
        keys = torch.nn.functional.normalize(keys, dim=-1)
    keys = keys.masked_fill(~here[..., None], 0)
    return Mapped(queries.to(dtype), keys.to(dtype), decay, beta)


def joined(weights: Weights, window: Tensor, lse: Tensor, out: Tensor, state_lse: Tensor) -> Tensor:
    """Window and state, each with its log-sum-exp, as one result [B, H, n, Dv]."""
    if "mass" in weights:
        # exp(a) / (exp(a) + exp(b)); rows of padding have neither, and give zero. Logits of sharp
        # heads spread over hundreds, features cannot follow: they learn to temper the window.
        mass, temper = (weights[name].to(lse.dtype)[:, None] for name in ("mass", "temper"))
        share = torch.sigmoid(state_lse + mass - temper * lse)
        share = share.masked_fill(lse == float("-inf"), 0)
    else:
        share = torch.sigmoid(weights["mix"].to(lse.dtype))[:, None].expand_as(lse)
    share = share[..., None]
    return window * (1 - share) + out * share


class Reads(NamedTuple):
    """Window and state, each with its log-sum-exp [B, H, n], in the order `joined` takes them."""

    window: Tensor
    lse: Tensor
    out: Tensor
    state_lse: Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Memory,
    weights: Weights,
    scale: float,
    softcap: float = 0.0,
    ops: tuple[Any, Any] | None = None,
) -> Tensor:
    """A whole sequence through window and state at once; differentiable in everything.

    Args:
        query: [B, H, n, Dk]; key, value: [B, Hkv, n, Dk], [B, Hkv, n, Dv].
        ops: forward and backward of the chunked recurrence; None: those of `ops.py`.

    Returns:
        [B, H, n, Dv] in the wide type.
    """
    return joined(weights, *reads(query, key, value, memory, weights, scale, softcap, ops))


def reads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Memory,
    weights: Weights,
    scale: float,
    softcap: float = 0.0,
    ops: tuple[Any, Any] | None = None,
) -> Reads:
    """Both parts of `attention`, of the same arguments."""
    from .recurrent import StateRead

    assert memory.state is not None
    window, (batch, _, n, _) = memory.own_window, key.shape
    near, lse = _windowed(query, key, value, window, scale, softcap)
    older = torch.nn.functional.pad(key, (0, 0, window, 0))[:, :, :n]
    older_value = torch.nn.functional.pad(value, (0, 0, window, 0))[:, :, :n]
    live = (torch.arange(n, device=query.device) >= window).expand(batch, n)
    feats = mapped(memory.state.feature_map, weights, query, older, live, scale)
    lengths = torch.full((batch,), n, dtype=torch.int32, device=query.device)
    if ops is None:
        chunk = torch.ops.memcompile.state_chunk
        ops = (chunk.default, chunk.backward)
    far = StateRead.apply(  # type: ignore[no-untyped-call]
        feats.query, feats.key, older_value, feats.decay, feats.beta, lengths,
        memory.state.normalised, *ops,
    )  # fmt: skip
    return Reads(near, lse, *far)


def _windowed(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Each row with its `window` keys: out [B, H, n, Dv] and log-sum-exp [B, H, n], wide.

    Blocks of `window` rows see their own keys and those of the block before.
    """
    n, group = query.shape[2], query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    count = -(-n // window)
    end = count * window - n

    def blocks(x: Tensor, before: int) -> Tensor:  # [B, H, count, before + window, D]
        padded = torch.nn.functional.pad(x.to(wide), (0, 0, before, end))
        return padded.unfold(2, before + window, window).transpose(-1, -2)

    keys, values = (blocks(x.repeat_interleave(group, 1), window) for x in (key, value))
    logits = scale * blocks(query, 0) @ keys.transpose(-1, -2)  # [B, H, count, window, 2 window]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    row = torch.arange(window, device=query.device)[:, None]
    at = torch.arange(2 * window, device=query.device)
    seen = (at > row) & (at <= row + window)
    seen = seen & ((at >= window) | (torch.arange(count, device=at.device)[:, None, None] > 0))
    logits = logits.masked_fill(~seen, float("-inf"))
    out, lse = logits.softmax(-1) @ values, logits.logsumexp(-1)
    return out.flatten(2, 3)[:, :, :n], lse.flatten(2, 3)[:, :, :n]
