"""One kernel's specification: everything that a template may depend on, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..models.memory.names import known
from ..models.memory.parts import INDEX_FIELDS, SCORE_FIELDS

DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
PAGES = ("all", "listed", "unlisted")
OPS = ("append_index", "score_select", "attend", "combine", "state_step", "state_chunk")
STATE_OPS = ("state_step", "state_chunk")
DECAYS = ("", "constant", "gate")

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
# The largest group of query heads that gradients of a state are generated for: a chunk's rows of
# all of them are held at once.
LARGEST_TRAINED_GROUP = 16


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
        by_slot: pages may begin at any slot of the pools, and their number is that slot's; pools
            are views whose pages overlap. attend only.
        pages: attend reads "all" pages of the table, the "listed", or the "unlisted" ones.
        bias: attend adds bias [P, page_size] to the logits, after softcap.
        softcap, window: whether the operation takes that argument.
        page_lse: attend also returns each page's part of the log-sum-exp.
        summaries: attend reads every full page that is not listed as one key, its record.
        page_logits: score_select also returns the product of each query with each page's mean key,
            which is what `summaries` need of the mean.
        fields: append_index writes these, in this order.
        record_table: append_index writes records to rows of a table of their own.
        fold: append_index writes records of groups, from their children's; no token.
        score: the score of score_select, a key of SCORE_TERMS.
        among: score_select chooses from each row's list of candidates.
        count: reads that combine merges.
        decay: the log-decay of a state: none (""), a "constant" of each KV head, or a "gate" of
            each row.
        delta: a state is written by the delta rule.
        normalised: a state has a normaliser, and reads are divided by it.
        backward: state_chunk returns gradients.
        contiguous: there is no page table: page p of a KV head is the p-th of that head's own
            pages. attend and score_select, as plug-ins of other runtimes.
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
    record_table: bool = False
    fold: bool = False
    among: bool = False
    count: int = 0
    decay: str = ""
    delta: bool = False
    normalised: bool = False
    backward: bool = False
    by_slot: bool = False
    contiguous: bool = False

    def __post_init__(self) -> None:
        known("operation", self.op, OPS)
        known("dtype of a kernel", self.dtype, DTYPES)
        known("pages", self.pages, PAGES)
        known("decay of a state", self.decay, DECAYS)
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
        if self.op == "score_select":  # which only divides by it: a record may stand for any number
            if not 1 <= self.page_size <= 1 << 20:
                raise NotCovered(
                    f"{self.op}: pages of {self.page_size} tokens; kernels cover up to 2^20"
                )
        elif self.page_size & (self.page_size - 1) or not 1 <= self.page_size <= 1024:
            raise NotCovered(
                f"{self.op}: pages of {self.page_size} slots; kernels cover powers of two to 1024"
            )
        if self.fold and "mean" not in self.fields and {"std", "radius"} & {*self.fields}:
            raise NotCovered(f"{self.op}: {', '.join(self.fields)} are not folded without the mean")
        if self.shared_kv and self.value_dim > self.key_dim:
            raise NotCovered(
                f"{self.op}: values of {self.value_dim} cannot be part of keys of {self.key_dim}"
            )
        if self.by_slot and (self.op != "attend" or self.bias or self.summaries):
            raise NotCovered(
                f"{self.op}: pages that begin at every slot are read by attend alone, and have "
                "neither a bias nor records of the same number"
            )
        if self.contiguous and (self.op not in ("attend", "score_select") or self.by_slot):
            raise NotCovered(f"{self.op}: this operation reads a page table")
        if self.delta and self.normalised:
            raise NotCovered(f"{self.op}: a delta-rule state has no normaliser; give norm None")
        if self.delta and self.backward:
            raise NotCovered(f"{self.op}: gradients of the delta rule are the reference's")
        if self.backward and self.group > LARGEST_TRAINED_GROUP:
            raise NotCovered(
                f"{self.op}: gradients of {self.group} query heads a KV head; "
                f"kernels cover up to {LARGEST_TRAINED_GROUP}"
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
        if self.op in ("attend", "score_select", *STATE_OPS):
            parts.append(f"g{self.group}")
        if self.op not in ("combine", *STATE_OPS) and not self.fold:
            parts.append(f"p{self.page_size}")
        if self.op == "attend":
            parts += [f"span{self.span}"] if self.span != 1 else []
            parts += ["by_slot"] if self.by_slot else []
            parts += [self.pages] if self.pages != "all" else []
            flags = ("bias", "softcap", "window", "page_lse", "summaries")
            parts += [flag for flag in flags if getattr(self, flag)]
        of_the_rest = ("record_table", "fold", "among", "contiguous")
        parts += [flag for flag in of_the_rest if getattr(self, flag)]
        if self.op in STATE_OPS:
            parts += [self.decay] if self.decay else []
            parts += [flag for flag in ("delta", "normalised", "backward") if getattr(self, flag)]
        parts += [self.score.replace("-", "_")] if self.score else []
        parts += ["page_logits"] if self.page_logits else []
        parts += self.fields
        parts += [f"x{self.count}"] if self.op == "combine" else []
        return "_".join(parts)

    @property
    def template(self) -> str:
        """The name, on every target, of the template that prints the kernel."""
        flags = ("fold", "among", "backward")
        return "_".join([self.op, *(flag for flag in flags if getattr(self, flag))])

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
        if self.fold:
            children = (f"children_{field}" for field in self.fields)
            read = (*children, "child_table", "page_table", "position", "lengths")
            index = (f"index_{field}" for field in self.fields)
            return (*_tensors(read), *_written(index), ("int", "child_size"), ("int", "ratio"))
        if self.op == "append_index":
            value = () if self.shared_kv else ("value",)
            pools = () if self.shared_kv else ("value_pages",)
            written = ("key_pages", *pools, *(f"index_{field}" for field in self.fields))
            table = ("page_table", "record_table") if self.record_table else ("page_table",)
            read = ("key", *value, *table, "position", "lengths")
            return (*_tensors(read), *_written(written))
        if self.op == "score_select":
            records = (f"index_{field}" for field in self.score_fields)
            table = (
                *(() if self.contiguous else ("page_table",)),
                *(("candidates",) if self.among else ()),
            )
            whole = ["sink_pages", "window_pages", "budget_pages"]
            if not self.among:
                whole[2:] = ["capacity", "budget_pages", "dense_below"]
            tensors = ("query", *records, *table, "position", "lengths")
            return (*_tensors(tensors), *(("int", name) for name in whole))
        if self.op == "attend":
            tensors = (
                *("query", "key_pages"),
                *(() if self.shared_kv else ("value_pages",)),
                *(("bias",) if self.bias else ()),
                *(() if self.contiguous else ("page_table",)),
                *(("pages",) if self.pages != "all" else ()),
                *(("page_logits", "page_values", "page_bias") if self.summaries else ()),
                *("position", "lengths"),
            )
            return (
                *_tensors(tensors),
                ("float", "scale"),
                *((("float", "softcap"),) if self.softcap else ()),
                *((("int", "window"),) if self.window else ()),
            )
        if self.op in STATE_OPS:
            tensors = (
                *("query", "key", "value"),
                *(("decay",) if self.decay else ()),
                *(("beta",) if self.delta else ()),
                "lengths",
                *(("grad_num",) if self.backward else ()),
                *(("grad_den",) if self.backward and self.normalised else ()),
            )
            kept = () if self.backward else ("state", "norm")[: 1 + self.normalised]
            return (*_tensors(tensors), *_written(kept))
        names = [f"{kind}{i}" for i in range(self.count) for kind in ("out", "lse")]
        return tuple(("Tensor", name) for name in names)

    @property
    def returns(self) -> tuple[str, ...]:
        """Names of the results, all tensors."""
        if self.op == "append_index":
            return ()
        if self.op == "score_select":
            return ("pages", "page_logits") if self.page_logits else ("pages",)
        if self.backward:
            return tuple(f"grad_{name}" for name in ("query", "key", "value", "decay", "beta"))
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


def _tensors(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple(("Tensor", name) for name in names)


def _written(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((f"Tensor({chr(ord('a') + i)}!)", name) for i, name in enumerate(names))


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
    for pools in [name for name in ("children", "index") if name in given]:
        for field, pool in zip(given["fields"], given.pop(pools), strict=True):
            given[f"{pools}_{field}"] = pool
    return given


_ATTEND = (
    "query key_pages value_pages bias page_table pages exclude position lengths "
    "scale softcap window span"
)
_SELECT = (
    "query index fields page_table position lengths score page_size sink_pages window_pages "
    "capacity budget_pages dense_below"
)
_STATE = "query key value decay beta lengths state norm"
_SIGNATURES = {
    "append_index": "key value page_table position lengths key_pages value_pages index fields",
    "append_index.record_table": (
        "key value page_table record_table position lengths key_pages value_pages index fields"
    ),
    "append_index.fold": (
        "children child_table page_table position lengths index fields child_size ratio"
    ),
    "score_select": _SELECT,
    "score_select.page_logits": _SELECT,
    "score_select.among": (
        "query index fields page_table candidates position lengths score page_size sink_pages "
        "window_pages budget_pages"
    ),
    "attend": _ATTEND,
    "attend.page_lse": _ATTEND,
    "attend.summaries": (
        "query key_pages value_pages page_table pages page_logits page_values page_bias "
        "position lengths scale softcap"
    ),
    "combine": "outs lses",
    "state_step": _STATE,
    "state_chunk": _STATE,
    "state_chunk.backward": "query key value decay beta lengths grad_num grad_den",
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
    if op == "append_index.fold":
        spec = _fold(given)
    elif op.startswith("append_index"):
        keys, values = given["key_pages"], given["value_pages"]
        fields = tuple(given["fields"])
        apart = op == "append_index.record_table" and bool(fields)
        spec = KernelSpec("append_index", **_cache(keys, values), fields=fields, record_table=apart)
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
            among=op == "score_select.among",
        )
        _same_dtype(spec, query, *(given[f"index_{field}"] for field in spec.score_fields))
    elif op == "combine":
        out = given["out0"]
        count = len(given) // 2
        spec = KernelSpec(op, dtype=_dtype(out), value_dim=int(out.shape[3]), count=count)
        if spec.dtype != "float32":
            raise NotCovered(f"combine: reads of {spec.dtype}; kernels merge float32")
    elif op.partition(".")[0] in STATE_OPS:
        spec = _state(op, given)
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
            by_slot=_by_slot(keys, values),
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


def _fold(given: dict[str, Any]) -> KernelSpec:
    fields = tuple(given["fields"])
    pools = [given[f"{of}_{f}"] for of in ("children", "index") for f in fields if f != "log_count"]
    width = {field: int(given[f"children_{field}"].shape[1]) for field in fields}
    spec = KernelSpec(
        "append_index",
        dtype=_dtype(pools[0]) if pools else "float32",
        key_dim=next((width[f] for f in ("mean", "min", "max") if f in width), 0),
        value_dim=width.get("value_mean", 0),
        fields=fields,
        fold=True,
    )
    _same_dtype(spec, *pools)
    return spec


def _state(op: str, given: dict[str, Any]) -> KernelSpec:
    query, key, value, decay = (given[name] for name in ("query", "key", "value", "decay"))
    backward = op.endswith(".backward")
    each = "" if decay is None else "gate"
    spec = KernelSpec(
        op.partition(".")[0],
        dtype=_dtype(query),
        key_dim=int(query.shape[3]),
        value_dim=int(value.shape[3]),
        group=_group(query, key),
        decay="constant" if each and decay.dim() == 1 else each,
        delta=given["beta"] is not None,
        normalised=given["grad_den" if backward else "norm"] is not None,
        backward=backward,
    )
    _same_dtype(spec, query, key, value)
    for name in ("decay", "beta", "state", "norm", "grad_num", "grad_den"):
        tensor = given.get(name)
        if tensor is not None and tensor.dtype != torch.float32:
            raise NotCovered(f"{spec.op}: {name} of {tensor.dtype}; kernels read float32")
    return spec


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


def _by_slot(*pools: torch.Tensor) -> bool:
    """Whether pools are views whose pages begin at every slot."""
    overlap = [pool.shape[1] > 1 and pool.stride(0) == pool.stride(1) for pool in pools]
    if any(overlap) != all(overlap):
        raise NotCovered("pages of keys and of values are numbered differently")
    return all(overlap)


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
