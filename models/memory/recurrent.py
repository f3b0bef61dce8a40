"""Plain PyTorch references of a fixed-size state: row by row, by chunks, and their gradients.

With e^g the decay of a row and S [m, Dv] the state of a KV head, row after row,

    additive   S <- e^g S + k v^T                           (2006.16236; z <- e^g z + k)
    delta      S <- e^g S + beta k (v - (e^g S)^T k)^T      (2102.11174, 2412.06464)
    read       num = S^T q,  den = z . q                    (after the row's own write)

A delta write is an additive write of u = beta (v - (e^g S)^T k). Within a chunk that starts at S0,
with c_i the sum of its log-decays up to row i, the rows u solve a unit lower triangular system,

    (I + L) U = diag(beta) V - W S0,   L_ij = beta_i e^(c_i - c_j) k_i . k_j  (j < i),

of which the part without S0 is solved for all chunks at once: the UT transform of 2406.06484.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .paged import NEGATIVE_INFINITY, rows_by_kv_head, wide

CHUNK = 64  # rows


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Query [B,Hkv,n,G,m], key, value, decay and beta [B,Hkv,n] in the summing type, and which
    rows [B,n] are live. Padding rows are zeros throughout: they write nothing and do not decay."""
    dtype, heads = wide(query.dtype), key.shape[1]
    live = torch.arange(query.shape[2], device=query.device) < lengths[:, None]
    at = live[:, None]  # [B,1,n]

    def of_live(x: Tensor, visible: Tensor) -> Tensor:
        return torch.where(visible, x.to(dtype), 0)

    q = of_live(rows_by_kv_head(query, heads), at[..., None, None])
    k, v = (of_live(x, at[..., None]) for x in (key, value))
    if decay is None:
        g = torch.zeros_like(k[..., 0])
    else:
        g = of_live(decay[:, None] if decay.dim() == 1 else decay, at).expand(k.shape[:3])
    return q, k, v, g, None if beta is None else of_live(beta, at), live


def _divided(num: Tensor, den: Tensor | None, live: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of sums [B,Hkv,n,G,Dv] and [B,Hkv,n,G]."""
    if den is None:
        lse = torch.where(live[:, None, :, None], 0.0, NEGATIVE_INFINITY).to(num.dtype)
        lse = lse.expand(num.shape[:-1])
    else:
        seen = den > 0
        safe = torch.where(seen, den, 1)
        num = torch.where(seen[..., None], num / safe[..., None], 0)
        lse = torch.where(seen, safe.log(), NEGATIVE_INFINITY)
    out, lse = (_dense(x.transpose(2, 3).flatten(1, 2)) for x in (num, lse))
    return out, lse


def _dense(x: Tensor) -> Tensor:
    """A copy whose strides follow from its shape, also those of axes of one."""
    return x.clone(memory_format=torch.contiguous_format)


def _check(beta: Tensor | None, norm: Tensor | None) -> None:
    if beta is not None and norm is not None:
        raise ValueError(
            "a delta-rule state has no normaliser: given both beta and norm; expected one of them"
        )


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor,
    state: Tensor,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`state_step`, as it is defined: one row after the other."""
    _check(beta, norm)
    # State carries no gradient: it would chain every step of an engine to the first.
    inputs = (query, key, value, decay, beta, lengths)
    given: list[Any] = [None if x is None else x.detach() for x in inputs]
    q, k, v, g, b, live = _inputs(*given)
    num, den = q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1])
    for i in range(q.shape[2]):
        state *= g[:, :, i, None, None].exp()
        write = v[:, :, i]
        if b is not None:
            held = torch.einsum("bhmd,bhm->bhd", state, k[:, :, i])
            write = b[:, :, i, None] * (write - held)
        state += k[:, :, i, :, None] * write[:, :, None]
        num[:, :, i] = q[:, :, i] @ state
        if norm is not None:
            norm *= g[:, :, i, None].exp()
            norm += k[:, :, i]
            den[:, :, i] = torch.einsum("bhgm,bhm->bhg", q[:, :, i], norm)
    return _divided(num, None if norm is None else den, live)


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor,
    state: Tensor,
    norm: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, a chunk of rows at a time; differentiable with respect to everything.

    Args:
        query, ..., lengths: as `state_chunk` takes them.
        state: [B, Hkv, m, Dv], before the call.
        norm: [B, Hkv, m], before the call; a delta-rule state passes zeros and ignores `den`.

    Returns:
        num [B, Hkv, n, G, Dv], den [B, Hkv, n, G], and state and norm after the call, all float32
        (float64 for float64 queries).
    """
    q, k, v, g, b, _ = _inputs(query, key, value, decay, beta, lengths)
    n = q.shape[2]
    count = max(1, -(-n // chunk))
    padding = count * chunk - n

    def cut(x: Tensor) -> Tensor:  # [B,Hkv,n,...] -> [B,Hkv,count,chunk,...]
        rest = x.new_zeros((*x.shape[:2], padding, *x.shape[3:]))
        chunks: Tensor = torch.cat([x, rest], 2).unflatten(2, (count, chunk))
        return chunks

    q, k, v, g = map(cut, (q, k, v, g))
    # Sums over j+1 .. i for each pair, not differences of sums: a decay to nothing stays exact.
    below = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril(-1)
    spans = torch.where(below, g[..., None], 0).cumsum(-2)
    reach = torch.where(below | below.new_ones(chunk).diag(), spans.exp(), 0)  # e^(c_i - c_j)
    since = g.cumsum(-1).exp()  # e^c_i, from the chunk's start
    until = reach[..., -1, :]  # e^(c_C - c_j), to its end
    whole = since[..., -1]
    solved = None
    if b is not None:
        b = cut(b)[..., None]
        lower = b * torch.where(below, reach * (k @ k.mT), 0)
        right = torch.cat([b * v, b * since[..., None] * k], -1)
        solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
        v = solved[..., : v.shape[-1]]
    starts, norms, writes = [], [], []
    for c in range(count):
        starts.append(state)
        norms.append(norm)
        write = v[:, :, c]
        if solved is not None:
            write = write - solved[:, :, c, :, v.shape[-1] :] @ state
        writes.append(write)
        kept = until[:, :, c, :, None] * k[:, :, c]
        state = whole[:, :, c, None, None] * state + kept.mT @ write
        norm = whole[:, :, c, None] * norm + kept.sum(-2)
    v, before, before_norm = (torch.stack(x, 2) for x in (writes, starts, norms))
    scores = torch.einsum("bhcigm,bhcjm->bhcigj", q, k) * reach[..., None, :]
    faded = q * since[..., None, None]
    num = torch.einsum("bhcigj,bhcjd->bhcigd", scores, v)
    num = num + torch.einsum("bhcigm,bhcmd->bhcigd", faded, before)
    den = scores.sum(-1) + torch.einsum("bhcigm,bhcm->bhcig", faded, before_norm)
    return num.flatten(2, 3)[:, :, :n], den.flatten(2, 3)[:, :, :n], state, norm


def chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor,
    state: Tensor,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`state_chunk`: `chunked`, whose state is written back."""
    _check(beta, norm)
    live = torch.arange(query.shape[2], device=query.device) < lengths[:, None]
    start = state.new_zeros(state.shape[:3]) if norm is None else norm
    with torch.no_grad():  # state carries no gradient
        num, den, end, end_norm = chunked(query, key, value, decay, beta, lengths, state, start)
        state.copy_(end)
        if norm is None:
            return _divided(num, None, live)
        norm.copy_(end_norm)
        return _divided(num, den, live)


def chunk_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor,
    grad_num: Tensor,
    grad_den: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`state_chunk.backward`: gradients of `chunked` from a zero state, found by autograd."""
    dtype, heads = wide(query.dtype), key.shape[1]
    inputs = (query, key, value, decay, beta)
    given: list[Any]
    given = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    state = query.new_zeros((*key.shape[:2], key.shape[3], value.shape[3]), dtype=dtype)
    # An operator runs below the dispatcher's autograd layer, where nothing would be recorded.
    layers = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(layer, False))
        stack.enter_context(torch.enable_grad())
        num, den, _, _ = chunked(*[*given, lengths, state, state[..., 0]])
        live = torch.arange(query.shape[2], device=query.device) < lengths[:, None]
        given_rows = torch.where(
            live[:, None, :, None, None], rows_by_kv_head(grad_num.to(dtype), heads), 0
        )
        total = (num * given_rows).sum()
        if grad_den is not None:
            rows = grad_den.to(dtype).unflatten(1, (heads, -1)).transpose(2, 3)
            total = total + (den * torch.where(live[:, None, :, None], rows, 0)).sum()
        wanted = [x for x in given if x is not None]
        found = iter(torch.autograd.grad(total, wanted, materialize_grads=True))
    grads = [query.new_empty(0, dtype=dtype) if x is None else next(found) for x in given]
    return tuple(map(_dense, grads))  # type: ignore[return-value]


class StateRead(torch.autograd.Function):
    """A whole sequence read through a state that starts empty, with gradients.

    StateRead.apply(query, key, value, decay, beta, lengths, normalised, forward_op, backward_op)
        -> (out [B, H, n, Dv], lse [B, H, n])

    Arguments as for `state_chunk`; `forward_op` has its signature and `backward_op` that of
    `state_chunk.backward` (the operators of `models.ops`, or generated kernels). Once
    differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        lengths: Tensor,
        normalised: bool,
        forward_op: Callable[..., tuple[Tensor, Tensor]],
        backward_op: Callable[..., tuple[Tensor, ...]],
    ) -> tuple[Tensor, Tensor]:
        size = (*key.shape[:2], key.shape[3], value.shape[3])
        state = key.new_zeros(size, dtype=wide(key.dtype))
        norm = state.new_zeros(size[:3]) if normalised else None
        out, lse = forward_op(query, key, value, decay, beta, lengths, state, norm)
        kept = (out, lse) if normalised else (None, None)
        ctx.save_for_backward(query, key, value, decay, beta, lengths, *kept)
        ctx.backward_op = backward_op
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        *inputs, lengths, out, lse = ctx.saved_tensors
        grad_num, grad_den = grad_out, None
        if lse is not None:  # out = num / den, lse = log den
            inverse = torch.where(lse > NEGATIVE_INFINITY, (-lse).exp(), 0)
            grad_num = grad_out * inverse[..., None]
            grad_den = (grad_lse - (grad_out * out).sum(-1)) * inverse
        grads = ctx.backward_op(*inputs, lengths, grad_num.contiguous(), grad_den)
        back = (
            None if x is None else grad.to(x.dtype) for x, grad in zip(inputs, grads, strict=True)
        )
        return (*back, None, None, None, None)
