"""A memory as it is behind a long context, without running the model: for measuring steps."""

from __future__ import annotations

import torch

from .engine import CHUNK_TOKENS, Engine
from .memory_state import MemoryState

# Fields of a record that are no coordinates: a spread, a radius, a count.
_POSITIVE = ("std", "radius", "log_count")


def fill(engine: Engine, tokens: int, *, policy: bool, seed: int = 0) -> None:
    """Make `engine` hold one sequence of `tokens` random keys and values, forgetting all else.

    Keys, values and records are drawn from a normal distribution, one by one: a record is not that
    of its page's keys, so which pages score best is as random as they are. Pages are assigned, and
    let go, as if the tokens had come in calls of the engine.

    Args:
        policy: as if they had been read through the policy, which frees what it does not need;
            otherwise as a prefill leaves them, all there.

    Raises:
        ValueError: more tokens than the engine takes.
    """
    program = engine._program
    if program.limit is not None and tokens > program.limit:
        raise ValueError(
            f"{tokens} tokens exceed the context of {program.limit} ({program.limited_by})"
        )
    state = MemoryState(program.layouts, 1, program.device, program.max_context)
    size = (program.piece or CHUNK_TOKENS) if policy else CHUNK_TOKENS
    for start in range(0, tokens, size):
        lengths = [min(size, tokens - start)]
        state.reserve(lengths, policy=policy)
        state.advance(lengths)
    _draw(state, torch.Generator(program.device).manual_seed(seed))
    engine.reset()
    engine._state = state


def _draw(state: MemoryState, generator: torch.Generator) -> None:
    for layout, stores, rows in zip(state.layouts, state._pools, state._rows, strict=True):
        fields = layout.memory.fields
        for number, pools in enumerate(stores):
            exact = 0 if number else 2
            for i, pool in enumerate(pools):
                pool.normal_(generator=generator)
                if i >= exact and fields[i - exact] in _POSITIVE:
                    pool.abs_()
        for held in rows:
            held.normal_(generator=generator).abs_()
    for account in state._accounts.values():
        account.uniform_(generator=generator)
