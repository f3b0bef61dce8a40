"""Load: a file or folder, told by content, as a module or exported program; nothing of it runs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import pickle
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..models.memory.names import known
from .archive import load_program, one_line, open_zip, read_program
from .arguments import nearest_path
from .claims import check_claims
from .folder import load_folder, tokenizer_folder, weight_files
from .signature import check_program
from .sniff import Found, pickled_names, sniff

__all__ = ["Loaded", "check_program", "load"]

_EXPECTED = (
    "expected a transformers folder, a .pt2 of torch.export.save, a state dict with --arch, or a "
    "safetensors file with --arch"
)
DTYPES = ("float32", "float16", "bfloat16")
_NESTED = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Loaded:
    """A model as it came from disk.

    Attributes:
        kind: "transformers", "exported", "state-dict" or "module" (unpickled, trusted).
        path: the file or folder.
        module: the module in eval mode; None for an exported program.
        program: the exported program; None for the others.
        tokenizer: the folder that holds the model's tokenizer, or None; a file has none, what lies
            beside it may belong to another model.
    """

    kind: str
    path: Path
    module: nn.Module | None = None
    program: ExportedProgram | None = None
    tokenizer: Path | None = None

    @property
    def model(self) -> nn.Module | ExportedProgram:
        """The module or the program, whichever there is."""
        model = self.module if self.module is not None else self.program
        assert model is not None
        return model

    @property
    def name(self) -> str:
        """Class of the module, or the file's name."""
        return type(self.module).__name__ if self.module is not None else self.path.stem

    @cached_property
    def sha256(self) -> str:
        """Fingerprint: of the file, or of config.json and the weights of a folder."""
        files = weight_files(self.path) if self.path.is_dir() else [self.path]
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def load(
    path: str | Path,
    *,
    trust_pickle: bool = False,
    arch: str | None = None,
    arch_config: str | PathLike[str] | Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Loaded:
    """Loads a model; what it is is told by content, never by the suffix.

    Args:
        path: a transformers folder; an export archive; a state dict (torch.save or safetensors);
            with `trust_pickle`, a pickled module.
        trust_pickle: unpickle objects, which runs whatever code the file holds.
        arch: ``module:Class`` to load a state dict into. Its module is imported, from the working
            directory too.
        arch_config: keyword arguments of that class, or the JSON file that holds them.
        dtype: "float32", "float16" or "bfloat16", what its weights are converted to; None: as they
            are.

    Raises:
        FileNotFoundError, PermissionError: the path, or a part of the model, cannot be read.
        ValueError: the file is something else, is damaged, cannot be compiled, or would run code;
            or transformers is needed and not installed.
    """
    path = Path(path)
    if dtype is not None:
        known("dtype", dtype, DTYPES)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: there is no such file or folder{nearest_path(path)}; {_EXPECTED}"
        )
    if path.is_dir():
        if arch is not None:
            raise ValueError(f"{path}: --arch goes with a state dict, and this is a folder")
        module = load_folder(path, dtype or "auto")
        return Loaded("transformers", path, module=module, tokenizer=tokenizer_folder(path))
    if not path.is_file():
        raise ValueError(f"{path}: neither a file nor a folder; {_EXPECTED}")
    try:
        found = sniff(path)
    except PermissionError as error:
        raise PermissionError(f"{path}: not allowed to read this file") from error
    if found.kind == "export":
        if arch is not None:
            raise ValueError(f"{path}: --arch goes with a state dict, and this is {found.words}")
        if dtype is not None:
            raise ValueError(
                f"{path}: --dtype {dtype}: an exported program computes in the types it was "
                "exported with; convert the module and export it again"
            )
        return Loaded("exported", path, program=_program(path, trust_pickle))
    if found.kind == "foreign":
        raise ValueError(f"{path}: {found.words}; {_EXPECTED}")
    held = (
        _safetensors(path) if found.kind == "safetensors" else _unpickled(path, found, trust_pickle)
    )
    if isinstance(held, nn.Module):
        return Loaded("module", path, module=_converted(held, dtype).eval())
    tensors = _state_dict(held, path, found)
    if arch is None:
        raise ValueError(
            f"{path}: a state dict ({len(tensors)} tensors) without the model it belongs to; pass "
            "--arch module:Class and --arch-config FILE.json"
        )
    module = _construct(arch, arch_config)
    _fill(module, tensors, path, arch)
    return Loaded("state-dict", path, module=_converted(module, dtype).eval())


def _converted(module: nn.Module, dtype: str | None) -> nn.Module:
    """The module with its weights in another type; tables that are no weights keep theirs, since
    positions in 16 bit are not what they were in 32."""
    if dtype is not None:
        for tensor in module.state_dict(keep_vars=True).values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.data = tensor.data.to(getattr(torch, dtype))
    return module


def _program(path: Path, trust_pickle: bool) -> ExportedProgram:
    try:
        program = read_program(path)
    except ValueError:
        if not trust_pickle:
            raise
        try:
            program = load_program(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    try:
        check_program(program)
        check_claims(program)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return program


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: a damaged or truncated safetensors file: {one_line(error)}"
        ) from error


def _unpickled(path: Path, found: Found, trust_pickle: bool) -> Any:
    """What torch.save wrote, tensors and plain containers only unless the pickle is trusted."""
    if found.kind == "torch-save":
        try:
            if zipfile.is_zipfile(path):
                with open_zip(path):
                    pass
            return _torch_load(path, weights_only=True)
        except pickle.UnpicklingError as error:
            refusal: Exception = error
        except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}: {found.words}, damaged: {one_line(error)}") from error
        if not trust_pickle:
            raise _refused(path, found) from refusal
    elif not trust_pickle:
        raise _refused(path, found)
    try:
        if found.kind == "torch-save":
            held = _torch_load(path, weights_only=False)
        else:
            with path.open("rb") as stream:
                held = pickle.load(stream)
    except Exception as error:  # unpickling runs foreign code, which raises what it likes
        raise ValueError(
            f"{path}: {found.words} that cannot be unpickled here: {one_line(error)}"
        ) from error
    if isinstance(held, nn.Module | Mapping):
        return held
    raise ValueError(
        f"{path}: {found.words} with a {type(held).__name__}, not a module; {_EXPECTED}"
    )


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    # Given a name, torch would go by its suffix.
    with path.open("rb") as stream:
        return torch.load(stream, map_location="cpu", weights_only=weights_only)


def _refused(path: Path, found: Found) -> ValueError:
    names = ", ".join(_names_inside(path)) or "unknown"
    return ValueError(
        f"{path}: {found.words} with Python objects inside ({names}), such as a pickled nn.Module; "
        "unpickling runs code from the file, so it is refused: save model.state_dict() and pass "
        "--arch, or use torch.export.save, or pass --trust-pickle if you trust whoever made it"
    )


def _names_inside(path: Path) -> list[str]:
    stream: IO[bytes]
    if zipfile.is_zipfile(path):
        with contextlib.suppress(ValueError), open_zip(path) as archive:
            for name in archive.namelist():
                if name.split("/")[1:] == ["data.pkl"]:
                    with archive.open(name) as stream:
                        return pickled_names(stream)
        return []
    names: dict[str, None] = {}
    with path.open("rb") as stream:
        for _ in range(8):  # the legacy format is several pickles in a row
            names.update(dict.fromkeys(pickled_names(stream)))
    return list(names)[:4]


def _state_dict(held: Any, path: Path, found: Found) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefixes that wrappers add."""
    if isinstance(held, Mapping):
        nested = [held[key] for key in _NESTED if isinstance(held.get(key), Mapping)]
        candidate = held if _all_tensors(held) else nested[0] if len(nested) == 1 else {}
        if candidate and _all_tensors(candidate):
            tensors = {str(name): tensor for name, tensor in candidate.items()}
            for prefix in _WRAPPERS:
                if all(name.startswith(prefix) for name in tensors):
                    tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
            return tensors
        keys = ", ".join(repr(key) for key in list(held)[:5]) or "nothing"
        what = f"a dict of {keys}"
    else:
        what = f"a {type(held).__name__}"
    raise ValueError(
        f"{path}: {found.words} with {what}; expected a state dict (names to tensors), bare or "
        f"under one of {', '.join(_NESTED)}"
    )


def _all_tensors(held: Mapping[Any, Any]) -> bool:
    return bool(held) and all(isinstance(value, Tensor) for value in held.values())


def _construct(arch: str, arch_config: str | PathLike[str] | Mapping[str, Any] | None) -> nn.Module:
    """Imports ``module:Class`` and calls it with the config's entries."""
    name, colon, attributes = arch.partition(":")
    words = [*name.split("."), *attributes.split(".")]
    if not colon or not all(word.isidentifier() for word in words):
        raise ValueError(f"--arch {arch!r}: expected module:Class, as in my_model:Decoder")
    config = _arch_config(arch_config)
    # A console script does not see the working directory; last, so that it shadows nothing.
    here = str(Path.cwd())
    unseen = here not in sys.path
    if unseen:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # the module is the user's, and raises what it likes
        raise ValueError(
            f"--arch {arch!r}: cannot import {name!r}: {one_line(error)}; run it from the folder "
            "that holds the module, or put that on PYTHONPATH"
        ) from error
    finally:
        if unseen:
            sys.path.remove(here)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            classes = [n for n, v in vars(found).items() if isinstance(v, type)]
            raise ValueError(f"--arch {arch!r}: no {attribute!r} in it; its classes are {classes}")
        found = getattr(found, attribute)
    try:
        module = found(**config)
    except TypeError as error:
        raise ValueError(f"--arch {arch!r}: {one_line(error)}; given were {config}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"--arch {arch!r}: made a {type(module).__name__}, expected a torch.nn.Module"
        )
    return module


def _arch_config(config: str | PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such config file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged JSON: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object of keyword arguments")
    return data


def _fill(module: nn.Module, tensors: dict[str, Tensor], path: Path, arch: str) -> None:
    """load_state_dict, strict, in the data type of the checkpoint and not of the constructor."""
    own = module.state_dict(keep_vars=True)
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    faults = []
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            faults.append(f"{len(names)} {what} ({', '.join(names[:3])})")
    for name in sorted(shapes)[:3]:
        faults.append(f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}")
    if faults:
        raise ValueError(f"{path}: the state dict does not fit {arch}: {'; '.join(faults)}")
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor.dtype != tensors[name].dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)
    module.load_state_dict(tensors)
