"""The self-check: a derived step against the model's own forward, before anything is handed out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..passes.result import Declined, NotRewritten
from ..runtime.engine import Engine, Program
from .in_float32 import (
    HALVES,
    TYPICAL,
    InFloat32,
    error_over_eager,
    farthest,
    program_in_float32,
)

# Batch, tokens and the calls they are split into: odd, with single tokens and a single row.
_SPLITS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (2, (7, 1, 3)),
    (1, (1, 1, 5, 3)),
    (3, (3, 8)),
)


# Contexts up to this length are also checked in full.
_WHOLE_CONTEXT = 1024


def self_check(
    program: Program, forward: Callable[..., Tensor], takes_position_ids: bool
) -> dict[str, Any]:
    """Compare the step with `forward` on random tokens at three odd splits.

    One of them runs the policy's graph, where the policy reads everything: then it must be dense.

    The tolerance is measured: a causal model's logits for a prefix do not depend on what follows,
    so ``forward(tokens)[:, :m]`` against ``forward(tokens[:, :m])`` shows the rounding noise of the
    model itself. A step may differ by four times that plus a rounding band.

    In 16 bit no such band tells wrong from rounded: there the forward is run in float32 as well,
    and the step has to be about as near to that as the forward in 16 bit is (`in_float32`).

    Returns:
        The figures: largest difference, what was allowed, tokens compared; in 16 bit, how many
        times as far from float32 as the forward the step was, or why that is not known.

    Raises:
        NotRewritten: the step differs, or the forward is not a function of the prefix alone.
    """
    generator = torch.Generator().manual_seed(0)
    worst, allowed, compared, noise = 0.0, 0.0, 0, 0.0
    in_float32: dict[str, Any] = {}
    splits = [(batch, _within(split, program.limit)) for batch, split in _SPLITS]
    if program.limit is not None and 2 < program.limit <= _WHOLE_CONTEXT:
        # A forward may treat a full table in its own way.
        splits.append((1, (program.limit - 2, 2)))
    for trial, (batch, split) in enumerate(splits):
        total = sum(split)
        tokens = torch.randint(program.vocabulary, (batch, total), generator=generator)
        tokens = tokens.to(program.device)
        full = _full(forward, tokens, takes_position_ids)
        for length in () if trial else {1, max(1, total // 2), max(1, total - 1)}:
            prefix = _full(forward, tokens[:, :length], takes_position_ids)
            noise = max(noise, _difference(prefix, full[:, :length]))
        scale = float(full.double().abs().max())
        band = scale * rounding(full.dtype, len(program.layouts), total)
        # A forward that looks ahead, or at the length, differs from its own prefix by far more
        # than rounding does.
        if noise > max(band, 0.005 * scale):
            raise NotRewritten(
                "the forward of a prefix is not the prefix of the forward",
                [
                    Declined(
                        f"logits change by up to {noise:.3g} when later tokens are cut off",
                        "(whole model)",
                        "self_check",
                    )
                ],
            )
        tolerance, exact = 4 * noise + band, None
        if full.dtype in HALVES:
            try:
                with InFloat32():
                    exact = _full(forward, tokens, takes_position_ids)
                tolerance = farthest(full, exact)
            except NotRewritten as refused:  # operations of its own may be for 16 bit alone
                in_float32["not_run_in_float32"] = refused.declined[0].reason
        # Tokens within every budget: the policy reads all of them too, through its own graph.
        read = "policy" if trial == 1 and _reads_all(program, total) else "dense"
        calls = f"batch {batch} in {read} calls of {list(split)} tokens"
        stepped = _stepped(program, tokens, split, read)
        error = _difference(stepped, full)
        if not error <= tolerance:
            raise _not_reproduced(calls, f"differ by {error:.3g}, allowed {tolerance:.3g}")
        if exact is not None:
            times = error_over_eager(stepped, full, exact)
            if not times <= TYPICAL:
                raise _not_reproduced(
                    calls,
                    f"are {times:.3g} times as far from float32 as the forward's, allowed "
                    f"{TYPICAL:g}",
                )
            in_float32["error_over_eager"] = max(times, in_float32.get("error_over_eager", 0.0))
        worst, allowed = max(worst, error), max(allowed, tolerance)
        compared += batch * total
    figures = {"largest_difference": worst, "allowed": allowed, "tokens": compared}
    return figures | in_float32


def _not_reproduced(calls: str, differ: str) -> NotRewritten:
    return NotRewritten(
        "the derived step does not reproduce the forward",
        [
            Declined(
                f"{calls}: logits {differ}; please report this model",
                "(whole model)",
                "self_check",
            )
        ],
    )


def check_splits(program: Program, source: Program) -> float:
    """Compare a program with itself: its logits must not depend on how tokens are split into calls.

    For programs with states, which no forward shows the logits of. The context is longer than every
    window, so that states are written, carried over and read, in chunks and row by row.

    Args:
        source: the program before it was lowered, which tells in 16 bit what rounding is.

    Returns:
        The largest difference.

    Raises:
        NotRewritten: one of them is larger than rounding.
    """
    window = max(layout.memory.own_window for layout in program.layouts)
    total = min(window + 19, program.limit or window + 19)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(program.vocabulary, (2, total), generator=generator)
    tokens = tokens.to(program.device)
    worst = 0.0
    for read in ("dense", "policy"):
        whole = _stepped(program, tokens, [total], read)
        split = [*_within((total - 8, 1, 1, 6), total)]
        parts = _stepped(program, tokens, split, read)
        error = _difference(parts, whole)
        scale = float(whole.double().abs().max())
        # Two roundings of each state, and of everything after it.
        band = 16 * math.sqrt(len(program.layouts)) * torch.finfo(whole.dtype).eps * scale
        times, told = 0.0, ""
        if whole.dtype in HALVES:
            with InFloat32():
                exact = _stepped(program_in_float32(source), tokens, [total], read)
            band, times = farthest(whole, exact), error_over_eager(parts, whole, exact)
            told = f", and are {times:.3g} times as far from float32 as its, allowed {TYPICAL:g}"
        if not (error <= band and times <= TYPICAL):
            raise NotRewritten(
                "what a state answers depends on how the tokens are split",
                [
                    Declined(
                        f"{read} calls of {split} tokens: logits differ by {error:.3g} from one "
                        f"call, allowed {band:.3g}{told}; please report this model",
                        "(whole model)",
                        "self_check",
                    )
                ],
            )
        worst = max(worst, error)
    return worst


def _within(split: Sequence[int], limit: int | None) -> tuple[int, ...]:
    """The split, shortened to a model's context."""
    left, kept = limit if limit is not None else sum(split), []
    for part in split:
        if left > 0:
            kept.append(min(part, left))
            left -= kept[-1]
    return tuple(kept)


def _full(forward: Callable[..., Tensor], tokens: Tensor, takes_position_ids: bool) -> Tensor:
    batch, n = tokens.shape
    positions = torch.arange(n, device=tokens.device).expand(batch, n).contiguous()
    try:
        with torch.no_grad():
            return forward(tokens, positions) if takes_position_ids else forward(tokens)
    except Exception as error:  # a model's forward may raise anything
        raise NotRewritten(
            f"the model's own forward fails on tokens[{batch}, {n}]",
            [
                Declined(
                    f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                    "(whole model)",
                    "self_check",
                )
            ],
        ) from error


def _reads_all(program: Program, tokens: int) -> bool:
    """Whether the policy selects every page of so short a context, at every site."""
    memories = [layout.memory for layout in program.layouts if layout.memory.selects]
    return all(memory.budget_pages * memory.page_size >= tokens for memory in memories)


def _stepped(program: Program, tokens: Tensor, split: Sequence[int], read: str) -> Tensor:
    engine, parts = Engine(program, always_select=True), []
    for piece in tokens.split(list(split), dim=1):
        dense = read == "dense"
        parts.append(engine.prefill(piece, all_logits=True) if dense else engine(piece))
    return torch.cat(parts, 1)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def rounding(dtype: torch.dtype, layers: int, keys: int) -> float:
    """What rounding makes of logits, as a part of the largest of them.

    Errors of successive layers add up like a random walk, and so do those of a sum, which has as
    many terms as there are keys. In 16 bit, sums are float32 and only what is stored is rounded,
    which takes fewer units and does not grow with the terms. What is wrong rather than rounded is
    off by the size of the logits.

    Args:
        keys: at most, that a query reads.
    """
    units, terms = (32, max(1, keys / 16)) if dtype.itemsize > 2 else (8, 1)
    return units * math.sqrt(layers * terms) * torch.finfo(dtype).eps
