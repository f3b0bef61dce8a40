"""`--emit aoti`: packages with our kernels beside them, run without Python's memcompile."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from aoti_case import (
    SCOUT,
    assert_equal,
    drive,
    generate,
    largest_block,
    llama,
    rows_of,
    traces,
    without_prefill,
    words,
)

from memcompile import codegen
from memcompile.codegen.cpp import NoCompiler
from memcompile.compiler.export import aoti, inductor
from memcompile.compiler.export.contract import read_contract
from memcompile.compiler.export.runners import LIBRARY
from memcompile.compiler.lower import Traced
from memcompile.compiler.pipeline import Compiled, build


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return build(llama(), "scout", kernels="off", check=False, **SCOUT)


@pytest.fixture(scope="module")
def shipped(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, moved away from where they were made."""
    folder = tmp_path_factory.mktemp("made") / "aoti"
    folder.mkdir()
    artefact = aoti.emit(folder, compiled, None)
    assert artefact.main == "engine.pt2" and artefact.notes[0].startswith(f"load {LIBRARY} first")
    return folder.rename(tmp_path_factory.mktemp("moved") / "engine")


def test_what_is_shipped(shipped: Path) -> None:
    names = {file.name for file in shipped.iterdir()}
    ours = {LIBRARY, "libmemcompile_runtime.so", "engine.pt2", "prefill.pt2", "state.json"}
    kernels = {name for name in names - ours if name.endswith(".so")}
    assert names == ours | kernels
    assert {name.split("_f32")[0] for name in kernels} == {"append_index", "score_select", "attend"}
    contract = read_contract(shipped)
    assert all(tensor.input == tensor.output for tensor in contract.state)
    assert contract.outputs == ["logits"]


def test_a_process_with_torch_alone(compiled: Compiled, shipped: Path, tmp_path: Path) -> None:
    """Odd chunks, then 64 steps; another engine's copy of the libraries does no harm."""
    told = traces(compiled, 160, 64)
    other = tmp_path / "other"
    shutil.copytree(shipped, other)
    assert_equal(drive(shipped, told, tmp_path, shipped / LIBRARY, other / LIBRARY), told)


def test_no_cache_is_copied(shipped: Path) -> None:
    """No block of memory that a step asks for is as large as a cache."""
    from memcompile.compiler.export.driver import Driver
    from memcompile.compiler.export.formats import Artefact
    from memcompile.compiler.export.runners import runner

    contract = read_contract(shipped)
    call = runner(shipped, Artefact("aoti", "aoti", "engine.pt2", {}), contract)
    driver = Driver(contract, call, 1, 1 << 16)
    driver(torch.ones(1, 90, dtype=torch.int64))
    assert (
        largest_block(driver)
        < min(driver.state[name].nbytes for name in ("site0_keys", "site0_values")) // 8
    )


def test_the_program_generates_what_the_engine_does(
    compiled: Compiled, shipped: Path, program: Path
) -> None:
    """The prompt read densely, by the second package with the first one's weights."""
    prompts = [[(7 * i + 3) % 97 for i in range(150)], [(5 * i + 1) % 97 for i in range(101)]]
    engine = compiled.engine()
    tokens = torch.zeros(2, 150, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    expected = engine.generate(tokens, 24, lengths=[150, 101])[:, -24:].tolist()
    asked = [word for prompt in prompts for word in ("--prompt", words(prompt))]
    ran = generate(program, shipped, "--max-new-tokens", "24", *asked)
    assert ran.returncode == 0, ran.stderr
    assert rows_of(ran.stdout) == expected
    assert "tokens/s" in ran.stderr
    ran = generate(program, shipped, "--max-new-tokens", "24", given=words(prompts[0]) + "\n")
    assert rows_of(ran.stdout) == expected[:1], ran.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", "1 97"), "token 97 is none of the vocabulary's 97"),
        (("--prompt", "one"), 'prompt "one": expected token ids, as in "105 109"'),
        (("--max-new-tokens", "0"), '--max-new-tokens is "0"; give a positive number'),
        (
            ("--tokens", "3"),
            "unknown option --tokens; known: --max-new-tokens, --threads, --prompt",
        ),
        ((), "no prompt: give token ids"),
    ],
)
def test_the_program_refuses(
    program: Path, shipped: Path, options: tuple[str, ...], said: str
) -> None:
    ran = generate(program, shipped, *options)
    assert ran.returncode == 2 and ran.stderr == f"generate: {said}\n"


def test_the_program_without_an_engine(program: Path, tmp_path: Path) -> None:
    ran = generate(program, tmp_path, "--prompt", "1")
    assert ran.returncode == 1 and ran.stderr.endswith("state.json: cannot be read\n")
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 2 and "give the folder of an engine" in ran.stderr


def test_without_a_compiler_the_portable_format_is_named(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: object) -> None:
        raise NoCompiler("no C++ compiler: install one")

    monkeypatch.setattr(codegen, "load", none)
    with pytest.raises(RuntimeError, match=r"aoti: no C.. compiler(.|\n)*export 'aoti-portable'"):
        aoti.emit(tmp_path, compiled, None)
    assert not list(tmp_path.iterdir())


def test_linear_layers_in_16_bit_need_the_compiler_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise NoCompiler("no C++ compiler: install one")

    half = build(llama().bfloat16(), "dense", kernels="off", check=False)
    monkeypatch.setattr(codegen, "load_linear", none)
    with pytest.raises(RuntimeError, match=r"aoti: no C.. compiler(.|\n)*export 'aoti-portable'"):
        aoti.emit(tmp_path, half, None)


def test_what_no_kernel_covers_is_refused(tmp_path: Path) -> None:
    odd = build(llama(hidden_size=48), "dense", kernels="off", check=False)
    with pytest.raises(RuntimeError, match=r"aoti: append_index: key_dim 12(.|\n)*'aoti-portable'"):
        aoti.emit(tmp_path, odd, None)
    double = build(llama().double(), "dense", kernels="off", check=False)
    with pytest.raises(RuntimeError, match=r"aoti: the model is float64(.|\n)*'aoti-portable'"):
        aoti.emit(tmp_path, double, None)


def test_a_compiler_that_fails_is_told_of(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import compile_fx

    def fails(*args: object, **kwargs: object) -> None:
        raise ValueError("cannot lower")

    monkeypatch.setattr(compile_fx, "compile_fx_inner", fails)
    with pytest.raises(RuntimeError, match=r"engine\.pt2 cannot be compiled: ValueError: cannot l"):
        aoti.emit(tmp_path, compiled, None)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["a write is lost", "a counter is folded"])
def test_a_package_that_loses_state_is_refused(
    fault: str, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is put into what Inductor is given; test_against_graph.py has many more."""
    real = inductor.with_weights

    def faulty(traced: Traced) -> torch.fx.GraphModule:
        module = real(traced)
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        if fault == "a write is lost":
            module.graph.erase_node(
                next(n for n in module.graph.nodes if "append_index" in str(n.target))
            )
        else:
            with module.graph.inserting_after(inputs[-1]):
                zero = module.graph.call_function(torch.ops.aten.mul.Tensor, (inputs[1], 0))
            zero.meta["val"] = inputs[1].meta["val"]
            inputs[1].replace_all_uses_with(zero, lambda user: user is not zero)
        module.recompile()
        return module

    monkeypatch.setattr(inductor, "with_weights", faulty)
    monkeypatch.setattr(inductor, "graphs", without_prefill)
    with pytest.raises(RuntimeError, match=r"aoti/engine\.pt2: (logits|site0_keys) .*lose state"):
        aoti.emit(tmp_path, compiled, None)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_16_bit(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "graphs", without_prefill)
    half = build(llama().to(dtype), "scout", kernels="off", check=False, **SCOUT)
    folder = tmp_path / "aoti"
    folder.mkdir()
    aoti.emit(folder, half, None)
    assert (folder / "libmemcompile_linear.so").exists()
    told = traces(half, 160, 64)
    assert_equal(drive(folder, told, tmp_path, folder / LIBRARY), told)
