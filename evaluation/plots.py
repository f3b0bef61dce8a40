"""Pictures: quality against bytes read and held, where needles are found, how a fit went."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import write_whole
from .run import DENSE
from .summary import SUCCEEDS, Row
from .tasks import TASKS
from .text_loss import NAME as TEXT_LOSS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
_PANELS_A_ROW = 4


def plot(rows: Sequence[Row], records: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draws what the rows and records allow; returns the files, each written whole."""
    figures = {
        "quality-against-bytes": quality(rows, "read"),
        "quality-against-memory": quality(rows, "held"),
    }
    kept = [*records]
    for task in dict.fromkeys(record["task"] for record in kept):
        if task in TASKS and TASKS[task].deep:
            figures[f"needles-{task}"] = needles(task, rows, kept)
    return [
        save(figure, folder / f"{name}.{kind}")
        for name, figure in figures.items()
        for kind in FORMATS
    ]


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure whole, in the format of the path's suffix."""
    drawn, kind = io.BytesIO(), path.suffix.removeprefix(".")
    # No date inside: equal records give equal files.
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(drawn, format=kind, dpi=120, metadata=metadata)
    write_whole(path, drawn.getvalue())
    return path


def quality(rows: Sequence[Row], against: str) -> Figure:
    """A panel a task: score (or loss) of each policy over its bytes.

    Args:
        against: "read", the bytes that a token reads; "held", those that the memory takes.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    tasks = [*dict.fromkeys(row.task for row in rows)]
    across = min(_PANELS_A_ROW, len(tasks))
    down = -(-len(tasks) // across)
    policies = [*dict.fromkeys(row.policy for row in rows)]
    lengths = [*dict.fromkeys(row.length for row in rows)]
    marks = dict(zip(lengths, "os^Dv<>p*hXP" * len(lengths), strict=False))
    handles = [_handle(name, f"C{i % 10}", "o", "-") for i, name in enumerate(policies)]
    handles += [_handle(f"{length} tokens", "0.4", marks[length], "") for length in lengths]
    # A legend that is wider than its figure is cut off: as many columns as the names leave room.
    width = 4.2 * across
    columns = int(width / (0.6 + 0.07 * max(len(handle.get_label()) for handle in handles)))
    columns = max(1, min(4, columns))
    figure = _figure(width, 3.4 * down + 0.2 + 0.2 * -(-len(handles) // columns))
    for i, task in enumerate(tasks):
        axes = figure.add_subplot(down, across, i + 1)
        for row in rows:
            size = row.bytes_per_token if against == "read" else row.resident_bytes
            if row.task != task or row.value is None or size is None:
                continue
            factor = 1 if task == TEXT_LOSS else 100
            middle = factor * row.value.mean
            axes.errorbar(
                size,
                middle,
                yerr=[[middle - factor * row.value.low], [factor * row.value.high - middle]],
                color=f"C{policies.index(row.policy) % 10}",
                marker=marks[row.length],
                # Hollow: no claim can be made of it.
                fillstyle="full" if row.claim or row.policy == DENSE else "none",
                capsize=2,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(task)
        axes.set_xlabel("bytes a token, index included" if against == "read" else "bytes held")
        if task == TEXT_LOSS:
            axes.set_ylabel("nats a token")
        else:
            axes.set_ylabel("score, %")
            axes.set_ylim(-4, 104)
            axes.axhline(100 * SUCCEEDS, color="0.8", linewidth=1, zorder=0)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize="small")
    return figure


def needles(task: str, rows: Sequence[Row], records: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel a policy: the mean score at each length and depth."""
    import numpy as np

    policies = [*dict.fromkeys(row.policy for row in rows)]
    lengths = sorted({row.length for row in rows})
    mine = [record for record in records if record["task"] == task]
    depths = sorted({record["depth"] for record in mine})
    figure = _figure(1.6 + (1.4 + 0.7 * len(lengths)) * len(policies), 1.8 + 0.4 * len(depths))
    figure.suptitle(f"{task}: score, %")
    for i, policy in enumerate(policies):
        scores = np.full((len(depths), len(lengths)), np.nan)
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                place = (policy, length, depth)
                found = [
                    record["score"]
                    for record in mine
                    if (record["policy"], record["length"], record["depth"]) == place
                ]
                if found:
                    scores[y, x] = 100 * sum(found) / len(found)
        axes = figure.add_subplot(1, len(policies), i + 1)
        axes.imshow(scores, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_title(_broken(policy), fontsize="small")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths] if not i else [])
        axes.set_xlabel("length")
        if not i:
            axes.set_ylabel("depth")
        for (y, x), value in np.ndenumerate(scores):
            shown = "-" if np.isnan(value) else f"{value:.0f}"
            axes.text(x, y, shown, ha="center", va="center", fontsize="small")
    return figure


def learning(curve: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """The error of each layer over the steps of a fit, on what was held out and on what was not.

    Args:
        curve: entries with ``step``, and by layer ``held_out`` and, but for the first, ``train``.
    """
    figure = _figure(7, 4.4)
    axes = figure.add_subplot(1, 1, 1)
    steps = [entry["step"] for entry in curve]
    for i, layer in enumerate(curve[0]["held_out"]):
        color = f"C{i % 10}"
        axes.plot(steps, [entry["held_out"][layer] for entry in curve], color=color, label=layer)
        seen = [entry["train"][layer] for entry in curve[1:]]
        axes.plot(steps[1:], seen, color=color, linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel("relative squared error (dotted: training)")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: no window, no state of the process.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _handle(label: str, color: str, marker: str, line: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, marker=marker, linestyle=line, label=label)


def _broken(policy: str) -> str:
    """A long name over several lines."""
    return policy.replace(":", ":\n").replace(",", ",\n")
