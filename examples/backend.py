"""The torch.compile backend in three lines: a transformers model reads its StaticCache in part."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, StaticCache

import memcompile

BYTES_SMALL = Path(__file__).resolve().parents[1] / "models/networks/checkpoints/bytes-small"
TEXT = b"import os\nimport sys\n\n\ndef main(argv):\n    return len(argv)\n\n\n"
OPTIONS = {
    "policy": "scout",
    **{"budget": 88, "page_size": 8, "sinks": 8, "window": 16, "dense_layers": 0},
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=480, help="tokens that are read first")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(BYTES_SMALL).eval()
    prompt = torch.tensor([list(TEXT * (given.context // len(TEXT) + 1))])[:, : given.context]
    room = -(-(given.context + given.max_new_tokens) // 64) * 64  # whole pages are read in place

    # The three lines.
    fast = torch.compile(model, backend="memcompile", options=OPTIONS)
    cache = StaticCache(config=model.config, max_cache_len=room)
    token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)  # read densely

    written = [token]
    started = time.perf_counter()
    for step in range(given.max_new_tokens - 1):
        token = fast(token, past_key_values=cache).logits.argmax(-1)
        written.append(token)
        if step == 0:
            print(f"compiled with the first token, in {time.perf_counter() - started:.0f} s")
    print(bytes(torch.cat(written, 1)[0].tolist()).decode(errors="replace"))

    for report in memcompile.graphs():
        print(f"\n{report}")
    (report,) = [report for report in memcompile.graphs() if report.kind == "cached"]
    if report.rewritten != model.config.num_hidden_layers or report.calls.dense:
        raise SystemExit("not every attention read its cache through the policy at every step")


if __name__ == "__main__":
    main()
