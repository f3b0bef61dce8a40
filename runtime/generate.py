"""Generation: prompts in, one token a row and step out, until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .sampling import Sampler, Sampling

Decode = Callable[[list[int]], str]
# What a row gives after its end where there is no eos to give: no token of any vocabulary.
NO_TOKEN = -1
READS = ("policy", "dense")


class Runner(Protocol):
    """What generation needs of an engine: `Engine` is one, and so is an exported one's session."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def ragged(self) -> bool: ...

    @property
    def limit(self) -> int | None: ...

    def admit(self, tokens: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
        """Valid tokens a row; ValueError where the call does not fit."""

    def prefill(self, tokens: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Append ``tokens[B, n]``, read densely; ``[B, 1, V]`` logits of each row's last."""

    def __call__(self, tokens: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Append ``tokens[B, n]``, read through the policy; logits ``[B, n, V]``."""


def stream(
    engine: Runner,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    eos: int | Sequence[int] | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    stop: str | Sequence[str] | None = None,
    decode: Decode | None = None,
    read: str = "policy",
    read_prompt: str = "dense",
    **sampling: Any,
) -> Iterator[Tensor]:
    """See `Engine.stream`. Options are checked at once, tokens are read when the first is asked."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; give at least 1")
    for name, value in (("read", read), ("read_prompt", read_prompt)):
        if value not in READS:
            raise ValueError(f"{name} is {value!r}; known: {', '.join(READS)}")
    vocabulary = engine.vocabulary
    chosen = Sampling.of(**sampling)
    ends = _end_tokens(eos, vocabulary)
    stops = _Stops.of(stop, decode)
    counts = engine.admit(tokens, lengths)
    if not all(counts):
        raise ValueError(f"lengths {counts}: every row needs at least one token to go on from")
    return _steps(engine, tokens, counts, max_new_tokens, ends, stops, (read, read_prompt), chosen)


def _steps(
    engine: Runner,
    tokens: Tensor,
    counts: list[int],
    max_new_tokens: int,
    ends: list[int],
    stops: _Stops | None,
    reads: tuple[str, str],
    sampling: Sampling,
) -> Iterator[Tensor]:
    read, read_prompt = reads
    if read_prompt == "dense":
        last = engine.prefill(tokens, counts)[:, -1]
    else:
        every = engine(tokens, counts)
        at = torch.tensor(counts, device=every.device) - 1
        last = every[torch.arange(len(counts), device=every.device), at]
    sampler = Sampler(sampling, len(counts), last.shape[-1], last.device)
    sampler.see(tokens, counts)
    marks = torch.tensor(ends, dtype=torch.int64, device=last.device)
    pad = ends[0] if ends else NO_TOKEN
    done = torch.zeros(len(counts), dtype=torch.bool, device=last.device)
    lengths: list[int] | None = None
    for left in range(max_new_tokens, 0, -1):
        chosen = torch.where(done, pad, sampler(last))
        stopped = stops.ended(chosen, done) if stops is not None else done
        done = done | stopped | torch.isin(chosen, marks)
        yield chosen
        if ends or stops is not None:  # else no row ends, and no step waits for the device
            lengths = [int(not ended) for ended in done.tolist()]
        if left == 1 or (lengths is not None and not any(lengths)):
            return
        fed = chosen.clamp(min=0)[:, None]
        # Rows that have ended stand still, where rows may stand at different positions.
        going = lengths if engine.ragged else None
        last = (engine(fed, going) if read == "policy" else engine.prefill(fed, going))[:, -1]
        sampler.see(fed)


def _end_tokens(eos: int | Sequence[int] | None, vocabulary: int) -> list[int]:
    if eos is None:
        return []
    given = [eos] if isinstance(eos, int) else list(eos)
    wrong = [e for e in given if type(e) is not int or not 0 <= e < vocabulary]
    if wrong or not given:
        raise ValueError(
            f"eos is {eos!r}; give one token of 0 .. {vocabulary - 1}, or several, or None"
        )
    return given


class _Stops:
    """Looks for stop strings in the text of what each row has generated."""

    def __init__(self, stop: list[str], decode: Decode) -> None:
        self._stop, self._decode = stop, decode
        self._rows: list[list[int]] = []
        # A token holds at least a byte of text, and a character has at most four. A few more, for
        # tokens without text and for decoders that treat the first token in a way of its own.
        self._tail = 4 * max(map(len, stop)) + 16

    @classmethod
    def of(cls, stop: str | Sequence[str] | None, decode: Decode | None) -> _Stops | None:
        if stop is None:
            return None
        given = [stop] if isinstance(stop, str) else list(stop)
        if not given or any(not isinstance(s, str) or not s for s in given):
            raise ValueError(f"stop is {stop!r}; give a text, or several, none of them empty")
        if decode is None:
            raise ValueError(
                "stop strings are looked for in text: give decode, a function from token ids to "
                "their text, such as tokenizer.decode"
            )
        return cls(given, decode)

    def ended(self, chosen: Tensor, done: Tensor) -> Tensor:
        """Which rows' text holds a stop string now; bool ``[B]``."""
        self._rows = self._rows or [[] for _ in range(len(chosen))]
        found = []
        pairs = zip(self._rows, chosen.tolist(), done.tolist(), strict=True)
        for row, token, ended in pairs:
            if not ended:
                row.append(token)
                text = self._decode(row[-self._tail :])
            found.append(not ended and any(s in text for s in self._stop))
        return torch.tensor(found, device=chosen.device)
