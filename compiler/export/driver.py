"""Drives an exported engine by its state contract, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .contract import Contract, StateTensor

# Inputs by name -> outputs by name; state that is updated in place is not among them.
Call = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Driver:
    """One batch of sequences that an exported engine remembers.

    Args:
        contract: of the engine.
        call: runs it once.
        batch: sequences.
        capacity: tokens to have room for; None: as the contract says. It grows when it is full.
    """

    def __init__(
        self, contract: Contract, call: Call, batch: int = 1, capacity: int | None = None
    ) -> None:
        self.contract, self.call, self.batch = contract, call, batch
        self.position = [0] * batch
        self.capacity = 0
        if contract.capacity is not None:
            self.capacity = self._rounded(capacity or contract.capacity.tokens)
        self.state = {
            tensor.input: torch.full(
                self._shape(tensor, self.capacity), tensor.init, dtype=tensor.torch_dtype
            )
            for tensor in contract.state
        }

    def _rounded(self, tokens: int) -> int:
        assert self.contract.capacity is not None
        multiple = self.contract.capacity.multiple
        return -(-tokens // multiple) * multiple

    def _shape(self, tensor: StateTensor, capacity: int) -> list[int]:
        shape = [*tensor.shape]
        shape[tensor.batch_axis] = self.batch
        if tensor.grows is not None:
            shape[tensor.grows.axis] = capacity // tensor.grows.tokens
        return shape

    def grow(self, tokens: int) -> None:
        """Makes room for `tokens` tokens a sequence."""
        if self.contract.capacity is None or tokens <= self.capacity:
            return
        self.capacity = self._rounded(max(tokens, 2 * self.capacity))
        for tensor in self.contract.state:
            if tensor.grows is None:
                continue
            old = self.state[tensor.input]
            shape = self._shape(tensor, self.capacity)
            new = torch.full(shape, tensor.init, dtype=old.dtype)
            new.narrow(tensor.grows.axis, 0, old.shape[tensor.grows.axis]).copy_(old)
            self.state[tensor.input] = new

    def __call__(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Feeds tokens [B, n] (int64), of which `lengths` are valid; logits [B, n, V].

        Raises:
            ValueError: lengths where the engine takes none, or more tokens than its context.
        """
        contract, n = self.contract, tokens.shape[1]
        counts = [n] * self.batch if lengths is None else [*lengths]
        if contract.lengths is None and any(count != n for count in counts):
            raise ValueError(
                f"lengths {counts} for {n} tokens: the sequences of this engine share a position"
            )
        longest = max(p + c for p, c in zip(self.position, counts, strict=True))
        if contract.context is not None and longest > contract.context:
            raise ValueError(
                f"{longest} tokens exceed the context of {contract.context} that the model has "
                "positions for"
            )
        made, start = [], 0
        while start < n:
            left = [max(count - start, 0) for count in counts]
            size = min(n - start, self._room(n - start, left))
            left = [min(count, size) for count in left]
            made.append(self._call(tokens[:, start : start + size], left))
            start += size
        return made[0] if len(made) == 1 else torch.cat(made, 1)

    def _room(self, n: int, counts: Sequence[int]) -> int:
        """Of n tokens, of which `counts` are valid, those that one call may take now."""
        room, piece = self.contract.longest_call or n, self.contract.splits_at
        if piece is None:
            return room
        rows = zip(self.position, counts, strict=True)
        return min(room, *(piece - p % piece for p, c in rows if c or not any(counts)))

    def _call(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        contract = self.contract
        # Room for the padding, too: most engines write it.
        self.grow(max(self.position) + tokens.shape[1])
        given = {
            contract.tokens: tokens.contiguous(),
            contract.position: torch.tensor(self.position, dtype=torch.int32),
            **self.state,
        }
        if contract.lengths is not None:
            given[contract.lengths] = torch.tensor(counts, dtype=torch.int32)
        made = self.call(given)
        for tensor in contract.state:
            if tensor.output != tensor.input:
                self.state[tensor.input] = made[tensor.output]
        self.position = [p + c for p, c in zip(self.position, counts, strict=True)]
        return made[contract.logits]
