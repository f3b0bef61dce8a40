"""AOTInductor packages in a process that has torch alone, beside what eager makes of the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memcompile.compiler.export import inductor, verify
from memcompile.compiler.pipeline import Compiled

SCOUT: dict[str, Any] = {"budget": 48, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 0}

# Nothing but torch and state.json: what a runtime's own engineers would write.
DRIVE = """
import json, sys, torch

folder, calls, answers, *libraries = sys.argv[1:]
contract = json.load(open(f"{folder}/state.json"))
for library in libraries:
    torch.ops.load_library(library)
engine = torch._inductor.aoti_load_package(f"{folder}/engine.pt2")
multiple = contract["capacity"]["multiple"] if contract["capacity"] else 1
made = []
for batch in torch.load(calls):
    rows, total = batch[0].shape[0], sum(tokens.shape[1] for tokens in batch)
    capacity, state = -(-total // multiple) * multiple, []
    for tensor in contract["state"]:
        shape = tensor["shape"]
        shape[tensor["batch_axis"]] = rows
        if tensor["grows"]:
            shape[tensor["grows"]["axis"]] = capacity // tensor["grows"]["tokens"]
        assert tensor["input"] == tensor["output"]
        state.append(torch.full(shape, tensor["init"], dtype=getattr(torch, tensor["dtype"])))
    places, at, logits = [x.data_ptr() for x in state], 0, []
    for tokens in batch:
        n = tokens.shape[1]
        given = [tokens, torch.full((rows,), at, dtype=torch.int32)]
        if contract["lengths"]:
            given.append(torch.full((rows,), n, dtype=torch.int32))
        logits.append(engine(*given, *state)[0])
        at += n
    assert [x.data_ptr() for x in state] == places
    made.append(logits)
torch.save(made, answers)
assert not [name for name in sys.modules if name.startswith("memcompile")]
"""


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, **options}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return model


def largest_block(driver: Any) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        driver(torch.ones(1, 1, dtype=torch.int64))
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def without_prefill(step: Any, program: Any) -> dict[str, Any]:
    """Stands for `inductor.graphs` where the second package is not what is tested."""
    return {inductor.PACKAGE: step.policy}


def traces(compiled: Compiled, prompt: int | None, steps: int) -> list[verify.Trace]:
    """What eager makes of odd chunks and then of its own choices, of one sequence and of three."""
    assert compiled.program is not None
    return [verify.trace(compiled.program, batch, prompt, steps) for batch in (1, 3)]


def drive(folder: Path, told: list[verify.Trace], scratch: Path, *libraries: Path) -> Any:
    """The same tokens through a package, in a process of its own: logits of each call."""
    calls, answers = scratch / "calls.pt", scratch / "answers.pt"
    torch.save([[tokens.contiguous() for tokens in trace.tokens] for trace in told], calls)
    command = (sys.executable, "-I", "-c", DRIVE, folder, calls, answers, *libraries)
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=scratch)
    assert ran.returncode == 0, ran.stderr
    assert "W1" not in ran.stderr and "warn" not in ran.stderr.lower(), ran.stderr
    return torch.load(answers)


def assert_equal(made: Any, told: list[verify.Trace]) -> None:
    """float32: the tokens that eager chooses. 16 bit: those that stand out by more than rounding,
    and logits within it."""
    for trace, answers in zip(told, made, strict=True):
        chosen = []
        for want, got in zip(trace.logits, answers, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            best: Tensor = want.double().topk(2, -1).values
            margin = 0.0 if want.dtype == torch.float32 else 2 * trace.allowed
            clear = best[..., 0] - best[..., 1] > margin
            assert bool((got.argmax(-1) == want.argmax(-1))[clear].all())
            assert float((got.double() - want.double()).abs().max()) <= trace.allowed
            chosen.append(clear.flatten())
        assert torch.cat(chosen).double().mean() > 0.1  # so many had to be eager's


def generate(program: Path, folder: Path, *options: str, given: str = "") -> Any:
    """Runs the C++ example (fixture `program`), which prints token ids."""
    command = [str(program), str(folder), "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, input=given)


def rows_of(said: str) -> list[list[int]]:
    return [[*map(int, line.split())] for line in said.splitlines()]


def words(prompt: list[int]) -> str:
    return " ".join(map(str, prompt))
