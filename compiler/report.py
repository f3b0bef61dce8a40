"""What was rewritten and what was not: as data, as JSON, and as a table for people."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..models.memory.spec import Memory, State
from ..models.memory.state import state_features
from ..models.memory.traffic import bytes_read
from ..passes.result import Declined, MaskRule, Site
from ..runtime.site_layout import SiteLayout
from .progress import doing

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderResult
    from rich.table import Table

VERSION = 1
CONTEXTS = (8 * 1024, 128 * 1024)
_KERNEL_FIGURES = ("registers", "spilled", "shared", "bytes")
# What an entry of a site has beside the fields of `Site`, or in another form.
_NOT_OF_SITES = ("memory", "step_bytes", "held_bytes", "window", "rule")


@dataclass
class Lowered:
    """How the step graphs of a model run.

    Attributes:
        kernels: one entry a generated kernel: name, source file, calls by graph.
        references: what runs on references or torch's own operations, a reason each.
        inductor: by graph, "lowered", or why it runs operation by operation.
        targets: by target that kernels were compiled for, their registers and sizes, and what is
            not covered there (see `export.targets.figures`).
    """

    kernels: list[dict[str, Any]] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    inductor: dict[str, str] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: what was generated, and what was not and why."""
        lines = []
        if self.kernels:
            calls = sum(sum(kernel["calls"].values()) for kernel in self.kernels)
            lines.append(f"kernels: {len(self.kernels)} generated, called {calls} times a step")
            lines += [f"  - {kernel['name']}: {kernel['source']}" for kernel in self.kernels]
        lines += [f"not generated: {reason}" for reason in self.references]
        for target, made in self.targets.items():
            size = bytes_of(sum(kernel["bytes"] for kernel in made["kernels"]))
            lines.append(f"{target}: {len(made['kernels'])} kernels, {size}, unverified on GPU")
            lines += [f"{target}: not compiled: {reason}" for reason in made["uncovered"]]
        eager = {reason for reason in self.inductor.values() if reason != "lowered"}
        return lines + [f"step graph runs operation by operation: {r}" for r in sorted(eager)]


@dataclass
class Report:
    """What became of each attention of a model.

    Attributes:
        model: class name of the model, or the name of its file.
        policy: name of the policy, and `options` the values of its fields.
        sites: the attentions that were found, in graph order.
        memories: the memory of each rewritten site, by the site's name.
        declined: what was looked at and left alone.
        max_context: the context that length-dependent tables were resolved for, or None.
        ragged: whether rows of a batch may have positions of their own.
        timings: seconds a stage took, by its name.
        self_check: figures of the check of the step against the model's own forward; empty when it
            was not run.
        notes: what a reader of the figures has to know.
        lowered: how the step graphs run.
    """

    model: str
    policy: str
    options: dict[str, Any] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    memories: dict[str, Memory] = field(default_factory=dict)
    declined: list[Declined] = field(default_factory=list)
    max_context: int | None = None
    ragged: bool = False
    timings: dict[str, float] = field(default_factory=dict)
    self_check: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lowered: Lowered = field(default_factory=Lowered)

    def step_bytes(self, site: Site, context: int) -> int:
        """Bytes that the last of `context` tokens reads at `site`, its own key included."""
        memory = self.memories.get(site.name)
        if memory is None:
            return site.dense_bytes(context)
        return bytes_read(memory, site, context - 1, window=site.rule.window)

    def held_bytes(self, site: Site, context: int) -> int:
        """Bytes that `site` holds of `context` tokens when the last has read."""
        memory = self.memories.get(site.name)
        if memory is None:
            return site.dense_bytes(context)
        return layout_of(site, memory).held_bytes(context)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; `from_json` gives it back."""
        return {
            "version": VERSION,
            "model": self.model,
            "policy": self.policy,
            "options": dict(self.options),
            "sites": [
                {
                    **site.to_json(),
                    "memory": m.to_json() if (m := self.memories.get(site.name)) else None,
                    "step_bytes": {
                        str(context): {
                            "dense": site.dense_bytes(context),
                            "memory": self.step_bytes(site, context),
                        }
                        for context in CONTEXTS
                    },
                    "held_bytes": {str(n): self.held_bytes(site, n) for n in CONTEXTS},
                }
                for site in self.sites
            ],
            "declined": [declined.to_json() for declined in self.declined],
            "max_context": self.max_context,
            "ragged": self.ragged,
            "timings": dict(self.timings),
            "self_check": dict(self.self_check),
            "notes": list(self.notes),
            "lowered": self.lowered.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """Rebuilds a report from `to_json`.

        Raises:
            ValueError: another version, a missing or an unknown key.
        """
        if data.get("version") != VERSION:
            raise ValueError(
                f"report version {data.get('version')!r}: this memcompile reads version {VERSION}; "
                "build the model again"
            )
        known = {"version", *cls.__dataclass_fields__} - {"memories"}
        if data.keys() != known:
            raise ValueError(
                f"report with missing keys {sorted(known - data.keys())} and unknown keys "
                f"{sorted(data.keys() - known)}; known: {sorted(known)}"
            )
        values = {key: value for key, value in data.items() if key != "version"}
        values["memories"] = {
            entry["name"]: Memory.from_json(entry["memory"])
            for entry in data["sites"]
            if entry["memory"] is not None
        }
        values["sites"] = [_site(entry) for entry in data["sites"]]
        values["declined"] = [Declined(**entry) for entry in data["declined"]]
        values["lowered"] = Lowered(**data["lowered"])
        for kernel in values["lowered"].kernels:
            if not isinstance(kernel, dict) or not isinstance(kernel.get("calls"), dict):
                raise ValueError(
                    f"report with a kernel {kernel!r:.60}; expected its calls by graph"
                )
        _check_targets(values["lowered"].targets)
        return cls(**values)

    def table(self) -> Table:
        """One row a site: heads, mask rule, memory, and the bytes a step reads beside dense."""
        from rich.table import Table

        table = Table(
            title=f"{self.model}, policy {self.policy}: bytes that a step reads, and dense's",
            title_justify="left",
        )
        table.add_column("layer", justify="right")
        table.add_column("name", overflow="fold")
        table.add_column("heads", no_wrap=True)
        table.add_column("reads", no_wrap=True)
        table.add_column("memory", no_wrap=True)
        for context in CONTEXTS:
            table.add_column(f"at {size_of(context)}", justify="right", no_wrap=True)
            table.add_column("dense", justify="right", no_wrap=True)
        for site in self.sites:
            memory = self.memories.get(site.name)
            row = [*_site_cells(site), memory.name if memory else "untouched"]
            for context in CONTEXTS:
                row += [bytes_of(self.step_bytes(site, context))]
                row += [bytes_of(site.dense_bytes(context))]
            table.add_row(*row)
        if len(self.sites) > 1:
            totals = []
            for context in CONTEXTS:
                totals.append(bytes_of(sum(self.step_bytes(s, context) for s in self.sites)))
                totals.append(bytes_of(sum(s.dense_bytes(context) for s in self.sites)))
            table.add_section()
            table.add_row("", "all", "", "", "", *totals)
        return table

    def kernel_table(self) -> Table:
        """One row a kernel and target: what it takes of a multiprocessor, and how large it is."""
        from rich.table import Table

        table = Table(title="kernels compiled for other machines", title_justify="left")
        table.add_column("kernel", overflow="fold")
        table.add_column("target", no_wrap=True)
        for head in ("registers", "spilled", "shared", "size"):
            table.add_column(head, justify="right", no_wrap=True)
        for target, made in self.lowered.targets.items():
            for kernel in made["kernels"]:
                sizes = [bytes_of(kernel[key]) for key in ("spilled", "shared", "bytes")]
                table.add_row(kernel["name"], target, str(kernel["registers"]), *sizes)
        return table

    def lines(self) -> list[str]:
        """What stands below the table."""
        lines = list(dict.fromkeys(describe(memory) for memory in self.memories.values()))
        if not self.memories:
            lines.append("no attention was rewritten")
        elif self.policy != "dense" and not any(
            m.selects or m.state for m in self.memories.values()
        ):
            lines.append("with these options no attention skips a page: a step reads everything")
        if self.memories:
            held = (
                f"{bytes_of(sum(self.held_bytes(s, n) for s in self.sites))} at {size_of(n)}"
                for n in CONTEXTS
            )
            lines.append(f"held of a sequence: {', '.join(held)}")
        if self.declined:
            lines.append(f"declined: {len(self.declined)}")
            lines += [f"  - {declined}" for declined in self.declined]
        if self.memories and not self.ragged:
            lines.append("the rows of a batch share one position: the model takes no position_ids")
        if self.max_context is not None:
            lines.append(f"tables that depend on the length hold for {self.max_context} tokens")
        if self.self_check:
            figures = ((k.replace("_", " "), v) for k, v in self.self_check.items())
            shown = (f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures)
            lines.append("self-check: " + ", ".join(shown))
        lines += self.lowered.lines()
        if self.timings:
            lines.append("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in self.timings.items()))
        return lines + [f"note: {note}" for note in self.notes]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        if self.sites:
            yield self.table()
        if self.lowered.targets:
            yield self.kernel_table()
        yield Text("\n".join(self.lines()))

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=140, color_system=None)
        with console.capture() as text:
            console.print(self, soft_wrap=True)
        return text.get().rstrip()


def comparison(reports: dict[str, Report]) -> Group:
    """Several policies' reports of one model side by side, by the policy's name."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    first = next(iter(reports.values()))
    sites = Table(title=f"{first.model}: {len(first.sites)} attentions", title_justify="left")
    sites.add_column("layer", justify="right")
    sites.add_column("name", overflow="fold")
    sites.add_column("heads", no_wrap=True)
    sites.add_column("reads", no_wrap=True)
    for site in first.sites:
        sites.add_row(*_site_cells(site))
    policies = Table(
        title="bytes that a step would read, and that a sequence would take, by policy",
        title_justify="left",
    )
    policies.add_column("policy", overflow="fold")
    for what in ("read", "held"):
        for context in CONTEXTS:
            policies.add_column(f"{what} at {size_of(context)}", justify="right", no_wrap=True)
    lines = []
    for name, report in reports.items():
        counts = [report.step_bytes, report.held_bytes] if report.memories else []
        policies.add_row(
            name,
            *(
                bytes_of(sum(count(site, context) for site in report.sites))
                for count in counts
                for context in CONTEXTS
            ),
        )
        kinds = [describe(memory) for memory in report.memories.values()]
        layers = [f"{kinds.count(kind)} of {len(kinds)} {kind}" for kind in dict.fromkeys(kinds)]
        lines.append(f"policy {name}: {'; '.join(layers) or 'no step can be derived'}")
    if not first.memories:
        lines.append(f"declined: {len(first.declined)}")
        lines += [f"  - {declined}" for declined in first.declined]
    text = Text("\n".join(lines))
    return Group(sites, policies, text) if first.sites else Group(text)


def layout_of(site: Site, memory: Memory) -> SiteLayout:
    """What the state holds for an attention under a memory."""
    return SiteLayout(
        site.name,
        site.kv_heads,
        site.key_dim,
        site.value_dim,
        site.dtype,
        memory,
        site.rule.window,
        state_features(memory, site.key_dim) if memory.state else 0,
    )


@contextmanager
def stage(timings: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that the block takes to `timings[name]`, and says what is being done."""
    started = time.perf_counter()
    with doing(name):
        yield
    timings[name] = timings.get(name, 0.0) + time.perf_counter() - started


def describe(memory: Memory) -> str:
    """A memory in one line."""
    if memory.state is not None:
        return f"{memory.name}: the last {memory.own_window} tokens, {_state(memory.state)}"
    if not memory.selects:
        return f"{memory.name}: every page of {memory.page_size}"
    pages = f"{memory.budget_pages} pages of {memory.page_size}"
    if memory.score is not None:
        pages += f" by {memory.score.kind}"
    parts = [f"{pages} by attention mass" if memory.account is not None else pages]
    if memory.levels:
        sizes = ", ".join(map(str, memory.levels))
        parts.append(f"the rest in summaries of {sizes} tokens")
    elif memory.compensate:
        parts.append("compensated")
    if memory.evict is not None:
        parts.append("other pages are freed")
    if memory.dense_below:
        parts.append(f"dense below {memory.dense_below}")
    return f"{memory.name}: {', '.join(parts)}"


def _state(state: State) -> str:
    joined = "in one softmax with them" if state.normalised else "joined by a gate"
    decay = {"none": "no decay", "constant": "a decay a head", "gate": "a decay a token"}
    how = f"{state.feature_map} features, {state.write} write, {decay[state.decay]}"
    return f"and a state {joined} ({how})"


def size_of(tokens: int) -> str:
    """8192 -> 8K; counts that are no multiple of 1024 stay as they are."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 and tokens else str(tokens)


def bytes_of(count: float) -> str:
    """A count of bytes for people, with three digits: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def _check_targets(targets: Any) -> None:
    """Refuses what `kernel_table` and the page could not show."""
    try:
        for made in targets.values():
            numbers = [k[key] for k in made["kernels"] for key in (*_KERNEL_FIGURES, "threads")]
            words = [k[key] for k in made["kernels"] for key in ("name", "binary")]
            if {*map(type, numbers)} - {int} or {*map(type, [*words, *made["uncovered"]])} - {str}:
                raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"report with targets {targets!r:.60}; expected the figures of kernels by target"
        ) from None


def _site_cells(site: Site) -> list[str]:
    """Layer, name, heads (query/KV×width, values' width if it differs), mask rule."""
    heads = f"{site.heads}/{site.kv_heads}×{site.key_dim}"
    if site.value_dim != site.key_dim:
        heads += f":{site.value_dim}"
    return [str(site.layer), site.name, heads, str(site.rule)]


def _site(entry: dict[str, Any]) -> Site:
    values = {k: v for k, v in entry.items() if k not in _NOT_OF_SITES}
    values["rule"] = MaskRule(entry["rule"], entry["window"])
    values["dtype"] = getattr(torch, entry["dtype"])
    return Site(**values)
