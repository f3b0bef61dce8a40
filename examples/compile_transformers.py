"""Gives a transformers model a memory, and generates: by the engine, and by transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memcompile

BYTES_SMALL = Path(__file__).resolve().parents[1] / "models/networks/checkpoints/bytes-small"
PROMPT = """\
import os
import sys


def main(argv):
    for path in argv[1:]:
        with open(path) as\
"""
# Of every context longer than 88 tokens: the first 8, the last 16, and the best pages of 8.
MEMORY = {"budget": 88, "page_size": 8, "sinks": 8, "window": 16, "dense_layers": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BYTES_SMALL, help="a transformers folder")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    engine = memcompile.compile(model, policy="scout", **MEMORY)

    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids  # [1, n] int64
    out = engine.generate(prompt, given.max_new_tokens)  # [1, n + new]
    print(tokenizer.decode(out[0]))
    stats = engine.stats()
    print(f"\nengine.generate: {stats.pages_read} of {stats.pages_dense} pages read")

    # The same memory under transformers' own generate, with every option that has.
    again = engine.transformers
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": given.max_new_tokens}
    greedy = again.generate(prompt, do_sample=False, return_dict_in_generate=True, **how)
    if not torch.equal(greedy.sequences, out):
        raise SystemExit("transformers' greedy tokens are not the engine's")
    stats = greedy.past_key_values.engine.stats()
    print(f"transformers, greedy: the same tokens, {stats.pages_read} pages read")
    beams = again.generate(prompt, num_beams=3, **how)
    print(f"transformers, 3 beams: {tokenizer.decode(beams[0, prompt.shape[1] :])!r}")


if __name__ == "__main__":
    main()
