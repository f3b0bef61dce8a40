"""What the backend made of each graph that Dynamo gave it."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ..models.memory.spec import Memory
from ..passes.find_cached import NO_CACHE
from ..passes.result import Declined, Site
from ..runtime.cached_run import Calls
from .report import Lowered, describe

# Reports that are kept; the oldest go first.
_KEPT = 1024
_reports: deque[GraphReport] = deque(maxlen=_KEPT)
_lock = threading.Lock()


@dataclass
class GraphReport:
    """One graph.

    Attributes:
        policy: name or file; `options` with the values of its fields.
        kind: "cached": it reads a cache through the policy; "cacheless": its attentions have no
            cache and stay dense; "training": it is differentiated and stays dense; "hidden": it
            could not be looked into and stays dense; "no attention".
        attentions: how many the graph holds.
        sites, memories: those that read through the policy, and what of a cache they read.
        declined: attentions that stay dense although the graph has no need of gradients.
        lowered: generated kernels.
        calls: what has run; None where nothing was rewritten.
        notes: what a reader has to know.
    """

    policy: str
    options: dict[str, Any]
    kind: str = ""
    attentions: int = 0
    sites: list[Site] = field(default_factory=list)
    memories: dict[str, Memory] = field(default_factory=dict)
    declined: list[Declined] = field(default_factory=list)
    lowered: Lowered = field(default_factory=Lowered)
    calls: Calls | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> int:
        """Attentions that read through the policy."""
        return len(self.sites)

    def line(self) -> str:
        """One line for people, or nothing where there is nothing to say."""
        if self.kind == "training":
            return (
                f"{self.attentions} attentions in a graph that is differentiated stay dense: for "
                "inference, call the model under torch.no_grad()"
                if self.attentions
                else ""
            )
        stopped = [d.reason for d in self.declined if d.rule == "find_cached"]
        other = [reason for reason in stopped if reason != NO_CACHE]
        if self.kind == "cacheless" and other:
            return f"{self.attentions} attentions stay dense: {other[0]}"
        if self.kind == "cacheless":
            return (
                f"{self.attentions} attentions in a graph without a cache stay dense, as those of "
                f"a prefill do: policy {self.policy!r} has nothing to remember between calls. Give "
                "the model a cache (past_key_values), or use memcompile.compile(model) for an "
                "engine with a memory"
            )
        if self.kind == "hidden":
            return (
                f"{self.attentions} attentions stay dense: the graph could not be looked into: "
                f"{self.notes[0]}"
            )
        if self.kind == "cached":
            left = self.attentions - self.rewritten
            rest = f"; {left} stay dense: {(other or stopped)[0]}" if left else ""
            return (
                f"{self.rewritten} of {self.attentions} attentions read their cache through "
                f"policy {self.policy!r}{rest}"
            )
        return ""

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "options": self.options,
            "kind": self.kind,
            "attentions": self.attentions,
            "rewritten": self.rewritten,
            "sites": [
                {**site.to_json(), "memory": self.memories[site.name].to_json()}
                for site in self.sites
            ],
            "declined": [declined.to_json() for declined in self.declined],
            "lowered": self.lowered.to_json(),
            "calls": self.calls.to_json() if self.calls else None,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.line() or 'nothing to rewrite'}"]
        lines += dict.fromkeys(describe(memory) for memory in self.memories.values())
        lines += [f"declined: {declined}" for declined in self.declined]
        if self.calls is not None:
            calls = self.calls
            lines.append(
                f"calls: {calls.policy} through the policy, {calls.dense} dense; "
                f"{calls.pages_read} of {calls.pages_held} pages read"
            )
            lines += [f"dense, {count} times: {why}" for why, count in calls.why_dense.items()]
            if calls.rebuilt:
                lines.append(f"records written again for changed caches: {calls.rebuilt}")
        return "\n".join([*lines, *self.lowered.lines()])


def remember_report(report: GraphReport) -> None:
    """Keeps a report for `reports`."""
    with _lock:
        _reports.append(report)


def reports(clear: bool = False) -> list[GraphReport]:
    """The reports of this process, oldest first; with `clear` they are forgotten afterwards."""
    with _lock:
        kept = list(_reports)
        if clear:
            _reports.clear()
        return kept
