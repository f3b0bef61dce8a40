"""From records to rows: scores and differences with intervals, and what may be claimed of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Any

from .protocol import Contender
from .run import DENSE, Plan, skips
from .statistics import Interval, mean_interval, paired_interval
from .text_loss import NAME as TEXT_LOSS
from .text_loss import bits_per_byte

# A claim needs a dense model that can do the task, and a budget of no more than this share of
# the context.
SUCCEEDS = 0.9
SHARE = 8
# A bootstrap over fewer prompts than this is too narrow to claim anything by.
ENOUGH = 20


@dataclass(frozen=True)
class Row:
    """One line of the table: a task at a length through a policy, over all depths and samples.

    Attributes:
        value: the mean score, 0 to 1; nats a token for the text loss. None: not run.
        difference: to dense on the same prompts; None for dense itself.
        bits_per_byte: of the text loss.
        prompts, paired: prompts answered, and those that dense has answered too.
        bytes_per_token: read by one query token of question and answer, index included.
        pages_read, pages_dense, bytes_read, bytes_dense: over all of them, and what reading
            everything would have taken.
        resident_bytes: what the memory took behind an answer, the largest over the prompts.
        state_bytes: the states among them.
        kept_dense, stateful, sites: attention sites that read everything, that hold a state, all.
        claim: whether the row is evidence about the policy.
        verdict: what it says, or why it says nothing.
    """

    task: str
    length: int
    policy: str
    value: Interval | None
    difference: Interval | None
    bits_per_byte: float | None
    prompts: int
    paired: int
    bytes_per_token: float | None
    pages_read: int
    pages_dense: int
    bytes_read: int
    bytes_dense: int
    resident_bytes: int
    state_bytes: int
    kept_dense: int
    stateful: int
    sites: int
    claim: bool
    verdict: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Rebuilds a row from `to_json`.

        Raises:
            ValueError: a key is missing or unknown, or a value is of another type.
        """
        try:
            values = {**data}
            for name in ("value", "difference"):
                if values[name] is not None:
                    values[name] = Interval(**values[name])
            row = cls(**values)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a row of an evaluation: {error}") from error
        for field in fields(cls):
            kinds = _KINDS[field.type]
            value = getattr(row, field.name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"not a row of an evaluation: its {field.name!r} is {value!r:.40}")
        for interval in (row.value, row.difference):
            for figure in asdict(interval).values() if interval is not None else ():
                if isinstance(figure, bool) or not isinstance(figure, int | float):
                    raise ValueError(
                        f"not a row of an evaluation: an interval holds {figure!r:.40}"
                    )
        return row


_KINDS: dict[Any, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float | None": (float, int, NoneType),
    "Interval | None": (Interval, NoneType),
}


def summarise(
    plan: Plan, contenders: Sequence[Contender], records: Iterable[Mapping[str, Any]]
) -> list[Row]:
    """One row a task, length and policy, in the order of the plan, from what is recorded so far."""
    cells: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for record in records:
        place = (record["task"], record["length"], record["policy"])
        cells.setdefault(place, []).append(record)
    return [
        _row(task, length, contender, cells.get((task, length, contender.name), []), dense)
        for task in plan.tasks
        for length in plan.lengths
        for dense in [cells.get((task, length, DENSE), [])]
        for contender in contenders
    ]


def _row(
    task: str,
    length: int,
    contender: Contender,
    mine: list[Mapping[str, Any]],
    dense: list[Mapping[str, Any]],
) -> Row:
    field = "nats" if task == TEXT_LOSS else "score"
    scale = 1.0
    if task == TEXT_LOSS:
        # A loss has no upper end; the worst window seen stands in for it.
        scale = max((record[field] for record in [*mine, *dense]), default=1.0)
    value = mean_interval([r[field] for r in mine], 0, scale) if mine else None
    difference, paired = None, 0
    reference = {(r["depth"], r["sample"]): r[field] for r in dense}
    if contender.name != DENSE:
        pairs = [
            (r[field], reference[r["depth"], r["sample"]])
            for r in mine
            if (r["depth"], r["sample"]) in reference
        ]
        paired = len(pairs)
        if pairs:
            own, theirs = zip(*pairs, strict=True)
            difference = paired_interval(own, theirs, -scale, scale)

    def total(field: str) -> int:
        return sum(record.get(field, 0) for record in mine)

    def largest(field: str) -> int:
        return max((record[field] for record in mine), default=0)

    tokens, text_bytes = total("tokens"), total("text_bytes")
    claim, verdict = _verdict(task, length, contender, value, difference, [*reference.values()])
    return Row(
        task,
        length,
        contender.name,
        value,
        difference,
        bits_per_byte(value.mean, tokens, text_bytes) if value and text_bytes else None,
        len(mine),
        paired,
        total("bytes_read") / tokens if tokens else None,
        *(total("pages_read"), total("pages_dense"), total("bytes_read"), total("bytes_dense")),
        *(largest("resident_bytes"), largest("state_bytes")),
        *(contender.kept_dense, len(contender.stateful), len(contender.layouts)),
        claim,
        verdict,
    )


def _verdict(
    task: str,
    length: int,
    contender: Contender,
    value: Interval | None,
    difference: Interval | None,
    dense: list[float],
) -> tuple[bool, str]:
    """Whether the row is evidence about its policy, and what it says."""
    if contender.name != DENSE and not skips(contender, length):
        return False, f"nothing to skip ≤ {contender.reads_all_below}"
    if value is None or not dense:
        return False, "not run yet"
    reached = sum(dense) / len(dense)
    fails = task != TEXT_LOSS and reached < SUCCEEDS
    if contender.name == DENSE:
        return False, "fails here" if fails else "the reference"
    if fails or difference is None:
        return False, f"no claim: dense {reached:.0%} < {SUCCEEDS:.0%}"
    if (contender.budget or 0) * SHARE > length:
        return False, f"no claim: budget > 1/{SHARE}"
    if difference.samples < ENOUGH:
        return False, f"no claim: {difference.samples} prompts < {ENOUGH}"
    # A lower loss is better, a lower score is worse.
    low, high = difference.low, difference.high
    worse, better = (low > 0, high < 0) if task == TEXT_LOSS else (high < 0, low > 0)
    if worse or better:
        return True, "worse than dense" if worse else "better than dense"
    return True, "no difference shown"
