"""`tensorrt.write_engines` by torch-tensorrt-rtx on a machine without a GPU, which it asks for.

Touches private names of torch-tensorrt-rtx 2.13.0. What is pretended: the properties of a GPU, and
that the engine was loaded before it is handed out. What is real: the program, the operators'
conversion, the engine's build.

Usage: torch_tensorrt_case.py FOLDER_OF_TORCH_TENSORRT OUT [POLICY, OPTIONS]
"""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import tensorrt_rtx_bindings
import torch

torch_tensorrt_folder, out, asked = sys.argv[1:]


class Loaded:
    """An engine that is not loaded, but has its bytes."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def serialize(self) -> Any:
        return self.engine


def pretend() -> Any:
    """torch_tensorrt, as if a GPU were there."""
    stand_in("psutil", virtual_memory=lambda: SimpleNamespace(total=1 << 34, available=1 << 34))
    stand_in("dllist", dllist=list)
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    sys.modules["psutil"].Process = lambda *_: memory  # type: ignore[attr-defined]
    sys.modules["tensorrt_rtx"] = tensorrt_rtx_bindings
    properties = SimpleNamespace(major=8, minor=0, name="none", total_memory=1 << 34)
    cuda: Any = torch.cuda
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda: "no GPU"
    cuda.get_device_properties = lambda *_: properties
    cuda.get_device_capability = lambda *_: (8, 0)
    cuda.mem_get_info = lambda *_: (1 << 34, 1 << 34)
    torch._C._CudaDeviceProperties = SimpleNamespace  # type: ignore[attr-defined, assignment]
    is_file = os.path.isfile
    # Its own library is linked to CUDA's, which are not here.
    os.path.isfile = lambda path: "libtorchtrt" not in str(path) and is_file(path)
    sys.path.append(torch_tensorrt_folder)
    import torch_tensorrt
    import torch_tensorrt.dynamo.conversion._TRTInterpreter as interpreter

    class Runtime:
        def __init__(self, log: Any) -> None: ...

        def deserialize_cuda_engine(self, engine: Any) -> Loaded:
            return Loaded(engine)

    names = {name: getattr(tensorrt_rtx_bindings, name) for name in dir(tensorrt_rtx_bindings)}
    interpreter.trt = SimpleNamespace(**{**names, "Runtime": Runtime})
    for module in list(sys.modules.values()):
        own = getattr(module, "__name__", "").startswith("torch_tensorrt")
        if own and hasattr(module, "to_torch_device"):
            module.to_torch_device = lambda *_: torch.device("cpu")
    return torch_tensorrt


def stand_in(name: str, **values: Any) -> None:
    """A module of the libraries that it wants beside it."""
    module = sys.modules.setdefault(name, ModuleType(name))
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(values)


def main() -> None:
    from transformers import LlamaForCausalLM

    from memcompile.compiler.export import tensorrt
    from memcompile.compiler.export.onnx_portable import functional_graphs
    from memcompile.compiler.pipeline import build

    sys.path.insert(0, str(Path(__file__).parent))
    from test_tensorrt_presets import llama

    assert LlamaForCausalLM is not None
    policy, options = json.loads(asked)
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    compiled = build(llama(torch.float32), policy, kernels="off", check=False, **options)
    torch_tensorrt = pretend()
    # What each engine's inputs and outputs are called is known before it is built.
    results: list[Any] = []
    conversion = torch_tensorrt.dynamo._compiler
    convert = conversion.interpret_module_to_result

    def noted(*given: Any, **named: Any) -> Any:
        results.append(convert(*given, **named))
        return results[-1]

    conversion.interpret_module_to_result = noted
    checked = []
    tensorrt.check_names = lambda engine, contract: checked.append(contract)
    tensorrt._converted(Path(out), compiled)  # what it refuses must not go another way
    _, graphs = functional_graphs(compiled)
    assert len(results) == len(checked) == len(graphs)
    for result, contract in zip(results, checked, strict=True):
        assert result.input_names == contract.inputs, result.input_names
        assert result.output_names == contract.outputs, result.output_names


if __name__ == "__main__":
    main()
