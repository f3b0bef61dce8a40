"""The formats that engines are exported in, and how an artefact is told of in the manifest."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import closest
from ..progress import doing

if TYPE_CHECKING:
    from ..pipeline import Compiled


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        module: of this folder, with `emit(folder, compiled, source)`; imported when it is asked
            for, so that a format's libraries need only be there for those who want it.
        about: one line for the help.
    """

    module: str
    about: str


FORMATS: dict[str, Format] = {
    "aoti": Format("aoti", "AOTInductor package with our kernels in libraries beside it"),
    "aoti-portable": Format("aoti_portable", "AOTInductor package that needs torch alone"),
    "onnx": Format("onnx_portable", "ONNX model that any onnxruntime runs"),
    "onnx-ort": Format("onnx_ort", "ONNX model with onnxruntime's own fused operators"),
    "onnx-ort-cuda": Format("onnx_ort_cuda", "the same for its CUDA provider, with a sparse read"),
    "onnx-genai": Format("onnx_genai", "ONNX model and files for onnxruntime-genai"),
    "tensorrt": Format("tensorrt", "TensorRT engine, or the recipe for one where no GPU is"),
    "tensorrt-rtx": Format("tensorrt_rtx", "TensorRT-RTX engine, built without a GPU"),
    "triton-server": Format("triton_server", "model repository for NVIDIA Triton Inference Server"),
}


@dataclass(frozen=True)
class Artefact:
    """One exported engine in a folder that memcompile wrote.

    Attributes:
        format: a key of FORMATS.
        folder: its folder, inside the written one.
        main: the file in it that a runtime is given.
        built: where it was built: machine, versions.
        notes: what its user has to know: what it needs, what is unverified.
        run, verified: None, or when and where it ran, and was found equal to eager
            (`memcompile verify`).
    """

    format: str
    folder: str
    main: str
    built: dict[str, Any]
    notes: tuple[str, ...] = ()
    run: dict[str, Any] | None = None
    verified: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: Any) -> Artefact:
        """Rebuilds it from `to_json`.

        Raises:
            ValueError: it is damaged.
        """
        try:
            made = cls(**{**data, "notes": tuple(data["notes"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"damaged: an artefact is {data!r:.120}") from error
        names = (made.format, made.folder, made.main)
        plain = all(isinstance(name, str) and name for name in names)
        if not plain or made.format not in FORMATS or Path(made.folder).name != made.folder:
            raise ValueError(f"damaged: an artefact is {data!r:.120}")
        return made


def known_formats(names: Sequence[str]) -> list[str]:
    """The formats asked for, each once.

    Raises:
        ValueError: one is unknown; the known ones are listed.
    """
    for name in names:
        if name not in FORMATS:
            near = closest(name, FORMATS)
            guess = f" Did you mean {near!r}?" if near is not None else ""
            raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}.{guess}")
    return list(dict.fromkeys(names))


def emit_all(
    folder: Path, compiled: Compiled, formats: Sequence[str], source: Path | None
) -> list[Artefact]:
    """Writes each format to a folder of its name in `folder`.

    Args:
        source: the folder the model came from, for the files of its tokenizer.

    Raises:
        ValueError: an unknown format.
        NotRewritten: the memory cannot be exported in a format; the reason is said.
        ImportError: a format's library is not installed; the message names the extra.
        RuntimeError: what was made is not what it must be: state would be lost, say.
    """
    made = []
    for name in known_formats(formats):
        with doing(f"export {name}"):
            place = folder / name
            place.mkdir()
            made.append(emitter(name)(place, compiled, source))
    return made


def emitter(name: str) -> Callable[[Path, Compiled, Path | None], Artefact]:
    """The function that writes a format."""
    module = importlib.import_module(f".{FORMATS[name].module}", __package__)
    found: Callable[[Path, Compiled, Path | None], Artefact] = module.emit
    return found


def this_machine() -> dict[str, Any]:
    """Where something was built or ran."""
    import torch

    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
