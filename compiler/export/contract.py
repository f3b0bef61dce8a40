"""The state contract: what a runtime feeds an exported engine with, as `state.json` says it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...models.memory.places import Place, SitePlaces, contiguous_names, splits_at
from ...passes.remember import StepGraph
from ...runtime.engine import CHUNK_TOKENS, Program
from ...runtime.site_layout import SiteLayout
from ..archive import one_line

FILE = "state.json"
DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64")
DEFAULT_CAPACITY = 4096  # tokens, where neither the model nor max_context sets one


@dataclass(frozen=True)
class Grows:
    """How an axis grows with the context.

    Attributes:
        axis: which.
        tokens: it is capacity / tokens long.
    """

    axis: int
    tokens: int


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state.

    Attributes:
        input, output: its names; where they are the same, the engine updates it in place.
        dtype: one of DTYPES.
        shape: before the first call, for one sequence, at the capacity of `Capacity.tokens`.
        init: what every element is before the first call, and in rows added later.
        batch_axis: the axis that is as long as there are sequences.
        grows: None where the shape holds for any context.
    """

    input: str
    output: str
    dtype: str
    shape: tuple[int, ...]
    init: float
    batch_axis: int
    grows: Grows | None

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def filled(self, held: Tensor, position: Tensor) -> Tensor:
        """`held` up to the tokens of each sequence, int [batch], and zeros behind them: what a call
        leaves there (padding, records of pages that are not full) nothing reads, and engines differ
        in it."""
        if self.grows is None:
            return held
        apart = held.movedim((self.batch_axis, self.grows.axis), (0, 1))
        ends = position.cpu()[:, None]
        if self.input.endswith("_account"):  # of every page that has begun; of others, once full
            ends = ends + self.grows.tokens - 1
        ends = ends // self.grows.tokens
        there = (torch.arange(apart.shape[1]) < ends).to(held.device)
        kept = torch.where(there.view(*there.shape, *[1] * (apart.dim() - 2)), apart, 0)
        return kept.movedim((0, 1), (self.batch_axis, self.grows.axis))


@dataclass(frozen=True)
class Capacity:
    """Tokens that the growing tensors have room for.

    Attributes:
        tokens: in the shapes given.
        multiple: any other capacity is a multiple of this.
    """

    tokens: int
    multiple: int


@dataclass(frozen=True)
class Contract:
    """All that is needed to drive an engine: feed it tokens, position and state, and feed each
    state input with the output of the call before.

    Attributes:
        tokens: int64 [batch, n], any n >= 1.
        position: int32 [batch], the tokens each sequence holds.
        lengths: int32 [batch], the valid ones of the new tokens (right-padded); None where every
            sequence has the same number.
        logits: [batch, n, vocabulary].
        state: in the order of the engine's inputs and outputs.
        capacity: None where nothing grows.
        longest_call: most tokens of one call; None: any number.
        splits_at: a call may end at a multiple of this position, and may not cross one; None: it
            may end anywhere.
        context: most tokens a sequence may hold; None: as many as there is capacity for.
        vocabulary: tokens are 0 .. vocabulary - 1.
    """

    tokens: str
    position: str
    lengths: str | None
    logits: str
    state: tuple[StateTensor, ...]
    capacity: Capacity | None
    longest_call: int | None
    splits_at: int | None
    context: int | None
    vocabulary: int

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in the order of runtimes that go by it."""
        first = [self.tokens, self.position, *([self.lengths] if self.lengths else [])]
        return [*first, *(tensor.input for tensor in self.state)]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs in order: the logits, and the state that is not updated in place."""
        return [self.logits, *(t.output for t in self.state if t.output != t.input)]

    def in_place(self) -> Contract:
        """The same for an engine that updates its state in place."""
        return replace(self, state=tuple(replace(t, output=t.input) for t in self.state))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, source: str = FILE) -> Contract:
        """Rebuilds a contract from `to_json`.

        Raises:
            ValueError: something is missing, unknown, or of another type.
        """
        try:
            given = dict(data)
            tensors = []
            for values in given.pop("state"):
                grows = values["grows"]
                made = {**values, "shape": tuple(values["shape"])}
                made["grows"] = None if grows is None else Grows(**grows)
                tensors.append(StateTensor(**made))
            capacity = given.pop("capacity")
            contract = cls(
                state=tuple(tensors),
                capacity=None if capacity is None else Capacity(**capacity),
                **given,
            )
            contract._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source}: damaged: {one_line(error)}") from error
        return contract

    def _check(self) -> None:
        names = [*self.inputs, self.logits]
        if any(not isinstance(name, str) or not name for name in names):
            raise ValueError(f"names are {names!r}")
        for number in (self.longest_call, self.splits_at, self.context):
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{number!r} where a number of tokens was expected")
        for tensor in self.state:
            sizes = (*tensor.shape, tensor.batch_axis)
            if tensor.dtype not in DTYPES or any(type(s) is not int or s < 0 for s in sizes):
                raise ValueError(f"{tensor.input}: {tensor.dtype!r} {tensor.shape}")
            axes = [tensor.batch_axis, *([tensor.grows.axis] if tensor.grows else [])]
            if any(axis >= len(tensor.shape) for axis in axes):
                raise ValueError(f"{tensor.input}: axes {axes} of {tensor.shape}")
            if tensor.grows and self.capacity is None:
                raise ValueError(f"{tensor.input} grows, and there is no capacity")

    def write(self, folder: Path) -> None:
        """Writes `state.json`."""
        text = json.dumps(self.to_json(), indent=1) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")


def read_contract(folder: Path) -> Contract:
    """The contract in a folder of an exported engine.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; expected the folder of an exported engine")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged JSON: {one_line(error)}") from error
    return Contract.from_json(data, str(path))


def places_of(program: Program) -> list[SitePlaces]:
    """Where the pages of each site lie without a host."""
    return [
        SitePlaces(number, layout.memory, layout.kv_heads, tuple(_places(layout, program.limit)))
        for number, layout in enumerate(program.layouts)
    ]


def _places(layout: SiteLayout, limit: int | None) -> list[Place]:
    made = []
    for store in layout.stores():
        key = store.key
        place = Place(key.page_size)
        if key.reach is not None:
            turns = Place(key.page_size, key.sinks, key.reach)
            # Where the whole context fits, every page may as well stay where it is.
            if limit is None or turns.columns(CHUNK_TOKENS) * key.page_size < limit:
                place = turns
        made.append(place)
    return made


def contract_of(program: Program, sites: Sequence[SitePlaces]) -> Contract:
    """The contract of a program's exported engines, state passed in and out."""
    growing = [place for site in sites for place in site.places if place.grows]
    capacity = None
    if growing:
        multiple = math.lcm(*(place.size for place in growing))
        tokens = program.max_context or program.limit or DEFAULT_CAPACITY
        capacity = Capacity(-(-tokens // multiple) * multiple, multiple)
    turns = any(not place.grows for site in sites for place in site.places)
    state = [
        tensor
        for site, layout in zip(sites, program.layouts, strict=True)
        for tensor in _state(site, layout, capacity)
    ]
    return Contract(
        "tokens",
        "position",
        "lengths" if program.ragged else None,
        "logits",
        tuple(state),
        capacity,
        CHUNK_TOKENS if turns else None,
        splits_at(site.memory for site in sites),
        program.limit,
        program.vocabulary,
    )


def _state(site: SitePlaces, layout: SiteLayout, capacity: Capacity | None) -> list[StateTensor]:
    """The tensors of one site, in the order of `contiguous_names`."""
    names = iter(contiguous_names(site.memory))
    made = []

    def add(dtype: torch.dtype, shape: tuple[int, ...], grows: Grows | None) -> None:
        name = f"site{site.layer}_{next(names)}"
        kind = str(dtype).removeprefix("torch.")
        made.append(StateTensor(name, f"{name}_out", kind, (1, *shape), 0.0, 0, grows))

    for place, store in zip(site.places, layout.stores(), strict=True):
        for shape, dtype in store.pools:
            slots = shape[0] if len(shape) == 2 else 1
            if place.grows:
                assert capacity is not None
                columns, grows = capacity.tokens // place.size, Grows(2, place.size // slots)
            else:
                columns, grows = place.columns(CHUNK_TOKENS), None
            add(dtype, (layout.kv_heads, columns * slots, shape[-1]), grows)
    if site.memory.account is not None:
        assert capacity is not None
        size = site.memory.page_size
        add(torch.float32, (layout.kv_heads, capacity.tokens // size), Grows(2, size))
    for shape, dtype in layout.rows():
        add(dtype, shape, None)
    return made


def prefill_of(step: StepGraph, program: Program) -> fx.GraphModule | None:
    """The graph that reads a prompt densely, for a second engine on the same state; None where the
    one graph does for both, or where pages are let go of, so that nothing is there to be read."""
    if step.dense is step.policy:
        return None
    if any(store.key.lets_go for layout in program.layouts for store in layout.stores()):
        return None
    return step.dense
