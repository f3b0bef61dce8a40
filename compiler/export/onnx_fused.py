"""onnxruntime's own fused operators in place of memory nodes: attention and recurrent states.

Each function gives what an operator of `models.portable` gives, in nodes of the domain
`com.microsoft` and what standard operators have to do around them. They are called while a graph is
exported, with `onnx_ir` values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .onnx_model import Translation

MICROSOFT = "com.microsoft"
FLOAT, INT32, INT64 = 1, 6, 7
LOWEST = float("-inf")


def grouped_attention(
    query: Any,
    key: Any,
    value: Any,
    position: Any,
    lengths: Any,
    keys: Any,
    values: Any,
    scale: float,
    softcap: float,
    window: int,
    size: int,
    pinned: int,
    reach: int,
) -> Sequence[Any]:
    """`GroupQueryAttention`: appends and reads; past and present may share their memory.

    The rows of padding are named to it, so that ragged chunks of several sequences are one call. A
    cache of fixed size is kept in its own order, which evicts what no later row of the window sees.
    """
    from onnxscript import opset18 as op

    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
    total = op.Add(position, lengths)
    one = op.Constant(value_int=1)
    held = op.Max(total, op.Cast(one, to=INT32))  # a sequence that holds nothing yet stands still
    rows = op.Cast(_rows(query), to=INT32)
    longest = op.Max(op.ReduceMax(held, keepdims=0), rows)
    attributes = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(scale),
        **({"softcap": float(softcap)} if softcap else {}),
        **({"local_window_size": window} if window else {}),
        **({"sliding_window_cache": 1} if pinned >= 0 else {}),
    }
    out, new_keys, new_values = _microsoft(
        "GroupQueryAttention",
        [
            *(_packed(x, x.shape[1], width) for x in (query, key, value)),
            *(keys, values, op.Sub(held, op.Cast(one, to=INT32)), longest),
            *[None] * 9,
            lengths,
        ],
        attributes,
        3,
    )
    return _float(_unpacked(out, heads, width)), new_keys, new_values


def listed_attention(
    query: Any,
    key: Any,
    value: Any,
    pages: Any,
    position: Any,
    lengths: Any,
    keys: Any,
    values: Any,
    scale: float,
    size: int,
) -> Any:
    """`DynamicSparseAttention`, of the CUDA provider: reads the tokens of listed pages.

    It reads one list for all heads of a sequence; each KV head is a sequence to it. The cache, into
    which the new rows were put before, is what it calls auxiliary, and only reads. What it appends
    to is the call's own rows, of which each sees itself; the list holds tokens before that.

    Arguments and result are those of `models.contiguous.fused.listed_attention`.
    """
    from onnxscript import opset18 as op

    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
    group = heads // kv_heads

    def apart(x: Any, count: int) -> Any:  # [B, Hkv * count, n, D] -> [B * Hkv, count, n, D]
        return op.Reshape(x, op.Constant(value_ints=[-1, count, 0, width]))

    rows = _rows(query)
    row = op.Range(op.Constant(value_int=0), rows, op.Constant(value_int=1))
    own = op.Add(op.Unsqueeze(op.Cast(position, to=INT64), op.Constant(value_ints=[1])), row)
    own = op.Unsqueeze(own, op.Constant(value_ints=[1, 3, 4]))  # [B, 1, n, 1, 1]
    first = op.Mul(op.Unsqueeze(pages, op.Constant(value_ints=[-1])), op.Constant(value_int=size))
    token = op.Add(first, op.Constant(value_ints=[*range(size)]))  # [B, Hkv, n, S, size]
    # Pages that are none have tokens below zero.
    there = op.And(op.Less(token, own), op.GreaterOrEqual(token, op.Constant(value_int=0)))
    listed = op.Cast(op.Where(there, token, op.Constant(value_int=-1)), to=INT32)
    flat = op.Constant(value_ints=[-1, pages.shape[3] * size])  # [B * Hkv * n, S * size]
    number = op.Reshape(op.Cast(there, to=INT32), flat)
    packed = _packed(apart(query, group), group, width)
    last = op.Cast(op.Sub(rows, op.Constant(value_int=1)), to=INT32)
    (out,) = _microsoft(
        "DynamicSparseAttention",
        [
            *(packed, *(_packed(apart(x, 1), 1, width) for x in (key, value))),
            *(None, None, *(apart(x, 1) for x in (keys, values))),
            op.Reshape(listed, flat),
            op.ReduceSum(number, op.Constant(value_ints=[1]), keepdims=0),
            op.Expand(last, op.Shape(packed, start=0, end=1)),
            op.Cast(rows, to=INT32),
        ],
        {
            "num_heads": group,
            "kv_num_heads": 1,
            "scale": float(scale),
            "attention_mode": "local_plus_selected",
            "selected_kv_source": "auxiliary",
            "local_window_size": 1,
        },
        1,
    )
    whole = op.Reshape(_unpacked(out, group, width), op.Constant(value_ints=[-1, heads, 0, width]))
    return _float(whole)


def additive_state(
    query: Any,
    key: Any,
    value: Any,
    decay: Any,
    lengths: Any,
    state: Any,
    norm: Any,
) -> Sequence[Any]:
    """`LinearAttention` without the delta rule. What a normalised read divides by comes with it:
    the norm is the column of a state whose values are one."""
    from onnxscript import opset18 as op

    width, rule = value.shape[3], "linear" if decay is None else "gated"
    if norm is None:
        out, new = _linear_attention(rule, query, key, value, width, decay, None, lengths, state)
        return out, _no_lse(out, lengths), new
    last = op.Constant(value_ints=[-1])
    ones = op.Expand(
        op.Constant(value_float=1.0),
        op.Concat(op.Shape(value, start=0, end=3), op.Constant(value_ints=[1]), axis=0),
    )
    whole, grown = _linear_attention(
        *(rule, query, key, op.Concat(_float(value), ones, axis=-1), width + 1, decay, None),
        *(lengths, op.Concat(state, op.Unsqueeze(norm, last), axis=-1)),
    )
    parts = op.Constant(value_ints=[width, 1])
    num, den = _split(whole, parts)
    new, new_norm = _split(grown, parts)
    some = op.Greater(den, op.Constant(value_float=0.0))
    safe = op.Where(some, den, op.Constant(value_float=1.0))
    out = op.Where(some, op.Div(num, safe), op.Constant(value_float=0.0))
    lse = op.Where(some, op.Log(safe), op.Constant(value_float=LOWEST))
    return out, op.Squeeze(lse, last), new, op.Squeeze(new_norm, last)


def delta_state(
    query: Any,
    key: Any,
    value: Any,
    decay: Any,
    beta: Any,
    lengths: Any,
    state: Any,
) -> Sequence[Any]:
    """`LinearAttention` with the delta rule."""
    rule = "delta" if decay is None else "gated_delta"
    width = value.shape[3]
    out, new = _linear_attention(rule, query, key, value, width, decay, beta, lengths, state)
    return out, _no_lse(out, lengths), new


TRANSLATIONS: Mapping[str, Translation] = {
    "grouped_attention": grouped_attention,
    "listed_attention": listed_attention,
    "additive_state": additive_state,
    "delta_state": delta_state,
}


def _linear_attention(
    rule: str,
    query: Any,
    key: Any,
    value: Any,
    width: int,
    decay: Any,
    beta: Any,
    lengths: Any,
    state: Any,
) -> tuple[Any, Any]:
    """out [B, H, n, width] and the state after it, both float32. Rows of padding write nothing."""
    from onnxscript import opset18 as op

    heads, kv_heads = query.shape[1], key.shape[1]
    live = op.Unsqueeze(_live(key, lengths), op.Constant(value_ints=[2]))  # [B, n, 1]
    nothing = op.Constant(value_float=0.0)

    def gate(given: Any) -> Any:  # [B, n, Hkv]
        if given is None:
            return None
        # A decay of each head is the same for all rows.
        rows = given if len(given.shape) == 1 else op.Transpose(given, perm=[0, 2, 1])
        return op.Where(live, rows, nothing)

    out, new = _microsoft(
        "LinearAttention",
        [
            _float(_packed(query, heads, query.shape[3])),
            op.Where(live, _float(_packed(key, kv_heads, key.shape[3])), nothing),
            _float(_packed(value, kv_heads, width)),
            *(state, gate(decay), gate(beta)),
        ],
        {"q_num_heads": heads, "kv_num_heads": kv_heads, "update_rule": rule, "scale": 1.0},
        2,
    )
    return _unpacked(out, heads, width), new


def _rows(x: Any) -> Any:
    """How many rows [B, H, n, D] has: n, int64."""
    from onnxscript import opset18 as op

    return op.Squeeze(op.Shape(x, start=2, end=3))


def _live(rows: Any, lengths: Any) -> Any:
    """Which of the rows [B, H, n, D] are valid: bool [B, n]."""
    from onnxscript import opset18 as op

    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    row = op.Cast(op.Range(zero, _rows(rows), one), to=INT32)
    return op.Less(row, op.Unsqueeze(lengths, op.Constant(value_ints=[1])))


def _no_lse(out: Any, lengths: Any) -> Any:
    """The log-sum-exp [B, H, n] of a read without a normaliser: 0, and nothing for padding."""
    from onnxscript import opset18 as op

    live = op.Unsqueeze(_live(out, lengths), op.Constant(value_ints=[1]))
    lse = op.Where(live, op.Constant(value_float=0.0), op.Constant(value_float=LOWEST))
    return op.Expand(lse, op.Shape(out, start=0, end=3))


def _packed(x: Any, heads: int, width: int) -> Any:
    """[B, H, n, D] -> [B, n, H * D]."""
    from onnxscript import opset18 as op

    rows = op.Transpose(x, perm=[0, 2, 1, 3])
    return op.Reshape(rows, op.Constant(value_ints=[0, 0, heads * width]))


def _unpacked(x: Any, heads: int, width: int) -> Any:
    """[B, n, H * D] -> [B, H, n, D]."""
    from onnxscript import opset18 as op

    rows = op.Reshape(x, op.Constant(value_ints=[0, 0, heads, width]))
    return op.Transpose(rows, perm=[0, 2, 1, 3])


def _float(x: Any) -> Any:
    """In the type that memory operations sum in; a cast to a value's own type is dropped later."""
    from onnxscript import opset18 as op

    return op.Cast(x, to=FLOAT)


def _split(x: Any, parts: Any) -> Sequence[Any]:
    return _emit("", "Split", [x, parts], {"axis": -1}, 2)


def _microsoft(kind: str, inputs: Sequence[Any], attributes: dict[str, Any], outputs: int) -> Any:
    return _emit(MICROSOFT, kind, inputs, attributes, outputs)


def _emit(
    domain: str, kind: str, inputs: Sequence[Any], attributes: dict[str, Any], outputs: int
) -> Sequence[Any]:
    """A node that onnxscript has no function for."""
    import onnx_ir as ir
    from onnxscript import evaluator

    given = ir.convenience.convert_attributes(attributes)
    node = ir.Node(domain, kind, list(inputs), given, num_outputs=outputs)
    evaluator.default().nodes.append(node)
    made: Sequence[Any] = node.outputs
    return made
