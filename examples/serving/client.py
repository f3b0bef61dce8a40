"""Streams a generation from NVIDIA Triton Inference Server, or any server of its HTTP protocol.

The server keeps what was read: each request holds new tokens and nothing else.

    python examples/serving/client.py --model NAME --prompt "def main(" --max-new-tokens 64

Tokens are bytes here, as those of the checkpoints in this repository are; `--ids 5,17,2` gives
tokens of another vocabulary, and prints what it gets as numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np

DTYPES = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}


class Sequence:
    """One conversation.

    Args:
        url: of the server, without a path.
        model: its name in the model repository.
        number: tells this conversation from others on the server; not 0.
    """

    def __init__(self, url: str, model: str, number: int) -> None:
        self.place, self.number = f"{url}/v2/models/{model}", number
        with _opened(urllib.request.Request(f"{self.place}/config")) as answer:
            given = json.load(answer).get("parameters", {})
        limits = {
            key.removeprefix("memcompile_"): int(value["string_value"])
            for key, value in given.items()
            if key.startswith("memcompile_")
        }
        self.room = min((limits[k] for k in ("context", "capacity") if k in limits), default=None)
        self.longest, self.piece = limits.get("longest_call"), limits.get("splits_at")
        self.held = 0

    def feed(self, tokens: list[int], *, end: bool = False) -> np.ndarray:
        """Adds tokens to the conversation.

        Args:
            end: it ends with them, and the server forgets it.

        Returns:
            logits [V] for the token that follows.

        Raises:
            ValueError: no tokens, or more than the server's model holds.
            RuntimeError: the server's own message.
        """
        if not tokens:
            raise ValueError("no tokens to feed")
        if self.room is not None and self.held + len(tokens) > self.room:
            raise ValueError(f"{self.held + len(tokens)} tokens; this model holds {self.room}")
        while tokens:
            count = min(len(tokens), self.longest or len(tokens))
            if self.piece is not None:
                count = min(count, self.piece - self.held % self.piece)
            part, tokens = tokens[:count], tokens[count:]
            logits = self._call(part, end and not tokens)
            self.held += count
        return logits

    def _call(self, tokens: list[int], end: bool) -> np.ndarray:
        request = {
            "parameters": {
                "sequence_id": self.number,
                "sequence_start": self.held == 0,
                "sequence_end": end,
            },
            "inputs": [
                {"name": "tokens", "datatype": "INT64", "shape": [1, len(tokens)], "data": tokens}
            ],
            # Of the logits only the last token's, as bytes behind the answer's JSON.
            "outputs": [{"name": "last_logits", "parameters": {"binary_data": True}}],
        }
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with _opened(urllib.request.Request(f"{self.place}/infer", body, headers)) as answer:
            text, size = answer.read(), answer.headers["Inference-Header-Content-Length"]
        head = json.loads(text[: int(size)])
        (output,) = head["outputs"]
        return np.frombuffer(text[int(size) :], DTYPES[output["datatype"]])


def _opened(request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise RuntimeError(f"{request.full_url}: {error.code}: {text}") from None


def generate(
    sequence: Sequence, prompt: list[int], count: int, temperature: float, seed: int
) -> Iterator[int]:
    """Tokens that continue a prompt, as they come; temperature 0 takes the likeliest."""
    drawn = np.random.default_rng(seed)
    logits = sequence.feed(prompt, end=count == 1)
    for left in range(count, 0, -1):
        if temperature == 0:
            token = int(logits.argmax())
        else:
            scaled = logits.astype(np.float64) / temperature
            chances = np.exp(scaled - scaled.max())
            token = int(drawn.choice(len(chances), p=chances / chances.sum()))
        yield token
        if left > 1:
            logits = sequence.feed([token], end=left == 2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="stream a generation from a Triton server")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", required=True)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="text, fed as its bytes")
    given.add_argument("--ids", help="tokens, as in 5,17,2")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequence", type=int, default=1, help="number of the conversation")
    chosen = parser.parse_args(arguments)
    text = chosen.prompt is not None
    prompt = list(chosen.prompt.encode()) if text else [int(x) for x in chosen.ids.split(",")]
    sequence = Sequence(chosen.url, chosen.model, chosen.sequence)
    for token in generate(sequence, prompt, chosen.max_new_tokens, chosen.temperature, chosen.seed):
        if text:
            sys.stdout.buffer.write(bytes([token]))
        else:
            sys.stdout.buffer.write(f"{token} ".encode())
        sys.stdout.buffer.flush()
    print()


if __name__ == "__main__":
    main()
