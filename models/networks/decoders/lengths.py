"""Traps: positions that hang on the length, on the content or on where a call begins."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import At, Decoder, PositionedDecoder, RotaryDecoder


class CountedFromTheEnd(Decoder):
    def positions(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        return length - 1 - torch.arange(length)


class ReversedArange(Decoder):
    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1] - 1, -1, -1)


class FlippedArange(Decoder):
    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1]).flip(0)


class FlippedCumsum(Decoder):
    spare: ClassVar[int] = 1

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.ones_like(tokens).flip(1).cumsum(1).flip(1)


class RolledArange(Decoder):
    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1]).roll(1)


class FlatArange(Decoder):
    """arange(B * T): row b of the batch starts at b T."""

    spare: ClassVar[int] = 128

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.numel()).view(tokens.shape)


class SortedArange(Decoder):
    """argsort of the tokens stands in for their positions."""

    def positions(self, tokens: Tensor) -> Tensor:
        return tokens.argsort(dim=1, stable=True)


class Linspace(Decoder):
    """Positions spread from 0 to 1 over the length at hand."""

    def place(self, at: At) -> Tensor:
        where = torch.linspace(0.0, 1.0, at.tokens.shape[1])
        return self.places.weight[:1] * where[:, None].to(self.places.weight.dtype)


class FractionOfLength(Decoder):
    def place(self, at: At) -> Tensor:
        where = at.positions / at.tokens.shape[1]
        return self.places.weight[:1] * where[:, None].to(self.places.weight.dtype)


class FractionOfLast(Decoder):
    """Positions divided by the largest among them."""

    def place(self, at: At) -> Tensor:
        where = at.positions / at.positions.max().clamp(min=1)
        return self.places.weight[:1] * where[:, None].to(self.places.weight.dtype)


class CentredPositions(Decoder):
    def place(self, at: At) -> Tensor:
        where = at.positions - at.positions.to(torch.float32).mean()
        return self.places.weight[:1] * where[:, None].to(self.places.weight.dtype)


class RelativeToFirst(PositionedDecoder):
    """Positions less the first one of the call."""

    def place(self, at: At) -> Tensor:
        placed: Tensor = self.places(at.positions - at.positions[:, :1])
        return placed


class RelativeToLast(PositionedDecoder):
    def place(self, at: At) -> Tensor:
        placed: Tensor = self.places(at.positions[:, -1:] - at.positions)
        return placed


class IndexBesidePositionIds(PositionedDecoder):
    """Takes positions, and yet counts by itself as well."""

    def place(self, at: At) -> Tensor:
        index = torch.arange(at.tokens.shape[1])
        placed: Tensor = self.places(at.positions) + self.places.weight.roll(5, 0)[index]
        return placed


class PositionSteps(PositionedDecoder):
    """How far each position is from the one ahead of it in the call."""

    def place(self, at: At) -> Tensor:
        steps = at.positions.diff(dim=1, prepend=torch.zeros_like(at.positions[:, :1]))
        placed: Tensor = self.places(steps.clamp(0, 9))
        return placed


class PositionSum(PositionedDecoder):
    def place(self, at: At) -> Tensor:
        placed: Tensor = self.places(at.positions.cumsum(-1) % 17)
        return placed


class SkipsPadding(Decoder):
    """Token 0 does not count: positions are a sum over the content."""

    def positions(self, tokens: Tensor) -> Tensor:
        return ((tokens != 0).long().cumsum(1) - 1).clamp(min=0)


class RestartsAtSeparator(Decoder):
    """Positions count from the last token 1."""

    def positions(self, tokens: Tensor) -> Tensor:
        index = torch.arange(tokens.shape[1]).expand_as(tokens)
        start = torch.where(tokens == 1, index, 0).cummax(1).values
        return index - start


class TableFromTheEnd(Decoder):
    """The last T rows of the table."""

    def place(self, at: At) -> Tensor:
        return self.places.weight[-at.tokens.shape[1] :]


class TableByLength(Decoder):
    """One row for the length at hand, added to every token."""

    def place(self, at: At) -> Tensor:
        length = at.tokens.shape[1]
        return self.places.weight[length - 1 : length]


class TableSliceFlipped(Decoder):
    def place(self, at: At) -> Tensor:
        return self.places.weight[: at.tokens.shape[1]].flip(0)


class TableInterpolated(Decoder):
    """A vision model's: the table is resized to the length."""

    def place(self, at: At) -> Tensor:
        table = self.places.weight.T[None]
        return F.interpolate(table, size=at.tokens.shape[1], mode="nearest")[0].T


class TableCentred(Decoder):
    """Rows less the mean of the rows in use."""

    def place(self, at: At) -> Tensor:
        rows = self.places.weight[: at.tokens.shape[1]]
        return rows - rows.mean(0, keepdim=True)


class TableShort(Decoder):
    """Twelve rows only: past them the forward itself fails, and a step must fail too."""

    context: ClassVar[int] = 12


class TableShortSliced(Decoder):
    context: ClassVar[int] = 12

    def place(self, at: At) -> Tensor:
        return self.places.weight[: at.tokens.shape[1]]


class TableShortPositionIds(PositionedDecoder):
    context: ClassVar[int] = 12


class TableShortRotary(RotaryDecoder):
    context: ClassVar[int] = 12

    table: Tensor

    def setup(self) -> None:
        super().setup()
        angles = torch.outer(torch.arange(self.context).float(), self.frequencies)
        self.register_buffer("table", torch.stack((angles.cos(), angles.sin())))

    def rotate(self, x: Tensor, at: At) -> Tensor:
        cosine, sine = self.table[:, : x.shape[2]].unbind(0)
        return self.turn(x, cosine, sine)


class WrappedNegative(Decoder):
    """`table[-1 - positions]` walks the table backwards: a function of position all the same."""

    def place(self, at: At) -> Tensor:
        return self.places.weight[-1 - at.positions]


class LengthAsScale(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * (x.shape[1] / 16.0)


class LengthAsData(Decoder):
    def place(self, at: At) -> Tensor:
        length = torch.full((1,), at.tokens.shape[1])
        placed: Tensor = self.places(length - 1)
        return super().place(at) + placed


class LengthByCounting(Decoder):
    """The length comes in as the sum of ones over the tokens."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        length = torch.ones_like(at.tokens).sum(1)
        return x * (1.0 + length[:, None, None] / 16.0)


class LengthBranch(Decoder):
    """Another network past eight tokens."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * 2.0 if x.shape[1] > 8 else x


class LengthWhere(Decoder):
    """The same branch, taken by a tensor."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        long = torch.full((), x.shape[1]) > 8
        return torch.where(long, x * 2.0, x)


class LateBranch(Decoder):
    """A branch far beyond a short trial run."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x.flip(-1) if x.shape[1] > 40 else x


class BatchBranch(Decoder):
    """Another network for one row alone; true to itself for any fixed batch."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * 2.0 if x.shape[0] == 1 else x


class LateContent(Decoder):
    """Past position 38 the first token is read again."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        late = (at.positions > 38)[:, None]
        return torch.where(late, x + x[:, :1], x)


class DynamicRotary(RotaryDecoder):
    """Dynamic NTK: frequencies stretch once the input is longer than it was trained on."""

    def angles(self, at: At) -> Tensor:
        length = at.tokens.shape[1]
        stretch = max(1.0, length / 8.0)
        return at.positions[:, None] * self.frequencies / stretch


class DynamicRotaryByData(PositionedDecoder, RotaryDecoder):
    """The same, by the largest position."""

    def angles(self, at: At) -> Tensor:
        stretch = (at.positions.max() + 1).clamp(min=8) / 8.0
        return (at.positions[..., None] * self.frequencies / stretch)[:, None]


class CentredScaling(RotaryDecoder):
    """xPos: queries grow and keys shrink from the middle of the input."""

    def rotate(self, x: Tensor, at: At) -> Tensor:
        middle = at.tokens.shape[1] // 2
        growth = 1.03 ** (at.positions - middle)
        return super().rotate(x, at) * growth[:, None].to(x.dtype)


class LoopedSinusoids(Decoder):
    """The table is built by a Python loop over the length."""

    def setup(self) -> None:
        return

    def place(self, at: At) -> Tensor:
        rows = [
            [math.sin(0.8**channel * index) for channel in range(self.hidden)]
            for index in range(at.tokens.shape[1])
        ]
        return torch.tensor(rows, dtype=self.head.weight.dtype)


class ConvolvedPositions(Decoder):
    """A centred convolution over the rows in use: the last row hangs on the length."""

    def setup(self) -> None:
        super().setup()
        self.convolution = nn.Conv1d(self.hidden, self.hidden, 3, padding=1)

    def place(self, at: At) -> Tensor:
        rows: Tensor = self.places(at.positions)
        smooth: Tensor = self.convolution(rows.T[None])[0].T
        return smooth


class CumulatedTable(Decoder):
    """A running sum over the rows in use, which hangs on the position alone."""

    def place(self, at: At) -> Tensor:
        return self.places.weight[: at.tokens.shape[1]].cumsum(0)


class SoftmaxedTable(Decoder):
    """Rows in use under a softmax over positions."""

    def place(self, at: At) -> Tensor:
        return 8.0 * self.places.weight[: at.tokens.shape[1]].softmax(0)


class ScaledEmbedding(Decoder):
    """Embeddings times the square root of the length instead of the width."""

    def embed(self, at: At) -> Tensor:
        embedded: Tensor = self.embedding(at.tokens) * math.sqrt(at.tokens.shape[1])
        return embedded + self.place(at)


class TableRowByLength(Decoder):
    """One row for the length at hand, taken by an index."""

    def place(self, at: At) -> Tensor:
        return super().place(at) + self.places.weight[at.tokens.shape[1] - 1]


class TableSplitAtLength(Decoder):
    """The first T rows, by split."""

    def place(self, at: At) -> Tensor:
        length = at.tokens.shape[1]
        rows: Tensor = self.places.weight.split([length, self.context - length])[0]
        return rows


class TableTailByLength(Decoder):
    """Three rows from the length on, summed into every token."""

    spare: ClassVar[int] = 3

    def place(self, at: At) -> Tensor:
        length = at.tokens.shape[1]
        rows = self.places.weight[length : length + 3]
        return super().place(at) + rows.sum(0)


class TableRolledByLength(Decoder):
    def place(self, at: At) -> Tensor:
        length = at.tokens.shape[1]
        return self.places.weight.roll(length, 0)[:length]


class EmptyLengthBranch(Decoder):
    """A single token alone takes another way."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * 2.0 if x.shape[1] == 1 else x


class ShiftedRange(Decoder):
    """arange(T, 2 T)."""

    spare: ClassVar[int] = 64

    def positions(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        return torch.arange(length, 2 * length)


class NegativeRange(Decoder):
    """arange(-T, 0), which indexes a table from its end."""

    def place(self, at: At) -> Tensor:
        return self.places.weight[torch.arange(-at.tokens.shape[1], 0)]


class RepeatedRange(Decoder):
    """Positions of all rows in one flat tensor, tiled: right."""

    def positions(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        return torch.arange(length).repeat(batch).view(batch, length)


class InterleavedRange(Decoder):
    """The same with repeat_interleave: the rows are scrambled."""

    def positions(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        return torch.arange(length).repeat_interleave(batch).view(batch, length)


class BatchRange(Decoder):
    """arange over the batch where the tokens were meant."""

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[0])[:, None].expand_as(tokens)


class ByteCumsum(Decoder):
    """Positions summed in eight bits: at 128 they begin again below zero."""

    context: ClassVar[int] = 300
    spare: ClassVar[int] = 300

    def positions(self, tokens: Tensor) -> Tensor:
        count = torch.ones(tokens.shape[1], dtype=torch.int8).cumsum(0, dtype=torch.int8)
        return count.long() + 150


class HalfPositions(Decoder):
    """Positions pass through bfloat16: past 256 neighbours are rounded together."""

    context: ClassVar[int] = 300
    spare: ClassVar[int] = 1

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1]).to(torch.bfloat16).long()


class HalfCumsum(Decoder):
    context: ClassVar[int] = 300
    spare: ClassVar[int] = 1

    def positions(self, tokens: Tensor) -> Tensor:
        ones = torch.ones(tokens.shape[1], dtype=torch.bfloat16)
        return (ones.cumsum(0) - 1).long()


class LengthTwentyBranch(Decoder):
    """One length of all is another network."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * 2.0 if x.shape[1] == 20 else x


class EvenLengthBranch(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * 2.0 if x.shape[1] % 2 == 0 else x


class ManyTokensBranch(Decoder):
    """Another network for more than fifty tokens over all rows."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * 2.0 if x.shape[0] * x.shape[1] > 50 else x


class SquareBranch(Decoder):
    """Another network when there are as many rows as tokens."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * 2.0 if x.shape[0] == x.shape[1] else x


class HalfRange(Decoder):
    """A range in bfloat16, from one on: past 256 it skips."""

    context: ClassVar[int] = 300
    spare: ClassVar[int] = 8

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(1, tokens.shape[1] + 1, dtype=torch.bfloat16).long()


class ByteRange(Decoder):
    """A range in eight bits: at 256 it begins again."""

    context: ClassVar[int] = 300

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1], dtype=torch.uint8).long()
