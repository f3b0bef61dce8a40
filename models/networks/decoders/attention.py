"""Ordinary causal attention: scores, softmax, heads and groups in the spellings people write."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import At, Block, Decoder, SpelledDecoder, causal


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

    layers: ClassVar[int] = 2

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


class LectureHeads(Decoder):
    """The lecture's: every head a module of its own, [B, T, D], joined by cat."""

    triangle: Tensor

    def setup(self) -> None:
        super().setup()
        self.register_buffer("triangle", torch.tril(torch.ones(self.context, self.context)))

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        length = x.shape[1]
        queries, keys, values = (
            y.chunk(self.heads, dim=-1) for y in (block.query(x), block.key(x), block.value(x))
        )
        outs = []
        for query, key, value in zip(queries, keys, values, strict=True):
            scores = query @ key.transpose(-2, -1) * self.scale
            scores = scores.masked_fill(self.triangle[:length, :length] == 0, float("-inf"))
            outs.append(F.softmax(scores, dim=-1) @ value)
        joined: Tensor = block.output(torch.cat(outs, dim=-1))
        return joined


class SdpaThreeDimensional(Decoder):
    """SDPA over [B * H, T, D]."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        out = F.scaled_dot_product_attention(
            query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), is_causal=True
        )
        split: Tensor = out.unflatten(0, (-1, self.heads))
        return split


class HeadMajorBmm(SpelledDecoder):
    """Heads folded ahead of the batch, [H * B, T, D]."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        batch, heads, length, _ = query.shape
        query, key, value = (
            y.transpose(0, 1).reshape(heads * batch, length, -1) for y in (query, key, value)
        )
        out = torch.bmm(self.weigh(self.mask(self.score(query, key), at)), value)
        return out.view(heads, batch, length, -1).transpose(0, 1)


class GroupedTiledExpand(GroupedExpand):
    """The same as a tile, written with expand: the group axis stands ahead of the heads."""

    def spread(self, x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        group = self.heads // self.kv_heads
        x = x[:, None].expand(batch, group, heads, length, width)
        return x.reshape(batch, heads * group, length, width)


class GroupedUnlike(GroupedExpand):
    """Keys are interleaved over heads, values tiled."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        group = self.heads // self.kv_heads
        key, value = key.repeat_interleave(group, dim=1), value.repeat(1, group, 1, 1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class RepeatedBlock(Decoder):
    """One block run three times over."""

    def decode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        at = At(tokens, positions, 0)
        x = self.embed(at)
        block = self.blocks[0]
        assert isinstance(block, Block)
        for _ in range(3):
            x = self.run_block(block, x, at)
        return self.finish(self.last_norm(x))


class PositionalKeys(Decoder):
    """Keys come from a table of positions, not from the tokens."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        table = self.places.weight[: query.shape[2]].view(-1, self.heads, self.key_dim)
        key = table.transpose(0, 1).expand(query.shape[0], -1, -1, -1)
        return super().attend(query, 2.0 * key, value, at)
