"""Questions about a long document: it is read once, densely; each question is asked on a fork."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch

import memcompile
from memcompile.models.networks import recall

BYTES_LONG = Path(__file__).resolve().parents[1] / "models/networks/checkpoints/bytes-long"


def document(length: int, facts: list[tuple[str, str]], rng: random.Random) -> bytes:
    """`length` bytes of Python's library, with the facts among its lines at even distances."""
    lines = [recall.fact_line(*fact) for fact in facts]
    room = length - sum(map(len, lines))
    text = recall.filler_text(rng, recall.library_text(held_out=True), room).splitlines(True)
    for i, line in reversed([*enumerate(lines)]):
        text.insert((2 * i + 1) * len(text) // (2 * len(lines)), line)
    return b"".join(text)


def ask(engine: Any, fact: tuple[str, str], read: str) -> tuple[bool, int, int]:
    """Whether the fact is known; the pages that were read for that, and dense's."""
    key, value = fact
    branch = engine.fork()  # remembers the document, and not the other questions
    question = torch.tensor([list(recall.question(key))])
    # The question as well as its answer through the policy: there the finding is done.
    how = "dense" if read == "dense" else "policy"
    out = branch.generate(question, len(value) + 1, read=how, read_prompt=how)
    said = bytes(out[0, question.shape[1] :].tolist())
    stats = branch.stats()
    return said == f"{value}\n".encode(), stats.pages_read, stats.pages_dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192, help="bytes of the document")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--budget", type=int, default=1024, help="tokens a query reads")
    given = parser.parse_args()
    rng = random.Random(0)
    facts = recall.draw_facts(rng, given.facts)
    text = document(given.length, facts, rng)

    memory = {"budget": given.budget, "page_size": 8, "sinks": 8, "window": 64}
    engine = memcompile.compile(BYTES_LONG, policy="scout", dense_layers=0, **memory)
    started = time.perf_counter()
    engine.prefill(torch.tensor([list(text)]))
    print(f"{len(text)} bytes read once, densely, in {time.perf_counter() - started:.0f} s")

    right: dict[str, int] = {}
    pages: dict[str, int] = {}
    for read in ("dense", "scout"):
        asked = [ask(engine, fact, read) for fact in facts]
        right[read], pages[read] = sum(a[0] for a in asked), sum(a[1] for a in asked)
        held = sum(a[2] for a in asked)
        print(
            f"{read:>5}: {right[read]} of {len(facts)} answers right, "
            f"{pages[read]} of {held} pages read ({pages[read] / held:.0%})"
        )
    if right["scout"] < right["dense"] or 4 * pages["scout"] > pages["dense"]:
        raise SystemExit("the scout was to answer as often, and to read less than a quarter")


if __name__ == "__main__":
    main()
