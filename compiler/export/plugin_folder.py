"""The folder of TensorRT plug-ins: PTX for each target, and the module that registers them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...codegen.render import render
from ...codegen.spec import NotCovered
from ...codegen.triton import ptx
from ...codegen.triton.plugin import Plugin, PluginKernel, plugin_kernels
from ...codegen.triton.sizes import Size
from ..manifest import own_version
from .plugins import DOMAIN, Call, SizeSource, calls_of, plugin_of, spread_overloads

MODULE, INDEX = "plugin.py", "plugins.json"
_TEMPLATE = Path(__file__).with_name("tensorrt_plugin.py.jinja")
_TRT = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int32": "INT32"} | {
    "int64": "INT64",
    "bool": "BOOL",
}


@dataclass
class Plugins:
    """What was made of a model's memory nodes.

    Attributes:
        made: names of the nodes that have a plug-in.
        left: the others, with a reason each: TensorRT takes their bodies.
    """

    made: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def write_plugins(
    folder: Path, models: Sequence[Path], targets: Sequence[str], max_context: int | None = None
) -> Plugins:
    """Writes the plug-ins of ONNX models whose memory operations are nodes.

    The models are written anew: where nodes of one name have several meanings each gets a name of
    its own, which is what TensorRT finds plug-ins by, and those that have one say that it is
    compiled ahead of time. Weights stay where they are.

    Args:
        folder: must exist; gets `plugin.py`, `plugins.json` and the PTX.
        targets: keys of `blocks.ARCHITECTURES`; those that are not CUDA are left out.
        max_context: the longest context of the engines.

    Raises:
        ImportError: triton or onnx is not installed.
        ValueError: no CUDA target, or a node whose shapes are not known.
    """
    import onnx

    cuda = [target for target in targets if target.startswith("cuda:")]
    if not cuda:
        raise ValueError(f"plug-ins are for CUDA; the targets are {', '.join(targets) or 'none'}")
    calls: dict[str, Call] = {}
    loaded = {path: onnx.load(path, load_external_data=False) for path in models}
    for path, model in loaded.items():
        for call in calls_of(model):
            if calls.setdefault(call.name, call) != call:
                raise ValueError(f"{path.name}: {call.name} is another operation than before")
    result = Plugins()
    entries = []
    for call in calls.values():
        try:
            plugin, sizes = plugin_of(call, max_context)
            kernels = {target: plugin_kernels(plugin, target) for target in cuda}
        except NotCovered as reason:
            result.left[call.name] = str(reason)
            continue
        result.made.append(call.name)
        entries.append(_entry(folder, plugin, sizes, kernels))
    if entries:
        _write_module(folder, entries, cuda)
    for path, model in loaded.items():
        spread_overloads(model)
        for node in model.graph.node:
            if node.domain == DOMAIN and node.op_type in result.made:
                # Plug-ins are looked up among those compiled ahead of time.
                node.attribute.append(onnx.helper.make_attribute("aot", 1))
        onnx.save(model, path)
    index = {"made": [_index(entry) for entry in entries], "left": result.left}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return result


def _write_module(folder: Path, entries: list[dict[str, Any]], targets: list[str]) -> None:
    names = {"plugins": entries, "targets": targets, "domain": DOMAIN, "version": own_version()}
    (folder / MODULE).write_text(render(_TEMPLATE, **names), encoding="utf-8")


def _entry(
    folder: Path,
    plugin: Plugin,
    sizes: dict[str, SizeSource],
    kernels: dict[str, list[PluginKernel]],
) -> dict[str, Any]:
    """What the template needs of a plug-in; its PTX is written."""
    extras = {kernel.extras for made in kernels.values() for kernel in made}
    (passed,) = extras  # every kernel takes the same numbers
    told: dict[str, list[dict[str, Any]]] = {}
    for target, made in kernels.items():
        told[target] = []
        for kernel in made:
            file = f"{plugin.name}.{kernel.role}.{target.replace(':', '-')}.ptx"
            (folder / file).write_text(kernel.ptx, encoding="utf-8")
            entry = ptx.entry(kernel.ptx)
            told[target].append(
                {
                    "file": file,
                    "threads": kernel.threads,
                    "shared": kernel.shared,
                    "sizes": [*sizes],
                    "grid": [str(extent) for extent in kernel.grid],
                    "written_for": f"{entry.target}, PTX {entry.version}",
                }
            )
    return {
        "name": plugin.name,
        "inputs": [operand.name for operand in plugin.inputs],
        "outputs": [
            ([str(_known(extent, plugin)) for extent in operand.shape], _name(operand.dtype))
            for operand in plugin.outputs
        ],
        "returned": _returned(len(plugin.outputs)),
        "types": [_TRT[_name(o.dtype)] for o in (*plugin.inputs, *plugin.outputs)],
        "sizes": {name: _place(source) for name, source in sizes.items()},
        "extras": passed,
        "most": _most(plugin, sizes),
        "kernels": told,
    }


def _returned(count: int) -> str:
    one = "trtp.TensorDesc"
    return one if count == 1 else f"Tuple[{', '.join([one] * count)}]"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _known(extent: Size | int, plugin: Plugin) -> Size | int:
    numbers = {k: v for k, v in plugin.constants.items() if isinstance(v, int)}
    return extent.bound({**numbers, **plugin.known}) if isinstance(extent, Size) else extent


def _place(source: SizeSource) -> str:
    axis = f"{source.input}.shape_expr[{source.axis}]"
    return axis if source.divisor == 1 else f"{axis} // {source.divisor}"


def _most(plugin: Plugin, sizes: dict[str, SizeSource]) -> tuple[str, int, int] | None:
    """The input whose axis counts the pages to rank, and how many there may be."""
    source = sizes.get("table_pages")
    if plugin.columns is None or plugin.spec.among or source is None:
        return None
    return source.input, source.axis, plugin.columns


def _index(entry: dict[str, Any]) -> dict[str, Any]:
    """What is to be known of a plug-in without reading the module."""
    return {
        "name": entry["name"],
        "inputs": [*zip(entry["inputs"], entry["types"], strict=False)],
        "extras": [*entry["extras"]],
        "outputs": [[shape, dtype] for shape, dtype in entry["outputs"]],
        "kernels": {
            target: [{k: v for k, v in kernel.items() if k != "sizes"} for kernel in made]
            for target, made in entry["kernels"].items()
        },
        "verified_on_gpu": False,
    }
