"""Builds TensorRT engines of exported ONNX models: `python build.py --help`.

Needs `tensorrt` or `tensorrt_rtx` and nothing else: recipes carry a copy of this file, to run on
machines that have no memcompile.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BATCH = 4  # most sequences of one call
CALL = 512  # most tokens of one call, where the engine itself takes any number
OFTEN = 4096  # tokens of capacity that kernels are chosen for

# Where each of them can be had.
MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}


class Range(NamedTuple):
    """Smallest and largest size, and the one that kernels are chosen for."""

    min: int
    opt: int
    max: int


class Sizes(NamedTuple):
    """What an engine is built for.

    Attributes:
        batch: sequences.
        call: new tokens a sequence.
        capacity: tokens that the growing state has room for; None where nothing grows.
    """

    batch: Range
    call: Range
    capacity: Range | None


def sizes_for(
    contract: Mapping[str, Any],
    *,
    batch: int | None = None,
    call: int | None = None,
    capacity: int | None = None,
    whole: bool = False,
) -> Sizes:
    """Sizes up to the ones given, or the ones that a contract suggests.

    Args:
        contract: what `state.json` holds.
        batch, call, capacity: the largest ones.
        whole: kernels are chosen for calls of many tokens, not of one.

    Raises:
        ValueError: a size that the contract excludes.
    """
    limits = [contract[name] for name in ("longest_call", "splits_at", "context")]
    longest = min((limit for limit in limits if limit is not None), default=None)
    if call is not None and longest is not None and call > longest:
        raise ValueError(f"{call} tokens in one call; the model takes up to {longest}")
    given = {"batch": batch, "call": call, "capacity": capacity}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    most = call or min(CALL, longest or CALL)
    room = contract["capacity"]
    if room is None:
        if capacity is not None:
            raise ValueError(f"capacity {capacity}: the state of this model does not grow")
        held = None
    else:
        unit = room["multiple"]
        top = _whole(capacity or room["tokens"], unit)
        held = Range(unit, min(top, _whole(OFTEN, unit)), top)
    return Sizes(Range(1, 1, batch or BATCH), Range(1, most if whole else 1, most), held)


def _whole(tokens: int, unit: int) -> int:
    return -(-tokens // unit) * unit


def input_shapes(contract: Mapping[str, Any], sizes: Sizes) -> dict[str, list[list[int]]]:
    """The [smallest, usual, largest] shape of every input, by name."""
    shapes: dict[str, list[list[int]]] = {
        contract["tokens"]: [[b, n] for b, n in zip(sizes.batch, sizes.call, strict=True)]
    }
    for name in (contract["position"], contract["lengths"]):
        if name is not None:
            shapes[name] = [[b] for b in sizes.batch]
    for tensor in contract["state"]:
        made = []
        for i, batch in enumerate(sizes.batch):
            shape = [*tensor["shape"]]
            shape[tensor["batch_axis"]] = batch
            if tensor["grows"] is not None and sizes.capacity is not None:
                shape[tensor["grows"]["axis"]] = sizes.capacity[i] // tensor["grows"]["tokens"]
            made.append(shape)
        shapes[tensor["input"]] = made
    return shapes


def flags(shapes: Mapping[str, Sequence[Sequence[int]]]) -> list[str]:
    """The shapes as options of trtexec."""
    made = []
    for i, name in enumerate(("min", "opt", "max")):
        each = (f"{key}:{'x'.join(map(str, value[i]))}" for key, value in shapes.items())
        made.append(f"--{name}Shapes={','.join(each)}")
    return made


def find(name: str) -> Any:
    """The module of `tensorrt` or `tensorrt-rtx`.

    Raises:
        ImportError: none is installed, or its libraries cannot be loaded.
    """
    causes = []
    for module in MODULES[name]:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            causes.append(str(error))
    hint = (
        "pip install tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings, the extra tensorrt-rtx"
        if name == "tensorrt-rtx"
        else "it comes with NVIDIA's TensorRT"
    )
    raise ImportError(f"{name} is not there ({'; '.join(causes)}); {hint}")


def build(
    trt: Any,
    model: str | os.PathLike[str],
    shapes: Mapping[str, Sequence[Sequence[int]]],
    capabilities: Sequence[str] = (),
) -> bytes:
    """One engine of an ONNX model.

    Matrix products of float32 stay float32: TF32 would keep 10 bits of each factor.

    Args:
        trt: the module of TensorRT or TensorRT-RTX.
        model: the ONNX file; its data beside it.
        shapes: of `input_shapes`.
        capabilities: of the GPUs it must run on, names of `trt.ComputeCapability` (TensorRT-RTX);
            none: this machine's, or any that TensorRT-RTX knows.

    Raises:
        RuntimeError: a node that TensorRT does not take, or an engine it cannot build; the node
            and the reason are said.
        ValueError: an unknown capability, or inputs that are not those of `shapes`.
    """
    messages: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    # Types are those of the ONNX model: a cache in float16 stays one.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(os.fspath(model)):
        raise RuntimeError(_refusal(parser, Path(model).name))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.add_optimization_profile(_profile(builder, network, shapes))
    if capabilities:
        _set_capabilities(trt, config, capabilities)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"{Path(model).name} cannot be built: {_joined(messages)}")
    return bytes(engine)


def _refusal(parser: Any, model: str) -> str:
    told = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        told.append(f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}")
    return f"TensorRT does not take {model}: {_joined(told)}"


def _joined(messages: Sequence[str]) -> str:
    """Each message once, the first few of them."""
    each = list(dict.fromkeys(" ".join(message.split()) for message in messages))
    return "; ".join(each[:3]) or "it does not say why"


def _profile(builder: Any, network: Any, shapes: Mapping[str, Sequence[Sequence[int]]]) -> Any:
    profile = builder.create_optimization_profile()
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    if set(names) != set(shapes):
        raise ValueError(f"the model has the inputs {sorted(names)}; expected {sorted(shapes)}")
    for name in names:
        profile.set_shape(name, *shapes[name])
    return profile


def _set_capabilities(trt: Any, config: Any, capabilities: Sequence[str]) -> None:
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    for name in capabilities:
        if name not in known:
            raise ValueError(f"unknown compute capability {name!r}; known: {', '.join(known)}")
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def models_of(folder: Path, nodes: bool = False) -> list[Path]:
    """The models of standard operators alone, or those with memory nodes: NAME.nodes.onnx."""
    wanted = ".nodes" if nodes else ""
    return sorted(p for p in folder.glob("*.onnx") if Path(p.stem).suffix == wanted)


def register(plugins: Path) -> None:
    """Runs the module that registers a recipe's plug-ins.

    Raises:
        FileNotFoundError: the recipe has none.
    """
    if not plugins.is_file():
        raise FileNotFoundError(f"{plugins}: not there; this recipe has no plug-ins")
    spec = importlib.util.spec_from_file_location("memcompile_plugins", plugins)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the models of a recipe's folder."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Builds the engines of this folder's models.")
    parser.add_argument("--folder", type=Path, default=here, help="where the models lie")
    parser.add_argument("--batch", type=int, help=f"most sequences of one call ({BATCH})")
    parser.add_argument("--call", type=int, help=f"most tokens of one call ({CALL})")
    parser.add_argument("--capacity", type=int, help="most tokens of a sequence (state.json's)")
    parser.add_argument("--rtx", action="store_true", help="for TensorRT-RTX; needs no GPU")
    parser.add_argument(
        "--capabilities", default="", help="with --rtx: SM80,SM120, say; none: all it knows"
    )
    parser.add_argument(
        "--plugins", action="store_true", help="memory operations by the plug-ins of plugins/"
    )
    given = parser.parse_args(arguments)
    try:
        contract = json.loads((given.folder / "state.json").read_text(encoding="utf-8"))
        trt = find("tensorrt-rtx" if given.rtx else "tensorrt")
        if given.plugins:
            register(given.folder / "plugins" / "plugin.py")
        for model in models_of(given.folder, given.plugins):
            name = model.name.partition(".")[0]
            sizes = sizes_for(
                contract,
                batch=given.batch,
                call=given.call,
                capacity=given.capacity,
                whole=name == "prefill",
            )
            named = [name for name in given.capabilities.split(",") if name]
            engine = build(trt, model, input_shapes(contract, sizes), named)
            plan, scratch = (model.with_name(f"{name}.plan{end}") for end in ("", ".part"))
            scratch.write_bytes(engine)
            scratch.replace(plan)
            print(f"{plan}: {len(engine)} bytes, {sizes}")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
