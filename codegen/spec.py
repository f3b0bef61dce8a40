"""One kernel's specification: everything that a template may depend on, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..models.memory.parts import INDEX_FIELDS, SCORE_FIELDS, known

DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
PAGES = ("all", "listed", "unlisted")
OPS = ("append_index", "score_select", "attend", "combine")

# A score is a sum over terms: a function of the query, dotted with a field of the page's record.
#   same q · positive max(q, 0) · negative min(q, 0) · magnitude |q| · norm ‖q‖, a scalar
SCORE_TERMS: dict[str, tuple[tuple[str, str], ...]] = {
    "mean": (("same", "mean"),),
    "mean-std": (("same", "mean"), ("magnitude", "std")),
    "box": (("positive", "max"), ("negative", "min")),
    "ball": (("same", "mean"), ("norm", "radius")),
}

# The widest head that kernels are generated for: latent attention's 512 + 64.
LARGEST_DIM = 576


class NotCovered(ValueError):
    """No template covers this; the reference runs in its place, and the report says so."""


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel is generated for. Fields that an operation does not read keep their default.

    Attributes:
        op: the template family.
        dtype: element type of queries, pools and index records (log_count is always float32).
            combine: float32, what attend returns.
        key_dim, value_dim: widths of a key and a value.
        shared_kv: a value is the first `value_dim` elements of its key (latent attention); there
            is no value pool.
        group: query heads that share a KV head.
        page_size: slots a page holds; 1 where an index record is read as a key.
        span: tokens a slot stands for.
        pages: attend reads "all" pages of the table, the "listed", or the "unlisted" ones.
        bias: attend adds bias [P, page_size] to the logits, after softcap.
        softcap, window: whether the operation takes that argument.
        page_lse: attend also returns each page's part of the log-sum-exp.
        summaries: attend reads every full page that is not listed as one key, its record.
        page_logits: score_select also returns the product of each query with each page's mean key,
            which is what `summaries` need of the mean.
        fields: append_index writes these, in this order.
        score: the score of score_select, a key of SCORE_TERMS.
        count: reads that combine merges.
    """

    op: str
    dtype: str = "float32"
    key_dim: int = 0
    value_dim: int = 0
    shared_kv: bool = False
    group: int = 1
    page_size: int = 1
    span: int = 1
    pages: str = "all"
    bias: bool = False
    softcap: bool = False
    window: bool = False
    page_lse: bool = False
    summaries: bool = False
    page_logits: bool = False
    fields: tuple[str, ...] = ()
    score: str = ""
    count: int = 0

    def __post_init__(self) -> None:
        known("operation", self.op, OPS)
        known("dtype of a kernel", self.dtype, DTYPES)
        known("pages", self.pages, PAGES)
        for field in self.fields:
            known("index field", field, INDEX_FIELDS)
        if self.op == "score_select":
            known("score", self.score, SCORE_TERMS)
        for name in ("key_dim", "value_dim"):
            dim = getattr(self, name)
            if dim % 8 or not 0 <= dim <= LARGEST_DIM:
                raise NotCovered(
                    f"{self.op}: {name} {dim}; kernels cover multiples of 8 up to {LARGEST_DIM}"
                )
        if self.page_size & (self.page_size - 1) or not 1 <= self.page_size <= 1024:
            raise NotCovered(
                f"{self.op}: pages of {self.page_size} slots; kernels cover powers of two to 1024"
            )
        if self.shared_kv and self.value_dim > self.key_dim:
            raise NotCovered(
                f"{self.op}: values of {self.value_dim} cannot be part of keys of {self.key_dim}"
            )

    @cached_property
    def name(self) -> str:
        """A C identifier, unique to the spec: the name of the file, the kernel and its operator."""
        parts = [self.op, DTYPES[self.dtype]]
        if self.op != "combine":
            parts.append(f"k{self.key_dim}")
        if self.op != "score_select":
            parts.append(f"v{self.value_dim}")
        if self.shared_kv:
            parts.append("shared")
        if self.op in ("attend", "score_select"):
            parts.append(f"g{self.group}")
        if self.op != "combine":
            parts.append(f"p{self.page_size}")
        if self.op == "attend":
            parts += [f"span{self.span}"] if self.span != 1 else []
            parts += [self.pages] if self.pages != "all" else []
            flags = ("bias", "softcap", "window", "page_lse", "summaries")
            parts += [flag for flag in flags if getattr(self, flag)]
        parts += [self.score.replace("-", "_")] if self.score else []
        parts += ["page_logits"] if self.page_logits else []
        parts += self.fields
        parts += [f"x{self.count}"] if self.op == "combine" else []
        return "_".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def score_fields(self) -> tuple[str, ...]:
        """The index fields score_select reads, in the order of its arguments."""
        fields = SCORE_FIELDS[self.score]
        return fields if "mean" in fields or not self.page_logits else ("mean", *fields)

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """(type, name) of the operator's arguments, in order; types as in a torch schema."""
        if self.op == "append_index":
            value = () if self.shared_kv else ("value",)
            pools = () if self.shared_kv else ("value_pages",)
            written = ("key_pages", *pools, *(f"index_{field}" for field in self.fields))
            marks = (f"Tensor({chr(ord('a') + i)}!)" for i in range(len(written)))
            read = ("key", *value, "page_table", "position", "lengths")
            return (*(("Tensor", name) for name in read), *zip(marks, written, strict=True))
        if self.op == "score_select":
            records = (f"index_{field}" for field in self.score_fields)
            tensors = ("query", *records, "page_table", "position", "lengths")
            whole = ("sink_pages", "window_pages", "capacity", "budget_pages", "dense_below")
            return (*(("Tensor", name) for name in tensors), *(("int", name) for name in whole))
        if self.op == "attend":
            tensors = (
                *("query", "key_pages"),
                *(() if self.shared_kv else ("value_pages",)),
                *(("bias",) if self.bias else ()),
                "page_table",
                *(("pages",) if self.pages != "all" else ()),
                *(("page_logits", "page_values", "page_bias") if self.summaries else ()),
                *("position", "lengths"),
            )
            return (
                *(("Tensor", name) for name in tensors),
                ("float", "scale"),
                *((("float", "softcap"),) if self.softcap else ()),
                *((("int", "window"),) if self.window else ()),
            )
        names = [f"{kind}{i}" for i in range(self.count) for kind in ("out", "lse")]
        return tuple(("Tensor", name) for name in names)

    @property
    def returns(self) -> tuple[str, ...]:
        """Names of the results, all tensors."""
        if self.op == "append_index":
            return ()
        if self.op == "score_select":
            return ("pages", "page_logits") if self.page_logits else ("pages",)
        return ("out", "lse", "page_lse") if self.page_lse else ("out", "lse")

    @property
    def schema(self) -> str:
        """The operator's torch schema, without a namespace."""
        given = ", ".join(f"{kind} {name}" for kind, name in self.arguments)
        back = "Tensor" if len(self.returns) == 1 else ""
        back = back or f"({', '.join(f'Tensor {name}' for name in self.returns)})"
        return f"{self.name}({given}) -> {back}"

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their default, and the operation."""
        given: dict[str, Any] = {"op": self.op}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "op" and value != field.default:
                given[field.name] = list(value) if isinstance(value, tuple) else value
        return given

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelSpec:
        """Rebuilds a spec from `to_json`.

        Raises:
            ValueError: an unknown key; the known ones are listed.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name in data:
            known("key of a kernel spec", name, names)
        values: dict[str, Any]
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


def bind(op: str, args: Sequence[Any]) -> dict[str, Any]:
    """Names for the arguments of one call of a memory operation, index fields one by one.

    Args:
        op: name of the operation in `models.ops`, with its overload ("attend.page_lse").
        args: the call's arguments: tensors, graph nodes, or anything that stands for them.
    """
    known("memory operation", op, _SIGNATURES)
    if op == "combine":
        outs, lses = args
        pairs = {f"out{i}": out for i, out in enumerate(outs)}
        return pairs | {f"lse{i}": lse for i, lse in enumerate(lses)}
    given = dict(zip(_SIGNATURES[op].split(), args, strict=True))
    for field, record in zip(given.get("fields", ()), given.pop("index", ()), strict=True):
        given[f"index_{field}"] = record
    return given


_ATTEND = (
    "query key_pages value_pages bias page_table pages exclude position lengths "
    "scale softcap window span"
)
_SELECT = (
    "query index fields page_table position lengths score page_size sink_pages window_pages "
    "capacity budget_pages dense_below"
)
_SIGNATURES = {
    "append_index": "key value page_table position lengths key_pages value_pages index fields",
    "score_select": _SELECT,
    "score_select.page_logits": _SELECT,
    "attend": _ATTEND,
    "attend.page_lse": _ATTEND,
    "attend.summaries": (
        "query key_pages value_pages page_table pages page_logits page_values page_bias "
        "position lengths scale softcap"
    ),
    "combine": "outs lses",
}


def specialise(op: str, args: Sequence[Any]) -> tuple[KernelSpec, tuple[Any, ...]]:
    """The spec of one call of a memory operation, and the arguments its kernel takes.

    Args:
        op: name of the operation in `models.ops`, with its overload ("attend.page_lse").
        args: the call's arguments; of tensors (fake ones do) only shape, dtype and aliasing count.

    Raises:
        NotCovered: no template covers the call.
    """
    given = bind(op, args)
    if op == "append_index":
        keys, values = given["key_pages"], given["value_pages"]
        spec = KernelSpec(op, **_cache(keys, values), fields=tuple(given["fields"]))
        records = [given[f"index_{field}"] for field in spec.fields if field != "log_count"]
        _same_dtype(spec, keys, given["key"], given["value"], *records)
    elif op.startswith("score_select"):
        query = given["query"]
        spec = KernelSpec(
            "score_select",
            dtype=_dtype(query),
            key_dim=int(query.shape[3]),
            group=_group(query, given["page_table"]),
            page_size=int(given["page_size"]),
            score=given["score"],
            page_logits=op == "score_select.page_logits",
        )
        _same_dtype(spec, query, *(given[f"index_{field}"] for field in spec.score_fields))
    elif op == "combine":
        out = given["out0"]
        count = len(given) // 2
        spec = KernelSpec(op, dtype=_dtype(out), value_dim=int(out.shape[3]), count=count)
        if spec.dtype != "float32":
            raise NotCovered(f"combine: reads of {spec.dtype}; kernels merge float32")
    elif op == "attend.summaries":
        query, keys, values = (given[name] for name in ("query", "key_pages", "value_pages"))
        spec = KernelSpec(
            "attend",
            **_cache(keys, values),
            group=_group(query, given["page_table"]),
            pages="listed",
            softcap=bool(given["softcap"]),
            summaries=True,
        )
        _same_dtype(spec, keys, query, values, given["page_values"])
        for name in ("page_logits", "page_bias"):
            if given[name].dtype != torch.float32:
                raise NotCovered(f"attend: {name} of {given[name].dtype}; kernels read float32")
    else:
        query, keys, values = (given[name] for name in ("query", "key_pages", "value_pages"))
        listed = "unlisted" if given["exclude"] else "listed"
        spec = KernelSpec(
            "attend",
            **_cache(keys, values),
            group=_group(query, given["page_table"]),
            span=int(given["span"]),
            pages="all" if given["pages"] is None else listed,
            bias=given["bias"] is not None,
            softcap=bool(given["softcap"]),
            window=bool(given["window"]),
            page_lse=op == "attend.page_lse",
        )
        _same_dtype(spec, keys, query, values)
        if spec.bias and given["bias"].dtype != torch.float32:
            raise NotCovered(f"attend: bias of {given['bias'].dtype}; kernels read float32")
    return spec, tuple(given[name] for _, name in spec.arguments)


def _cache(keys: torch.Tensor, values: torch.Tensor) -> dict[str, Any]:
    shared = bool(torch._C._is_alias_of(keys, values))  # type: ignore[attr-defined]
    if shared and (keys.storage_offset() != values.storage_offset()):
        raise NotCovered("values share the keys' memory, but do not start where keys do")
    return {
        "dtype": _dtype(keys),
        "key_dim": int(keys.shape[2]),
        "value_dim": int(values.shape[2]),
        "page_size": int(keys.shape[1]),
        "shared_kv": shared,
    }


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise NotCovered(f"elements of {name}; kernels cover {', '.join(DTYPES)}")
    return name


def _same_dtype(spec: KernelSpec, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != spec.torch_dtype:
            raise NotCovered(
                f"{spec.op}: {tensor.dtype} beside {spec.torch_dtype}; kernels read one type"
            )


def _group(query: torch.Tensor, page_table: torch.Tensor) -> int:
    return int(query.shape[1]) // int(page_table.shape[1])
