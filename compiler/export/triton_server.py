"""A model repository for NVIDIA Triton Inference Server: `--emit triton-server`.

The model is ONNX, for the server's onnxruntime backend. An AOTInductor package would not do: it
updates its state in place, and the server carries state from outputs to inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .contract import Contract
from .driver import Call, Driver
from .formats import Artefact
from .onnx_check import can_run, check_depends, check_interface, check_model, compared
from .onnx_model import onnx_models, require_onnx
from .onnx_portable import MAIN, PREFILL, built, functional_graphs, refuse_bfloat16
from .onnx_served import DECODE_TOKENS, DENSE, POLICY, served
from .onnx_session import load_model
from .onnx_write import write_models
from .triton_config import LAST, TYPES, config, new_name

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..pipeline import Compiled

REPOSITORY = "model_repository"
CONFIG = "config.pbtxt"
# Sequences in one call, where each stands at a position of its own.
BATCH = 8


def emit(folder: Path, compiled: Compiled, source: Path | None) -> Artefact:
    """Writes the format `triton-server`; see `formats.emit_all`."""
    require_onnx()
    contract, graphs = functional_graphs(compiled)
    refuse_bfloat16(contract, graphs[MAIN])
    models = onnx_models(graphs, contract)
    for file, model in models.items():
        check_interface(model, contract, file)
        check_depends(model, contract, file)
    logits = models[MAIN].graph.outputs[0]
    sizes = [size if isinstance(size, int) else None for size in logits.shape or ()]
    kind = _dtype(logits)
    branches = {POLICY: models[MAIN]}
    if PREFILL in models:
        branches[DENSE] = models[PREFILL]
    name = model_name(source)
    version = folder / REPOSITORY / name / "1"
    version.mkdir(parents=True)
    write_models(version, {MAIN: served(branches, contract)})
    check_model(version / MAIN)
    batch = BATCH if contract.lengths is not None else 1
    text = config(name, contract, kind, sizes[1:], batch)
    (version.parent / CONFIG).write_text(text, encoding="utf-8")
    served_contract(contract, DENSE in branches).write(folder)
    notes = [
        f"for tritonserver --model-repository={REPOSITORY}, its onnxruntime backend; clients send "
        "tokens alone, as examples/serving/client.py does",
        "not run under Triton Inference Server here",
    ]
    if DENSE in branches:
        notes.append(f"calls of more than {DECODE_TOKENS} tokens read densely, as prompts are")
    if can_run():
        check_answers(version / MAIN, graphs, contract)
    else:
        notes.append("not run: onnxruntime is not installed here")
    main = f"{REPOSITORY}/{name}/{CONFIG}"
    return Artefact("triton-server", "triton-server", main, built(), tuple(notes))


def model_name(source: Path | None) -> str:
    """What the model is called in its repository: as its file, in letters that a URL takes."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", source.stem if source is not None else "")
    return name.strip(".-") or "model"


def served_contract(contract: Contract, prefill: bool) -> Contract:
    """What `memcompile verify` drives the served model by: every sequence has the same number of
    new tokens, and so few that they read through the policy.

    Args:
        prefill: calls of more tokens read densely.
    """
    most = contract.longest_call
    if prefill:
        most = min(most or DECODE_TOKENS, DECODE_TOKENS)
    state = tuple(replace(tensor, output=new_name(tensor.input)) for tensor in contract.state)
    return replace(contract, lengths=None, state=state, longest_call=most)


def served_call(path: Path, contract: Contract) -> Call:
    """Runs a served model in onnxruntime: the position is a state of it, [batch, 1].

    Args:
        contract: `served_contract`.
    """
    session = load_model(path)
    moved = new_name(contract.position)
    names = [*contract.outputs, LAST, moved]

    def call(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feed = {name: tensor.numpy() for name, tensor in given.items()}
        feed[contract.position] = feed[contract.position][:, None]
        made = session.run(names, feed)
        results = {n: torch.from_numpy(x) for n, x in zip(names, made, strict=True)}
        count = given[contract.tokens].shape[1]
        if not torch.equal(results.pop(moved)[:, 0], given[contract.position] + count):
            raise RuntimeError(f"{path.name}: its position does not go on by the tokens it is fed")
        if not torch.equal(results.pop(LAST), results[contract.logits][:, -1]):
            raise RuntimeError(f"{path.name}: {LAST} are not those of the last token")
        return results

    return call


def check_answers(path: Path, graphs: Mapping[str, fx.GraphModule], contract: Contract) -> float:
    """Runs the served model beside the graphs it was made of: a prompt, then single tokens.

    Returns:
        the largest difference of a logit or a state, as a part of the largest value.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    dense = graphs.get(PREFILL, graphs[MAIN])

    def eager(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = dense if given[contract.tokens].shape[1] > DECODE_TOKENS else graphs[MAIN]
        with torch.no_grad():
            made = graph(*[given[name] for name in contract.inputs])
        return dict(zip(contract.outputs, made, strict=True))

    capacity = None
    if contract.capacity is not None:
        capacity = max(4 * DECODE_TOKENS, contract.capacity.multiple)
    theirs = replace(served_contract(contract, False))
    truth = Driver(contract, eager, batch=2, capacity=capacity)
    made = Driver(theirs, served_call(path, theirs), batch=2, capacity=capacity)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    first = min(2 * DECODE_TOKENS, contract.longest_call or 64, (contract.context or 64) - 4)
    for number, n in enumerate((max(1, first), 1, 2, 1)):
        tokens = torch.randint(contract.vocabulary, (2, n), generator=generator)
        pairs = {contract.logits: (made(tokens), truth(tokens))}
        for tensor in contract.state:
            pairs[tensor.input] = (made.state[tensor.input], truth.state[tensor.input])
        for name, (have, want) in pairs.items():
            error = compared(f"{path.name}: {name}", have, want, f"call {number + 1}")
            worst = max(worst, error)
    return worst


def _dtype(value: ir.Value) -> str:
    """The type of the logits, a key of TYPES."""
    names = {"FLOAT": "float32", "FLOAT16": "float16", "DOUBLE": "float64"}
    kind: Any = value.dtype
    found = names.get(kind.name)
    assert found in TYPES, f"logits of {kind}"
    return found
