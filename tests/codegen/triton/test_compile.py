"""Generated kernels compiled for GPUs that are not there: fit, spills, and what compilers see."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memcompile.codegen.spec import KernelSpec, NotCovered
from memcompile.codegen.triton import blocks, compile_for, emit, load, resources, source, tune
from memcompile.codegen.triton.aot import compile_launch
from memcompile.codegen.triton.load import module
from memcompile.models.memory.parts import INDEX_FIELDS, SCORE_FIELDS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120", "hip:gfx942")
LLAMA: dict[str, Any] = dict(dtype="bfloat16", key_dim=128, value_dim=128, page_size=64)
SUMMARY = ("mean", "std", "value_mean", "log_count")
READ = {
    "all": KernelSpec("attend", group=4, **LLAMA),
    "listed": KernelSpec("attend", group=4, pages="listed", **LLAMA),
    "summaries": KernelSpec("attend", group=4, pages="listed", summaries=True, **LLAMA),
    "unlisted": KernelSpec("attend", group=4, pages="unlisted", **LLAMA),
    "by_slot": KernelSpec("attend", group=4, pages="listed", by_slot=True, **LLAMA),
    "records": KernelSpec(
        "attend", group=4, span=64, bias=True, pages="unlisted", **{**LLAMA, "page_size": 1}
    ),
}
SELECT = KernelSpec(
    "score_select", dtype="bfloat16", key_dim=128, group=4, page_size=64, score="mean-std"
)
SELECT_AND_KEEP = dataclasses.replace(SELECT, page_logits=True)
APPEND = KernelSpec("append_index", fields=SUMMARY, **LLAMA)
COMBINE = KernelSpec("combine", value_dim=128, count=2)
HEADS = dict(dtype="bfloat16", key_dim=128, value_dim=128, group=4)
STATE = {
    "step": KernelSpec("state_step", decay="gate", normalised=True, **HEADS),
    "chunk": KernelSpec("state_chunk", decay="gate", normalised=True, **HEADS),
    "delta": KernelSpec("state_chunk", decay="gate", delta=True, **HEADS),
    "backward": KernelSpec("state_chunk", decay="gate", normalised=True, backward=True, **HEADS),
}
# All of them on every target would take long: the long test of random specs compiles many more.
STATE_ON = {
    "cuda:sm_80": ("step", "chunk"),
    "cuda:sm_90": tuple(STATE),
    "cuda:sm_100": ("step",),
    "cuda:sm_120": ("step",),
    "hip:gfx942": ("step", "delta"),
}
LLAMA_STEP = (
    *(READ[kind] for kind in ("all", "listed", "summaries")),
    *(SELECT, SELECT_AND_KEEP, APPEND, COMBINE),
)
LLAMA_ALL = (*LLAMA_STEP, READ["unlisted"], READ["by_slot"], READ["records"])
SPECS = (
    *LLAMA_ALL,
    KernelSpec("attend", dtype="bfloat16", key_dim=576, value_dim=512, group=128, page_size=64,
               shared_kv=True),
    KernelSpec("attend", dtype="float16", key_dim=80, value_dim=96, group=5, page_size=16,
               pages="listed", softcap=True, window=True, page_lse=True),
    KernelSpec("attend", key_dim=256, value_dim=256, group=3, page_size=128, page_lse=True),
    KernelSpec("append_index", key_dim=96, value_dim=40, page_size=256, fields=INDEX_FIELDS),
    KernelSpec("attend", dtype="bfloat16", key_dim=576, value_dim=512, group=16, page_size=64,
               pages="listed", shared_kv=True, summaries=True),
    KernelSpec("attend", key_dim=80, value_dim=40, group=5, page_size=16, pages="listed",
               softcap=True, summaries=True),
    KernelSpec("score_select", key_dim=264, group=70, page_size=32, score="ball"),
    KernelSpec("score_select", key_dim=264, group=70, page_size=32, score="box", page_logits=True),
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sources and Triton's own cache beside each other, for all tests of this file."""
    place = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMCOMPILE_CACHE", str(place))
        patch.setenv("TRITON_CACHE_DIR", str(place / "triton_cache"))
        yield


# The others have the tables of sm_90's neighbours; `make test-long` compiles every preset for all.
@pytest.mark.parametrize(
    ("target", "specs"),
    [
        pytest.param("cuda:sm_90", LLAMA_ALL, id="cuda:sm_90"),
        pytest.param("hip:gfx942", LLAMA_STEP, id="hip:gfx942"),
        *(
            pytest.param(target, SPECS, id=f"{target}-all", marks=pytest.mark.long)
            for target in ("cuda:sm_90", "hip:gfx942")
        ),
        *(
            pytest.param(target, LLAMA_STEP, id=target, marks=pytest.mark.long)
            for target in ("cuda:sm_80", "cuda:sm_100", "cuda:sm_120")
        ),
    ],
)
def test_kernels_compile_and_fit(target: str, specs: tuple[KernelSpec, ...]) -> None:
    backend = target.split(":")[0]
    for spec in (*specs, *(STATE[kind] for kind in STATE_ON[target])):
        for compiled in compile_for(spec, target):
            assert compiled.binary
            assert compiled.shared <= blocks.architecture(target).shared, (spec, compiled.role)
            if backend == "cuda":
                assert f".target {target[5:]}" in compiled.assembly
                kinds = [kind for _, kind in compiled.arguments]
                assert len(kinds) == len(set(n for n, _ in compiled.arguments))


@pytest.mark.parametrize(
    ("spec", "role"),
    [
        (SELECT_AND_KEEP, "upto_256"),
        (SELECT_AND_KEEP, "rank"),
        (SELECT_AND_KEEP, "choose"),
        (READ["summaries"], "decode"),
        (READ["all"], "decode"),
        (READ["all"], "merge"),
        (APPEND, "append"),
        (STATE["step"], "step"),
    ],
    ids=lambda given: given if isinstance(given, str) else given.op,
)
def test_numbers_that_are_1_may_be_constants(spec: KernelSpec, role: str) -> None:
    """As Inductor makes them, whatever a kernel asks not to be specialised."""
    made, launch = module(spec, "cuda:sm_90"), blocks.launches(spec, "cuda:sm_90")[role]
    numbers = {"rows", "kv_heads", "table_pages", "splits", "list_pages", "capacity", "chunks"}
    ones = dict.fromkeys(numbers.intersection(getattr(made, launch.kernel).arg_names), 1)
    launch = dataclasses.replace(launch, constants={**launch.constants, **ones})
    assert compile_launch(spec, made, role, launch, "cuda:sm_90").binary


@pytest.mark.parametrize("spec", (*LLAMA_ALL, *STATE.values()), ids=lambda spec: spec.name)
def test_nothing_spills_on_sm_90(spec: KernelSpec) -> None:
    for compiled in compile_for(spec, "cuda:sm_90"):
        used = resources(compiled.binary)
        assert used["stack"] == 0, (compiled.role, used)
        assert 0 < used["registers"] <= 255


def test_keys_and_values_are_copied_ahead_on_sm_90() -> None:
    """The page ids behind an address must not keep Triton from pipelining the copies."""
    for spec in (READ["all"], READ["listed"]):
        decode = compile_for(spec, "cuda:sm_90")[0]
        assert decode.assembly.count("cp.async.cg") >= 16
        stages = decode.launch.stages - 1
        page = 64 * 128 * 2
        assert decode.shared >= stages * 2 * page, "fewer pages are in flight than stages allow"


def test_records_are_copied_ahead_on_sm_90() -> None:
    """Nor must the list that is looked up before a record is read."""
    pages, both = (
        compile_for(READ[kind], "cuda:sm_90")[0].assembly.count("cp.async.cg")
        for kind in ("listed", "summaries")
    )
    a_block = 64 * 128 * 2 // (128 * 16)  # copies of 16 bytes by 128 threads
    assert both - pages >= 2 * a_block, "values of records are copied in their own turn"


@pytest.mark.parametrize(
    ("name", "spec"),
    {
        "attend": READ["listed"],
        "attend_summaries": READ["summaries"],
        "score_select": SELECT,
        "score_select_page_logits": SELECT_AND_KEEP,
        "append_index": APPEND,
        "combine": COMBINE,
        "state_step": STATE["step"],
        "state_chunk": STATE["chunk"],
        "state_chunk_delta": STATE["delta"],
        "state_chunk_backward": STATE["backward"],
    }.items(),
)
def test_generated_text(name: str, spec: KernelSpec, golden: Callable[[str, str], None]) -> None:
    golden(f"triton_{name}.txt", source(spec, "cuda:sm_90"))


def random_specs(count: int) -> list[KernelSpec]:
    """Distinct specs from everything that is covered, the same in every run."""
    pick = random.Random(0)
    dims = (8, 16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
    sizes = (1, 2, 8, 16, 32, 64, 128, 256)
    dtypes = ("bfloat16", "float16", "float32")
    found: dict[KernelSpec, None] = {}
    while len(found) < count:
        shape: dict[str, Any] = dict(
            dtype=pick.choice(dtypes), key_dim=pick.choice(dims), page_size=pick.choice(sizes)
        )
        op = pick.choice(("attend", "attend", "attend", "append_index", "score_select", "combine"))
        shared = pick.random() < 0.15
        value_dim = pick.choice([d for d in dims if not shared or d <= shape["key_dim"]])
        if shared and pick.random() < 0.5:
            shape["key_dim"], value_dim = 576, 512
        group = pick.choice((1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 128))
        if op == "attend" and pick.random() < 0.3:
            spec = KernelSpec(
                op, **shape, value_dim=value_dim, shared_kv=shared, group=group, pages="listed",
                softcap=pick.random() < 0.3, summaries=True,
            )  # fmt: skip
        elif op == "attend":
            spec = KernelSpec(
                op, **shape, value_dim=value_dim, shared_kv=shared, group=group,
                span=pick.choice((1, 1, 64)), pages=pick.choice(("all", "listed", "unlisted")),
                bias=pick.random() < 0.3, softcap=pick.random() < 0.3,
                window=pick.random() < 0.3, page_lse=pick.random() < 0.3,
            )  # fmt: skip
        elif op == "append_index":
            fields = tuple(f for f in INDEX_FIELDS if pick.random() < 0.5)
            spec = KernelSpec(op, **shape, value_dim=value_dim, shared_kv=shared, fields=fields)
        elif op == "score_select":
            score, page_logits = pick.choice([*SCORE_FIELDS]), pick.random() < 0.5
            spec = KernelSpec(op, **shape, group=group, score=score, page_logits=page_logits)
        else:
            spec = KernelSpec(op, value_dim=pick.choice(dims), count=pick.randint(1, 4))
        found[spec] = None
    return [*found]


def random_states(count: int) -> list[KernelSpec]:
    """The same of recurrent states."""
    pick = random.Random(1)
    dims = (8, 24, 32, 64, 80, 96, 128, 160, 256, 576)
    found: dict[KernelSpec, None] = {}
    while len(found) < count:
        delta = pick.random() < 0.4
        op = pick.choice(("state_step", "state_chunk"))
        spec = KernelSpec(
            op, dtype=pick.choice(("bfloat16", "float16", "float32")), key_dim=pick.choice(dims),
            value_dim=pick.choice(dims), group=pick.choice((1, 3, 4, 16)),
            decay=pick.choice(("", "constant", "gate")), delta=delta,
            normalised=not delta and pick.random() < 0.5,
            backward=op == "state_chunk" and not delta and pick.random() < 0.5,
        )  # fmt: skip
        found[spec] = None
    return [*found]


def compiled_launches(job: tuple[KernelSpec, str]) -> int:
    spec, target = job
    most = blocks.architecture(target).shared
    every = compile_for(spec, target)
    assert all(compiled.shared <= most for compiled in every), spec
    return len(every)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_five_hundred_specs_compile() -> None:
    specs = [*random_specs(520), *random_states(100)]
    assert len({spec.name for spec in specs}) == len(specs)
    with ProcessPoolExecutor() as pool:
        jobs = [(spec, "cuda:sm_90") for spec in specs]
        assert sum(pool.map(compiled_launches, jobs, chunksize=4)) > 1000


@pytest.mark.parametrize("target", TARGETS)
def test_many_specs_are_printed(target: str) -> None:
    printed = 0
    for spec in (*random_specs(200), *random_states(50)):
        with contextlib.suppress(NotCovered):  # keys too wide for its shared memory
            compile(source(spec, target), spec.name, "exec")
            printed += 1
    assert printed > 230


# What torch sees.


STEP = (APPEND, SELECT_AND_KEEP, READ["summaries"], READ["all"], COMBINE)


def make_step() -> Callable[..., tuple[Tensor, ...]]:
    """One site of a decode step, made of operators."""
    append, select, read_some, read_all, combine = load(STEP).values()

    def step(
        query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor,
        records: list[Tensor], table: Tensor, position: Tensor, lengths: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        at = (position, lengths)
        append(key, value, table, *at, keys, values, *records)
        chosen = select(query, *records[:2], table, *at, 1, 1, 40, 32, 0)
        some = read_some(query, keys, values, table, *chosen, *records[2:], *at, 0.1)
        every = read_all(query, keys, values, table, *at, 0.1)
        return *combine(*some, *every), *chosen

    return step


def step_arguments(device: str, columns: int = 25) -> tuple[Any, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    whole = dict(dtype=torch.int32)
    return (
        *(empty(2, 8, 1, 128), empty(2, 2, 1, 128), empty(2, 2, 1, 128)),
        *(empty(100, 64, 128), empty(100, 64, 128)),
        [*(empty(100, 128) for _ in range(3)), empty(100, 1, dtype=torch.float32)],
        *(empty(2, 2, columns, **whole), empty(2, **whole), empty(2, **whole)),
    )


def test_operators_have_the_specs_arguments() -> None:
    for spec, op in load(STEP).items():
        schema = op._schema
        given = [(str(a.type), a.name, bool(a.alias_info and a.alias_info.is_write))
                 for a in schema.arguments]  # fmt: skip
        assert given == [(kind.split("(")[0], name, "!" in kind) for kind, name in spec.arguments]
        assert [str(r.type) for r in schema.returns] == ["Tensor"] * len(spec.returns)
        assert schema.name == f"memcompile_triton::{spec.name}"


def test_operators_are_exported_with_a_table_of_any_width() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    step = make_step()

    class Step(torch.nn.Module):
        def forward(self, *args: Any) -> tuple[Tensor, ...]:
            return step(*args)

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        args = step_arguments("cuda")
    wide = {2: torch.export.Dim("columns", max=1 << 20)}
    shapes = ((*(None,) * 5, [None] * 4, wide, None, None),)
    program = torch.export.export(Step(), args, dynamic_shapes=shapes)
    called = [n for n in program.graph.nodes if str(n.target).startswith("memcompile_triton")]
    assert len(called) == 5
    out, lse, pages, logits = (n.meta["val"] for n in program.graph.output_node().args[0][-4:])
    assert (out.shape, out.dtype) == ((2, 8, 1, 128), torch.float32)
    assert (lse.shape, lse.dtype) == ((2, 8, 1), torch.float32)
    assert (pages.shape, pages.dtype) == ((2, 2, 1, 40), torch.int32)
    assert (logits.shape[:3], logits.dtype) == ((2, 8, 1), torch.float32)
    assert isinstance(logits.shape[3], torch.SymInt)
    assert {t.device.type for t in (out, lse, pages, logits)} == {"cuda"}


def state_arguments(device: str, rows: int) -> list[Tensor]:
    """Those of an additive, gated and normalised state of HEADS."""
    shapes = ((2, 8, rows, 128), (2, 2, rows, 128), (2, 2, rows, 128))
    given = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    whole = torch.empty(2, dtype=torch.int32, device=device)
    held = [torch.empty(shape, device=device) for shape in ((2, 2, 128, 128), (2, 2, 128))]
    return [*given, torch.empty(2, 2, rows, device=device), whole, *held]


def test_states_are_exported_with_any_number_of_rows() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    forward = load([STATE["chunk"]])[STATE["chunk"]]

    class Chunk(torch.nn.Module):
        def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
            return forward(*args)

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        args = state_arguments("cuda", 70)
    rows = {2: torch.export.Dim("rows", min=2)}
    program = torch.export.export(
        Chunk(), tuple(args), dynamic_shapes=((rows, rows, rows, rows, None, None, None),)
    )
    out, lse = (n.meta["val"] for n in program.graph.output_node().args[0][-2:])
    assert isinstance(out.shape[2], torch.SymInt) and out.shape[2] == lse.shape[2]
    assert (out.dtype, lse.dtype, out.device.type) == (torch.float32, torch.float32, "cuda")


def kernels_seen(function: Callable[..., Any], args: Iterable[Any]) -> list[str]:
    """The names of the kernels in the graph that a compiler behind autograd is given."""
    from torch._dynamo.backends.common import aot_autograd

    seen: list[str] = []

    class Captured(Exception):
        pass

    def capture(graph: torch.fx.GraphModule, _: Any) -> Any:
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        for node in graph.graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                seen.append(kernel.fn.__name__)
        raise Captured

    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=capture), fullgraph=True)
    with pytest.raises(Exception, match="Captured"):
        compiled(*args)
    return seen


@pytest.mark.parametrize(("bound", "launches"), [(4096, 1), (None, 2)])
def test_a_compiler_sees_the_kernels(bound: int | None, launches: int) -> None:
    """A table of bounded width is ranked in one launch, one of unknown width in two."""
    torch._dynamo.reset()
    args = step_arguments("cpu")
    torch._dynamo.mark_dynamic(args[6], 2, **({} if bound is None else dict(min=2, max=bound)))
    ranked = [SELECT_AND_KEEP.name] if launches == 1 else ["rank_pages", "choose_pages"]
    assert kernels_seen(make_step(), args) == [
        *(APPEND.name, *ranked),
        *(READ["summaries"].name, "merge_splits", READ["all"].name, "merge_splits", COMBINE.name),
    ]


def test_a_compiler_sees_the_kernels_of_a_state() -> None:
    torch._dynamo.reset()
    step, chunk = load([STATE["step"], STATE["chunk"]]).values()
    assert kernels_seen(step, state_arguments("cpu", 1)) == [STATE["step"].name]
    assert kernels_seen(chunk, state_arguments("cpu", 70)) == ["walk_chunks", STATE["chunk"].name]


def test_importing_the_package_leaves_triton_alone() -> None:
    code = (
        "import sys, memcompile.codegen.triton as t; from memcompile.codegen import KernelSpec;"
        "t.source(KernelSpec('combine', value_dim=8, count=1), 'cuda:sm_90');"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# What is refused.


def test_heads_that_fit_no_gpu_are_not_covered() -> None:
    with pytest.raises(NotCovered, match="heads above 256 are covered where a value is a part"):
        source(KernelSpec("attend", key_dim=512, value_dim=128), "cuda:sm_90")


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown target 'cuda:sm_1'; known: cuda:sm_80"):
        source(COMBINE, "cuda:sm_1")


def test_only_cubins_have_resources() -> None:
    with pytest.raises(ValueError, match="cuobjdump reads no kernel in this"):
        resources(b"nothing")


@pytest.mark.parametrize(
    ("arch", "target"),
    [("80", "cuda:sm_80"), ("103", "cuda:sm_100"), ("121", "cuda:sm_120"), ("75", "cuda:sm_80")],
)
def test_devices_take_the_next_older_table(arch: str, target: str) -> None:
    assert blocks.nearest("cuda", arch) == target
    assert blocks.nearest("hip", "gfx1100") == "hip:gfx942"


# Tuning.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="torch finds none; without tuning the table"):
        tune(SELECT)


def test_tuned_launches_come_before_the_table(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path))
    before = source(READ["all"], "cuda:sm_90")
    file = blocks.tuned_path(READ["all"], "cuda:sm_90")
    file.parent.mkdir(parents=True)
    file.write_text('{"decode": {"constants": {"BLOCK_M": 16, "BLOCK_N": 32}, "options": [2, 3]}}')
    after = source(READ["all"], "cuda:sm_90")
    assert after != before and "block_m, warps, stages = 16, 2, 3" in after
    assert source(READ["all"], "cuda:sm_80") != after


@pytest.mark.parametrize("spec", (*LLAMA_ALL, *STATE.values()), ids=lambda spec: spec.name)
def test_candidates_are_printed_and_differ(spec: KernelSpec) -> None:
    from memcompile.codegen.triton.tune import candidates

    chosen = blocks.table(spec, "cuda:sm_90")
    for role in itertools.islice(chosen, 2):
        if role == "merge":
            continue
        made = candidates(spec, role, chosen)
        assert made[0] == chosen and len(made) > 4
        texts = {emit.text(spec, "cuda:sm_90", candidate) for candidate in made}
        assert len(texts) >= len(made) // 4  # not every launch names its stages
