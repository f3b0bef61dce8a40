"""Ordinary ways to tell a decoder where its tokens stand."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import At, Decoder, PositionedDecoder, RotaryDecoder


class NoPositions(Decoder):
    def setup(self) -> None:
        return

    def embed(self, at: At) -> Tensor:
        embedded: Tensor = self.embedding(at.tokens)
        return embedded


class SlicedTable(Decoder):
    def place(self, at: At) -> Tensor:
        return self.places.weight[: at.tokens.shape[1]]


class SlicedTable3d(Decoder):
    """A parameter [1, context, hidden] sliced in the middle."""

    def setup(self) -> None:
        self.table = nn.Parameter(torch.zeros(1, self.context, self.hidden))

    def draw(self, seed: int) -> None:
        super().draw(seed)
        self.table.data.mul_(20.0)

    def place(self, at: At) -> Tensor:
        return self.table[:, : at.tokens.shape[1], :]


class NarrowedTable(Decoder):
    def place(self, at: At) -> Tensor:
        return self.places.weight.narrow(0, 0, at.tokens.shape[1])


class OffsetSlice(Decoder):
    """The table's first two rows belong to nobody."""

    spare: ClassVar[int] = 2

    def place(self, at: At) -> Tensor:
        return self.places.weight[2 : at.tokens.shape[1] + 2]


class StridedSlice(Decoder):
    """Every other row of the table."""

    spare: ClassVar[int] = 63

    def place(self, at: At) -> Tensor:
        return self.places.weight[: 2 * at.tokens.shape[1] : 2]


class FlippedTable(Decoder):
    """The table is a constant turned round; positions still count from the start."""

    def place(self, at: At) -> Tensor:
        return self.places.weight.flip(0)[: at.tokens.shape[1]]


class CumsumOfOnes(Decoder):
    def positions(self, tokens: Tensor) -> Tensor:
        return torch.ones(tokens.shape[1], dtype=torch.long).cumsum(0) - 1


class CumsumOfAttentionMask(Decoder):
    """OPT's: a mask of ones [B, T], summed up, one less, offset by two."""

    spare: ClassVar[int] = 2

    def positions(self, tokens: Tensor) -> Tensor:
        mask = torch.ones(tokens.shape, dtype=torch.long, device=tokens.device)
        return (torch.cumsum(mask, dim=1) * mask).long() - 1 + 2


class OnesLikeCumsum(Decoder):
    spare: ClassVar[int] = 1

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.ones_like(tokens).cumsum(-1)


class OffsetArange(Decoder):
    spare: ClassVar[int] = 2

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(2, tokens.shape[1] + 2)


class ExpandedArange(Decoder):
    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.size(1)).unsqueeze(0).expand_as(tokens)


class GatheredTable(Decoder):
    def place(self, at: At) -> Tensor:
        index = at.positions[:, None].expand(-1, self.hidden)
        return torch.gather(self.places.weight, 0, index)


class SelectedTable(Decoder):
    def place(self, at: At) -> Tensor:
        return torch.index_select(self.places.weight, 0, at.positions)


class PositionIds(PositionedDecoder):
    pass


class OffsetPositionIds(PositionedDecoder):
    spare: ClassVar[int] = 2

    def place(self, at: At) -> Tensor:
        placed: Tensor = self.places(at.positions + 2)
        return placed


class ClampedPositions(Decoder):
    """Every position past 20 shares the last row: a function of the position alone."""

    def place(self, at: At) -> Tensor:
        placed: Tensor = self.places(at.positions.clamp(max=20))
        return placed


class PeriodicPositions(Decoder):
    def place(self, at: At) -> Tensor:
        placed: Tensor = self.places(at.positions % 7 + at.positions // 5)
        return placed


class ParityGate(Decoder):
    """Odd positions are scaled: position is data here, but each token's own."""

    def place(self, at: At) -> Tensor:
        odd = (at.positions % 2).to(self.places.weight.dtype)
        scaled: Tensor = self.places(at.positions) * (1.0 + odd)[:, None]
        return scaled


class NegativeWrap(Decoder):
    """Advanced indexing with positions - 3: the first three wrap to the table's end."""

    def place(self, at: At) -> Tensor:
        return self.places.weight[at.positions - 3]


class OneHotPositions(Decoder):
    def place(self, at: At) -> Tensor:
        weight = self.places.weight
        return F.one_hot(at.positions, self.context).to(weight.dtype) @ weight


class EyePositions(Decoder):
    """An identity of the length at hand picks the rows."""

    def place(self, at: At) -> Tensor:
        weight = self.places.weight
        length = at.tokens.shape[1]
        return torch.eye(length, dtype=weight.dtype) @ weight[:length]


class FlatArangeModulo(Decoder):
    """arange(B * T) % T, a long way to write positions."""

    def positions(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        return (torch.arange(batch * length) % length).view(batch, length)


class Sinusoids(Decoder):
    def setup(self) -> None:
        return

    def place(self, at: At) -> Tensor:
        rates = torch.exp(torch.arange(0, self.hidden, 2) * (-3.0 / self.hidden))
        angles = at.positions.to(rates.dtype)[:, None] * rates
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class SinusoidBuffer(Decoder):
    """The tutorial's: a registered table [1, context, hidden], filled by strides."""

    table: Tensor

    def setup(self) -> None:
        table = torch.zeros(self.context, self.hidden)
        angles = torch.arange(self.context)[:, None] * 0.6 ** torch.arange(self.hidden // 2)
        table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
        self.register_buffer("table", table[None])

    def place(self, at: At) -> Tensor:
        return self.table[:, : at.tokens.size(1)].detach()


class RotaryPositionIds(PositionedDecoder, RotaryDecoder):
    pass


class RotaryPartial(RotaryDecoder):
    """GPT-NeoX's: half of each head turns."""

    def rotate(self, x: Tensor, at: At) -> Tensor:
        angles = self.angles(at)[..., :2]
        return torch.cat((self.turn(x[..., :4], angles.cos(), angles.sin()), x[..., 4:]), dim=-1)


class RotaryDoubled(RotaryDecoder):
    """transformers' rotate_half over doubled tables."""

    def rotate(self, x: Tensor, at: At) -> Tensor:
        doubled = torch.cat((self.angles(at), self.angles(at)), dim=-1)
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * doubled.cos() + torch.cat((-second, first), dim=-1) * doubled.sin()


class RotaryOuter(RotaryDecoder):
    def angles(self, at: At) -> Tensor:
        return torch.outer(torch.arange(at.tokens.shape[1]).float(), self.frequencies)


class RotaryTables(RotaryDecoder):
    """llama.c's: tables of the whole context, sliced; pairs interleaved."""

    cosine: Tensor
    sine: Tensor

    def setup(self) -> None:
        super().setup()
        angles = torch.outer(torch.arange(self.context).float(), self.frequencies)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def rotate(self, x: Tensor, at: At) -> Tensor:
        length = x.shape[2]
        even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cosine, sine = self.cosine[:length], self.sine[:length]
        turned = (even * cosine - odd * sine, even * sine + odd * cosine)
        return torch.stack(turned, dim=-1).flatten(3)


class RotaryComplex(RotaryDecoder):
    """Meta's: queries seen as complex numbers."""

    def rotate(self, x: Tensor, at: At) -> Tensor:
        angles = self.angles(at)
        turns = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


class RotaryComplexTable(RotaryDecoder):
    """Meta's, with the turns in a table that is sliced."""

    turns: Tensor

    def setup(self) -> None:
        super().setup()
        angles = torch.outer(torch.arange(2 * self.context).float(), self.frequencies)
        self.register_buffer("turns", torch.view_as_real(torch.polar(angles * 0 + 1, angles)))

    def rotate(self, x: Tensor, at: At) -> Tensor:
        turns = torch.view_as_complex(self.turns)[: x.shape[2]]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns.view(1, 1, x.shape[2], -1)).flatten(3)


class RotaryGathered(PositionedDecoder, RotaryDecoder):
    """Tables gathered by the position input."""

    cosine: Tensor
    sine: Tensor

    def setup(self) -> None:
        super().setup()
        angles = torch.outer(torch.arange(self.context).float(), self.frequencies)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def rotate(self, x: Tensor, at: At) -> Tensor:
        cosine, sine = self.cosine[at.positions], self.sine[at.positions]
        return self.turn(x, cosine[:, None], sine[:, None])


class RotaryCached(RotaryDecoder):
    """Tables computed for the longest length seen, sliced to the one at hand."""

    cosine: Tensor
    sine: Tensor

    def setup(self) -> None:
        super().setup()
        self.register_buffer("cosine", self.table(self.context).cos())
        self.register_buffer("sine", self.table(self.context).sin())

    def table(self, length: int) -> Tensor:
        return torch.outer(torch.arange(length).float(), self.frequencies)

    def rotate(self, x: Tensor, at: At) -> Tensor:
        length = x.shape[2]
        if length > self.context:
            table = self.table(length)
            return self.turn(x, table.cos(), table.sin())
        return self.turn(x, self.cosine[:length], self.sine[:length])
