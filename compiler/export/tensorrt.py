"""TensorRT: an engine where there is a GPU, elsewhere all that one needs: `--emit tensorrt`.

With torch-tensorrt and a GPU, `model.plan` and perhaps `prefill.plan`, as `tensorrt-rtx` has them.
Without, a recipe: the inlined ONNX models that TensorRT's parser takes, the same with their memory
operations as nodes, plug-ins for these, and two ways to build, `build.sh` by trtexec and `build.py`
by TensorRT's Python module.
"""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ...models import portable
from ..archive import one_line
from . import tensorrt_build
from .contract import Contract
from .formats import Artefact, this_machine
from .onnx_model import device_of, example
from .onnx_portable import MAIN, PREFILL, built, functional_graphs
from .plugin_folder import write_plugins
from .tensorrt_build import Sizes, flags, input_shapes, models_of, sizes_for
from .tensorrt_onnx import check_lists, write_inlined
from .tensorrt_rtx import PLAN, STATE_NOTE, build_plans, ranges

if TYPE_CHECKING:
    from ..pipeline import Compiled

NODES = ".nodes.onnx"
PLUGINS = "plugins"
# What a recipe's plug-ins have kernels for; PTX of sm_90 and later is for that architecture alone.
TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120")


def emit(folder: Path, compiled: Compiled, source: Path | None) -> Artefact:
    """Writes the format `tensorrt`; see `formats.emit_all`."""
    if can_build():
        return write_engines(folder, compiled)
    return write_recipe(folder, compiled)


def can_build() -> bool:
    """Whether TensorRT and a GPU are here."""
    found = find_spec("torch_tensorrt") is not None
    return found and torch.cuda.is_available()


# --- with a GPU ---


def write_engines(folder: Path, compiled: Compiled) -> Artefact:
    """Engines of standard operators, by torch-tensorrt.

    What it does not convert, TensorRT's ONNX parser reads; the notes then say why.

    Raises:
        NotRewritten: a memory that has no portable form.
        RuntimeError: an operator that neither takes.
        ValueError: lists of pages that are longer than TensorRT can choose.
    """
    try:
        return _converted(folder, compiled)
    except RuntimeError as error:
        reason = one_line(error)
    for path in folder.iterdir():
        path.unlink()
    trt = tensorrt_build.find("tensorrt")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        contract = write_inlined(Path(scratch), compiled)
        sizes = build_plans(folder, Path(scratch), contract, trt)
    contract.write(folder)
    way = f"by TensorRT's ONNX parser, since torch-tensorrt did not convert the model: {reason}"
    return _engines(folder, sizes, way, {"tensorrt": trt.__version__})


def _engines(folder: Path, sizes: Sizes, way: str, versions: dict[str, str]) -> Artefact:
    notes = [
        "built, not run",
        f"for {torch.cuda.get_device_name()} and no other kind of GPU",
        f"for {ranges(sizes)}",
        way,
        STATE_NOTE,
    ]
    if (folder / PREFILL).with_suffix(PLAN).exists():
        notes.append("feed prompts to prefill.plan, which reads everything, the rest to model.plan")
    main = Path(MAIN).with_suffix(PLAN).name
    return Artefact("tensorrt", "tensorrt", main, {**this_machine(), **versions}, tuple(notes))


def _converted(folder: Path, compiled: Compiled) -> Artefact:
    """Engines by torch-tensorrt."""
    import torch_tensorrt

    contract, graphs = functional_graphs(compiled)
    check_lists(graphs.values())
    # torch-tensorrt numbers the outputs.
    outputs = {name: f"output{number}" for number, name in enumerate(contract.outputs)}
    named = renamed(contract, outputs)
    told = contract.to_json()
    for name, graph in graphs.items():
        sizes = sizes_for(told, whole=name == PREFILL)
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            standard_program(graph, contract),
            arg_inputs=inputs_of(torch_tensorrt, contract, input_shapes(told, sizes)),
            require_full_compilation=True,
            disable_tf32=True,
        )
        check_names(engine, named)
        (folder / name).with_suffix(PLAN).write_bytes(engine)
    named.write(folder)
    version = torch_tensorrt.__version__
    return _engines(folder, sizes, "by torch-tensorrt", {"torch_tensorrt": version})


def standard_program(graph: fx.GraphModule, contract: Contract) -> ExportedProgram:
    """The graph in operators that torch-tensorrt converts, sizes symbolic."""
    given, axes = example(contract, device_of(graph))
    program = torch.export.export(graph, tuple(given), dynamic_shapes=tuple(axes))
    texts = {
        **torch.export.default_decompositions(),
        **portable.TEXTS,
        # It takes one index, and no sort of more than 3840.
        portable.operator("put_rows"): _put_rows,
        portable.operator("largest"): _largest,
    }
    standard: ExportedProgram = program.run_decompositions(texts)
    return standard


def _put_rows(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    batch, heads, rows = cache.shape[:3]
    first = torch.arange(batch * heads, device=at.device).view(batch, heads, 1) * rows
    whole = (at[:, None] + first).flatten()
    written = new.to(cache.dtype).flatten(0, 2)
    return torch.index_put(cache.flatten(0, 2), (whole,), written).view(cache.shape)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # torch-tensorrt ranks in float32 and gives that; pages are exact in it up to 2**24.
    values, order = torch.topk(scores.to(torch.float32), count, -1)
    return values.to(scores.dtype), order


def inputs_of(
    torch_tensorrt: Any, contract: Contract, shapes: Mapping[str, Sequence[Sequence[int]]]
) -> list[Any]:
    """torch-tensorrt's description of each input, in order."""
    dtypes = {contract.tokens: torch.int64}
    dtypes.update({tensor.input: tensor.torch_dtype for tensor in contract.state})
    return [
        torch_tensorrt.Input(
            min_shape=shapes[name][0],
            opt_shape=shapes[name][1],
            max_shape=shapes[name][2],
            dtype=dtypes.get(name, torch.int32),
            name=name,
        )
        for name in contract.inputs
    ]


def renamed(contract: Contract, outputs: Mapping[str, str]) -> Contract:
    """The contract of an engine that calls its outputs otherwise."""
    state = tuple(dataclasses.replace(t, output=outputs[t.output]) for t in contract.state)
    return dataclasses.replace(contract, logits=outputs[contract.logits], state=state)


def check_names(engine: bytes, contract: Contract) -> None:
    """Whether an engine has the inputs and outputs of its contract.

    Raises:
        RuntimeError: one is missing, or there is another.
    """
    trt = tensorrt_build.find("tensorrt")
    loaded = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine)
    if loaded is None:
        raise RuntimeError("the engine that was just built cannot be loaded")
    have = {loaded.get_tensor_name(number) for number in range(loaded.num_io_tensors)}
    wanted = {*contract.inputs, *contract.outputs}
    if have != wanted:
        raise RuntimeError(
            f"the engine lacks {sorted(wanted - have)} of its contract, and has "
            f"{sorted(have - wanted)} too"
        )


# --- without one ---


def write_recipe(folder: Path, compiled: Compiled) -> Artefact:
    """All that engines are built from where there is TensorRT."""
    contract = write_inlined(folder, compiled, NODES)
    (folder / "build.py").write_bytes(Path(tensorrt_build.__file__).read_bytes())
    script = folder / "build.sh"
    script.write_text(build_script(contract, [path.name for path in models_of(folder)]))
    script.chmod(0o755)
    notes = [
        "a recipe, not built: there is no TensorRT with a GPU here; build.sh or build.py makes the "
        "engines where there is",
        "nothing of it ran under TensorRT",
        f"build.sh is for {ranges(sizes_for(contract.to_json()))}; build.py --help says how to "
        "change that",
        plugins_of(folder, contract),
        STATE_NOTE,
    ]
    return Artefact("tensorrt", "tensorrt", MAIN, built(), tuple(notes))


def plugins_of(folder: Path, contract: Contract) -> str:
    """Writes plug-ins for the memory nodes that can be one, and says which those are."""
    kept = f"*{NODES} keep the memory operations as nodes"
    if find_spec("triton") is None:
        return f"{kept}; there are no plug-ins for them, since triton is not installed here"
    place = folder / PLUGINS
    place.mkdir()
    room = contract.capacity.tokens if contract.capacity else None
    nodes = models_of(folder, nodes=True)
    made = write_plugins(place, nodes, TARGETS, contract.context or room).made
    if not made:
        return f"{kept}; none of them can be a plug-in, see {PLUGINS}/plugins.json"
    return f"{kept}; build.py --plugins builds {', '.join(made)} as plug-ins (PTX, never run)"


def build_script(contract: Contract, models: Sequence[str]) -> str:
    """`build.sh`: one line of trtexec a model."""
    told = contract.to_json()
    lines = [
        "#!/bin/sh",
        "# Builds the engines with trtexec, which comes with TensorRT (10 or newer).",
        "# Options given to this script are given to trtexec.",
        "set -e",
        'cd "$(dirname "$0")"',
    ]
    for name in models:
        shapes = input_shapes(told, sizes_for(told, whole=name == PREFILL))
        plan = Path(name).with_suffix(PLAN).name
        options = [
            f"--onnx={name}",
            f"--saveEngine={plan}",
            # Types are those of the model, and float32 products stay float32.
            "--stronglyTyped",
            "--noTF32",
            "--skipInference",
            *flags(shapes),
        ]
        lines.append(" \\\n  ".join(["trtexec", *(shlex.quote(o) for o in options), '"$@"']))
    return "\n".join(lines) + "\n"
