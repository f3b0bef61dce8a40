"""The folder a compiled model is kept in: written whole or not at all, checked when opened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..models.memory import preset_from_json
from .archive import one_line, read_program, rewrite
from .claims import check_claims
from .export.formats import emit_all
from .folder import tokenizer_files
from .manifest import (
    FORMAT,
    MANIFEST,
    PAGE,
    PROGRAM,
    REPORT,
    VERSION,
    WEIGHTS,
    all_facts,
    is_package,
    own_version,
    read_manifest,
)
from .policy_file import FittedPolicy, check_named, read_policy, write_policy

if TYPE_CHECKING:
    from ..models.memory import Preset
    from ..runtime.engine import Engine
    from .capture import Captured
    from .export.targets import Binaries
    from .pipeline import Compiled
    from .report import Report

_POLICY = "policy.safetensors"
KERNELS = "kernels"  # folder of binaries for other machines


def write(
    out: str | Path,
    compiled: Compiled,
    *,
    source: Path | None = None,
    force: bool = False,
    emit: Sequence[str] = (),
    binaries: Sequence[Binaries] = (),
) -> Path:
    """Writes a compiled model to the folder `out`, which appears complete or not at all.

    Args:
        out: the folder; its parent must exist.
        compiled: what `pipeline.build` returned.
        source: the folder the model came from; the files of its tokenizer are copied.
        force: replace `out` if it is a folder that memcompile wrote. The old one stays until the
            new one is complete.
        emit: formats to export it in as well, keys of `export.formats.FORMATS`.
        binaries: kernels for other machines (see `export.targets`), which go to `kernels/`.

    Raises:
        FileExistsError: `out` exists, and `force` is not given or it holds something else.
        FileNotFoundError: the parent of `out` does not exist.
        NotRewritten, ImportError, RuntimeError: as `export.formats.emit_all`.
        ValueError: there is no engine to write, or a weight cannot be written.
    """
    out = Path(out)
    if compiled.program is None or compiled.captured is None:
        raise ValueError("nothing was rewritten, so there is no engine to write; see its declines")
    check_named(compiled.preset, "a folder", "compile the model where it is used")
    _place(out, force, lambda folder: _fill(folder, compiled, source, emit, binaries))
    return out


def write_refusal(out: str | Path, report: Report, *, force: bool = False) -> Path:
    """Writes the report of a model that was refused, as a folder without an engine.

    Raises:
        FileExistsError, FileNotFoundError: as `write`.
    """
    out = Path(out)

    def fill(folder: Path) -> None:
        _fill_report(folder, report)
        files = all_facts(folder)
        about = {"format": FORMAT, "version": VERSION, "memcompile": own_version()}
        manifest = {**about, "model": report.model, "refused": True, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    _place(out, force, fill)
    return out


def _place(out: Path, force: bool, fill: Callable[[Path], None]) -> None:
    """Fills a new folder beside `out` and puts it in its place."""
    check_target(out, force)
    target = out.resolve()
    # Beside the target, so that renaming never crosses file systems.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        fill(new)
        check_target(out, force)
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            # An interrupt, too, may come between the two: what is in `scratch` goes with it.
            if old.exists() and not target.exists():
                old.rename(target)
            raise


def check_target(out: Path, force: bool) -> None:
    """Refuses a folder that must not be written; cheap, so that it can be asked before the work.

    Raises:
        FileExistsError: it exists, and `force` is not given or memcompile did not write it.
        FileNotFoundError: its parent does not exist.
        PermissionError: nothing may be written in its parent.
    """
    parent = out.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{out}: its parent folder does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{out}: not allowed to write in {parent}; give another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise FileExistsError(f"{out}: already exists and is kept; give --force to replace it")
    if not is_package(out):
        raise FileExistsError(
            f"{out}: not a folder that memcompile wrote, so it is kept even with --force; give "
            "another --out"
        )


@dataclass(frozen=True)
class Package:
    """What a folder holds that memcompile wrote.

    Attributes:
        captured: the program with its weights.
        preset: the policy it was compiled with, and what was fitted for it.
        max_context: as for `build`.
        sites: the attentions that were found then, as JSON values.
        version: of the memcompile that wrote it.
        sha256: fingerprint of program and weights.
    """

    captured: Captured
    preset: Preset
    max_context: int | None
    sites: list[Any]
    version: str
    sha256: str


def read(path: str | Path) -> Package:
    """Reads the folder `path`; nothing in it is executed, the program is checked as any archive.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: a file was changed or cut off, or another version wrote it.
    """
    from .capture import Captured

    folder = Path(path)
    manifest = read_manifest(folder)
    try:
        chosen = preset_from_json(manifest["policy"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged: its 'policy': {error}") from error
    if _POLICY in manifest["files"]:
        fitted = read_policy(folder / _POLICY)
        if fitted.base != chosen:
            raise ValueError(
                f"{folder / _POLICY}: fitted for {fitted.to_json()}, where {MANIFEST} says "
                f"{chosen.to_json()}: damaged"
            )
        chosen = fitted
    program = read_program(folder / PROGRAM)
    _pour(program, folder / WEIGHTS, manifest["weights"])
    try:
        check_claims(program)
    except ValueError as error:
        raise ValueError(f"{folder / PROGRAM}: {error}") from error
    files = (manifest["files"][name]["sha256"] for name in (PROGRAM, WEIGHTS))
    return Package(
        Captured(program, manifest["takes_position_ids"], manifest["model"]),
        chosen,
        manifest["max_context"],
        manifest["sites"],
        manifest["memcompile"],
        hashlib.sha256("".join(files).encode()).hexdigest(),
    )


def open_engine(path: str | Path, kernels: str | None = None) -> Engine:
    """The engine kept in the folder `path`, empty, as if it had just been compiled.

    Args:
        kernels: as for `build`.

    Raises:
        FileNotFoundError, ValueError: as `read`.
    """
    return open_compiled(path, kernels).engine()


def open_compiled(path: str | Path, kernels: str | None = None) -> Compiled:
    """The compiled model kept in the folder `path`; see `open_engine`."""
    from .pipeline import build_captured

    package = read(path)
    compiled = build_captured(
        package.captured,
        package.preset,
        max_context=package.max_context,
        strict=True,
        check=False,  # checked when it was compiled; the files are the same to the bit
        kernels=kernels,
    )
    if [site.to_json() for site in compiled.sites] != package.sites:
        raise ValueError(
            f"{path}: memcompile {own_version()} finds other attentions in it than memcompile "
            f"{package.version}, which wrote it; compile the model again"
        )
    return compiled


def _fill(
    folder: Path,
    compiled: Compiled,
    source: Path | None,
    emit: Sequence[str],
    binaries: Sequence[Binaries],
) -> None:
    captured = compiled.captured
    assert compiled.program is not None and captured is not None
    weights = {**captured.program.state_dict, **captured.program.constants}
    stored, layout = _pack(weights)
    _save_tensors(stored, folder / WEIGHTS)
    _save_program(captured.program, folder / PROGRAM)
    if isinstance(compiled.preset, FittedPolicy):
        write_policy(folder / _POLICY, compiled.preset)
    _fill_report(folder, compiled.report)
    for file in tokenizer_files(source) if source is not None and source.is_dir() else []:
        shutil.copyfile(file, folder / file.name)
    if binaries:
        from .export.kernel_folder import write_kernels

        write_kernels(folder / KERNELS, binaries)
    artefacts = emit_all(folder, compiled, emit, source)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "memcompile": own_version(),
        "torch": torch.__version__,
        "model": captured.name,
        "takes_position_ids": captured.takes_position_ids,
        "policy": compiled.preset.to_json(),
        "max_context": compiled.program.max_context,
        "sites": [site.to_json() for site in compiled.sites],
        "weights": layout,
        "artefacts": [artefact.to_json() for artefact in artefacts],
        "files": all_facts(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _fill_report(folder: Path, report: Report) -> None:
    from .report_html import render

    (folder / REPORT).write_text(json.dumps(report.to_json(), indent=1) + "\n")
    (folder / PAGE).write_text(render(report, version=own_version()), encoding="utf-8")


def _save_program(program: ExportedProgram, path: Path) -> None:
    """Saved as it will be read: what could not be opened again is found now."""
    raw = path.with_suffix(".raw.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it finds placeholders odd
        torch.export.save(_hollow(program), raw)
    try:
        rewrite(raw, path, traces=False)
    except ValueError as error:
        raise ValueError(f"the program cannot be kept: {error}") from error
    finally:
        raw.unlink(missing_ok=True)


def _hollow(program: ExportedProgram) -> ExportedProgram:
    """The program with one element in place of each weight: its archive is the graph alone."""

    def placeholder(tensor: Tensor) -> Tensor:
        # An expanded empty tensor would claim a storage that it does not cover.
        one = torch.zeros((), dtype=tensor.dtype)
        empty = one.expand(tensor.shape) if tensor.numel() else one.new_zeros(tensor.shape)
        return (
            nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        )

    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict={name: placeholder(t) for name, t in program.state_dict.items()},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=None,
        constants={
            name: placeholder(value) if isinstance(value, Tensor) else value
            for name, value in program.constants.items()
        },
        verifiers=[program.verifier],
    )


def _pack(weights: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as safetensors keeps them (each once, contiguous, real) and what undoes that."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    strides: dict[str, list[int]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            kind = type(tensor).__name__
            raise ValueError(f"weight {name!r} is a {kind}; only dense tensors can be written")
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        if not tensor.is_contiguous():
            strides[name] = list(tensor.stride())
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        stored[name] = real.cpu().contiguous()
    return stored, {"aliases": aliases, "strides": strides}


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # Tensors may still share storage (slices of one): each gets bytes of its own.
        save_file({name: _alone(tensor) for name, tensor in tensors.items()}, path)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"the weights cannot be written as safetensors: {one_line(error)}"
        ) from error


def _alone(tensor: Tensor) -> Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _pour(program: ExportedProgram, path: Path, layout: Mapping[str, Any]) -> None:
    """Puts the weights back in place of their placeholders."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged: {one_line(error)}") from error
    made: dict[str, Tensor] = {}
    for places in (program.state_dict, program.constants):
        for name, hollow in places.items():
            origin = layout["aliases"].get(name, name)
            if origin not in made:
                if origin not in stored:
                    raise ValueError(f"{path}: holds no weight {origin!r}, which the program needs")
                made[origin] = _restored(stored.pop(origin), hollow, layout["strides"].get(origin))
            weight = made[origin]
            if weight.shape != hollow.shape or weight.dtype != hollow.dtype:
                raise ValueError(
                    f"{path}: {name!r} is {list(weight.shape)} {weight.dtype}; the program expects "
                    f"{list(hollow.shape)} {hollow.dtype}"
                )
            places[name] = weight
    if stored:
        raise ValueError(f"{path}: holds {sorted(stored)[:3]}, which the program does not use")


def _restored(tensor: Tensor, hollow: Tensor, strides: list[int] | None) -> Tensor:
    if hollow.is_complex():
        tensor = torch.view_as_complex(tensor)
    # Strides of overlapping tensors (expanded ones) have no room for values of their own.
    if strides is not None and 0 not in strides:
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
    tensor = tensor.to(hollow.device)
    return nn.Parameter(tensor, requires_grad=False) if isinstance(hollow, nn.Parameter) else tensor
