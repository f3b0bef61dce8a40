"""An engine as a model of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..runtime.engine import Engine
from .protocol import Contender, Counts, check, measured
from .tokens import Tokenizer

_log = logging.getLogger(__name__)
_CALL = 64
_NEW_TOKENS = 256


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Contexts are read densely, continuations and what is generated through the policy.

    Requests that follow each other with one context, as the choices of a question do, read it once.

    Args:
        contender: the model under its policy.
        tokenizer: its tokenizer.
        end: token that ends a text, or None.
        max_length: most tokens of context and continuation; None: the model's limit, or 4096
            tokens for a model without one. Longer contexts lose their beginning, with a warning.

    Attributes:
        counts: what has been read for continuations and generated tokens so far.

    Raises:
        ValueError: max_length is below 2, or above what the model can hold.
        ReadTooMuch: by a request, when the policy reads what its memory does not allow.
    """

    def __init__(
        self,
        contender: Contender,
        tokenizer: Tokenizer,
        end: int | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        limit = contender.limit
        self.max_length = max_length if max_length is not None else limit or 4096
        if self.max_length < 2 or (limit is not None and self.max_length > limit):
            raise ValueError(
                f"max_length is {max_length}; give 2 to {limit or 'any number of'} tokens"
            )
        self.contender, self.tokens, self.end = contender, tokenizer, end
        self.counts = Counts()
        self._engine = contender.make()
        self._held: tuple[int, ...] = ()
        self._told = False

    # --- what the harness asks for ---

    @property
    def eot_token_id(self) -> int:
        return self.end if self.end is not None else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the BOS, the end, or a newline."""
        if self.tokens.start:
            return self.tokens.start[-1]
        return self.end if self.end is not None else self.tokens.encode("\n")[0]

    @property
    def tokenizer_name(self) -> str:
        return f"memcompile-{self.contender.name}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        start = [] if add_special_tokens is False else [*self.tokens.start]
        return start + self.tokens.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of the log-likelihoods of each continuation, and whether greedy would write it."""
        return [self._score(context, wanted) for _, context, wanted in requests]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tokens.encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            totals.append(sum(self._score(context, wanted)[0] for context, wanted in pairs))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to one of the request's `until`, its end, or `max_gen_toks` tokens.

        Raises:
            ValueError: a request asks for sampling.
        """
        return [self._generate(*request.args) for request in requests]

    # --- how it is done ---

    def _score(self, context: Sequence[int], wanted: Sequence[int]) -> tuple[float, bool]:
        if not wanted:
            return 0.0, True
        if len(wanted) >= self.max_length:
            raise ValueError(
                f"a continuation of {len(wanted)} tokens does not fit into max_length="
                f"{self.max_length}; give a larger one"
            )
        context = self._cut(context, self.max_length - len(wanted))
        branch = self._behind(context[:-1])
        given = torch.tensor([[context[-1], *wanted[:-1]]])
        total, greedy = 0.0, True

        def run() -> None:
            nonlocal total, greedy
            targets = torch.tensor(wanted)
            for queries, right in zip(given.split(_CALL, 1), targets.split(_CALL), strict=True):
                logits = branch(queries)[0].float().cpu()  # [n, V]
                chosen = logits.log_softmax(-1).gather(-1, right[:, None])
                total += float(chosen.double().sum())
                greedy &= bool((logits.argmax(-1) == right).all())

        self._count(branch, len(context) - 1, run)
        return total, greedy

    def _generate(self, text: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature", 0.0) > 0:
            raise ValueError(
                f"generation is greedy here, and the task asks for {options}; give it "
                "do_sample=false and temperature=0"
            )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [*until]
        room = int(options.get("max_gen_toks", _NEW_TOKENS))
        context = self._cut(self.tok_encode(text) or [self.prefix_token_id], self.max_length - room)
        branch = self._behind(context[:-1])
        new: list[int] = []

        def run() -> None:
            following = torch.tensor([[context[-1]]])
            while len(new) < room:
                following = branch(following)[:, -1:].argmax(-1)
                if self.end is not None and int(following) == self.end:
                    break
                new.append(int(following))
                if _stopped(self.tokens.decode(new), stops) is not None:
                    break

        self._count(branch, len(context) - 1, run)
        written = self.tokens.decode(new)
        return written[: _stopped(written, stops)]

    def _cut(self, context: Sequence[int], room: int) -> tuple[int, ...]:
        """The last `room` tokens of a context, one at least."""
        if room < 1:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a context; give a larger one, or "
                "fewer tokens to generate"
            )
        if len(context) > room:
            _log.warning("a context of %d tokens was cut to its last %d", len(context), room)
        return tuple(context[-room:])

    def _behind(self, context: tuple[int, ...]) -> Engine:
        """An engine that has read `context` densely."""
        if self._held != context:
            self._held = ()
            self._engine.reset()
            if context:
                self._engine.prefill(torch.tensor([context]))
            self._held = context
        return self._engine.fork()

    def _count(self, branch: Engine, first: int, run: Any) -> None:
        counts = measured(branch, run)
        last = first + counts.tokens
        exact = self.contender.reads_all_below
        if exact is not None and last <= exact and not self._told:
            self._told = True
            _log.warning(
                "policy %r reads everything up to %d tokens, and a request has %d: such requests "
                "say nothing about the policy",
                *(self.contender.name, exact, last),
            )
        counts = replace(counts, pages_allowed=self.contender.pages_allowed(first, counts.tokens))
        check(self.contender, first, counts)
        self.counts += counts


def _stopped(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of `stops` stands in `text`."""
    return min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=None)
