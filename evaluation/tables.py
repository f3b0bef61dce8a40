"""Rows as tables: for the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .statistics import Interval
from .summary import Row
from .text_loss import NAME as TEXT_LOSS

if TYPE_CHECKING:
    from rich.console import Group

FOOT = (
    "The context is read densely, question and answer through the policy. Brackets: 95 % "
    "bootstrap intervals over prompts; differences are paired with dense on the same prompts. "
    "Bytes: read by one token of question and answer, index and states included, over all layers. "
    "Held: what the memory takes behind the answer, free pages of its pools included. Pages: the "
    "share of those that dense reads. Dense: layers that read every page; state: layers that hold "
    "one, and read a window beside it. No claim is made where dense itself does not succeed, or "
    "where the budget is above an eighth of the context."
)
_LAYERS = ("dense", "state")
_SCORE = (
    *("task", "length", "policy", "score, %", "difference", "bytes", "held", "pages"),
    *_LAYERS,
)
_LOSS = ("task", "length", "policy", "nats", "difference", "bits a byte", *_SCORE[5:])
# On a terminal, where width is scarce.
_HEADS = {"bits a byte": "bits\na byte"}


def table(rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> Group:
    """The rows, a section for each task and length; what is one for a policy stands below."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    labels = _labels([*dict.fromkeys(row.policy for row in rows)])
    shown: list[Table | Text] = []
    for heads, part in parts(rows):
        grid = Table(
            title=title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        grid.add_column("task, tokens", no_wrap=True)
        for head in heads[3 : -len(_LAYERS)]:
            grid.add_column(_HEADS.get(head, head), justify="right", no_wrap=True)
        grid.add_column("verdict", min_width=16)
        before: tuple[str, int] | None = None
        for row in part:
            place = (row.task, row.length)
            if place != before:
                if before:
                    grid.add_section()
                grid.add_row(f"{row.task}, {row.length}", style="bold")
            before = place
            # What no claim can be made of stands back.
            style = None if row.claim or row.difference is None else "dim"
            words = cells(row)[3:]
            words = (*words[: -1 - len(_LAYERS)], words[-1])
            grid.add_row(f"  {labels[row.policy]}", *words, style=style)
        shown.append(grid)
    named = {row.policy: _named(labels[row.policy], row) for row in rows}
    lines = (*named.values(), *(f"note: {note}" for note in notes), FOOT)
    return Group(*shown, *(Text(line) for line in lines))


def markdown(rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> str:
    """The same as a Markdown document."""
    lines = [f"# {title}", ""]
    for heads, part in parts(rows):
        lines += [f"| {' | '.join([*heads, 'verdict'])} |", "|---" * (len(heads) + 1) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in part] + [""]
    for note in notes:
        lines += [f"Note: {note}.", ""]
    return "\n".join([*lines, FOOT, ""])


def parts(rows: Sequence[Row]) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Scores and losses apart, which have other columns: their heads (`cells` has the verdict
    behind them), and their rows."""
    both = [
        (_SCORE, [row for row in rows if row.task != TEXT_LOSS]),
        (_LOSS, [row for row in rows if row.task == TEXT_LOSS]),
    ]
    return [part for part in both if part[1]]


def _labels(policies: Sequence[str]) -> dict[str, str]:
    """Short names: of policies that differ in their options, the kind and a number."""
    kinds = [policy.partition(":")[0] for policy in policies]
    return {
        policy: kind if kinds.count(kind) == 1 else f"{kind}-{kinds[:i].count(kind) + 1}"
        for i, (policy, kind) in enumerate(zip(policies, kinds, strict=True))
    }


def _named(label: str, row: Row) -> str:
    """A policy's full name, and what it makes of the layers."""
    layers = [f"{row.kept_dense} of {row.sites} layers dense"] if row.kept_dense else []
    layers += [f"{row.stateful} of {row.sites} with a state"] if row.stateful else []
    words = [*([row.policy] if row.policy != label else []), *layers]
    return f"{label}: {'; '.join(words) or 'no layer dense'}"


def cells(row: Row) -> tuple[str, ...]:
    """A row in words, under the heads that `parts` gives it, and its verdict."""
    loss = row.task == TEXT_LOSS
    factor, places = (1, 3) if loss else (100, 1)
    bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
    return (
        row.task,
        str(row.length),
        row.policy,
        _interval(row.value, factor, places, ""),
        _interval(row.difference, factor, places, "+"),
        *((bits,) if loss else ()),
        _bytes(row.bytes_per_token),
        _bytes(row.resident_bytes if row.prompts else None),
        f"{row.pages_read / row.pages_dense:.1%}" if row.pages_dense else "-",
        *(f"{count}/{row.sites}" for count in (row.kept_dense, row.stateful)),
        row.verdict,
    )


def _interval(shown: Interval | None, factor: float, places: int, sign: str) -> str:
    if shown is None:
        return "-"
    mean, low, high = (
        f"{factor * figure:{sign}.{places}f}" for figure in (shown.mean, shown.low, shown.high)
    )
    return f"{mean} [{low}, {high}]"


def _bytes(size: float | None) -> str:
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
