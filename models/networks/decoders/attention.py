"""Ordinary causal attention in the spellings that people write."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import At, Block, Decoder, MaskedDecoder, PositionedDecoder, SpelledDecoder


def causal(at: At) -> Tensor:
    """True on and under the diagonal, bool [T, T]."""
    index = torch.arange(at.tokens.shape[1], device=at.tokens.device)
    return index[:, None] >= index[None, :]


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


class SdpaDropoutInEval(Decoder):
    def setup(self) -> None:
        super().setup()
        self.dropout = nn.Dropout(0.2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        rate = 0.2 if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=rate, is_causal=True, scale=0.5
        )
        dropped: Tensor = self.dropout(out)
        return dropped


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


class EinsumAttention(SpelledDecoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = torch.einsum("bthd,bshd->bhts", query, key) * self.scale
        weights = self.weigh(self.mask(scores, at))
        return torch.einsum("bhts,bshd->bthd", weights, value)

    def join(self, out: Tensor) -> Tensor:
        return out.flatten(2)


class BmmAttention(SpelledDecoder):
    """Heads folded into the batch axis, [B * H, T, D]."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        batch, heads, length, _ = query.shape
        query, key, value = (x.reshape(batch * heads, length, -1) for x in (query, key, value))
        scores = torch.bmm(query, key.transpose(1, 2)) / math.sqrt(self.key_dim)
        weights = self.weigh(self.mask(scores, at))
        return torch.bmm(weights, value).view(batch, heads, length, -1)


class BaddbmmAttention(SpelledDecoder):
    """Bloom's: the mask goes in as the addend, the scale as alpha."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        batch, heads, length, _ = query.shape
        query, key, value = (x.reshape(batch * heads, length, -1) for x in (query, key, value))
        bias = torch.where(causal(at), 0.0, -1e9).to(query.dtype)
        scores = torch.baddbmm(
            bias.expand(batch * heads, length, length),
            query,
            key.transpose(1, 2),
            beta=1.0,
            alpha=self.scale,
        )
        return torch.bmm(self.weigh(scores), value).view(batch, heads, length, -1)


class KeyPermuted(SpelledDecoder):
    """The first GPT-2's: keys are stored as [B, H, D, T]."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        turned = key.permute(0, 1, 3, 2).contiguous()
        scores = torch.matmul(query, turned) / math.sqrt(key.shape[-1])
        return torch.matmul(self.weigh(self.mask(scores, at)), value)


class TransposedScores(SpelledDecoder):
    """Keys on rows, softmax down the columns."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        scores = key @ query.transpose(-1, -2) * self.scale
        scores = scores.masked_fill(~causal(at).T, float("-inf"))
        return torch.softmax(scores, dim=-2).transpose(-1, -2) @ value


class ScaledQuery(SpelledDecoder):
    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return (query * self.scale) @ key.transpose(-1, -2)


class ScaledOnBothSides(SpelledDecoder):
    """Whisper's: the fourth root on each."""

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        scale = math.sqrt(self.scale)
        return (query * scale) @ (key * scale).transpose(-1, -2)


class Unscaled(SpelledDecoder):
    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT


class LearnedTemperature(SpelledDecoder):
    def setup(self) -> None:
        super().setup()
        self.temperature = nn.Parameter(torch.zeros(self.heads, 1, 1))

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT * self.scale * self.temperature.exp()


class ScoreSoftcap(SpelledDecoder):
    """Gemma 2's: 5 tanh(s / 5), ahead of the mask."""

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        scores = query @ key.transpose(2, 3) * self.scale
        return torch.tanh(scores / 5.0) * 5.0


class UpcastSoftmax(SpelledDecoder):
    def weigh(self, scores: Tensor) -> Tensor:
        return F.softmax(scores.float(), dim=-1).type_as(scores)


class SoftmaxDtype(SpelledDecoder):
    def weigh(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


class HandSoftmax(SpelledDecoder):
    def weigh(self, scores: Tensor) -> Tensor:
        grown = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        return grown / grown.sum(dim=-1, keepdim=True)


class LogSoftmaxExp(SpelledDecoder):
    def weigh(self, scores: Tensor) -> Tensor:
        return F.log_softmax(scores, dim=-1).exp()


class MaskedThenRenormalised(SpelledDecoder):
    """Softmax over everything, then the triangle, then the sum to one restored."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores

    def weigh(self, scores: Tensor) -> Tensor:
        weights = torch.softmax(scores, dim=-1).tril()
        return weights / weights.sum(dim=-1, keepdim=True)


class GroupedExpand(Decoder):
    """transformers' repeat_kv: expand and reshape."""

    kv_heads: ClassVar[int] = 2

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        key, value = self.spread(key), self.spread(value)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def spread(self, x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        group = self.heads // self.kv_heads
        x = x[:, :, None].expand(batch, heads, group, length, width)
        return x.reshape(batch, heads * group, length, width)


class GroupedInterleave(GroupedExpand):
    def spread(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // self.kv_heads, dim=1)


class GroupedTiled(GroupedExpand):
    """torch.repeat: head h reads KV head h % Hkv, not h // group."""

    def spread(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.heads // self.kv_heads, 1, 1)


class GroupedBeforeTranspose(SpelledDecoder):
    """llama.c's and Meta's: heads repeated in [B, T, Hkv, D]."""

    kv_heads: ClassVar[int] = 2

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return super().attend(query, self.spread(key), self.spread(value), at)

    def spread(self, x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        group = self.heads // self.kv_heads
        x = x.transpose(1, 2)[:, :, :, None, :].expand(batch, length, heads, group, width)
        return x.reshape(batch, length, heads * group, width).transpose(1, 2)


class GroupedNative(Decoder):
    kv_heads: ClassVar[int] = 2

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class GroupedFiveDimensional(SpelledDecoder):
    """Queries as [B, Hkv, G, T, D] against keys [B, Hkv, 1, T, D]."""

    kv_heads: ClassVar[int] = 2

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        grouped = query.unflatten(1, (self.kv_heads, -1))
        scores = self.mask(self.score(grouped, key[:, :, None]), at)
        return (self.weigh(scores) @ value[:, :, None]).flatten(1, 2)


class MultiQuery(SpelledDecoder):
    """One KV head, broadcast."""

    kv_heads: ClassVar[int] = 1


class MultiQuerySdpa(Decoder):
    kv_heads: ClassVar[int] = 1

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        key, value = key.expand(-1, self.heads, -1, -1), value.expand(-1, self.heads, -1, -1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class WideValues(SpelledDecoder):
    value_dim: ClassVar[int] = 10


class WideValuesSdpa(Decoder):
    key_dim: ClassVar[int] = 10
    value_dim: ClassVar[int] = 4


class ValuesAreKeys(SpelledDecoder):
    def project(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, _ = super().project(block, x)
        return query, key, key


class CrossLayerKeyValue(Decoder):
    """Layer 0 computes keys and values, layer 1 reads them again."""

    def decode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        at = At(tokens, positions, 0)
        x = self.embed(at)
        key = value = None
        for block in self.blocks:
            assert isinstance(block, Block)
            query, own_key, own_value = self.project(block, block.before_attention(x))
            if key is None or value is None:
                key, value = own_key, own_value
            x = x + block.output(self.join(self.attend(query, key, value, at)))
            x = x + self.mlp(block, block.before_mlp(x))
        return self.finish(self.last_norm(x))


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

    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        return (distance >= 0) & (distance < 7) if at.layer % 2 == 0 else distance >= 0


class QueryKeyNorm(Decoder):
    def setup(self) -> None:
        super().setup()
        self.query_norm = nn.LayerNorm(self.key_dim)
        self.key_norm = nn.LayerNorm(self.key_dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return super().attend(self.query_norm(query), self.key_norm(key), value, at)


class PositionTemperature(Decoder):
    """Llama 4's: queries grow with the logarithm of their position."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        growth = torch.log1p(torch.floor((at.positions + 1.0) / 8.0)) + 1.0
        return super().attend(query * growth[:, None], key, value, at)


class MultiheadModule(Decoder):
    """torch's own module, under a square mask."""

    def setup(self) -> None:
        super().setup()
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(self.hidden, self.heads, batch_first=True)
            for _ in range(self.layers)
        )

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        mask = ~causal(at)
        out = self.attentions[at.layer](x, x, x, attn_mask=mask, need_weights=False)
        joined: Tensor = out[0]
        return joined


class SinkLogit(SpelledDecoder):
    """gpt-oss's: a learned extra logit that takes part in the softmax and is dropped."""

    def setup(self) -> None:
        super().setup()
        self.sinks = nn.Parameter(torch.zeros(self.heads))

    def weigh(self, scores: Tensor) -> Tensor:
        sinks = self.sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


class SoftmaxPlusOne(SpelledDecoder):
    """exp / (1 + sum exp): a row may read less than one."""

    def weigh(self, scores: Tensor) -> Tensor:
        grown = scores.exp()
        return grown / (1.0 + grown.sum(dim=-1, keepdim=True))


class DifferentialAttention(SpelledDecoder):
    """The difference of two softmaxes over the two halves of the heads' width."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        (q1, q2), (k1, k2) = query.chunk(2, dim=-1), key.chunk(2, dim=-1)
        first = self.weigh(self.mask(q1 @ k1.mT, at))
        second = self.weigh(self.mask(q2 @ k2.mT, at))
        return (first - 0.4 * second) @ value
