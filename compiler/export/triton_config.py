"""`config.pbtxt`: the state contract in the words of NVIDIA Triton Inference Server.

The server's sequence batcher keeps the state between the requests of a sequence (*implicit state
management*): each `state` entry is one tensor of `state.json`, and so is the position, so that a
client sends tokens and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from .contract import Contract, StateTensor

# https://docs.nvidia.com/deeplearning/triton-inference-server, "Datatypes"
TYPES = {
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
# The last token's logits: what a client needs to go on, and V numbers instead of n * V.
LAST = "last_logits"
# Sequences that wait for their next request; beyond them the server queues.
SEQUENCES = 64
# After this a sequence that sends nothing is let go: a reader may think for ten minutes.
IDLE_SECONDS = 600


def new_name(state: str) -> str:
    """The output that renews a state input.

    The server pairs states by the order of their inputs' and of their outputs' names. A prefix
    keeps that order whatever the names are; a suffix does not (`mean_8`, `mean_80`).
    """
    return f"new_{state}"


def config(
    name: str, contract: Contract, logits: str, rows: Sequence[int | None], batch: int
) -> str:
    """The text of `config.pbtxt`.

    Args:
        name: of the model in its repository.
        contract: of the engine that is served.
        logits: type of the logits, a key of TYPES.
        rows: sizes of the logits behind the batch's; None: any.
        batch: sequences that may be read at once.

    Raises:
        ValueError: a state that does not begin at zero, or whose batch axis is not the first.
    """
    dims = ["-1" if size is None else str(size) for size in rows]
    position = StateTensor(contract.position, "", "int32", (1, 1), 0.0, 0, None)
    states = [_state(tensor) for tensor in (position, *contract.state)]
    limits = {
        "context": contract.context,
        "capacity": contract.capacity.tokens if contract.capacity else None,
        "longest_call": contract.longest_call,
        "splits_at": contract.splits_at,
        "vocabulary": contract.vocabulary,
    }
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {batch}",
        "input [",
        f"  {{ name: {_quoted(contract.tokens)} data_type: TYPE_INT64 dims: [ -1 ] }}",
        "]",
        "output [",
        f"  {{ name: {_quoted(contract.logits)} data_type: {TYPES[logits]} "
        f"dims: [ {', '.join(dims)} ] }},",
        f"  {{ name: {_quoted(LAST)} data_type: {TYPES[logits]} dims: [ {dims[-1]} ] }}",
        "]",
        "sequence_batching {",
        f"  max_sequence_idle_microseconds: {IDLE_SECONDS * 1_000_000}",
        f"  oldest {{ max_candidate_sequences: {SEQUENCES} }}",
        "  state [",
        ",\n".join(states),
        "  ]",
        "}",
        "# What was run is the CPU provider.",
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
    ]
    for key, value in limits.items():
        if value is not None:
            lines.append(
                f'parameters {{ key: "memcompile_{key}" value {{ string_value: "{value}" }} }}'
            )
    return "\n".join(lines) + "\n"


def _state(tensor: StateTensor) -> str:
    if tensor.init != 0 or tensor.batch_axis != 0:
        raise ValueError(
            f"{tensor.input} begins at {tensor.init}, batch axis {tensor.batch_axis}; Triton "
            "Inference Server's state is made of zeros, sequences along the first axis"
        )
    kind, dims = TYPES[tensor.dtype], ", ".join(map(str, tensor.shape[1:]))
    return "\n".join(
        [
            "    {",
            f"      input_name: {_quoted(tensor.input)}",
            f"      output_name: {_quoted(new_name(tensor.input))}",
            f"      data_type: {kind}",
            f"      dims: [ {dims} ]",
            # It is read before it is written: one buffer will do.
            "      use_same_buffer_for_input_output: true",
            f'      initial_state {{ name: "zeros" data_type: {kind} dims: [ {dims} ] '
            "zero_data: true }",
            "    }",
        ]
    )


def _quoted(name: str) -> str:
    text = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
