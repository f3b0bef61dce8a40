"""Compiles two small models with `scout`, asks them for facts, and shows what was read for that."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import memcompile
from memcompile.models.networks import induction, recall

ROOT = Path(__file__).resolve().parents[1]
BYTES_SMALL = ROOT / "models/networks/checkpoints/bytes-small"
INDUCTION_OPTIONS = {"budget": 2048, "dense_layers": 0}
BYTES_OPTIONS = {"budget": 56, "page_size": 8, "sinks": 8, "window": 16, "dense_layers": 0}
# Prompt bytes and budget: at most an eighth of the context.
BYTES_ROWS = ((512, 56), (768, 88))
console = Console(soft_wrap=True, highlight=False)


@dataclass
class Asked:
    """What came of questions that were read one way.

    Attributes:
        right: answers that were right in every token, of `total`.
        pages, size: pages and bytes read for the questions and answers, index included.
        tokens: tokens of those questions and answers that were run.
    """

    read: str
    right: int = 0
    total: int = 0
    pages: int = 0
    size: int = 0
    tokens: int = 0


def ask(engine: Any, question: torch.Tensor, answer: torch.Tensor, result: Asked) -> None:
    """Read question [B, m] on a fork of `engine` and write as many tokens as answer [B, k] has.

    Everything that is read here is read as `result.read` says: densely or through the policy.
    """
    branch = engine.fork()
    step = branch.prefill if result.read == "dense" else branch
    following = step(question)[:, -1:].argmax(-1)
    written = [following]
    while len(written) < answer.shape[1]:
        following = step(following)[:, -1:].argmax(-1)
        written.append(following)
    stats = branch.stats()
    result.right += int((torch.cat(written, 1) == answer).all(1).sum())
    result.total += answer.shape[0]
    result.pages += stats.pages_read
    result.size += stats.bytes_read
    result.tokens += sum(stats.tokens.values())


def induction_questions(
    length: int, depths: list[float], steps: int
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A context [1, length] with one fact at each depth, and a question for each.

    A fact is `steps` symbols that occur nowhere else, and one more; the question is the first.
    """
    generator = torch.Generator().manual_seed(0)
    symbols = 1 + torch.randperm(induction.SYMBOLS, generator=generator)
    facts, filler = symbols[: len(depths) * steps].view(-1, steps), symbols[len(depths) * steps :]
    context = filler[torch.randint(len(filler), (length,), generator=generator)]
    context[0] = induction.BOS
    for fact, depth in zip(facts, depths, strict=True):
        start = 1 + round(depth * (length - steps - 2))
        context[start : start + steps] = fact
    questions = []
    for fact in facts:
        question = fact[None, :1]
        known = induction.continuation(torch.cat([context[None], question], 1), steps)
        questions.append((question, known))
    return context[None], questions


def bytes_questions(
    length: int, count: int
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Prompts [count, length - m] of library source with a fact, and the questions [count, m]."""
    prompts = [
        recall.recall_prompt(length, recall.HELD_OUT_SEEDS + i, depth=i / (count - 1))
        for i in range(count)
    ]
    tokens, answers = recall.recall_batch(prompts)
    cut = len(recall.question(prompts[0].key))
    return tokens[:, :-cut], [(tokens[:, -cut:], answers)]


def compare(
    table: Table, name: str, budget: int, engine: Any, context: torch.Tensor, questions: Any
) -> list[Asked]:
    """Prefill once, ask every question both ways, and add one row a way to the table.

    Returns:
        what came of the questions read densely, and through the scout.
    """
    with console.status(f"{name}: reading {context.shape[0]} x {context.shape[1]} tokens densely"):
        started = time.perf_counter()
        engine.prefill(context)
        console.print(
            f"{name}: {context.shape[0]} x {context.shape[1]} tokens read densely in "
            f"{time.perf_counter() - started:.0f} s"
        )
    results = [Asked("dense"), Asked("policy")]
    for result in results:
        for question, answer in questions:
            ask(engine, question, answer, result)
        table.add_row(
            name,
            str(context.shape[1]),
            "dense" if result.read == "dense" else f"scout, {budget}",
            f"{result.right} of {result.total}",
            f"{result.pages / result.tokens:.0f}",
            f"{result.size / result.tokens / 1024:.0f} KiB",
        )
    table.add_section()
    return results


def hold(dense: Asked, scout: Asked, sixteenth: bool) -> None:
    """End the demo with exit code 1 unless the known answers came out, of few enough pages."""
    if not dense.right == scout.right == dense.total:
        sys.exit(
            f"the induction network is exact, but of {dense.total} answers "
            f"{dense.right} were right densely, {scout.right} through the scout"
        )
    if sixteenth and 16 * scout.pages > dense.pages:
        sys.exit(f"scout read {scout.pages} of {dense.pages} pages, more than a sixteenth")


def memcompile_command(*arguments: object) -> None:
    """Show and run a `memcompile` command; a failure ends the demo with its exit code."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold]$ memcompile {shlex.join(words)}[/bold]")
    done = subprocess.run([sys.executable, "-m", "memcompile.compiler.cli", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def settings(options: dict[str, int]) -> list[str]:
    return [word for key, value in options.items() for word in ("--set", f"{key}={value}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to")
    parser.add_argument("--induction-length", type=int, default=32 * 1024)
    parser.add_argument("--prompts", type=int, default=64, help="recall prompts at each length")
    given = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    networks = {"induction": induction.save(given.out / "induction"), "bytes-small": BYTES_SMALL}
    options = {"induction": INDUCTION_OPTIONS, "bytes-small": BYTES_OPTIONS}
    for name, folder in networks.items():
        target = given.out / f"{name}.scout"
        memcompile_command(
            folder, "--policy", "scout", *settings(options[name]), "--out", target, "--force"
        )

    example = recall.recall_prompt(512, recall.HELD_OUT_SEEDS, depth=0.5)
    (given.out / "prompt.txt").write_bytes(example.prompt)
    shown = example.prompt.decode().splitlines()
    fact = next(line for line in shown if line.startswith(f"# fact: {example.key}"))
    console.print(
        f"\n512 bytes of library source with the line [green]{fact}[/green] in the middle, "
        f"ending in [green]{shown[-1]}[/green]:",
    )
    memcompile_command(
        *("run", given.out / "bytes-small.scout", "--prompt-file", given.out / "prompt.txt"),
        *("--max-new-tokens", len(example.answer)),
    )

    console.print()
    table = Table(title="dense against scout", title_justify="left")
    for column in ("model", "context", "memory", "answers right", "pages a token", "bytes a token"):
        table.add_column(column, justify="left" if column in ("model", "memory") else "right")
    engine = memcompile.compile(networks["induction"], "scout", **INDUCTION_OPTIONS)
    depths = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
    length, budget = given.induction_length, INDUCTION_OPTIONS["budget"]
    asked = induction_questions(length, depths, 4)
    dense, scout = compare(table, "induction", budget, engine, *asked)
    for size, budget in BYTES_ROWS:
        chosen = {**BYTES_OPTIONS, "budget": budget}
        engine = memcompile.compile(networks["bytes-small"], "scout", **chosen)
        compare(table, "bytes-small", budget, engine, *bytes_questions(size, given.prompts))
    console.print(table)
    for name, chosen in options.items():
        rest = [f"{key}={value}" for key, value in chosen.items() if key != "budget"]
        console.print(f"{name}: scout with the budget of its row, {', '.join(rest)}")
    seconds = time.perf_counter() - started
    console.print(
        "The context is read densely; question and answer are read as the row says. Pages are "
        "those of all layers and KV heads; bytes are keys, values and index. "
        f"Nothing here is about speed. {seconds:.0f} s in all."
    )
    hold(dense, scout, length >= 16 * INDUCTION_OPTIONS["budget"])


if __name__ == "__main__":
    main()
