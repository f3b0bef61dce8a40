"""Bodies of memory nodes: standard operators that say what the operators' texts say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import Tensor

from memcompile.models import portable

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx_ir as ir  # noqa: E402

from memcompile.compiler.export.onnx_bodies import write_body  # noqa: E402
from memcompile.compiler.export.onnx_model import OPSET  # noqa: E402
from memcompile.compiler.export.onnx_recorder import Recorder, Size  # noqa: E402
from memcompile.compiler.export.onnx_symbols import symbol_of  # noqa: E402

HEADS, GROUP, WIDTH, PAGE = 2, 3, 8, 4
POOLS = {"mean": WIDTH, "std": WIDTH, "value_mean": WIDTH, "log_count": 1}
FIELDS = list(POOLS)
Sizes = Sequence["int | str"]


class Case:
    """A call: shapes with symbols, and the other arguments."""

    def __init__(self, name: str, tensors: dict[str, Sizes], **static: Any) -> None:
        self.name, self.tensors, self.static = name, tensors, static


KEYS: Sizes = ("batch", HEADS, f"{PAGE}*units", WIDTH)
NEW: Sizes = ("batch", HEADS, "n", WIDTH)
QUERY: Sizes = ("batch", HEADS * GROUP, "n", WIDTH)
ROW: Sizes = ("batch",)
WHEN: dict[str, Sizes] = {"position": ROW, "lengths": ROW}
POOL = {f"index_{i}": ("batch", HEADS, "units", width) for i, width in enumerate(POOLS.values())}
SELECT: dict[str, Any] = {
    "fields": FIELDS, "size": PAGE, "sink_pages": 1, "window_pages": 1, "budget_pages": 4,
}  # fmt: skip
ATTEND: dict[str, Any] = {
    "scale": 0.3, "softcap": 0.0, "size": PAGE, "slots": PAGE, "pinned": -1, "window": 0,
    "exclude": False,
}  # fmt: skip
ACCOUNT: Sizes = ("batch", HEADS, "units")
PAGES: Sizes = ("batch", HEADS, "n", 4)
RING: Sizes = ("batch", HEADS, 9 * PAGE, WIDTH)
CASES = {
    "append": Case(
        "append_index",
        {"key": NEW, "value": NEW, **WHEN, "keys": KEYS, "values": KEYS, **POOL},
        fields=FIELDS, size=PAGE, pinned=-1, reach=0, record_pinned=-1,
    ),
    "append-ring": Case(
        "append_index",
        {"key": NEW, "value": NEW, **WHEN, "keys": RING, "values": RING},
        size=PAGE, pinned=1, reach=6, record_pinned=1,
    ),
    "fold": Case(
        "fold",
        {
            "new": NEW,
            **{f"children_{i}": x for i, x in enumerate(POOL.values())},
            **WHEN,
            **{f"index_{i}": ("batch", HEADS, "groups", x[3]) for i, x in enumerate(POOL.values())},
        },
        fields=FIELDS, child_size=PAGE, ratio=2, child_pinned=-1, pinned=-1,
    ),
    **{
        f"select-{score}": Case(
            "score_select",
            {"query": QUERY, "index_0": POOL["index_0"], "index_1": POOL["index_1"], **WHEN},
            **{**SELECT, "fields": fields}, score=score, capacity=5, dense_below=6,
        )
        for score, fields in
        {"mean": ["mean", "std"], "mean-std": ["mean", "std"], "box": ["min", "max"]}.items()
    },
    "select-logits": Case(
        "score_select.page_logits",
        {"query": QUERY, **POOL, **WHEN},
        **SELECT, score="mean-std", capacity=4, dense_below=0,
    ),
    "select-among": Case(
        "score_select.among",
        {"query": QUERY, **POOL, "candidates": ("batch", HEADS, "n", 6), **WHEN},
        **SELECT, score="mean-std", pinned=-1,
    ),
    "attend": Case("attend", {"query": QUERY, "keys": KEYS, "values": KEYS, **WHEN}, **ATTEND),
    "attend-window": Case(
        "attend",
        {"query": QUERY, "keys": RING, "values": RING, **WHEN},
        **{**ATTEND, "softcap": 2.0, "window": 6, "pinned": 1},
    ),
    "attend-listed": Case(
        "attend",
        {"query": QUERY, "keys": KEYS, "values": KEYS, "pages": PAGES, **WHEN},
        **ATTEND,
    ),
    "attend-records": Case(
        "attend",
        {
            "query": QUERY,
            "keys": POOL["index_0"],
            "values": POOL["index_1"],
            "bias": ("batch", HEADS, "units"),
            "pages": PAGES,
            **WHEN,
        },
        **{**ATTEND, "slots": 1, "exclude": True},
    ),
    "summaries": Case(
        "attend.summaries",
        {
            "query": QUERY,
            "keys": KEYS,
            "values": KEYS,
            "pages": PAGES,
            "page_logits": ("batch", HEADS * GROUP, "n", "units"),
            "value_mean": POOL["index_2"],
            "log_count": POOL["index_3"],
            **WHEN,
        },
        scale=0.3, softcap=0.0, size=PAGE,
    ),
    "page-lse": Case(
        "attend.page_lse",
        {"query": QUERY, "keys": KEYS, "values": KEYS, "account": ACCOUNT, **WHEN},
        scale=0.3, softcap=0.0, window=0, size=PAGE,
    ),
    "evict": Case(
        "evict", {"account": ACCOUNT, **WHEN},
        size=PAGE, sink_pages=1, window_pages=1, budget_pages=4,
    ),
    "account": Case(
        "account",
        {
            "account": ACCOUNT,
            "page_lse": ("batch", HEADS * GROUP, "n", "units"),
            "lse": QUERY[:3],
            "lengths": ROW,
        },
        decay=0.9,
    ),
    "combine": Case(
        "combine",
        {
            **{f"outs_{i}": QUERY for i in range(3)},
            **{f"lses_{i}": QUERY[:3] for i in range(3)},
        },
    ),
    "entering": Case(
        "entering", {"query": QUERY, "keys": RING, "values": RING, **WHEN},
        window=5, size=PAGE, pinned=1,
    ),
    **{
        f"state-{kind}": Case(
            "additive_state",
            {
                "query": QUERY,
                "key": NEW,
                "value": NEW,
                **extra,
                "lengths": ROW,
                "state": ("batch", HEADS, WIDTH, WIDTH),
                **({"norm": ("batch", HEADS, WIDTH)} if kind != "constant" else {}),
            },
        )
        for kind, extra in
        {"kept": {}, "constant": {"decay": (HEADS,)}, "gate": {"decay": ("batch", HEADS, "n")}}
        .items()
    },
}  # fmt: skip


def tensors_of(case: Case, batch: int, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {"batch": batch, "n": n, "units": 10, "groups": 5}
    made: dict[str, Tensor] = {}
    for name, shape in case.tensors.items():
        whole = [s if isinstance(s, int) else eval(s, {}, sizes) for s in shape]
        if name == "position":
            made[name] = torch.tensor([7, 22, 12, 0][:batch], dtype=torch.int32)
        elif name == "lengths":
            made[name] = torch.tensor([n, max(0, n - 2), n, n][:batch], dtype=torch.int32)
        elif name in ("pages", "candidates"):
            picked = torch.rand(*whole[:3], 6).argsort(-1)[..., : whole[3]].sort(-1).values
            made[name] = torch.where(torch.arange(whole[3]) < whole[3] - 1, picked, -1)
        else:
            made[name] = torch.rand(whole) - 0.5
            if name in ("norm", "decay") or name.startswith("index_1"):
                made[name] = -made[name].abs() if name == "decay" else made[name].abs()
            if case.name == "additive_state" and name in ("query", "key"):
                made[name] = made[name].abs()  # features
            if name == "account":
                made[name] = torch.where(torch.rand(whole) < 0.3, -1.0, made[name].abs())
            wide = name.startswith(
                ("lse", "outs", "page_l", "bias", "state", "norm", "decay", "account")
            )
            made[name] = made[name].to(torch.float32 if wide else dtype)
    return made


def arguments(case: Case, tensors: dict[str, Tensor]) -> list[Any]:
    args: list[Any] = []
    for argument in portable.operator(case.name)._schema.arguments:
        kind, name = str(argument.type), argument.name
        if kind == "List[Tensor]":
            args.append([x for key, x in tensors.items() if key.startswith(f"{name}_")])
        elif "Tensor" in kind:
            args.append(tensors.get(name))
        else:
            args.append(case.static.get(name, []))
    return args


def results(case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
    made = portable.TEXTS[portable.operator(case.name)](*arguments(case, tensors))
    return [made] if isinstance(made, Tensor) else [*made]


def body(case: Case, dtype: torch.dtype, **rest: Any) -> ir.Graph:
    example = tensors_of(case, 3, 4, dtype)
    given = {key: (x.dtype, case.tensors[key]) for key, x in example.items()}
    graph, _ = write_body(case.name, given, case.static, OPSET, **rest)
    return graph


# A page may be filled or not: those bodies have a branch, or do without.
BODIES = [(name, True) for name in CASES] + [("append", False), ("fold", False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("name", "branches"), BODIES, ids=[n if b else f"{n}, no branch" for n, b in BODIES]
)
def test_bodies_say_what_the_texts_say(name: str, branches: bool, dtype: torch.dtype) -> None:
    case = CASES[name]
    graph = body(case, dtype, branches=branches)
    assert branches or all(node.op_type != "If" for node in graph)
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch, n in ((3, 4), (1, 1), (2, 1), (1, 6), (2, 9)):
        tensors = tensors_of(case, batch, n, dtype)
        used = {x.name for x in session.get_inputs()}
        feed = {key: x.numpy() for key, x in tensors.items() if key in used}
        have = [torch.from_numpy(x) for x in session.run(None, feed)]
        eager = results(case, tensors)
        truth = results(
            case, {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
        )
        for a, b, c in zip(have, eager, truth, strict=True):
            assert a.dtype == b.dtype
            if a.dtype.is_floating_point:
                assert_close_to_float64(a, b, c.double(), reduction=WIDTH * 16, logarithm=True)
            else:
                assert torch.equal(a, b)


def test_records_are_computed_in_a_branch() -> None:
    """A page is rarely full, and reading one takes longer than writing a token."""
    graph = body(CASES["append"], torch.float32)
    (branch,) = (node for node in graph if node.op_type == "If")
    assert not [node for node in graph if node.op_type in ("GatherND", "ReduceMean")]
    inside = [node.op_type for node in branch.attributes["then_branch"].as_graph()]
    assert inside.count("GatherND") == 2
    otherwise = {node.op_type for node in branch.attributes["else_branch"].as_graph()}
    assert otherwise <= {"Constant", "Identity"}


def test_outputs_that_nothing_reads_are_not_computed() -> None:
    kinds = [node.op_type for node in body(CASES["attend-listed"], torch.float32)]
    fewer = body(CASES["attend-listed"], torch.float32, count=1)
    assert len(fewer.outputs) == 1 and "Log" in kinds
    assert len([*fewer]) < len(kinds) and all(node.op_type != "Log" for node in fewer)


@pytest.mark.parametrize("name", CASES)
def test_operators_give_the_shapes_that_they_claim(name: str) -> None:
    case = CASES[name]
    tensors = tensors_of(case, 3, 4, torch.float16)
    _, _, shapes = portable.OPS[case.name]
    claimed = shapes(*arguments(case, {k: x.to("meta") for k, x in tensors.items()}))
    for a, b in zip(
        [claimed] if isinstance(claimed, Tensor) else claimed, results(case, tensors), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_size_is_no_number() -> None:
    recorder = Recorder(OPSET)
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))
    symbol = symbol_of(recorder, value, torch.float32, ["n", 4])
    n = symbol.shape[0]
    assert isinstance(n, Size)
    for wrong in (int, range, len, torch.arange):
        with pytest.raises(TypeError):
            wrong(n if wrong is not len else symbol)  # type: ignore[operator]
    with pytest.raises(NotImplementedError, match="roll has no form in ONNX"):
        torch.roll(symbol, 1)  # type: ignore[call-overload]
    assert symbol.unflatten(1, (2, -1)).flatten(0, 1).shape == (n * 2, 2)
