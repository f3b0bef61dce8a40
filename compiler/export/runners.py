"""Runs one exported engine here: a function from named inputs to named outputs, a format each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .contract import Contract
from .formats import Artefact

if TYPE_CHECKING:
    from .driver import Call


LIBRARY = "libmemcompile_engine.so"  # of an engine with kernels: the one to load


# Engines that read a prompt densely, by the names that their formats have for them.
PREFILLS = ("prefill.onnx", "prefill.pt2")


class CannotRun(Exception):
    """Why an engine does not run on this machine; no fault of the engine."""


def runner(folder: Path, artefact: Artefact, contract: Contract) -> Call:
    """What runs an engine of `artefact`, in its folder.

    Raises:
        CannotRun: this machine lacks what it needs, or it is none that a contract drives.
        RuntimeError: it should run here and does not load.
    """
    check_drives(artefact, True)
    try:
        return RUNNERS[artefact.format](folder / artefact.main, contract)
    except ImportError as reason:  # onnxruntime is not installed
        raise CannotRun(str(reason)) from None


def check_drives(artefact: Artefact, trust_native: bool) -> None:
    """Whether a contract drives engines of this format here, and may.

    Args:
        trust_native: engines that are native code may run.

    Raises:
        CannotRun: none does, or may not.
    """
    if artefact.format in NATIVE and not trust_native:
        raise CannotRun("it is native code, which can do anything: --trust-native runs it")
    if artefact.format not in RUNNERS:
        usual = f"{artefact.format} engines do not run on this machine"
        raise CannotRun(OTHERS.get(artefact.format, usual))


def has_prefill(folder: Path) -> bool:
    """Whether an engine for prompts lies beside the one for what follows."""
    return any((folder / name).is_file() for name in PREFILLS)


def prefill_runner(
    folder: Path, artefact: Artefact, contract: Contract, weights: Mapping[str, Tensor]
) -> Call | None:
    """What runs the engine that reads prompts densely; None where there is none.

    Args:
        weights: of the model by name; an AOTInductor package for prompts has none of its own.
    """
    onnx, package = (folder / name for name in PREFILLS)
    if onnx.is_file():
        return _onnx(onnx, contract, cuda=artefact.format == CUDA)
    if package.is_file():
        from .inductor import load

        run = load(package, weights)
        return lambda given: dict(
            zip(contract.outputs, run([given[name] for name in contract.inputs]), strict=True)
        )
    return None


def _onnx(path: Path, contract: Contract, cuda: bool = False) -> Call:
    from .onnx_session import load_model

    session = load_model(path, cuda)

    def call(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        feed = {name: tensor.numpy() for name, tensor in given.items()}
        made = session.run(contract.outputs, feed)
        return {
            name: torch.from_numpy(value)
            for name, value in zip(contract.outputs, made, strict=True)
        }

    return call


def _onnx_cuda(path: Path, contract: Contract) -> Call:
    from .onnx_session import has_cuda

    if not has_cuda():
        raise CannotRun("it needs a GPU and onnxruntime with its CUDA provider")
    return _onnx(path, contract, cuda=True)


def _aoti(path: Path, contract: Contract) -> Call:
    library = path.parent / LIBRARY
    if library.exists():
        torch.ops.load_library(library)
    model: Any = torch._inductor.aoti_load_package(str(path))

    def call(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        made = model(*(given[name] for name in contract.inputs))
        return dict(zip(contract.outputs, _flat(made), strict=True))

    return call


def _served(path: Path, contract: Contract) -> Call:
    from .triton_server import served_call

    return served_call(path.parent / "1/model.onnx", contract)


def _flat(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else [*made]


CUDA = "onnx-ort-cuda"
NATIVE = ("aoti", "aoti-portable")
# What is driven otherwise.
OTHERS = {"onnx-genai": "onnxruntime-genai drives it, and no contract"}
RUNNERS: dict[str, Callable[[Path, Contract], Call]] = {
    "aoti": _aoti,
    "aoti-portable": _aoti,
    "onnx": _onnx,
    "onnx-ort": _onnx,
    CUDA: _onnx_cuda,
    # The model that the server runs, not the server.
    "triton-server": _served,
}
