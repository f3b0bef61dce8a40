"""Ordinary causal and sliding-window masks in the spellings that people write."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import At, Block, Decoder, MaskedDecoder, PositionedDecoder, SpelledDecoder, causal


class SdpaArangeMask(MaskedDecoder):
    def visible(self, at: At) -> Tensor:
        return causal(at)


class SdpaTrilMask(MaskedDecoder):
    def visible(self, at: At) -> Tensor:
        length = at.tokens.shape[1]
        return torch.tril(torch.ones(length, length, dtype=torch.bool, device=at.tokens.device))


class SdpaFloatMask(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        length = query.shape[2]
        mask = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class SdpaSquareSubsequentMask(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(query.shape[2], dtype=query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class TrilBuffer(SpelledDecoder):
    """nanoGPT: a registered triangle, sliced to the length at hand."""

    triangle: Tensor

    def setup(self) -> None:
        super().setup()
        triangle = torch.tril(torch.ones(self.context, self.context))
        self.register_buffer("triangle", triangle.view(1, 1, self.context, self.context))
        self.dropout = nn.Dropout(0.1)

    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        return scores.masked_fill(self.triangle[:, :, :length, :length] == 0, float("-inf"))

    def weigh(self, scores: Tensor) -> Tensor:
        weights: Tensor = self.dropout(F.softmax(scores, dim=-1))
        return weights


class BoolTrilBufferSdpa(MaskedDecoder):
    triangle: Tensor

    def setup(self) -> None:
        super().setup()
        triangle = torch.tril(torch.ones(self.context, self.context)).bool()
        self.register_buffer("triangle", triangle)

    def visible(self, at: At) -> Tensor:
        length = at.tokens.shape[1]
        return self.triangle[:length, :length]


class TriuAdditive(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        mask = torch.full((length, length), float("-inf"), dtype=scores.dtype)
        return scores + torch.triu(mask, diagonal=1)


class FinfoMinFill(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores.masked_fill(~causal(at), torch.finfo(scores.dtype).min)


class WhereMask(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        return torch.where(causal(at), scores, -1e9)


class WhereTensorMask(SpelledDecoder):
    """GPT-2's: the fill is a zero-dimensional tensor."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
        return torch.where(causal(at), scores, lowest)


class OneMinusMask(SpelledDecoder):
    """BERT's: a 0/1 float mask turned into a large negative bias."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        keep = causal(at).to(scores.dtype)
        return scores + (1.0 - keep) * -1e4


class LogicalNotMask(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        keep = torch.tril(torch.ones((length, length), device=scores.device)).bool()
        return scores.masked_fill_(torch.logical_not(keep), float("-inf"))


class FlippedComparison(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        row = torch.arange(length).view(-1, 1).expand(length, length)
        column = torch.arange(length).view(1, -1)
        return scores.masked_fill(column > row, float("-inf"))


class ShiftedComparison(SpelledDecoder):
    """`k < q + 1`, in floating point."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        index = torch.arange(scores.shape[-1], dtype=torch.float32)
        return scores.masked_fill((index[None, :] < index[:, None] + 1.0).logical_not(), -1e30)


class MaskThenScale(SpelledDecoder):
    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.matmul(query, key.transpose(2, 3))

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return (scores + torch.where(causal(at), 0.0, float("-inf"))) * self.scale


class ExpandedTwoDimensionalMask(SpelledDecoder):
    """transformers of old: ones [B, T] expanded and joined with the triangle."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        attended = torch.ones_like(at.tokens)[:, None, None, :].bool()
        return scores.masked_fill(~(attended & causal(at)[None, None]), float("-inf"))


class SharedMask(SpelledDecoder):
    """One additive mask, made once and read by every layer."""

    layers: ClassVar[int] = 2

    def decode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        at = At(tokens, positions, 0)
        bias = torch.where(causal(at), 0.0, torch.finfo(torch.float32).min)[None, None]
        x = self.embed(at)
        for block in self.blocks:
            assert isinstance(block, Block)
            query, key, value = self.project(block, block.before_attention(x))
            out = torch.softmax(self.score(query, key) + bias, dim=-1) @ value
            x = x + block.output(self.join(out))
            x = x + self.mlp(block, block.before_mlp(x))
        return self.finish(self.last_norm(x))


class PositionIdsMask(PositionedDecoder):
    """The triangle drawn from the position input itself."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        visible = at.positions[:, None, :, None] >= at.positions[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


class MaskedThenRenormalised(SpelledDecoder):
    """Softmax over everything, then the triangle, then the sum to one restored."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores

    def weigh(self, scores: Tensor) -> Tensor:
        weights = torch.softmax(scores, dim=-1).tril()
        return weights / weights.sum(dim=-1, keepdim=True)


class SlidingArange(MaskedDecoder):
    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        return (distance >= 0) & (distance < 9)


class SlidingInclusive(MaskedDecoder):
    """`q - k <= 5` keeps six keys."""

    def visible(self, at: At) -> Tensor:
        index = torch.arange(at.tokens.shape[1])
        past = index[None, :] <= index[:, None]
        near = index[:, None] - index[None, :] <= 5
        return past.logical_and(near)


class SlidingTriu(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
        band = torch.triu(torch.tril(ones), diagonal=-6)
        return scores.masked_fill(~band, float("-inf"))


class SlidingLong(MaskedDecoder):
    """A window longer than any short trial run."""

    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        return (distance >= 0) & (distance < 40)


class SlidingAlternate(MaskedDecoder):
    """Gemma's: a window on even layers, everything on odd ones."""

    layers: ClassVar[int] = 2

    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        return (distance >= 0) & (distance < 7) if at.layer % 2 == 0 else distance >= 0


class TwoMasks(SpelledDecoder):
    """The triangle, then the window, one after the other."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        scores = super().mask(scores, at)
        far = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-7)
        return scores.masked_fill(far, float("-inf"))


class TwoAdditiveMasks(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        distance = at.positions[:, None] - at.positions[None, :]
        future = torch.where(distance < 0, float("-inf"), 0.0)
        return scores + future + torch.where(distance > 8, float("-inf"), 0.0)


class SubtractedMask(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores - 1e9 * (1.0 - causal(at).to(scores.dtype))


class HalfHeadsLocal(MaskedDecoder):
    """Two heads with a window, two without, in two calls."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        near = self.visible(at)
        local = F.scaled_dot_product_attention(
            query[:, :2], key[:, :2], value[:, :2], attn_mask=near
        )
        wide = F.scaled_dot_product_attention(
            query[:, 2:], key[:, 2:], value[:, 2:], is_causal=True
        )
        return torch.cat((local, wide), dim=1)

    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        return (distance >= 0) & (distance < 5)


class TransposedTriangle(SpelledDecoder):
    """An upper triangle, sliced, turned, sliced again: in the end a lower one."""

    triangle: Tensor

    def setup(self) -> None:
        super().setup()
        self.register_buffer("triangle", torch.ones(self.context, self.context).triu())

    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        keep = self.triangle[:length].T[:length]
        return scores.masked_fill(keep == 0, float("-inf"))
