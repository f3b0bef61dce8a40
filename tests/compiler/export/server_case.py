"""A server of the KServe v2 protocol that does what `config.pbtxt` says, by onnxruntime.

It stands in for NVIDIA Triton Inference Server: config.pbtxt is parsed by protobuf's own text
format against the schema of `model_config.proto` (tritonclient's, where that is installed, or else
the fields used here), the model is checked against it as the onnxruntime backend does, and state
is kept as the sequence batcher does.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.json_format import MessageToDict

NUMPY = {
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
}
WIRE = {"TYPE_INT32": "INT32", "TYPE_INT64": "INT64", "TYPE_FP16": "FP16", "TYPE_FP32": "FP32"}
ONNX = {
    **{"tensor(int32)": "TYPE_INT32", "tensor(int64)": "TYPE_INT64"},
    **{"tensor(float16)": "TYPE_FP16", "tensor(float)": "TYPE_FP32"},
}
ENUMS = {
    "DataType": (
        "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16"
    ),
    "Kind": "AUTO GPU CPU MODEL",
}
PREFIX = {"DataType": "TYPE", "Kind": "KIND"}
# message -> field: type; "*" repeated, "=" a map's value; as model_config.proto names them.
MESSAGES: dict[str, dict[str, str]] = {
    "Tensor": {"name": "string", "data_type": "DataType", "dims": "int64*"},
    "Initial": {
        **{"data_type": "DataType", "dims": "int64*", "zero_data": "bool"},
        **{"data_file": "string", "name": "string"},
    },
    "State": {
        **{"input_name": "string", "output_name": "string", "data_type": "DataType"},
        **{"dims": "int64*", "initial_state": "Initial*"},
        **{"use_same_buffer_for_input_output": "bool", "use_growable_memory": "bool"},
    },
    "Oldest": {"max_candidate_sequences": "int32", "max_queue_delay_microseconds": "uint64"},
    "Batching": {
        **{"oldest": "Oldest", "max_sequence_idle_microseconds": "uint64", "state": "State*"},
    },
    "Group": {"kind": "Kind", "count": "int32"},
    "Parameter": {"string_value": "string"},
    "ModelConfig": {
        **{"name": "string", "platform": "string", "backend": "string", "max_batch_size": "int32"},
        **{"input": "Tensor*", "output": "Tensor*", "sequence_batching": "Batching"},
        **{"instance_group": "Group*", "parameters": "Parameter="},
    },
}


def schema() -> Any:
    """The message that config.pbtxt is the text of."""
    try:
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError:
        return own_schema()
    return ModelConfig


def own_schema() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="served_model_config.proto", package="served", syntax="proto3"
    )
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=f"{PREFIX[name]}_{value}", number=number)
    field = descriptor_pb2.FieldDescriptorProto
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (key, kind) in enumerate(fields.items(), 1):
            made = message.field.add(name=key, number=number, label=field.LABEL_OPTIONAL)
            plain = kind.rstrip("*=")
            if kind != plain:
                made.label = field.LABEL_REPEATED
            if kind.endswith("="):
                entry = message.nested_type.add(name=f"{key.title()}Entry")
                entry.options.map_entry = True
                for i, (part, type_name) in enumerate((("key", ""), ("value", plain)), 1):
                    sub = entry.field.add(name=part, number=i, label=field.LABEL_OPTIONAL)
                    sub.type = field.TYPE_MESSAGE if type_name else field.TYPE_STRING
                    if type_name:
                        sub.type_name = f".served.{type_name}"
                made.type, made.type_name = field.TYPE_MESSAGE, f".served.{name}.{entry.name}"
            elif plain in ENUMS:
                made.type, made.type_name = field.TYPE_ENUM, f".served.{plain}"
            elif plain in MESSAGES:
                made.type, made.type_name = field.TYPE_MESSAGE, f".served.{plain}"
            else:
                made.type = getattr(field, f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("served.ModelConfig"))


def read_config(path: Path, message: Any = None) -> dict[str, Any]:
    """A config.pbtxt, names and values as in the file.

    Raises:
        google.protobuf.text_format.ParseError: it is none.
    """
    parsed = text_format.Parse(path.read_text(), (message or schema())())
    made: dict[str, Any] = MessageToDict(parsed, preserving_proto_field_name=True)
    return made


class Model:
    """A model of a repository, and the state of its sequences."""

    def __init__(self, folder: Path) -> None:
        self.config = config = read_config(folder / "config.pbtxt")
        assert config["name"] == folder.name and config["backend"] == "onnxruntime"
        self.session = onnxruntime.InferenceSession(
            str(folder / "1/model.onnx"), providers=["CPUExecutionProvider"]
        )
        self.states = config["sequence_batching"]["state"]
        self.most = config["max_batch_size"]
        self._check()
        # The server keeps both in ordered maps, and pairs what stands at one place in them.
        inputs, outputs = (
            sorted(state[key] for state in self.states) for key in ("input_name", "output_name")
        )
        self.renews = dict(zip(outputs, inputs, strict=True))
        self.held: dict[Any, dict[str, np.ndarray]] = {}
        self.lock = threading.Lock()

    def _check(self) -> None:
        """What the onnxruntime backend looks at when it loads a model that takes batches."""
        assert self.most > 0
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name: value for value in self.session.get_outputs()}
        given = self.config["input"]
        assert len(inputs) == len(given) + len(self.states)
        for tensor in given:
            fits(inputs[tensor["name"]], tensor, exact=False)
        for tensor in self.config["output"]:
            fits(outputs[tensor["name"]], tensor, exact=True)
        for state in self.states:
            for name, values in (("input_name", inputs), ("output_name", outputs)):
                fits(values[state[name]], state, exact=False)
            (initial,) = state["initial_state"]
            assert initial["zero_data"] and initial["data_type"] == state["data_type"]
            assert initial["dims"] == state["dims"] and "-1" not in initial["dims"]

    def start(self, sequence: Any) -> None:
        self.held[sequence] = {
            state["input_name"]: np.zeros(
                [1, *map(int, state["initial_state"][0]["dims"])], NUMPY[state["data_type"]]
            )
            for state in self.states
        }

    def run(self, requests: list[tuple[Any, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Requests of as many sequences at once; tensors are put beside each other."""
        assert len(requests) <= self.most and len({x.shape for _, x in requests}) == 1
        names = [state["input_name"] for state in self.states]
        feed = {n: np.concatenate([self.held[s][n] for s, _ in requests]) for n in names}
        feed[self.config["input"][0]["name"]] = np.concatenate([x for _, x in requests])
        wanted = [tensor["name"] for tensor in self.config["output"]]
        made = self.session.run([*wanted, *self.renews], feed)
        results = dict(zip([*wanted, *self.renews], made, strict=True))
        for row, (sequence, _) in enumerate(requests):
            for output, name in self.renews.items():
                self.held[sequence][name] = results[output][row : row + 1]
        return [
            {name: results[name][row : row + 1] for name in wanted}
            for row, _ in enumerate(requests)
        ]

    def infer(self, request: dict[str, Any]) -> dict[str, np.ndarray]:
        parameters = request["parameters"]
        sequence = parameters["sequence_id"]
        assert sequence, "an id of 0 is no sequence"
        (given,) = request["inputs"]
        tokens = np.array(given["data"], np.int64).reshape(given["shape"])
        with self.lock:
            if parameters.get("sequence_start"):
                self.start(sequence)
            if sequence not in self.held:
                raise KeyError(f"sequence {sequence} is not known; it must be started")
            (result,) = self.run([(sequence, tokens)])
            if parameters.get("sequence_end"):
                del self.held[sequence]
        return result


def fits(value: Any, tensor: dict[str, Any], exact: bool) -> None:
    """Types are the same; sizes too, where neither is free or `exact`."""
    assert ONNX[value.type] == tensor["data_type"], value.name
    have = [size if isinstance(size, int) else -1 for size in value.shape]
    assert have[0] == -1, f"{value.name}: no batch axis"
    want = [int(size) for size in tensor["dims"]]
    assert len(want) == len(have) - 1, value.name
    pairs = zip(have[1:], want, strict=True)
    assert all(h == w or (not exact and h == -1) for h, w in pairs), (value.name, have, want)


def serve(repository: Path) -> tuple[ThreadingHTTPServer, dict[str, Model]]:
    """A server of every model in a repository, on a port of its own, running."""
    models = {path.name: Model(path) for path in repository.iterdir()}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, code: int, text: bytes, behind: bytes = b"") -> None:
            self.send_response(code)
            self.send_header("Inference-Header-Content-Length", str(len(text)))
            self.send_header("Content-Length", str(len(text) + len(behind)))
            self.end_headers()
            self.wfile.write(text + behind)

        def do_GET(self) -> None:
            name = self.path.split("/")[3]
            if name not in models:
                self.answer(404, b'{"error": "unknown model"}')
                return
            self.answer(200, json.dumps(models[name].config).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request, model = json.loads(body), models[self.path.split("/")[3]]
            try:
                made = model.infer(request)
            except Exception as error:
                self.answer(400, json.dumps({"error": str(error)}).encode())
                return
            outputs, behind = [], b""
            types = {t["name"]: t["data_type"] for t in model.config["output"]}
            for output in request["outputs"]:
                name = output["name"]
                assert output["parameters"] == {"binary_data": True}
                value = np.ascontiguousarray(made[name])
                behind += value.tobytes()
                size = {"binary_data_size": value.nbytes}
                kind = WIRE[types[name]]
                shape = list(value.shape)
                outputs.append({"name": name, "datatype": kind, "shape": shape, "parameters": size})
            head = {"model_name": model.config["name"], "outputs": outputs}
            self.answer(200, json.dumps(head).encode(), behind)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server, models
