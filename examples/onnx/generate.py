"""Generates with a model exported by `--emit onnx`, on onnxruntime and numpy alone.

python generate.py FOLDER/onnx --tokens 72,101,108,108,111 --count 64
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort


class Engine:
    """Sequences that an exported model remembers; `state.json` says what it is fed with."""

    def __init__(self, folder, batch=1):
        self.contract = json.loads((Path(folder) / "state.json").read_text())
        files = [Path(folder) / name for name in ("model.onnx", "prefill.onnx")]
        sessions = [ort.InferenceSession(str(file)) for file in files if file.exists()]
        self.step, self.prefill = sessions[0], sessions[-1]
        self.position = np.zeros(batch, np.int32)
        self.capacity, self.state = 0, {}
        self.grow(1)

    def grow(self, tokens):
        """Makes room for `tokens` tokens a sequence."""
        known = self.contract["capacity"] or {"tokens": tokens, "multiple": 1}
        wanted = max(tokens, 2 * self.capacity, min(known["tokens"], 4096))
        self.capacity = -(-wanted // known["multiple"]) * known["multiple"]
        for tensor in self.contract["state"]:
            shape, name = list(tensor["shape"]), tensor["input"]
            shape[tensor["batch_axis"]] = len(self.position)
            if tensor["grows"]:
                shape[tensor["grows"]["axis"]] = self.capacity // tensor["grows"]["tokens"]
            elif name in self.state:
                continue
            new = np.full(shape, tensor["init"], tensor["dtype"])
            if name in self.state:
                old = self.state[name].numpy()
                new[tuple(map(slice, old.shape))] = old
            self.state[name] = ort.OrtValue.ortvalue_from_numpy(new)

    def __call__(self, tokens, session=None):
        """Feeds tokens [batch, n], int64, in as many calls as it takes; logits [batch, n, V]."""
        made, start, whole = [], 0, tokens.shape[1]
        while start < whole:
            size = min(self.contract["longest_call"] or whole, whole - start)
            if self.contract["splits_at"]:
                every = self.contract["splits_at"]
                size = min(size, every - int(self.position[0]) % every)
            piece = np.ascontiguousarray(tokens[:, start : start + size])
            made.append(self.call(piece, session or self.step))
            start += size
        return np.concatenate(made, 1)

    def call(self, tokens, session):
        contract, n = self.contract, tokens.shape[1]
        if contract["capacity"] and self.position[0] + n > self.capacity:
            self.grow(int(self.position[0]) + n)
        given = {contract["tokens"]: tokens, contract["position"]: self.position}
        if contract["lengths"]:
            given[contract["lengths"]] = np.full(len(tokens), n, np.int32)
        binding = session.io_binding()
        for name, value in given.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output(contract["logits"])
        for tensor in contract["state"]:
            state = self.state[tensor["input"]]
            binding.bind_ortvalue_input(tensor["input"], state)
            if tensor["grows"]:  # updated in place; the others are small and made anew
                binding.bind_ortvalue_output(tensor["output"], state)
            else:
                binding.bind_output(tensor["output"])
        session.run_with_iobinding(binding)
        logits, *states = binding.get_outputs()  # in the order of binding
        for tensor, state in zip(contract["state"], states, strict=True):
            if not tensor["grows"]:
                self.state[tensor["input"]] = state
        self.position = self.position + np.int32(n)
        return logits.numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--tokens", required=True, help="the prompt's, as 1,2,3")
    parser.add_argument("--count", type=int, default=64)
    given = parser.parse_args()
    engine = Engine(given.folder)
    prompt = np.array([[int(token) for token in given.tokens.split(",")]])
    logits = engine(prompt, engine.prefill)
    for _ in range(given.count):
        token = logits[:, -1:].argmax(-1)
        print(token[0, 0], end=" ", flush=True)
        logits = engine(token)
    print()


if __name__ == "__main__":
    main()
