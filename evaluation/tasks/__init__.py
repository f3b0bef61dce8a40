"""The tasks: prompts with known answers, each a pure function of task, length, depth and seed."""

from __future__ import annotations

import random

from ...models.networks.recall import HELD_OUT_SEEDS
from ..filler import Filler
from ..prompts import Prompt, fit
from ..tokens import Tokenizer
from ..wordings import Wording
from .associations import MQAR
from .needles import MULTI_KEY, MULTI_QUERY, MULTI_VALUE, SINGLE
from .shifts import LATE_CONSTRAINT, TOPIC_SHIFT
from .task import Draw, Task
from .tracking import TRACKING
from .words import COMMON_WORDS, FREQUENT_WORDS

__all__ = ["TASKS", "Task", "make_prompt", "tasks_of"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(SINGLE, MULTI_KEY, MULTI_VALUE, MULTI_QUERY, TRACKING),
        *(COMMON_WORDS, FREQUENT_WORDS, MQAR, LATE_CONSTRAINT, TOPIC_SHIFT),
    )
}


def tasks_of(wording: Wording) -> list[str]:
    """The tasks that a profile has lines for."""
    return [task.name for task in TASKS.values() if not wording.lacks(*task.needs)]


def make_prompt(
    task: Task,
    length: int,
    depth: float,
    seed: int,
    *,
    tokenizer: Tokenizer,
    wording: Wording,
    filler: Filler,
) -> Prompt:
    """The prompt of a task; equal arguments give equal prompts.

    Args:
        length: most tokens of context, question and answer together.
        depth: where the statement that is asked for stands, 0 to 1; tasks without a depth (see
            `Task.deep`) ignore it.
        seed: of everything that is drawn, from 0; counted on from the first seed that no
            checkpoint was trained on.

    Raises:
        ValueError: the profile has no lines for the task, the depth or the seed is out of range,
            or the length is too short.
    """
    lacking = wording.lacks(*task.needs)
    if lacking:
        raise ValueError(
            f"the wording {wording.name!r} has no {', '.join(lacking)} for task {task.name!r}; its "
            f"tasks are {', '.join(tasks_of(wording))}"
        )
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}; give a share of the context, 0 to 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; give a whole number of at least 0")
    place = f"{depth:.6f}" if task.deep else "-"
    rng = random.Random(f"{task.name} {length} {place} {HELD_OUT_SEEDS + seed}")
    draw = Draw(rng, filler, wording, wording.names(rng, filler), depth)

    def room(tokens: int) -> int:
        return max(1, round(tokens * wording.patience) + wording.spare)

    try:
        return fit(task.outline(draw), length, tokenizer, room, wording.end)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from error
