"""Recall tasks in real text: facts hidden among Python's standard-library sources, asked for later.

A fact is the line `# fact: zorvik = 4821`; a question is the line `# recall: zorvik = `, and its
answer is the value followed by a newline. Everything is a pure function of its seed and of the
text.
"""

from __future__ import annotations

import itertools
import random
import sysconfig
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

KEY_LETTERS = 6
VALUE_DIGITS = 4
# Training draws its documents from seeds below this bound, so seeds from here on are held out.
HELD_OUT_SEEDS = 1_000_000_000

# Directories that hold tests, installed packages, generated tables or one machine's own paths.
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
_HELD_OUT_SHARE = 16
_CONSONANTS = "bcdfghjklmnprstvwxz"
_VOWELS = "aeiou"


@dataclass(frozen=True)
class RecallPrompt:
    """One question about one fact in a text.

    Attributes:
        prompt: the bytes to read, ending with the question; its length is exactly what was asked.
        answer: the bytes a right continuation starts with, ending with a newline.
        key: the name asked for.
        fact_start: offset in `prompt` of the line that states the fact.
        depth: the fact's place, 0.0 at the start of the filler and 1.0 at its end, as realised.
    """

    prompt: bytes
    answer: bytes
    key: str
    fact_start: int
    depth: float


@cache
def library_text(held_out: bool, folder: Path | None = None) -> bytes:
    """The pure-ASCII standard-library sources, joined; training files or the held-out sixteenth.

    The split is by a checksum of a file's relative path, so a file stays on its side of the split
    in every Python version. `folder` defaults to the running interpreter's library.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if any(part in _SKIPPED or part.startswith(_SKIPPED_PREFIXES) for part in relative.parts):
            continue
        if (zlib.crc32(relative.as_posix().encode()) % _HELD_OUT_SHARE == 0) != held_out:
            continue
        text = path.read_bytes().replace(b"\r\n", b"\n")
        if text.isascii():
            texts.append(text)
    if not texts:
        raise FileNotFoundError(
            f"no Python sources were found under {root}; give the folder of a standard library."
        )
    return b"\n".join(texts)


def fact_line(key: str, value: str) -> bytes:
    """The line that states a fact."""
    return f"# fact: {key} = {value}\n".encode()


def question(key: str) -> bytes:
    """The unfinished line that asks for a fact; the value and a newline complete it."""
    return f"# recall: {key} = ".encode()


def draw_facts(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` pairs of a pronounceable key and a value, all keys different."""
    facts: dict[str, str] = {}
    while len(facts) < count:
        letters = [rng.choice((_CONSONANTS, _VOWELS)[i % 2]) for i in range(KEY_LETTERS)]
        facts["".join(letters)] = "".join(rng.choice("0123456789") for _ in range(VALUE_DIGITS))
    return list(facts.items())


def recall_prompt(
    length: int,
    seed: int,
    *,
    depth: float | None = None,
    facts: int = 1,
    text: bytes | None = None,
) -> RecallPrompt:
    """A prompt of exactly `length` bytes: filler with `facts` facts, then a question about one.

    Args:
        length: bytes in the prompt; what the facts and the question leave is filler.
        seed: draws filler, facts and places; `HELD_OUT_SEEDS` and above never occur in training.
        depth: place of the fact asked for, 0.0 (start) to 1.0 (end); None draws it uniformly.
            The fact stands at the line boundary nearest to it.
        facts: how many facts the text states; the others stand at random places.
        text: where filler comes from; None takes the held-out standard-library files.

    Raises:
        ValueError: the facts and the question do not fit into `length`, or `depth` or `facts` is
            out of range.
    """
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth={depth} is outside 0.0 to 1.0; 0.0 is the start of the filler.")
    if facts < 1:
        raise ValueError(f"facts={facts} leaves nothing to ask for; give at least 1.")
    rng = random.Random(seed)
    pairs = draw_facts(rng, facts)
    lines = [fact_line(key, value) for key, value in pairs]
    key, value = pairs[0]
    ask = question(key)
    room = length - len(ask) - sum(map(len, lines))
    if room < 0:
        raise ValueError(
            f"length={length} is too short for {facts} fact(s) and a question, which take "
            f"{length - room} bytes; give a greater length or fewer facts."
        )
    filler = filler_text(rng, library_text(held_out=True) if text is None else text, room)
    boundaries = _line_starts(filler)
    depths = [rng.random() for _ in lines]
    if depth is not None:
        depths[0] = depth
    places = [_nearest(boundaries, d * room) for d in depths]

    pieces: list[bytes] = []
    done = written = fact_start = 0
    for i in sorted(range(facts), key=lambda i: (places[i], depths[i])):
        pieces += [filler[done : places[i]], lines[i]]
        written += places[i] - done
        done = places[i]
        if i == 0:
            fact_start = written
        written += len(lines[i])
    pieces += [filler[done:], ask]
    return RecallPrompt(
        prompt=b"".join(pieces),
        answer=f"{value}\n".encode(),
        key=key,
        fact_start=fact_start,
        depth=places[0] / room if room else 0.0,
    )


def recall_batch(prompts: Sequence[RecallPrompt]) -> tuple[Tensor, Tensor]:
    """Prompts of one length as tensors: prompts [B, T] int64 and answers [B, A] int64."""
    lengths = sorted({len(prompt.prompt) for prompt in prompts})
    if len(lengths) != 1:
        raise ValueError(f"prompts of lengths {lengths} do not stack; give prompts of one length.")
    return (
        torch.tensor([list(prompt.prompt) for prompt in prompts]),
        torch.tensor([list(prompt.answer) for prompt in prompts]),
    )


# Roles of a byte in a training document: what its prediction is worth.
UNPREDICTABLE, TEXT, ANSWER = 0, 1, 2


def training_document(
    rng: random.Random, text: bytes, length: int, dense: bool
) -> tuple[bytes, bytes]:
    """A document of exactly `length` bytes and the role of each byte.

    A dense document is nothing but facts and questions, so that nearly every line teaches recall.
    The other kind is library text with a few facts among its lines, each asked for later.
    """
    pieces: list[tuple[bytes, bytes]] = []
    if dense:
        count = rng.randint(1, max(1, length // 40))
        waiting, known = draw_facts(rng, count), list[tuple[str, str]]()
        bare = rng.random() < 0.5
        size = 0
        while size < length:
            if waiting and (not known or rng.random() < 0.5):
                known.append(waiting.pop())
                pieces.append(_fact(known[-1], bare))
            else:
                pieces.append(_asked(rng.choice(known), bare))
            size += len(pieces[-1][0])
    else:
        # Half of the documents state one fact, as the evaluation does; the others are harder.
        count = 1 if rng.random() < 0.5 else rng.randint(2, max(2, length // 80))
        facts = draw_facts(rng, count)
        questions = rng.choices(facts, k=rng.randint(1, max(2, length // 128)))
        events: list[tuple[float, tuple[bytes, bytes]]] = []
        for fact in facts:
            stated = rng.random()
            events.append((stated, _fact(fact)))
            for asked in questions:
                if asked == fact:
                    # The square root favours the far end: long distances are the hard ones.
                    at = stated + (1 - stated) * rng.random() ** 0.5
                    events.append((at, _asked(fact)))
        if rng.random() < 0.5:
            last = rng.choice(facts)
            events.append((2.0, _asked(last)))
        return place_events(rng, text, length, events)
    return _joined(pieces, length)


def place_events(
    rng: random.Random,
    text: bytes,
    length: int,
    events: list[tuple[float, tuple[bytes, bytes]]],
    subjects: int = 1,
) -> tuple[bytes, bytes]:
    """Lines spread over filler from `text`, in the order of their places, as a document.

    Args:
        rng: draws the filler.
        text: where filler comes from; unused if the lines leave no room.
        length: bytes of the document; lines that would stand beyond it are cut off.
        events: for each line its place, 0.0 (start) to 1.0 (end) and more, its bytes, their roles.
        subjects: places in `text` that the filler is taken from, one after the other.

    Returns:
        The document's bytes and the role of each.
    """
    pieces: list[tuple[bytes, bytes]] = []
    room = max(0, length - sum(len(line) for _, (line, _) in events))
    cuts = [room * i // subjects for i in range(subjects + 1)]
    filler = b"".join(
        filler_text(rng, text, end - start) for start, end in itertools.pairwise(cuts)
    )
    boundaries = _line_starts(filler)
    done = 0
    for at, event in sorted(events, key=lambda event: event[0]):
        place = max(done, _nearest(boundaries, min(at, 1.0) * room))
        pieces += [(filler[done:place], bytes([TEXT]) * (place - done)), event]
        done = place
    pieces.append((filler[done:], bytes([TEXT]) * (room - done)))
    return _joined(pieces, length)


def _joined(pieces: list[tuple[bytes, bytes]], length: int) -> tuple[bytes, bytes]:
    document = b"".join(piece for piece, _ in pieces)[:length]
    roles = b"".join(role for _, role in pieces)[:length]
    return document, roles


def _fact(fact: tuple[str, str], bare: bool = False) -> tuple[bytes, bytes]:
    line = fact_line(*fact)
    roles = bytearray([TEXT]) * len(line)
    start = line.index(fact[0].encode())
    roles[start : start + KEY_LETTERS] = bytes(KEY_LETTERS)
    roles[-1 - VALUE_DIGITS : -1] = bytes(VALUE_DIGITS)
    return (line[start:], bytes(roles[start:])) if bare else (line, bytes(roles))


def _asked(fact: tuple[str, str], bare: bool = False) -> tuple[bytes, bytes]:
    ask = question(fact[0])
    line = ask + fact[1].encode() + b"\n"
    roles = bytes([TEXT]) * len(ask) + bytes([ANSWER]) * (VALUE_DIGITS + 1)
    start = line.index(fact[0].encode()) if bare else 0
    return line[start:], roles[start:]


def filler_text(rng: random.Random, text: bytes, room: int) -> bytes:
    """`room` bytes of text from a random line on, the last one a newline."""
    if room == 0:
        return b""
    if len(text) <= room:
        raise ValueError(
            f"the filler text has {len(text)} bytes, {room + 1} are needed; give more text."
        )
    start = text.rfind(b"\n", 0, rng.randrange(len(text) - room)) + 1
    return text[start : start + room - 1] + b"\n"


def _line_starts(filler: bytes) -> list[int]:
    starts = [0]
    while (newline := filler.find(b"\n", starts[-1])) >= 0:
        starts.append(newline + 1)
    return starts


def _nearest(boundaries: list[int], target: float) -> int:
    i = min(bisect_left(boundaries, target), len(boundaries) - 1)
    return min(boundaries[max(0, i - 1)], boundaries[i], key=lambda place: abs(place - target))
