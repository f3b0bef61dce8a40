"""What the evaluation's tests share: tokenizers of several kinds, and the induction network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import memcompile
from memcompile.compiler.evaluate import FileTokenizer
from memcompile.compiler.pipeline import Compiled, build
from memcompile.evaluation.filler import NumberFiller
from memcompile.evaluation.protocol import Contender
from memcompile.evaluation.run import Source
from memcompile.evaluation.tokens import NumberTokenizer
from memcompile.evaluation.wordings import numbers
from memcompile.models.networks import induction, recall
from memcompile.runtime.engine import Engine, Program

CHECKPOINT = Path(memcompile.__file__).parent / "models/networks/checkpoints/bytes-small"
SMALL = {"budget": 64, "page_size": 8, "sinks": 8, "window": 16, "dense_layers": 0}


def byte_tokenizer(folder: Path) -> FileTokenizer:
    """One token a byte, as the shipped checkpoints have it."""
    return FileTokenizer(CHECKPOINT / "tokenizer.json")


def merging_tokenizer(folder: Path) -> FileTokenizer:
    """Byte-pair merges learnt on library text, which cross no word; a BOS before every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _trained(made, trainer, folder)


def spaced_tokenizer(folder: Path) -> FileTokenizer:
    """Pieces with a mark for the space before them, runs of spaces and newlines among them."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    return _trained(made, trainer, folder)


def _trained(made: Tokenizer, trainer: Any, folder: Path) -> FileTokenizer:
    text = recall.library_text(held_out=False)[:60_000].decode()
    made.train_from_iterator(text.splitlines(keepends=True), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    path = folder / "tokenizer.json"
    made.save(str(path))
    return FileTokenizer(path)


TOKENIZERS: dict[str, Callable[[Path], FileTokenizer]] = {
    "bytes": byte_tokenizer,
    "merges": merging_tokenizer,
    "spaces": spaced_tokenizer,
}


def induction_source() -> Source:
    """Prompts of token ids for the induction network."""
    size, start = induction.VOCABULARY, (induction.BOS,)
    return Source(
        NumberTokenizer(size, start), numbers(size, start), NumberFiller(size, start), None
    )


def compiled(folder: Path, policy: str, **options: Any) -> Compiled:
    return build(folder, policy, check=False, kernels="off", **options)


def contender(built: Compiled, name: str) -> Contender:
    assert built.program is not None
    return Contender(name, built.engine, built.program.layouts, built.program.limit)


def with_program(given: Contender, change: Callable[[Program], Program]) -> Contender:
    """A contender of the same name and memories that runs something else."""
    program = change(given.make()._program)
    return dataclasses.replace(given, make=lambda: Engine(program))


def silently_dense(program: Program) -> Program:
    """Runs the dense graph where the policy's was asked for."""
    return dataclasses.replace(program, policy=program.dense)


def dropping_pages(program: Program, one_in: int = 8, seed: int = 0) -> Program:
    """Hides one page in `one_in`, drawn anew for each call and site, from the policy's graph.

    The open page stays: it is written to.
    """
    generator = torch.Generator().manual_seed(seed)

    def policy(
        tokens: torch.Tensor, position: torch.Tensor, lengths: torch.Tensor, *state: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        damaged, at = [], 0
        for layout in program.layouts:
            table, *pools = state[at : at + 3 + len(layout.memory.fields)]
            at += 1 + len(pools)
            hidden = torch.rand(table.shape, generator=generator) < 1 / one_in
            first_open = int(position.min()) // layout.memory.page_size
            hidden[:, :, first_open:] = False
            damaged += [table.masked_fill(hidden, -1), *pools]
        return program.policy(tokens, position, lengths, *damaged)

    return dataclasses.replace(program, policy=policy)
