"""Training documents that reward reading far back: recall tasks among library text.

One task is one small function that draws *events*: lines, each with the role of every byte and a
place between 0 (start of the document) and 1 (its end). `training_document` spreads the events of
a few tasks over library text. The wordings, one line each, where a name is six letters:

| task | stated | asked and answered |
|---|---|---|
| fact | `# fact: zorvik = 4821` | `# recall: zorvik = 4821` |
| items | `# item: zorvik = 4821`, `# item: zorvik = 0377` | `# items: zorvik = 4821 0377` |
| chain | `# let: mabelo = 4821`, `# let: zorvik = mabelo` | `# trace: zorvik = mabelo = 4821` |
| rule | `# rule: kalubi`, once and early, and facts | `# obey: zorvik = kalubi 4821` |
| note | `# note: zorvik = 4821`, in the first half | `# recall: zorvik = 4821`, in the second |

Everything is a pure function of its random generator and of the text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from .recall import ANSWER, TEXT, UNPREDICTABLE, draw_facts, place_events

# A line as bytes and the role of each byte, and where in the document it belongs.
Piece = tuple[bytes, bytes]
Event = tuple[float, Piece]
Task = Callable[[random.Random], list[Event]]


@dataclass(frozen=True)
class Diet:
    """What a stage's documents are made of.

    Attributes:
        dense: share of documents that are lines of tasks and nothing else.
        lone: share of documents that state one single fact in text, as the evaluation does.
        others: share of tasks other than facts among the tasks drawn.
    """

    dense: float
    lone: float = 0.0
    others: float = 0.0


def marked(*parts: tuple[str, int]) -> Piece:
    """Parts of a line, each with its role, as bytes and roles."""
    text = "".join(part for part, _ in parts).encode()
    return text, b"".join(bytes([role]) * len(part) for part, role in parts)


def stated(mark: str, name: str, value: str) -> Piece:
    """The line `# mark: name = value`; name and value are news, so neither is worth predicting."""
    return marked(
        (f"# {mark}: ", TEXT),
        (name, UNPREDICTABLE),
        (" = ", TEXT),
        (value, UNPREDICTABLE),
        ("\n", TEXT),
    )


def asked(mark: str, name: str, answer: str) -> Piece:
    """The line `# mark: name = answer`, of which the answer and the newline are what is learnt."""
    return marked((f"# {mark}: {name} = ", TEXT), (f"{answer}\n", ANSWER))


def after(rng: random.Random, place: float) -> float:
    """A place behind `place`; the square root favours far ones, long distances being hard."""
    return place + (1 - place) * math.sqrt(rng.random())


def fact_events(rng: random.Random, count: int) -> list[Event]:
    """`count` facts at random places, each asked for later, and half of them twice."""
    events: list[Event] = []
    for name, value in draw_facts(rng, count):
        place = rng.random()
        events.append((place, stated("fact", name, value)))
        for _ in range(rng.randint(1, 2)):
            events.append((after(rng, place), asked("recall", name, value)))
    return events


def fact_task(rng: random.Random) -> list[Event]:
    """Several keys: one to four facts, each asked for."""
    return fact_events(rng, rng.randint(1, 4))


def items_task(rng: random.Random) -> list[Event]:
    """Several values: two to four for one name, all asked for at once, in the order stated."""
    count = rng.randint(2, 4)
    drawn = draw_facts(rng, count)
    name, values = drawn[0][0], [value for _, value in drawn]
    places = sorted(rng.random() for _ in values)
    events: list[Event] = [
        (place, stated("item", name, value)) for place, value in zip(places, values, strict=True)
    ]
    events.append((after(rng, places[-1]), asked("items", name, " ".join(values))))
    return events


def chain_task(rng: random.Random) -> list[Event]:
    """Variable tracking: one to three assignments from name to name, written out down to the value.

    Every name of the chain is asked for once, the first one's answer being the value alone.
    """
    drawn = draw_facts(rng, rng.randint(2, 4))
    names, value = [name for name, _ in drawn], drawn[0][1]
    places = sorted(rng.random() for _ in names)
    events: list[Event] = []
    answer = value
    for i, (name, place) in enumerate(zip(names, places, strict=True)):
        events.append((place, stated("let", name, names[i - 1] if i else value)))
        events.append((after(rng, place), asked("trace", name, answer)))
        answer = f"{name} = {answer}"
    return events


def rule_task(rng: random.Random) -> list[Event]:
    """Late constraint: a word given once in the first half starts every answer to `# obey:`."""
    (word, _), *facts = draw_facts(rng, rng.randint(2, 4))
    early = rng.random() / 2
    events: list[Event] = [(early, marked(("# rule: ", TEXT), (word, UNPREDICTABLE), ("\n", TEXT)))]
    for name, value in facts:
        place = rng.random()
        events.append((place, stated("fact", name, value)))
        late = after(rng, max(place, early))
        events.append((late, asked("obey", name, f"{word} {value}")))
    return events


def note_task(rng: random.Random) -> list[Event]:
    """Topic shift: notes passed by in the first half become the subject of the second half."""
    events: list[Event] = []
    for name, value in draw_facts(rng, rng.randint(2, 4)):
        events.append((rng.random() / 2, stated("note", name, value)))
        events.append((0.5 + rng.random() / 2, asked("recall", name, value)))
    return events


OTHER_TASKS: tuple[Task, ...] = (
    items_task,
    chain_task,
    rule_task,
    note_task,
)


def training_document(
    rng: random.Random, text: bytes, length: int, diet: Diet
) -> tuple[bytes, bytes]:
    """A document of exactly `length` bytes and the role of each byte.

    A document of one kind in eight is bare: `zorvik = 4821` and again `zorvik = 4821`, nothing
    else, which is associative recall as it is tested on synthetic tokens.
    """
    kind = rng.random()
    if kind < diet.dense and rng.random() < 0.125:
        return _bare_document(rng, length)
    if kind < diet.dense:
        room = length
    elif kind < diet.dense + diet.lone:
        return place_events(rng, text, length, fact_events(rng, 1))
    else:
        # Between a few lines in much text and as much of tasks as of text.
        room = round(length * rng.uniform(0.05, 0.6))
    events: list[Event] = []
    others = [*OTHER_TASKS]
    drawn = fact_events(rng, 1)
    while (room := room - sum(len(line) for _, (line, _) in drawn)) >= 0 or not events:
        events += drawn
        task = rng.choice(others) if rng.random() < diet.others else fact_task
        # A second rule would leave it open which of the two holds.
        others = [other for other in others if other is not rule_task or task is not rule_task]
        drawn = task(rng)
    # A text of two halves changes its subject just where notes become theirs.
    return place_events(rng, text, length, events, subjects=rng.choice((1, 1, 2)))


def _bare_document(rng: random.Random, length: int) -> tuple[bytes, bytes]:
    events: list[Event] = []
    for name, value in draw_facts(rng, max(1, length // (3 * len("zorvik = 4821\n")))):
        place = rng.random()
        first = marked((name, UNPREDICTABLE), (" = ", TEXT), (value, UNPREDICTABLE), ("\n", TEXT))
        again = marked((f"{name} = ", TEXT), (f"{value}\n", ANSWER))
        events += [(place, first), (after(rng, place), again), (after(rng, place), again)]
    filler = length - sum(len(line) for _, (line, _) in events)
    events.append((0.0, (b"\n" * filler, bytes([TEXT]) * filler)))
    return place_events(rng, b"", length, events)


def skipped_positions(rng: random.Random, document: bytes, reach: int) -> list[int]:
    """A position for each byte, rising from 0 and below `reach`, with gaps before some lines.

    A network trained on gaps meets the distances of a long context at the cost of a short one. One
    document in four has none, so that unbroken counting stays known.

    Raises:
        ValueError: `reach` has no place for the document.
    """
    length = len(document)
    if reach < length:
        raise ValueError(
            f"reach={reach} has no room for {length} bytes; give at least the document's length."
        )
    if rng.random() < 0.25:
        return list(range(length))
    slack = int((reach - length) * rng.random())
    breaks = sorted(rng.randrange(1, length) for _ in range(rng.randint(1, 8)))
    cuts = sorted(rng.random() for _ in breaks)
    positions: list[int] = []
    shift = done = 0
    for place, cut in zip(breaks, cuts, strict=True):
        line = document.find(b"\n", place) + 1 or length
        positions += range(done + shift, max(done, line) + shift)
        done = max(done, line)
        shift = int(slack * cut)
    positions += range(done + shift, length + shift)
    return positions
