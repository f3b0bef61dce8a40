"""What a state's prefill is held against: chunked PyTorch, compiled, and onnxruntime's operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Prefill = Callable[[], Any]


def chunked(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, chunk: int, folded: bool
) -> Tensor:
    """An additive state from zeros, a chunk of rows at a time, in batched matrix products.

    Args:
        query [B, H, n, m], key [B, Hkv, n, m], value [B, Hkv, n, Dv]: n a multiple of `chunk`.
            Products are of their type, the state between chunks is float32.
        decay: log-decay, float32 [B, Hkv, n].
        folded: query heads of a group are rows of one product; else keys are broadcast to them.

    Returns:
        [B, H, n, Dv].
    """
    (batch, heads, rows, width), kv_heads, dtype = query.shape, key.shape[1], query.dtype
    group, count = heads // kv_heads, rows // chunk
    q = query.view(batch, kv_heads, group, count, chunk, width)
    k, v = (x.view(batch, kv_heads, count, chunk, x.shape[3]) for x in (key, value))
    below = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    if decay is None:
        reach, faded, kept = below.to(dtype), q, k
        added = (kept.mT @ v).float()
        before = added.cumsum(2) - added
    else:
        summed = decay.view(batch, kv_heads, count, chunk).cumsum(-1)
        spans = summed[..., :, None] - summed[..., None, :]
        reach = spans.masked_fill(~below, -torch.inf).exp()[:, :, None]
        faded = (q * summed.exp()[:, :, None, ..., None]).to(dtype)
        kept = (k * (summed[..., -1:] - summed).exp()[..., None]).to(dtype)
        added = (kept.mT @ v).float()
        # Each chunk's start from all that was added before, in one product over chunks.
        total = summed[..., -1].cumsum(-1)
        earlier = torch.ones(count, count, dtype=torch.bool).tril(-1)
        shifted = torch.cat([torch.zeros_like(total[..., :1]), total[..., :-1]], -1)
        left = (shifted[..., :, None] - total[..., None, :]).masked_fill(~earlier, -torch.inf)
        before = (left.exp() @ added.flatten(3)).view_as(added)
    before = before.to(dtype)
    if not folded:
        k, v, before = k[:, :, None], v[:, :, None], before[:, :, None]
        scores = ((q @ k.mT) * reach).to(dtype)
        out: Tensor = scores @ v + faded @ before
        return out.view(batch, heads, rows, -1)

    def fold(x: Tensor) -> Tensor:  # [.., group, count, chunk, d] -> [.., count, group * chunk, d]
        rows: Tensor = x.transpose(2, 3).flatten(3, 4)
        return rows

    scores = (fold(q) @ k.mT).unflatten(3, (group, chunk))
    scores = (scores * (reach if decay is None else reach.transpose(2, 3))).to(dtype)
    out = scores.flatten(3, 4) @ v + fold(faded) @ before
    out = out.unflatten(3, (group, chunk)).transpose(2, 3)
    return out.reshape(batch, heads, rows, -1)


def compiled(given: dict[str, Any], chunk: int, folded: bool, backend: str) -> Prefill:
    """`chunked` on these inputs, compiled for their shapes by that backend of torch.compile."""

    def form(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None) -> Tensor:
        return chunked(query, key, value, decay, chunk, folded)

    names = ("query", "key", "value", "decay")
    # One function of many shapes: each is compiled for itself.
    made = torch.compile(form, dynamic=False, backend=backend)
    call = partial(made, *(given[name] for name in names))
    with torch._dynamo.config.patch(recompile_limit=64):
        call()
    return call


def onnxruntime(given: dict[str, Any]) -> Prefill:
    """onnxruntime's `LinearAttention` (com.microsoft) on these inputs, in torch's threads.

    In float32, the one type that its CPU kernel takes: 16-bit inputs are widened, outside of the
    time.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: this onnxruntime does not run it; what it says.
    """
    import onnx
    import onnxruntime as ort

    batch, heads, rows, _ = given["query"].shape
    kv_heads = given["key"].shape[1]
    tensors = {name: given[name] for name in ("query", "key", "value", "decay") if name in given}
    packed = {
        # [B, heads, n, D] -> [B, n, heads * D]; a gate has one element a head
        name: tensor.view(batch, -1, rows, tensor.shape[3] if tensor.dim() == 4 else 1)
        .transpose(1, 2)
        .flatten(2)
        .contiguous()
        .float()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = ["query", "key", "value", "", *(["decay"] if "decay" in packed else [])]
    node = make.make_node(
        "LinearAttention",
        names,
        ["out", "state"],
        domain="com.microsoft",
        update_rule="gated" if "decay" in packed else "linear",
        q_num_heads=heads,
        kv_num_heads=kv_heads,
        scale=1.0,
    )
    graph = make.make_graph(
        [node],
        "prefill",
        [make.make_tensor_value_info(name, kind, x.shape) for name, x in packed.items()],
        [make.make_tensor_value_info(name, kind, None) for name in ("out", "state")],
    )
    domains = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=domains, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads that spin would slow whoever has the next turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no base of their own
        raise ValueError(str(error).splitlines()[0]) from error
    values = {n: ort.OrtValue.ortvalue_from_numpy(x.numpy()) for n, x in packed.items()}
    return partial(session.run_with_ort_values, ["out", "state"], values)
