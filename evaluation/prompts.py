"""A prompt: an outline of statements and questions, fitted into a length in the model's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .filler import Stretch
from .tokens import Tokenizer, shared_prefix


@dataclass(frozen=True)
class Statement:
    """Whole lines, to stand at `depth` of the filler: 0 in front of it, 1 behind it."""

    text: str
    depth: float


@dataclass(frozen=True)
class Question:
    """What is asked behind the context.

    Attributes:
        text: an unfinished line.
        answers: what has to be found in what is written; the score is the share that is.
        written: a right answer, as the wording would write it: sets the tokens to write.
        begins: the word that an answer must begin with for anything in it to count.
    """

    text: str
    answers: tuple[str, ...]
    written: str
    begins: str = ""


@dataclass(frozen=True)
class Outline:
    """A prompt before it has a length.

    Attributes:
        stretch: the filler.
        statements: what stands in it; those of one depth keep their order.
        questions: each is asked behind the whole context, none sees another.
        opening: text in front of everything.
        least: the least amount of the stretch with which the answers are right.
    """

    stretch: Stretch
    statements: tuple[Statement, ...]
    questions: tuple[Question, ...]
    opening: str = ""
    least: int = 0

    def context(self, amount: int) -> tuple[str, list[int]]:
        """The context with `amount` of filler, and the offset of each statement in it."""
        filler = self.stretch.take(amount)
        places = self.stretch.places(filler)
        order = sorted(range(len(self.statements)), key=lambda i: self.statements[i].depth)
        pieces, size, done, offsets = [self.opening], len(self.opening), 0, [0] * len(order)
        for i in order:
            statement = self.statements[i]
            place = max(done, _nearest([*places, len(filler)], statement.depth * len(filler)))
            pieces += [filler[done:place], statement.text]
            offsets[i] = size + place - done
            size, done = offsets[i] + len(statement.text), place
        return "".join([*pieces, filler[done:]]), offsets


@dataclass(frozen=True)
class Asked:
    """A question in tokens.

    Attributes:
        tokens: what follows the context.
        answers, begins: as in `Question`.
        room: tokens to write.
    """

    tokens: tuple[int, ...]
    answers: tuple[str, ...]
    room: int
    begins: str = ""


@dataclass(frozen=True)
class Prompt:
    """A context to be read densely and questions to be read through a policy.

    Attributes:
        context: tokens, the tokenizer's start included.
        asked: the questions.
        depth: where the first statement stands, as a share of the context's tokens.
        end: writing stops behind this text; "" never.
    """

    context: tuple[int, ...]
    asked: tuple[Asked, ...]
    depth: float
    end: str

    @property
    def tokens(self) -> int:
        """Context, longest question and the room for its answer."""
        return len(self.context) + max(len(asked.tokens) + asked.room for asked in self.asked)


def fit(
    outline: Outline,
    length: int,
    tokenizer: Tokenizer,
    room: Callable[[int], int],
    end: str,
) -> Prompt:
    """The prompt of at most `length` tokens, the room for the answer included, as near as can be.

    Args:
        room: tokens to write for an answer of so many.
        end: as in `Prompt`.

    Raises:
        ValueError: the statements and a question alone are longer; the text says how long.
    """
    start = [*tokenizer.start]
    rooms = [room(len(tokenizer.encode(question.written))) for question in outline.questions]
    longest, behind = max(
        zip(rooms, outline.questions, strict=True),
        key=lambda pair: pair[0] + len(tokenizer.encode(pair[1].text)),
    )

    def taken(amount: int) -> int:
        text = outline.context(amount)[0] + behind.text
        return len(start) + len(tokenizer.encode(text)) + longest

    def fits(amount: int) -> bool:
        return taken(amount) <= length

    least = outline.least
    if not fits(least):
        raise ValueError(
            f"a length of {length} tokens is too short: statements, question and answer take "
            f"{taken(least)}; give at least that"
        )
    low, high = least, least + 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    prompt = _prompt(outline, low, tokenizer, rooms, end)
    # Another question may merge with the context in another way.
    while prompt.tokens > length and low > least:
        low = max(least, low - (prompt.tokens - length))
        prompt = _prompt(outline, low, tokenizer, rooms, end)
    return prompt


def _prompt(
    outline: Outline, amount: int, tokenizer: Tokenizer, rooms: Sequence[int], end: str
) -> Prompt:
    text, offsets = outline.context(amount)
    start = [*tokenizer.start]
    # A token may span the end of the context: it belongs to the question then.
    whole = [tokenizer.encode(text + question.text) for question in outline.questions]
    context = tokenizer.encode(text)
    cut = min(shared_prefix(context, tokens) for tokens in whole)
    if cut == min(map(len, whole)):
        raise ValueError(f"the question {outline.questions[0].text!r} has no tokens of its own")
    depth = 0.0
    if offsets:
        depth = len(tokenizer.encode(text[: offsets[0]])) / max(1, len(context))
    asked = tuple(
        Asked(tuple(tokens[cut:]), question.answers, room, question.begins)
        for tokens, question, room in zip(whole, outline.questions, rooms, strict=True)
    )
    return Prompt((*start, *context[:cut]), asked, round(min(1.0, depth), 4), end)


def _nearest(places: Sequence[int], target: float) -> int:
    return min(places, key=lambda place: (abs(place - target), place))
