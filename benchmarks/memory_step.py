"""One layer's memory step as an engine runs it: the same lines, printed into a graph of kernels."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..codegen.spec import KernelSpec, specialise
from ..models.memory.read import emit_read, emit_write
from ..models.memory.site import SiteTensors, state_names
from ..models.memory.spec import Memory
from ..models.ops import FAMILIES
from ..runtime.memory_state import MemoryState
from ..runtime.site_layout import SiteLayout

# Gives the kernel of each spec; None: the reference operations run.
Load = Callable[[Iterable[KernelSpec]], dict[KernelSpec, Any]]
INPUTS = ("query", "key", "value", "position", "lengths")


class Printer:
    """An `emit` that adds calls of kernels to a graph, and runs them to know the shapes."""

    def __init__(self, load: Load | None) -> None:
        self.graph = fx.Graph()
        self.load = load
        self.specs: list[KernelSpec] = []
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Any] = []  # an id names a value only while the value lives

    def give(self, name: str, value: Tensor) -> None:
        self.keep(self.graph.placeholder(name), value)

    def keep(self, node: fx.Node, value: Any) -> None:
        self.kept.append(value)
        self.nodes[id(value)] = node

    def __call__(self, target: Callable[..., Any], *args: Any) -> Any:
        given: Sequence[Any] = args
        label = getattr(target, "__name__", "").split(".")[0]
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "memcompile":
            label = target._schema.name.split("::")[1]
            if self.load is not None:
                spec, given = specialise(FAMILIES[target], args)
                target = self.load([spec])[spec]
                self.specs.append(spec)
        value = target(*given)
        nodes = fx.map_arg(self.wrap(given), lambda node: node)
        node = self.graph.create_node("call_function", target, nodes, name=label)
        if value is not None:
            self.keep(node, value)
        return value

    def wrap(self, value: Any) -> Any:
        """Nodes in the place of the tensors, tuples and lists that were seen before."""
        if id(value) in self.nodes:
            return self.nodes[id(value)]
        if isinstance(value, tuple | list):
            return type(value)(self.wrap(item) for item in value)
        if isinstance(value, Tensor):
            raise ValueError(f"a tensor of {tuple(value.shape)} comes from nowhere in the graph")
        return value


class MemoryStep:
    """Write one token and read, at one site: `step(query, key, value, position, lengths, *state)`.

    Attributes:
        run: the step as plain Python; returns [B, H, 1, Dv] in the query's type.
        specs: what kernels were generated for.
    """

    def __init__(
        self,
        layout: SiteLayout,
        read: str,
        sample: Sequence[Tensor],
        state: Sequence[Tensor],
        load: Load | None,
        scale: float,
    ) -> None:
        emit = Printer(load)
        names = [*INPUTS, *state_names(layout.memory)]
        for name, tensor in zip(names, (*sample, *state), strict=True):
            emit.give(name, tensor)
        query, key, value, position, lengths = sample
        site = SiteTensors.take(layout.memory, state)
        emit_write(emit, layout.memory, site, key, value, position, lengths)
        out, _ = emit_read(
            emit,
            layout.memory,
            site,
            read,
            query,
            position,
            lengths,
            scale=scale,
            softcap=0.0,
            window=layout.window,
            dtype=query.dtype,
        )
        emit.graph.output(emit.nodes[id(out)])
        self.module = fx.GraphModule({}, emit.graph)
        self.run: Callable[..., Tensor] = self.module.forward
        self.specs = emit.specs

    def phases(self, *inputs: Tensor) -> dict[str, float]:
        """Seconds that each kernel of one call took on the CPU, by its part in the step."""
        watch = Stopwatch(self.module)
        watch.run(*inputs)
        return watch.seconds

    def calls(self, *inputs: Tensor) -> dict[str, Callable[[], Any]]:
        """Each kernel of the step with its arguments, by its part in the step."""
        calls = Calls(self.module)
        calls.run(*inputs)
        return calls.found


class Stopwatch(fx.Interpreter):
    """Runs a graph node by node and keeps the time of each call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[str, float] = {}
        self.node = ""

    def run_node(self, n: fx.Node) -> Any:
        self.node = n.name
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        started = time.perf_counter()
        result = target(*args, **kwargs)
        taken = time.perf_counter() - started
        if is_kernel(target, self.node):
            self.seconds[self.node] = taken
        return result


def reads_dense(memory: Memory, position: int) -> bool:
    """Whether an engine runs its dense graph for a policy read at token `position`."""
    return not memory.selects or position < memory.reads_all_below


class Calls(fx.Interpreter):
    """Runs a graph and keeps each kernel's call, to be made again by itself."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Callable[[], Any]] = {}
        self.node = ""

    def run_node(self, n: fx.Node) -> Any:
        self.node = n.name
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if is_kernel(target, self.node):
            self.found[self.node] = lambda: target(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def is_kernel(target: Any, node: str) -> bool:
    """Whether a call of a step is a kernel's, and not a view or a cast around it."""
    return target is not operator.getitem and not node.startswith(("unsqueeze", "to"))


def one_site(
    layout: SiteLayout,
    tokens: int,
    seed: int = 0,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> MemoryState:
    """A memory of one site whose `batch` sequences hold `tokens` random tokens each, with room for
    one more, whose page is assigned."""
    state = MemoryState([layout], batch, device, max_context=tokens + 1)
    fill(state, [tokens] * batch, seed)
    state.reserve([1] * batch)
    return state


PATTERN_PAGES = 2048


def fill(state: MemoryState, tokens: Sequence[int], seed: int = 0) -> None:
    """Makes an empty memory hold `tokens` random tokens a sequence, as if they had been read.

    Keys and values are drawn once, for PATTERN_PAGES pages; every site gets them over and over,
    each time in another order, with the records that belong to them. Only what the engine itself
    uses is relied on: `reserve` assigns pages, `advance` counts tokens, `tensors` lists pools.
    """
    from ..models.memory.records import page_records

    device = state.device
    make = torch.Generator(device).manual_seed(seed)
    state.reserve(tokens)
    state.advance(tokens)
    patterns: dict[tuple[Any, ...], list[Tensor]] = {}
    tensors = iter(state.tensors())
    for layout in state.layouts:
        memory, exact = layout.memory, 2
        for store in layout.stores():
            next(tensors)  # the page table
            pools = [next(tensors) for _ in store.pools]
            size, fields = store.key.page_size, memory.fields
            # A level's records are those of keys of its own, of so many tokens each.
            drawn = min(size, 512)
            count = min(PATTERN_PAGES * memory.page_size // drawn, len(pools[0]))
            shape = (count, drawn, layout.key_dim, layout.value_dim, layout.dtype, fields)
            if shape not in patterns:
                keys, values = (
                    torch.randn(count, drawn, dim, generator=make, device=device).to(layout.dtype)
                    for dim in (layout.key_dim, layout.value_dim)
                )
                records = page_records(keys, values, list(fields)) if fields else []
                patterns[shape] = [keys, values, *records]
            chosen = patterns[shape][:exact] if exact and memory.levels else patterns[shape]
            chosen = chosen if exact else patterns[shape][2:]
            for start in range(0, len(pools[0]), count):
                order = torch.randperm(count, generator=make, device=device)
                for pool, pattern in zip(pools, chosen, strict=True):
                    part = pool[start : start + count]
                    part.copy_(pattern[order[: len(part)]])
            exact = 0
        for _ in range(bool(memory.account) + len(layout.rows())):
            next(tensors)
