"""Figures of a byte-level Llama on held-out files and held-out seeds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import recall, tasks
from .bytes_llama import BytesLlama
from .recipes import Recipe

# Bytes that are read at once: long prompts go one by one, short ones together.
BYTES_AT_ONCE = 8192


def _device(network: BytesLlama) -> torch.device:
    return network.model.embed_tokens.weight.device


@torch.no_grad()
def recall_rate(network: BytesLlama, prompts: Sequence[recall.RecallPrompt]) -> float:
    """Share of prompts whose whole answer greedy decoding gives.

    All answer bytes are read at once: decoding is exact if and only if every byte is the likeliest
    one after the right bytes before it.
    """
    right = 0
    size = max(1, BYTES_AT_ONCE // len(prompts[0].prompt))
    for start in range(0, len(prompts), size):
        right += sum(exact(network, *recall.recall_batch(prompts[start : start + size])))
    return right / len(prompts)


@torch.no_grad()
def exact(network: BytesLlama, questions: Tensor, answers: Tensor) -> list[bool]:
    """For each row whether greedy decoding after questions [B, T] writes answers [B, A]."""
    read = torch.cat((questions, answers), dim=1)[:, :-1].to(_device(network))
    guesses = network(read)[:, questions.shape[1] - 1 :].argmax(-1).cpu()
    return [bool(row) for row in (guesses == answers).all(1)]


def task_prompt(task: tasks.Task, length: int, seed: int, text: bytes) -> tuple[bytes, bytes]:
    """A prompt of `length` bytes that ends with the last question of a task, and its answer.

    The task's other questions are left out; its statements stand where the task puts them.
    """
    rng = random.Random(seed)
    events = task(rng)
    stated = [event for event in events if recall.ANSWER not in event[1][1]]
    line, roles = [piece for _, piece in events if recall.ANSWER in piece[1]][-1]
    ask = roles.index(recall.ANSWER)
    filled, _ = recall.place_events(rng, text, length - ask, stated, subjects=2)
    return filled + line[:ask], line[ask:]


def task_rate(network: BytesLlama, task: tasks.Task, count: int, length: int) -> float:
    """Share of held-out prompts of a task whose whole answer greedy decoding gives."""
    text = recall.library_text(held_out=True)
    right = 0
    for seed in range(recall.HELD_OUT_SEEDS, recall.HELD_OUT_SEEDS + count):
        pair = task_prompt(task, length, seed, text)
        right += sum(exact(network, *(torch.tensor([list(part)]) for part in pair)))
    return right / count


@torch.no_grad()
def bits_per_byte(network: BytesLlama, length: int, places: int, row: int = 1) -> float:
    """Mean loss in bits on held-out library text, in windows of `length` read from their start.

    `row` windows stand one behind the other at each of `places` evenly spread places: lengths
    whose `length * row` is the same are measured on about the same bytes.
    """
    text = recall.library_text(held_out=True)
    stride = (len(text) - length * row - 1) // places
    starts = [place * stride + i * length for place in range(places) for i in range(row)]
    total = 0.0
    size = max(1, BYTES_AT_ONCE // length)
    for first in range(0, len(starts), size):
        rows = [list(text[at : at + length + 1]) for at in starts[first : first + size]]
        tokens = torch.tensor(rows, device=_device(network))
        logits = network(tokens[:, :-1]).flatten(0, 1)
        total += float(functional.cross_entropy(logits, tokens[:, 1:].flatten()) * len(rows))
    return total / len(starts) / math.log(2)


def held_out_prompts(count: int, length: int, **options: Any) -> list[recall.RecallPrompt]:
    """Prompts of held-out seeds in held-out text."""
    seeds = range(recall.HELD_OUT_SEEDS, recall.HELD_OUT_SEEDS + count)
    return [recall.recall_prompt(length, seed, **options) for seed in seeds]


def watched(network: BytesLlama, recipe: Recipe) -> dict[str, float]:
    """Recall of few prompts, for the curve."""
    return {
        f"recall_{length}": recall_rate(network, held_out_prompts(count, length))
        for length, count in recipe.watch
    }


def figures(network: BytesLlama, recipe: Recipe) -> dict[str, Any]:
    """The figures of the model card, on held-out seeds and files."""
    network.eval()
    length, count = recipe.detail
    return {
        "recall_by_length": {
            str(length): recall_rate(network, held_out_prompts(count, length))
            for length, count in recipe.figures
        },
        f"recall_at_{length}_by_depth": {
            f"{depth:.1f}": recall_rate(network, held_out_prompts(count, length, depth=depth))
            for depth in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
        },
        f"recall_at_{length}_by_facts": {
            str(facts): recall_rate(network, held_out_prompts(2 * count, length, facts=facts))
            for facts in (2, 4, 8)
        },
        f"tasks_at_{length}": {
            task.__name__.removesuffix("_task"): task_rate(network, task, 2 * count, length)
            for task in recipe.tasks
        },
        "text_bits_per_byte": {
            str(length): round(bits_per_byte(network, length, places, row), 3)
            for length, places, row in recipe.text
        },
    }
