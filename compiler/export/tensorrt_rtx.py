"""TensorRT-RTX engines, built without a GPU for the ones they are to run on: `--emit tensorrt-rtx`.

`model.plan` is the step through the policy; `prefill.plan`, where the policy chooses what it reads,
the same step reading everything. Both have the contract of `state.json`; weights are inside.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contract import Contract
from .formats import Artefact, this_machine
from .onnx_portable import MAIN, PREFILL
from .tensorrt_build import Sizes, build, find, input_shapes, models_of, sizes_for
from .tensorrt_onnx import write_inlined

if TYPE_CHECKING:
    from ..pipeline import Compiled

# What TensorRT-RTX builds for ahead of time; it knows no SM90.
CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
PLAN = ".plan"
# True of every engine of a contract that passes its state in and out.
STATE_NOTE = (
    "state is passed in and out: TensorRT does not promise to update a cache in place, so a call "
    "writes all of it anew; give it two sets of buffers and swap them"
)


def emit(folder: Path, compiled: Compiled, source: Path | None) -> Artefact:
    """Writes the format `tensorrt-rtx`; see `formats.emit_all`."""
    trt = find("tensorrt-rtx")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        models = Path(scratch)
        contract = write_inlined(models, compiled)
        sizes = build_plans(folder, models, contract, trt, CAPABILITIES)
    contract.write(folder)
    notes = [
        "built, not run: an engine can only be loaded where there is a GPU",
        f"for compute capabilities {', '.join(CAPABILITIES)}",
        f"for {ranges(sizes)}",
        STATE_NOTE,
    ]
    if (folder / PREFILL).with_suffix(PLAN).exists():
        notes.append("feed prompts to prefill.plan, which reads everything, the rest to model.plan")
    made = {**this_machine(), "tensorrt_rtx": trt.__version__, "capabilities": [*CAPABILITIES]}
    main = Path(MAIN).with_suffix(PLAN).name
    return Artefact("tensorrt-rtx", "tensorrt-rtx", main, made, tuple(notes))


def build_plans(
    folder: Path, models: Path, contract: Contract, trt: Any, capabilities: tuple[str, ...] = ()
) -> Sizes:
    """Writes an engine of each model to `folder`, and returns the sizes they are for."""
    told = contract.to_json()
    for path in models_of(models):
        sizes = sizes_for(told, whole=path.name == PREFILL)
        engine = build(trt, path, input_shapes(told, sizes), capabilities)
        (folder / path.name).with_suffix(PLAN).write_bytes(engine)
    return sizes


def ranges(sizes: Sizes) -> str:
    """The sizes in words."""
    held = "" if sizes.capacity is None else f", a capacity of up to {sizes.capacity.max} tokens"
    return f"1 to {sizes.batch.max} sequences, 1 to {sizes.call.max} tokens of each in a call{held}"
