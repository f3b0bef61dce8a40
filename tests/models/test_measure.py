"""Figures of trained networks: a network that always knows gets one, one that never does zero."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from memcompile.models.networks import measure, recall, tasks
from memcompile.models.networks.bytes_llama import BytesLlama
from memcompile.models.networks.recipes import SMALL

TEXT = b"".join(b"line %d of the filler\n" % i for i in range(2000))


class Oracle(BytesLlama):
    """Writes the byte that stands next in what it is given, but for every `misses`-th row."""

    def __init__(self, misses: int = 0) -> None:
        nn.Module.__init__(self)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(1, 1)
        self.misses, self.rows = misses, 0

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, block: int = 0) -> Tensor:
        following = input_ids.roll(-1, dims=1)
        following[:, -1] = ord("\n")
        for row in following:
            self.rows += 1
            if self.misses and self.rows % self.misses == 0:
                row[-3] = 0
        return nn.functional.one_hot(following, 256).float()


@pytest.mark.parametrize(("misses", "rate"), [(0, 1.0), (1, 0.0), (4, 0.75)])
def test_recall_rate_counts_whole_answers(misses: int, rate: float) -> None:
    prompts = [recall.recall_prompt(700, seed, text=TEXT) for seed in range(20)]
    assert measure.recall_rate(Oracle(misses), prompts) == rate


@pytest.mark.parametrize("task", tasks.OTHER_TASKS, ids=lambda task: task.__name__)
def test_task_prompts_ask_for_what_is_stated(task: tasks.Task) -> None:
    for seed in range(30):
        prompt, answer = measure.task_prompt(task, 800, seed, TEXT)
        assert len(prompt) == 800
        assert prompt.endswith(b" = ")
        assert answer.endswith(b"\n")
        # One question, and every word of its answer stands in the text before it.
        asked = prompt[prompt.rindex(b"\n") + 1 :]
        assert asked.split()[1] in (b"recall:", b"items:", b"trace:", b"obey:")
        marks = [b"# recall:", b"# items:", b"# trace:", b"# obey:"]
        assert sum(map(prompt.count, marks)) == 1
        assert all(word in prompt for word in answer.split())
        assert (prompt, answer) == measure.task_prompt(task, 800, seed, TEXT)
    assert measure.task_rate(Oracle(), task, 3, 800) == 1.0
    assert measure.task_rate(Oracle(misses=1), task, 3, 800) == 0.0


def test_bits_of_a_network_that_knows_nothing() -> None:
    network = BytesLlama(SMALL.config)
    with torch.no_grad():
        network.model.norm.weight.zero_()
    assert measure.bits_per_byte(network, 64, places=3) == pytest.approx(8.0)
    assert measure.bits_per_byte(network, 64, places=2, row=3) == pytest.approx(8.0)


def test_lengths_of_one_row_read_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = bytes(random.Random(0).choices(range(97, 123), k=4000))
    monkeypatch.setattr(recall, "library_text", lambda held_out: text)
    read: list[bytes] = []

    class Spy(Oracle):
        def forward(self, input_ids: Tensor, *_: object) -> Tensor:  # type: ignore[override]
            read.append(bytes(input_ids.flatten().tolist()))
            return super().forward(input_ids)

    for length in (64, 256):
        measure.bits_per_byte(Spy(), length, places=2, row=512 // length)
    half = len(read) // 2
    assert b"".join(read[:half]) == b"".join(read[half:])


def test_chain_asks_for_its_longest_answer() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        names = len(tasks.chain_task(rng)) // 2
        _, answer = measure.task_prompt(tasks.chain_task, 800, seed, TEXT)
        assert answer.count(b" = ") == names - 1
