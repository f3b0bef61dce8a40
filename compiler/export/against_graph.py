"""A compiled engine held against the graph that it was made of, before it is handed out.

What a compiler can lose without a word (a write, a counter taken for a constant, an output) shows
in the logits or in the state within a few calls. Every call of the engine begins from the state
that the graph left, so that only this call's own rounding tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...models.memory.places import SitePlaces
from .contract import Contract
from .driver import Driver

# From the contract's inputs to its outputs, in order.
Run = Callable[[list[Tensor]], list[Tensor]]

# Of what a call changes: rounding, or a page chosen otherwise at a tie, is far below it; what is
# lost, misplaced or left from an earlier call is of the size of the change itself.
ALLOWED = {4: 0.05, 2: 0.25}
_SEED = 5


def check(
    contract: Contract,
    sites: Sequence[SitePlaces],
    engine: Run,
    graph: Run,
    what: str,
) -> None:
    """Runs both on random tokens, singly and several at once: from random state of two sequences,
    where pages and records of every size are filled, and from nothing.

    Args:
        engine, graph: state whose output has the name of its input they write in place.
        what: names the engine in errors.

    Raises:
        RuntimeError: they differ; the message names the tensor and the call.
    """
    generator = torch.Generator().manual_seed(_SEED)
    both = _Both(contract, engine, graph, what)
    for batch, split, filled in ((2, (1, 1, 19, 1), True), (1, (1, 1, 3, 1), False)):
        counts = _within(contract, split)
        start = _start(contract, sites, sum(counts)) if filled else 0
        driver = Driver(contract, both, batch, start + sum(counts))
        if filled:
            driver.position = [start] * batch
            for tensor in driver.state.values():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
        for count in counts:
            tokens = torch.randint(contract.vocabulary, (batch, count), generator=generator)
            # Rows of different lengths, where an engine takes them.
            lengths = [count, *[max(1, count - 4)] * (batch - 1)] if contract.lengths else None
            driver(tokens, lengths)


class _Both:
    """What drives both: calls the engine on copies, compares, and answers as the graph does."""

    def __init__(self, contract: Contract, engine: Run, graph: Run, what: str) -> None:
        self.contract, self.what = contract, what
        self.engine, self.graph = engine, graph
        self.calls = 0

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        contract = self.contract
        batch, rows = given[contract.tokens].shape
        self.calls += 1
        where = f"call {self.calls}, of {batch} x {rows} tokens"
        before = {tensor.input: given[tensor.input].clone() for tensor in contract.state}
        copies = {name: tensor.clone() for name, tensor in given.items()}
        with torch.no_grad():
            want = self._named([*self.graph([given[name] for name in contract.inputs])])
            try:
                got = self._named([*self.engine([copies[name] for name in contract.inputs])])
            except Exception as error:
                text = " ".join(str(error).split())[:400]
                raise RuntimeError(f"{self.what}: {where} fails: {text}") from error
        lengths = given[contract.lengths].tolist() if contract.lengths else [rows] * batch
        for row, valid in enumerate(lengths):
            expected, made = (x[contract.logits][row, :valid] for x in (want, got))
            self._compare(contract.logits, where, expected, made, None)
        held = given[contract.position].cpu() + torch.tensor(lengths, dtype=torch.int32)
        for tensor in contract.state:
            name, same = tensor.input, tensor.output == tensor.input
            expected, made = given[name], copies[name]
            if not same:
                expected, made = want[tensor.output], got[tensor.output]
            self._compare(
                name, where, *(tensor.filled(x, held) for x in (expected, made, before[name]))
            )
        return want

    def _named(self, made: list[Tensor]) -> dict[str, Tensor]:
        names = self.contract.outputs
        if len(made) != len(names):
            raise ValueError(f"it returns {len(made)} tensors where {len(names)} were expected")
        return dict(zip(names, made, strict=True))

    def _compare(
        self, name: str, where: str, want: Tensor, got: Tensor, before: Tensor | None
    ) -> None:
        if got.shape != want.shape or got.dtype != want.dtype:
            raise RuntimeError(
                f"{self.what}: {name} is {got.dtype} {list(got.shape)} after {where}; the graph "
                f"makes it {want.dtype} {list(want.shape)}"
            )
        change, other = want.double(), got.double()
        if before is not None:
            change, other = change - before.double(), other - before.double()
        size, error = float(change.norm()), float((change - other).norm())
        if error <= ALLOWED[min(4, want.dtype.itemsize)] * size:
            return
        kind = "is" if before is None else "changes"
        raise RuntimeError(
            f"{self.what}: {name} {kind} otherwise than the graph makes it in {where}: off by "
            f"{error:.3g} of {size:.3g}. What was compiled would lose state; please report this "
            "model"
        )


def _start(contract: Contract, sites: Sequence[SitePlaces], tokens: int) -> int:
    """A position two tokens before every page and record is full, where windows are left and
    budgets exceeded."""
    every = math.lcm(*(place.size for site in sites for place in site.places))
    memories = [site.memory for site in sites]
    passed = max(max(memory.own_window, memory.reads_all_below) for memory in memories)
    start = (passed // every + 1) * every - 2
    return start if contract.context is None else min(start, contract.context - tokens)


def _within(contract: Contract, split: Sequence[int]) -> list[int]:
    """The split, up to the engine's context."""
    left = contract.context if contract.context is not None else sum(split)
    counts: list[int] = []
    for count in split:
        if left > 0:
            counts.append(min(count, left))
            left -= counts[-1]
    return counts
