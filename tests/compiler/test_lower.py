"""Step graphs lowered: kernels in place of references, Inductor around them, once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import nn

from memcompile import codegen
from memcompile.codegen.cpp import NoCompiler
from memcompile.compiler import lower as lowering
from memcompile.compiler.pipeline import Compiled, build
from memcompile.runtime.engine import Engine

VOCABULARY = 61
SCOUT: dict[str, Any] = {"page_size": 16, "budget": 64, "sinks": 16, "window": 16}
SCOUT |= {"dense_layers": 0}


class Block(nn.Module):
    """Attention with grouped heads, and a feed-forward, on rotated positions."""

    def __init__(self, width: int, heads: int, kv_heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, heads * dim)
        self.key = nn.Linear(width, kv_heads * dim, bias=False)
        self.value = nn.Linear(width, kv_heads * dim, bias=False)
        self.out = nn.Linear(heads * dim, width, bias=False)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, n, _ = x.shape
        at = self.norm(x)
        q, k, v = (
            project(at).view(batch, n, heads, self.dim).transpose(1, 2)
            for project, heads in (
                (self.query, self.heads),
                (self.key, self.kv_heads),
                (self.value, self.kv_heads),
            )
        )
        read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(read.transpose(1, 2).reshape(batch, n, -1))
        return x + self.feed(x)


class Decoder(nn.Module):
    def __init__(self, dim: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.places = nn.Embedding(512, 64)
        self.blocks = nn.ModuleList(Block(64, 4, 2, dim) for _ in range(layers))
        self.head = nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def decoder(dtype: torch.dtype = torch.float32, **sizes: int) -> Decoder:
    torch.manual_seed(0)
    return Decoder(**sizes).eval().to(dtype)


@cache
def built(policy: str, dtype: torch.dtype = torch.float32) -> Compiled:
    options = SCOUT if policy == "scout" else {"page_size": 16}
    return build(decoder(dtype), policy, kernels="required", **options)


def tokens(batch: int, n: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.float16, marks=pytest.mark.long), torch.bfloat16],
    ids=str,
)
def test_the_dense_engine_is_the_forward_however_calls_are_split(dtype: torch.dtype) -> None:
    model, compiled = decoder(dtype), built("dense", dtype)
    assert compiled.report.lowered.inductor == {"dense": "lowered", "policy": "lowered"}
    for batch, split in ((1, (1, 1, 40, 1)), (3, (37, 1, 2))):
        given = tokens(batch, sum(split))
        engine = compiled.engine()
        got = torch.cat([engine(part) for part in given.split(split, 1)], 1)
        with torch.no_grad():
            eager, exact = model(given), decoder().double()(given)
        assert_close_to_float64(got, eager, exact, reduction=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_scout_reads_what_its_references_read(dtype: torch.dtype) -> None:
    """The same pages: float32 rounds alike enough for random keys, and 16 bit has one record."""
    kernels = built("scout", dtype).engine()
    references = build(decoder(dtype), "scout", kernels="off", check=False, **SCOUT).engine()
    exact = build(decoder().double(), "scout", kernels="off", check=False, **SCOUT).engine()
    given = tokens(2, 300)
    outs = []
    for engine in (kernels, references, exact):
        engine.prefill(given[:, :290])
        outs.append(torch.cat([engine(part) for part in given[:, 290:].split((1, 4, 5), 1)], 1))
    assert kernels.stats().pages_read == references.stats().pages_read < kernels.stats().pages_dense
    if dtype == torch.float32:
        assert_close_to_float64(*outs, reduction=300)


def test_generating_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = built("scout")
    from torch._inductor import compile_fx

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("compiled while generating")

    monkeypatch.setattr(compile_fx, "compile_fx_inner", never)
    monkeypatch.setattr(codegen, "load", never)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (1, 2):
            out = compiled.engine().generate(tokens(batch, 60), 90)
            assert out.shape == (batch, 150)
        prompt = compiled.engine()
        prompt.prefill(tokens(1, 200))
        branches = prompt.fork(rows=[0] * 3)
        branches.generate(tokens(3, 5), 9, temperature=1.0, seed=0)
        branches.select([2, 0, 0])
        assert branches(tokens(3, 2)).shape == (3, 2, VOCABULARY)


def test_state_is_written_where_it_lies() -> None:
    program = built("scout").program
    assert program is not None
    engine = Engine(replace(program, max_context=256))
    engine(tokens(1, 3))
    assert engine._state is not None
    places = [tensor.data_ptr() for tensor in engine._state.tensors()]
    engine(tokens(1, 100))
    assert places == [tensor.data_ptr() for tensor in engine._state.tensors()]


def test_the_report_lists_each_kernel_with_its_file() -> None:
    report = built("scout").report
    listed = {kernel["name"]: kernel for kernel in report.lowered.kernels}
    families = {"append_index", "score_select", "attend"}
    assert {name for name in families if any(k.startswith(name) for k in listed)} == families
    for name, kernel in listed.items():
        source = Path(kernel["source"])
        assert name in source.name or name in source.parent.name
        assert source.read_text()
    appended = next(kernel for name, kernel in listed.items() if name.startswith("append_index"))
    assert appended["calls"] == {"dense": 2, "policy": 2}
    assert type(report).from_json(report.to_json()).lowered == report.lowered
    assert "kernels: " in str(report)


def test_debug_prints_where_the_sources_lie(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEMCOMPILE_DEBUG", "3")
    build(decoder(), "dense", kernels="required", check=False)
    printed = re.findall(r"^(attend_\w+): (/.+)$", capsys.readouterr().err, re.MULTILINE)
    assert printed and all(Path(path).exists() for _, path in printed)


def test_off_runs_references_and_lowers_nothing() -> None:
    compiled = build(decoder(), "scout", kernels="off", **SCOUT)
    assert isinstance(compiled.program.dense, torch.fx.GraphModule)  # type: ignore[union-attr]
    assert compiled.report.lowered.references == ["kernels=off"]


def test_the_environment_decides_when_the_call_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMCOMPILE_KERNELS", "required")
    assert build(decoder(), "dense", check=False).report.lowered.kernels
    monkeypatch.setenv("MEMCOMPILE_KERNELS", "sometimes")
    with pytest.raises(ValueError, match="kernels is 'sometimes'; known: auto, required, off"):
        build(decoder(), "dense")


def test_without_a_compiler_the_references_run_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*args: object) -> None:
        raise NoCompiler("no C++ compiler: install one")

    monkeypatch.setattr(codegen, "load", none)
    monkeypatch.setattr(codegen, "load_linear", none)
    with pytest.warns(UserWarning, match="references, which are slow: no C\\+\\+ compiler"):
        compiled = build(decoder(), "scout", kernels="auto", **SCOUT)
    assert compiled.report.lowered.references == ["no C++ compiler: install one"]
    assert "not generated: no C++ compiler" in str(compiled.report)
    engine = compiled.engine()
    engine.prefill(tokens(1, 200))
    assert engine(tokens(1, 1)).shape == (1, 1, VOCABULARY)
    for model in (decoder(), decoder(torch.bfloat16)):
        with pytest.raises(RuntimeError, match="kernels='required', but no C\\+\\+ compiler"):
            build(model, "scout", kernels="required", **SCOUT)


def test_when_inductor_gives_up_the_step_runs_operation_by_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import compile_fx

    def fails(*args: object, **kwargs: object) -> None:
        raise ValueError("cannot lower")

    monkeypatch.setattr(compile_fx, "compile_fx_inner", fails)
    with pytest.warns(UserWarning, match="operation by operation, which is slow: ValueError"):
        compiled = build(decoder(), "dense", kernels="auto")
    assert compiled.report.lowered.inductor["dense"] == "ValueError: cannot lower"
    assert "step graph runs operation by operation: ValueError" in str(compiled.report)
    with pytest.raises(RuntimeError, match="kernels='required', but Inductor gave up"):
        build(decoder(), "dense", kernels="required")


def test_what_no_template_covers_is_reported_and_required_refuses_it() -> None:
    odd = decoder(dim=12)
    with pytest.warns(UserWarning, match="references, which is slow: append_index: key_dim 12"):
        compiled = build(odd, "dense", kernels="auto")
    assert compiled.report.lowered.references == [
        f"{op}: key_dim 12; kernels cover multiples of 8 up to 576"
        for op in ("append_index", "attend")
    ]
    with pytest.raises(RuntimeError, match="kernels='required', but append_index: key_dim 12"):
        build(odd, "dense", kernels="required")


def test_float64_models_run_on_their_references() -> None:
    compiled = build(decoder(torch.float64), "dense", kernels="auto")
    assert compiled.report.lowered.references[0].startswith("the model is float64")
    with pytest.raises(RuntimeError, match="kernels='required', but the model is float64"):
        build(decoder(torch.float64), "dense", kernels="required")


def called(run: Callable[[], object]) -> set[str]:
    """The memory's operators, of either kind, that run."""
    with torch.profiler.profile() as profile:
        run()
    names = {event.name for event in profile.events()}
    return {name for name in names if name.startswith("memcompile")}


@pytest.mark.parametrize("order", [("auto", "required"), ("required", "auto")])
def test_inductors_cache_tells_kernels_from_references(
    order: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same graph twice through one cache: with kernels, and where none can be built."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    real = codegen.load

    def none(*args: object) -> None:
        raise NoCompiler("no C++ compiler")

    for kind in order:
        monkeypatch.setattr(codegen, "load", none if kind == "auto" else real)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = build(decoder(layers=1), "dense", kernels=kind, check=False)
        engine = compiled.engine()
        ran = called(lambda e=engine: e(tokens(1, 3)))  # type: ignore[misc]
        space = "memcompile::" if kind == "auto" else "memcompile_cpp::"
        assert len(ran) == 2 and all(name.startswith(space) for name in ran), (kind, ran)


def test_kernels_run_where_inductor_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    def fails(*args: object, **kwargs: object) -> None:
        raise ValueError("cannot lower")

    monkeypatch.setattr(compile_fx, "compile_fx_inner", fails)
    with pytest.warns(UserWarning, match="operation by operation"):
        engine = build(decoder(layers=1), "dense", kernels="auto", check=False).engine()
    ran = called(lambda: engine(tokens(1, 3)))
    assert len(ran) == 2 and all(name.startswith("memcompile_cpp::") for name in ran)


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(codegen, "load_linear", lambda: None)
    odd = decoder(dim=40, layers=1)  # a spec that no other test has loaded
    with pytest.warns(UserWarning, match="cannot be written.*MEMCOMPILE_CACHE"):
        compiled = build(odd, "dense", kernels="auto", check=False)
    assert "point $MEMCOMPILE_CACHE at a folder" in compiled.report.lowered.references[0]


def test_graphs_that_are_one_object_are_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    real = lowering.compile_step
    monkeypatch.setattr(
        lowering,
        "compile_step",
        lambda *args: count.append(1) or real(*args),  # type: ignore[func-returns-value]
    )
    program = build(decoder(), "dense", kernels="required").program
    assert program is not None and program.dense is program.policy and len(count) == 1


def test_the_policy_runs_the_dense_graph_until_it_has_something_to_skip() -> None:
    compiled = build(decoder(), "scout", kernels="off", **SCOUT)
    program = compiled.program
    assert program is not None and program.dense_below == 64
    engine = compiled.engine()
    ran: list[str] = []
    for name in ("dense", "policy"):
        graph = getattr(program, name)
        graph.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    for n in (60, 4, 1):
        engine(tokens(1, n))
    assert ran == ["dense", "dense", "policy"]
    assert engine.stats().tokens == {"dense": 0, "policy": 65}


def test_linear_layers_that_stay_torchs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("the compiler failed")

    monkeypatch.setattr(codegen, "load_linear", fails)
    with pytest.warns(UserWarning, match="linear layers are torch's own: the compiler failed"):
        compiled = build(decoder(torch.bfloat16, layers=1), "dense", kernels="auto", check=False)
    assert compiled.report.lowered.references == [
        "linear layers are torch's own: the compiler failed"
    ]
    assert compiled.report.lowered.kernels
    build(decoder(layers=1), "dense", kernels="required", check=False)  # float32 needs none


def test_linear_layers_with_16_bit_weights_stream_them() -> None:
    linear = codegen.load_linear()
    for dtype, streams in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        program = build(decoder(dtype), "dense", kernels="off", check=False).program
        assert program is not None
        lifted, weights = lowering.lift_weights(program.dense, linear)  # type: ignore[arg-type]
        replaced = [n for n in lifted.graph.nodes if n.target is linear]
        assert len(replaced) == (13 if streams else 0)
        assert all(len(n.args) == 3 for n in replaced)
        assert all(w.dtype == dtype for w in weights.values())
