"""The engine: runs a step graph beside the memory it reads and writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .admit import Bounds
from .generate import Decode, stream
from .memory_state import MemoryState
from .site_layout import SiteLayout
from .stats import Call, Stats

if TYPE_CHECKING:
    from .transformers_bridge import Origin

# Tokens that run at a time: bounds what a call needs beside its result, and changes no result.
CHUNK_TOKENS = 512

# tokens, position, lengths, state... -> logits, and page counts where something is selected.
Step = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Program:
    """What an engine runs; shared by all engines of one compiled model.

    Attributes:
        dense, policy: step graphs (see `passes.remember.StepGraph`), or what they were lowered to.
        layouts: the sites' shapes and memories, in graph order.
        ragged: whether rows may stand at different positions.
        limit: largest context the model has positions for, or None.
        limited_by: what sets the limit, for the message.
        max_context: context to preallocate, or None to grow.
        vocabulary: tokens are 0 .. vocabulary - 1.
        device: where the weights are.
        origin: the transformers model that this was, without its weights; None if it was none.
    """

    dense: Step
    policy: Step
    layouts: tuple[SiteLayout, ...]
    ragged: bool
    limit: int | None
    limited_by: str
    max_context: int | None
    vocabulary: int
    device: torch.device
    origin: Origin | None = None

    @cached_property
    def bounds(self) -> Bounds:
        """What every call has to keep to."""
        return Bounds(self.vocabulary, self.ragged, self.limit, self.limited_by)

    @cached_property
    def dense_below(self) -> int:
        """Contexts up to this many tokens are read in full under every site's policy."""
        selecting = [layout.memory for layout in self.layouts if layout.memory.selects]
        return min((memory.reads_all_below for memory in selecting), default=0)

    @cached_property
    def piece(self) -> int:
        """Tokens at whose multiples a policy's calls are split: accounts evict there; 0: none."""
        sizes = [x.memory.page_size for x in self.layouts if x.memory.account is not None]
        return math.gcd(*sizes)


class Engine:
    """A compiled model with its memory.

    ``prefill`` reads dense, calling the engine reads through the policy; both append their tokens
    and may be called in any order and split. An engine starts empty; its first call fixes the
    batch size until `reset`.

    A memory that frees pages does so at the first read through the policy: until then ``prefill``
    has everything to read, and the memory is as large as the context. Calling the engine from the
    start keeps it small. Once pages are gone, ``prefill`` reads through the policy as well.

    Args:
        always_select: run the policy's graph even where it has nothing to skip.
    """

    def __init__(self, program: Program, *, always_select: bool = False) -> None:
        self._program = program
        self._always_select = always_select
        self._state: MemoryState | None = None
        self._log: list[Call] = []
        self._stats = Stats()
        self._hold = False

    # --- running ---

    def prefill(
        self,
        tokens: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Append ``tokens[B, n]`` (int64, n >= 1), every query reading all that is remembered.

        Args:
            lengths: valid tokens a row, right-padded; None means n for all.
            all_logits: return the logits of every token instead of each row's last.

        Returns:
            ``[B, 1, V]`` logits of each row's last valid token, or ``[B, n, V]``.
        """
        last: Tensor | None = None
        every: list[Tensor] = []
        for logits, left in self._in_chunks("dense", tokens, self.admit(tokens, lengths)):
            if all_logits:
                every.append(logits)
            ends = torch.tensor(left, device=logits.device)
            tail = logits[torch.arange(len(left)), (ends - 1).clamp(min=0)].unsqueeze(1)
            keep = (ends > 0)[:, None, None]
            last = tail if last is None else torch.where(keep, tail, last)
        assert last is not None
        return torch.cat(every, 1) if all_logits else last

    def __call__(self, tokens: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Append ``tokens[B, n]`` (int64, n >= 1), every query reading what the policy selects.

        Selection is made for each query token, so splitting a call changes nothing.

        Returns:
            Logits ``[B, n, V]`` in the model's type; rows of padding hold no meaning.
        """
        counts = self.admit(tokens, lengths)
        every = [logits for logits, _ in self._in_chunks("policy", tokens, counts)]
        return every[0] if len(every) == 1 else torch.cat(every, 1)

    def stream(
        self,
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
        """Continue ``tokens[B, n]`` (int64): the next token of every row, int64 ``[B]``, a step.

        The prompt is appended to what the engine remembers, and every token when the next one is
        asked for: the last one of a row is not in the memory. A row ends at an eos or a stop
        string, which is given too. From then on it gives the first eos, or -1 where there is none,
        and its memory stands still (where the model counts positions by itself, it goes on with
        the others'). The stream ends when every row has.

        Args:
            eos: a token, or several, at which a row ends.
            lengths: valid tokens a row of a right-padded batch, each at least 1.
            stop: texts at which a row ends, in what it has generated; may span tokens.
            decode: text of token ids; needed for `stop`.
            read: "policy", or "dense" to read everything for every token.
            read_prompt: the same for ``tokens``.
            sampling: fields of `Sampling`: ``temperature``, ``top_k``, ``top_p``, ``min_p``,
                ``repetition_penalty``, ``seed``. Greedy if none are given. The penalty counts
                ``tokens`` and what follows them, not what the engine remembered before.

        Raises:
            ValueError: an option that is unknown or out of range; a call that does not fit.
        """
        return stream(
            self,
            tokens,
            max_new_tokens,
            eos=eos,
            lengths=lengths,
            stop=stop,
            decode=decode,
            read=read,
            read_prompt=read_prompt,
            **sampling,
        )

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        eos: int | Sequence[int] | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """What `stream` gives, behind the tokens: int64 ``[B, n + new]``, new <= max_new_tokens.

        In a ragged batch row r goes from ``[r, :lengths[r]]`` to ``[r, n:]``: all rows' new tokens
        begin in column n, and the padding before it stays as it was given.

        Args:
            options: those of `stream`.
        """
        steps = list(self.stream(tokens, max_new_tokens, eos=eos, lengths=lengths, **options))
        return torch.cat([tokens, torch.stack(steps, 1).to(tokens.device)], 1)

    # --- the memory ---

    @property
    def position(self) -> list[int]:
        """Tokens each row holds; empty before the first call."""
        return self._state.position if self._state is not None else []

    @property
    def limit(self) -> int | None:
        """Tokens a row can hold, by the model's tables or `max_context`; None if any number."""
        return self._program.limit

    @property
    def vocabulary(self) -> int:
        """Tokens are 0 .. vocabulary - 1."""
        return self._program.vocabulary

    @property
    def ragged(self) -> bool:
        """Whether rows may stand at different positions."""
        return self._program.ragged

    @property
    def device(self) -> torch.device:
        """Where the weights and the memory are."""
        return self._program.device

    @property
    def rewinds(self) -> bool:
        """Whether tokens can be taken back: states and accounts cannot give up what they took."""
        return not any(x.memory.state or x.memory.account for x in self._program.layouts)

    @property
    def holds(self) -> bool:
        """Whether `hold` was called."""
        return self._hold

    def like(self, other: Engine) -> bool:
        """Whether both run the same compiled model."""
        return self._program is other._program

    @property
    def transformers(self) -> Any:
        """This model as a transformers model, for transformers' own ``generate``.

        An instance of the class that was compiled, without weights: its forward runs on engines of
        this compilation, each `MemoryCache` with one of its own. This engine's memory is not
        touched. See docs/generation.md.

        Raises:
            ValueError: what was compiled is no transformers model that generates.
        """
        from .transformers_bridge import bridge

        empty = Engine(self._program, always_select=self._always_select)
        return bridge(empty, self._program.origin)

    def reset(self) -> None:
        """Forget everything, statistics too; the next call may have another batch size."""
        self._state, self._log, self._stats = None, [], Stats()

    def fork(self, rows: Sequence[int] | Tensor | None = None) -> Engine:
        """An engine that remembers the same and goes its own way; weights are shared.

        Args:
            rows: the rows it remembers, in order, each any number of times: ``[0] * 4`` goes on
                from one prompt in four ways. None: all.

        Raises:
            ValueError: a row that is not there, or rows of an engine that remembers nothing.
        """
        other = Engine(self._program, always_select=self._always_select)
        other._state = self._state.fork() if self._state is not None else None
        other._hold = self._hold
        if rows is not None:
            other.select(rows)
        return other

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Make row i what row ``rows[i]`` was: reorder, drop or repeat what is remembered.

        Raises:
            ValueError: as `fork`.
        """
        if self._state is None:
            raise ValueError(f"rows {rows}: this engine remembers none yet; prefill it first")
        self._state.select(rows.tolist() if isinstance(rows, Tensor) else rows)

    def adopt(self, other: Engine) -> None:
        """Remember what `other` remembers, instead of what this engine did.

        `other` may run the same model under another policy, whose memories hold all that this
        one's need: what it has read densely need not be read again.

        Raises:
            ValueError: its sites or pages are others, or an index field is missing there; or it
                keeps a state under other weights, perhaps: engines of another compilation.
        """
        states = any(layout.memory.state for layout in self._program.layouts)
        if states and other._program is not self._program:
            raise ValueError(
                "a state is written by the weights that were fitted for it: only an engine of the "
                "same compilation can go on with it; read the context with this one"
            )
        held = other._state
        self._state = held.fork(self._program.layouts) if held is not None else None
        self._hold = other._hold

    def rewind(self, n: int) -> None:
        """Forget the last `n` tokens of every row.

        Raises:
            ValueError: a row holds fewer tokens, or what would be needed again was freed, or has
                gone into a state or an account.
        """
        if n < 0 or n > min(self.position, default=0):
            raise ValueError(f"cannot take back {n} tokens: rows hold {self.position}")
        if self._state is not None:
            self._state.rewind([held - n for held in self.position])

    def hold(self) -> None:
        """Keep what a `rewind` to here or later needs, until the next call of this.

        Without it a sliding window's pages are freed as soon as no later token reads them.

        Raises:
            ValueError: a site keeps a state or an account, which nothing can be taken out of.
        """
        for layout in self._program.layouts:
            if layout.memory.state or layout.memory.account:
                kept = "a state" if layout.memory.state else "an account"
                raise ValueError(
                    f"{layout.name} keeps {kept}, which cannot give back what it took in: this "
                    "memory cannot be rewound, whatever is held; take a policy without one"
                )
        self._hold = True
        if self._state is not None:
            self._state.hold()

    def memory_bytes(self) -> int:
        """Bytes of the page pools, index, page tables, accounts and states."""
        return self._state.memory_bytes() if self._state is not None else 0

    def stats(self) -> Stats:
        """Tokens, pages and bytes read so far; the graph itself counts the policy's pages."""
        for call in self._log:
            self._stats.count(self._program.layouts, call)
        self._log = []
        if self._state is not None:
            self._stats.pages_evicted = self._state.pages_evicted
            self._stats.resident_bytes = self._state.memory_bytes()
            self._stats.state_bytes = self._state.state_bytes()
        return self._stats

    def admit(self, tokens: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
        """Check a call before anything changes; valid tokens a row.

        Raises:
            ValueError: what is wrong with it, as every call raises it.
        """
        return self._program.bounds.admit(tokens, lengths, self.position)

    # --- inside ---

    def _in_chunks(
        self, read: str, tokens: Tensor, counts: list[int]
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """Logits of every CHUNK_TOKENS tokens, and each row's valid tokens among them."""
        start = 0
        while start < tokens.shape[1]:
            if read == "dense" and self._state is not None and self._state.forgot:
                read = "policy"  # a dense read would miss what was freed
            left = [max(c - start, 0) for c in counts]
            size = min(CHUNK_TOKENS, tokens.shape[1] - start, self._room(read, left))
            left = [min(c, size) for c in left]
            yield self._run(read, tokens[:, start : start + size], left), left
            start += size

    def _room(self, read: str, left: list[int]) -> int:
        """Tokens until some row of a policy's call enters a page, where accounts evict."""
        piece = self._program.piece
        if read == "dense" or not piece:
            return CHUNK_TOKENS
        held = self.position or [0] * len(left)
        return min(piece - h % piece for h, c in zip(held, left, strict=True) if c or not any(left))

    @torch.no_grad()
    def _run(self, read: str, tokens: Tensor, lengths: list[int]) -> Tensor:
        program = self._program
        if self._state is None:
            self._state = MemoryState(
                program.layouts, tokens.shape[0], program.device, program.max_context
            )
            if self._hold:
                self._state.hold()
        state = self._state
        start = state.position
        state.reserve(lengths, policy=read == "policy")
        position = torch.tensor(start, dtype=torch.int32, device=program.device)
        counts = torch.tensor(lengths, dtype=torch.int32, device=program.device)
        dense = read == "dense"
        if not dense and not self._always_select:
            # Where no row has a page to skip, the dense graph reads the same without selecting.
            end = max(first + length for first, length in zip(start, lengths, strict=True))
            dense = end <= program.dense_below
        graph = program.dense if dense else program.policy
        new = tokens.to(program.device).contiguous()
        logits, *selected = graph(new, position, counts, *state.tensors())
        state.advance(lengths)
        self._log.append(Call(read, start, lengths, selected[0] if selected else None))
        if len(self._log) >= 256:
            self.stats()
        result: Tensor = logits
        return result
