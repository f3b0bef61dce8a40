"""What is trained, on what and when: one recipe for each shipped byte-level Llama."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import recall, tasks
from .bytes_llama import BytesLlamaConfig
from .tasks import Diet, Task

# A generator, the training text, a length and what documents are made of -> bytes and roles.
Documents = Callable[[random.Random, bytes, int, Diet], tuple[bytes, bytes]]


@dataclass(frozen=True)
class Stage:
    """What is trained when: a stage holds until its share of the whole budget is spent.

    Attributes:
        until: share of the budget, of steps or of minutes, at which the next stage begins.
        lengths: bytes of a document; steps take them in turn.
        diet: what documents are made of.
        tokens: bytes of one step, rounded down to whole documents.
        reach: positions are skipped up to this one; 0 counts every byte.
    """

    until: float
    lengths: tuple[int, ...]
    diet: Diet
    tokens: int = 4352
    reach: int = 0


@dataclass(frozen=True)
class Recipe:
    """One network and its training.

    Attributes:
        config: sizes of the network.
        documents: makes one training document.
        stages: the curriculum, short and dense first.
        steps, minutes: default budgets; whichever is further spent drives stages and rates.
        block: queries a block of attention while training on a processor; 0 leaves it to torch.
        watch: lengths and numbers of the prompts whose recall is logged while training.
        watch_every: steps between two such looks.
        figures: lengths and numbers of the prompts of the final figures.
        detail: length and number of the prompts of the figures by depth and by facts.
        tasks: what else than single facts is trained and measured.
        text: windows of the final text loss: length, places, windows in a row at each place.
    """

    config: BytesLlamaConfig
    documents: Documents
    stages: tuple[Stage, ...]
    steps: int
    minutes: float
    block: int
    watch: tuple[tuple[int, int], ...]
    watch_every: int
    figures: tuple[tuple[int, int], ...]
    detail: tuple[int, int]
    tasks: tuple[Task, ...]
    text: tuple[tuple[int, int, int], ...]


def small_document(rng: random.Random, text: bytes, length: int, diet: Diet) -> tuple[bytes, bytes]:
    """A document of facts and questions alone, or of text with a few of them."""
    return recall.training_document(rng, text, length, rng.random() < diet.dense)


# Matching a key is learnt where nearly every line needs it; lengths grow once that is there.
SMALL = Recipe(
    config=BytesLlamaConfig(),
    documents=small_document,
    stages=(
        Stage(0.15, (128,), Diet(dense=0.75)),
        Stage(0.35, (256,), Diet(dense=0.4)),
        Stage(0.80, (256, 544, 544), Diet(dense=0.1)),
        Stage(1.00, (544, 544, 1056), Diet(dense=0.05)),
    ),
    steps=2400,
    minutes=28.0,
    block=0,
    watch=((512, 48),),
    watch_every=250,
    figures=((128, 200), (256, 200), (512, 500), (768, 200), (1024, 200)),
    detail=(512, 100),
    tasks=(),
    text=((512, 128, 1), (1024, 128, 1)),
)

# The base of the rotary angles is so large that half of a head's pairs hardly turn over 16K
# positions: content is compared there, whatever the distance, and neighbours in the other half.
LONG = Recipe(
    config=BytesLlamaConfig(
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rope_theta=1e8,
        max_position_embeddings=24576,
    ),
    documents=tasks.training_document,
    stages=(
        Stage(0.135, (128,), Diet(dense=0.8, lone=0.1)),
        Stage(0.2695, (256,), Diet(dense=0.6, lone=0.1, others=0.2), reach=8192),
        Stage(0.500, (256, 512), Diet(dense=0.4, lone=0.2, others=0.3), reach=24576),
        Stage(0.740, (512, 1024), Diet(dense=0.15, lone=0.3, others=0.6), reach=24576),
        Stage(0.895, (1024, 2048), Diet(dense=0.1, lone=0.35, others=0.6), reach=24576),
        Stage(0.958, (4096,), Diet(dense=0.1, lone=0.3, others=0.6), 8192, 24576),
        Stage(1.000, (8192,), Diet(dense=0.1, lone=0.3, others=0.6), 8192, 24576),
    ),
    steps=1900,
    minutes=240.0,
    block=128,
    watch=((512, 32), (2048, 8), (4096, 4), (8192, 2)),
    watch_every=500,
    figures=((512, 100), (1024, 100), (2048, 100), (4096, 100), (8192, 60), (16384, 12)),
    detail=(2048, 30),
    tasks=tasks.OTHER_TASKS,
    text=tuple((length, 4, 16384 // length) for length in (512, 1024, 2048, 4096, 8192, 16384)),
)

RECIPES = {"small": SMALL, "long": LONG}
