"""A chat that streams its answers: the system prompt is read once, and every branch is a fork.

The model completes Python source, so what one says to it is a line of that: `# fact: NAME = 1234`
tells it something, `# recall: NAME = ` asks. With --interactive lines are read from stdin; `/fork`
begins a branch, `/back` returns to where it began.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch

import memcompile
from memcompile.models.networks import recall

BYTES_SMALL = Path(__file__).resolve().parents[1] / "models/networks/checkpoints/bytes-small"
MEMORY = {"budget": 128, "page_size": 8, "sinks": 8, "window": 32, "dense_layers": 0}


def text_of(ids: list[int]) -> str:
    """The text of tokens: this model's are bytes."""
    return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")


class Chat:
    """One branch of a conversation: an engine that remembers it, and what it has yet to read."""

    def __init__(self, engine: Any, unread: bytes = b"") -> None:
        self.engine, self.unread = engine, unread

    def fork(self) -> Chat:
        """A branch that remembers the same, and goes its own way."""
        return Chat(self.engine.fork(), self.unread)

    def tell(self, line: str) -> None:
        """Say something that wants no answer."""
        print(f"  > {line}")
        self.unread += f"{line}\n".encode()

    def ask(self, line: str) -> str:
        """Say a line that the model is to end, and show its answer while it comes."""
        print(f"  > {line}", end="", flush=True)
        prompt = torch.tensor([list(self.unread + line.encode())])
        said: list[int] = []
        stream = self.engine.stream(prompt, 24, stop="\n", decode=text_of, read_prompt="policy")
        for token in stream:
            said.append(int(token))
            print(text_of(said[-1:]), end="", flush=True)
        if said[-1:] != [ord("\n")]:
            print()
        self.unread = bytes(said[-1:])  # the last token was given, and not yet read
        return text_of(said).strip()


def interact(chat: Chat) -> None:
    """Lines from stdin, until there are no more."""
    branches = [chat]
    for line in sys.stdin:
        said = line.rstrip("\n")
        if said == "/fork":
            branches.append(branches[-1].fork())
        elif said == "/back":
            branches = branches[:-1] or branches  # the first has nowhere to go back to
        elif said.startswith("# fact:"):
            branches[-1].tell(said)
        elif said:
            branches[-1].ask(said)


def show(chat: Chat, known: list[tuple[str, str]]) -> None:
    """Two questions, and two branches that are told different things."""
    answers = [chat.ask(recall.question(name).decode()) for name, _ in known]
    told = []
    for value in ("1234", "9876"):
        print(f"a branch that is told {value}:")
        branch = chat.fork()
        branch.tell(f"# fact: tomato = {value}")
        told.append(branch.ask("# recall: tomato = "))
    stats = branch.engine.stats()
    print(f"the last branch read {stats.pages_read} of {stats.pages_dense} pages")
    if answers != [value for _, value in known] or told != ["1234", "9876"]:
        raise SystemExit(f"expected {known} and each branch's own value, got {answers} and {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--interactive", action="store_true", help="take lines from stdin")
    parser.add_argument("--length", type=int, default=480, help="bytes of the system prompt")
    given = parser.parse_args()
    rng = random.Random(0)
    known = recall.draw_facts(rng, 2)
    source = recall.filler_text(rng, recall.library_text(held_out=True), given.length)
    system = b"".join(recall.fact_line(*fact) for fact in known) + source

    engine = memcompile.compile(BYTES_SMALL, policy="scout", **MEMORY)
    engine.prefill(torch.tensor([list(system)]))
    print(f"system prompt of {len(system)} bytes, read once; it says {dict(known)}")
    chat = Chat(engine.fork())
    if given.interactive:
        interact(chat)
    else:
        show(chat, known)


if __name__ == "__main__":
    main()
