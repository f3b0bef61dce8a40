"""Variable tracking: a value handed from name to name, statements far from each other."""

from __future__ import annotations

from itertools import pairwise

from ..prompts import Outline, Statement
from .needles import RULER
from .task import Draw, Task

HOPS = 3


def _tracking(draw: Draw) -> Outline:
    """A chain of `HOPS` + 1 names that hold one value, in this order anywhere in the text.

    A wording asks for the chain of a name down to the value, or, with `{value}` in its template,
    for all names that hold the value.
    """
    wording = draw.wording
    value = draw.names.value()
    chain = [draw.names.name() for _ in range(HOPS + 1)]
    depths = sorted(draw.rng.random() for _ in chain)
    lines = [wording.let.format(key=chain[0], value=value)]
    lines += [wording.same.format(key=key, other=other) for other, key in pairwise(chain)]
    statements = tuple(Statement(line, depth) for line, depth in zip(lines, depths, strict=True))
    backwards = chain[::-1]
    answers = chain if "{value}" in wording.trace else [*backwards[1:], value]
    text = wording.trace.format(key=backwards[0], value=value)
    question = draw.ask(text, answers, wording.chain)
    return Outline(draw.filler.open(draw.rng, draw.names.taken), statements, (question,))


TRACKING = Task(
    "tracking",
    f"a value handed on over {HOPS} names",
    RULER,
    needs=("let", "same", "trace"),
    deep=False,
    outline=_tracking,
)
