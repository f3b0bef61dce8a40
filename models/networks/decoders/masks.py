"""Traps: attention whose visibility, weights or keys are not those of a causal softmax."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import At, Block, Decoder, MaskedDecoder, PositionedDecoder, SpelledDecoder, causal


class Bidirectional(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class BidirectionalSpelled(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores


class BidirectionalLastLayer(MaskedDecoder):
    """Causal everywhere but in the last layer."""

    layers: ClassVar[int] = 2

    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        return distance >= 0 if at.layer == 0 else distance > -1000


class AntiCausal(MaskedDecoder):
    def visible(self, at: At) -> Tensor:
        return self.distance(at) <= 0


class OneAhead(SpelledDecoder):
    """tril(diagonal=1): every query peeks at the next token."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(1)
        return scores.masked_fill(~keep, float("-inf"))


class PrefixMask(MaskedDecoder):
    """The first six tokens are seen by all, the rest causally."""

    def visible(self, at: At) -> Tensor:
        index = torch.arange(at.tokens.shape[1])
        return (self.distance(at) >= 0) | (index[None, :] < 6)


class ChunkedMask(MaskedDecoder):
    """floor(q / 8) == floor(k / 8), both ways."""

    def visible(self, at: At) -> Tensor:
        chunk = torch.arange(at.tokens.shape[1]) // 8
        return chunk[:, None] == chunk[None, :]


class ChunkedCausalMask(MaskedDecoder):
    """Llama 4's local layers: causal inside chunks of sixteen."""

    def visible(self, at: At) -> Tensor:
        index = torch.arange(at.tokens.shape[1])
        return (index[:, None] // 16 == index[None, :] // 16) & (self.distance(at) >= 0)


class DilatedMask(MaskedDecoder):
    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        return (distance >= 0) & (distance % 2 == 0)


class SinksAndWindow(MaskedDecoder):
    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        sink = torch.arange(at.tokens.shape[1])[None, :] < 3
        return (distance >= 0) & ((distance < 6) | sink)


class StrictlyPast(SpelledDecoder):
    """No token sees itself; the first row, with nothing to see, averages everything."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return torch.where(causal(at).tril(-1), scores, -1e9)


class HalfLengthWindow(MaskedDecoder):
    """The window is half of the length at hand."""

    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        return (distance >= 0) & (distance <= at.tokens.shape[1] // 2)


class CausalWhenShort(MaskedDecoder):
    """A window that opens only past position 30, beyond a short trial run."""

    def visible(self, at: At) -> Tensor:
        index = torch.arange(at.tokens.shape[1])
        distance = self.distance(at)
        return (distance >= 0) & ((distance < 6) | (index[:, None] < 30))


class DoubledRow(MaskedDecoder):
    """`2 q >= k`: the further on, the further ahead."""

    def visible(self, at: At) -> Tensor:
        index = torch.arange(at.tokens.shape[1])
        return 2 * index[:, None] >= index[None, :]


class FlawedTriangle(SpelledDecoder):
    """A registered triangle with one wrong cell, far from the corner."""

    triangle: Tensor

    def setup(self) -> None:
        super().setup()
        triangle = torch.tril(torch.ones(self.context, self.context))
        triangle[41, 44] = 1.0
        triangle[40, 3] = 0.0
        self.register_buffer("triangle", triangle)

    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        keep = self.triangle[:length, :length]
        return scores.masked_fill(keep == 0, float("-inf"))


class ShiftedTriangle(SpelledDecoder):
    """The triangle is sliced from its second row on."""

    triangle: Tensor

    def setup(self) -> None:
        super().setup()
        self.register_buffer("triangle", torch.ones(self.context + 1, self.context + 1).tril())

    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        keep = self.triangle[1 : length + 1, :length]
        return scores.masked_fill(keep == 0, float("-inf"))


class TriangleFromTheEnd(SpelledDecoder):
    """The last [T, T] corner of the table: still a triangle, sliced from the end."""

    triangle: Tensor

    def setup(self) -> None:
        super().setup()
        self.register_buffer("triangle", torch.ones(self.context, self.context).tril())

    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        keep = self.triangle[-length:, -length:]
        return scores.masked_fill(keep == 0, float("-inf"))


class PaddingMask(SpelledDecoder):
    """Token 0 is padding that nobody reads."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        keep = causal(at) & (at.tokens != 0)[:, None, None, :]
        return scores.masked_fill(~keep, torch.finfo(scores.dtype).min)


class DocumentMask(MaskedDecoder):
    """Token 1 ends a document; documents do not see each other."""

    def visible(self, at: At) -> Tensor:
        document = (at.tokens == 1).cumsum(-1)
        same = document[:, :, None] == document[:, None, :]
        return (same & causal(at))[:, None]


class SameTokenMask(MaskedDecoder):
    def visible(self, at: At) -> Tensor:
        same = at.tokens[:, :, None] == at.tokens[:, None, :]
        return (same & causal(at))[:, None]


class Alibi(SpelledDecoder):
    """A slope for each head times the distance."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, self.heads + 1)
        bias = -slopes[:, None, None] * (at.positions[:, None] - at.positions[None, :])
        return super().mask(scores + bias, at)


class AlibiByKey(SpelledDecoder):
    """Bloom's: only the key's index, which softmax makes the same."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, self.heads + 1)
        return super().mask(scores + slopes[:, None, None] * at.positions, at)


class AlibiSdpa(Decoder):
    """MPT's: the bias rides in the float mask."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, self.heads + 1)
        bias = slopes[:, None, None] * (at.positions[None, :] - at.positions[:, None])
        bias = bias.masked_fill(~causal(at), float("-inf")).to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


class RelativeBias(SpelledDecoder):
    """T5's: a learned bias for each bucket of distance."""

    def setup(self) -> None:
        super().setup()
        self.buckets = nn.Embedding(12, self.heads)

    def mask(self, scores: Tensor, at: At) -> Tensor:
        bucket = (at.positions[:, None] - at.positions[None, :]).clamp(0, 11)
        return super().mask(scores + self.buckets(bucket).permute(2, 0, 1), at)


class AbsoluteBias(SpelledDecoder):
    """A learned [context, context] bias, sliced."""

    def setup(self) -> None:
        super().setup()
        self.bias = nn.Parameter(torch.zeros(self.context, self.context))

    def draw(self, seed: int) -> None:
        super().draw(seed)
        self.bias.data.mul_(5.0)

    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        return super().mask(scores + self.bias[:length, :length], at)


class SoftMask(SpelledDecoder):
    """The future is only made unlikely."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores + (1.0 - causal(at).to(scores.dtype)) * -3.0


class FilledWithZero(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores.masked_fill(~causal(at), 0.0)


class MultipliedMask(SpelledDecoder):
    """Scores times the triangle: hidden keys get a logit of zero."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores * causal(at)


class MaskedAfterSoftmax(SpelledDecoder):
    """The triangle comes after the softmax, and nobody restores the sum."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores

    def weigh(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, dim=-1).tril()


class SoftmaxOverQueries(SpelledDecoder):
    def weigh(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores.nan_to_num(neginf=-1e9), dim=-2)


class SoftmaxOverHeads(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores

    def weigh(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, dim=1).tril()


class ScaledByLength(SpelledDecoder):
    """1 / sqrt of the number of keys, not of their width."""

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT / math.sqrt(key.size(-2))


class ScaledByLengthSdpa(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        query = query * (query.shape[2] ** 0.5 / 4.0)
        return super().attend(query, key, value, at)


class LogLengthTemperature(SpelledDecoder):
    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return super().score(query, key) * (1.0 + math.log(query.shape[2]))


class CentredScores(SpelledDecoder):
    """Scores less their mean over keys times a half: not what softmax cancels."""

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        scores = super().score(query, key)
        return scores * (1.0 + scores.mean(dim=-1, keepdim=True).tanh())


class CentredKeys(Decoder):
    """Keys less the mean of all keys."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return super().attend(query, key * key.mean(dim=2, keepdim=True), value, at)


class ValueMeanAdded(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return super().attend(query, key, value, at) + value.mean(dim=2, keepdim=True)


class ReceivedAttention(SpelledDecoder):
    """Each token also learns how much it was read."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        weights = self.weigh(self.mask(self.score(query, key), at))
        return weights @ value + weights.sum(dim=-2).unsqueeze(-1)


class WeightsReadTwice(SpelledDecoder):
    """The weights also gate the output by their largest entry."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        weights = self.weigh(self.mask(self.score(query, key), at))
        return (weights @ value) * weights.amax(dim=-1, keepdim=True)


class TalkingHeads(SpelledDecoder):
    """Heads mix their weights after the softmax."""

    def setup(self) -> None:
        super().setup()
        self.talk = nn.Linear(self.heads, self.heads, bias=False)

    def weigh(self, scores: Tensor) -> Tensor:
        weights = torch.softmax(scores, dim=-1)
        mixed: Tensor = self.talk(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return mixed


class TalkingScores(SpelledDecoder):
    """Heads mix their scores ahead of the softmax."""

    def setup(self) -> None:
        super().setup()
        self.talk = nn.Parameter(torch.zeros(self.heads, self.heads))

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.einsum("hg,bgqk->bhqk", self.talk, super().score(query, key))


class TopScores(SpelledDecoder):
    """Only the three best keys of a row are read."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        scores = F.pad(super().mask(scores, at), (3, 0), value=-1e9)
        least = scores.topk(3, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, -1e9)[..., 3:]


class LearnedPrefixKeys(Decoder):
    """Prefix tuning: four learned keys stand ahead of every sequence."""

    def setup(self) -> None:
        super().setup()
        self.prefix_key = nn.Parameter(torch.zeros(self.heads, 4, self.key_dim))
        self.prefix_value = nn.Parameter(torch.zeros(self.heads, 4, self.value_dim))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        batch = query.shape[0]
        key = torch.cat((self.prefix_key.expand(batch, -1, -1, -1), key), dim=2)
        value = torch.cat((self.prefix_value.expand(batch, -1, -1, -1), value), dim=2)
        visible = F.pad(causal(at), (4, 0), value=True)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


class ZeroKey(Decoder):
    """add_zero_attn: an empty key and value behind the sequence."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        visible = F.pad(causal(at), (0, 1), value=True)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


class ConstantMemory(Decoder):
    """Cross attention to a learned memory: every token by itself, nothing to remember."""

    def setup(self) -> None:
        super().setup()
        self.memory = nn.Parameter(torch.zeros(7, self.hidden))

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        out = super().attention(block, x, at)
        query, _, _ = self.project(block, x)
        _, key, value = self.project(block, self.memory[None])
        read = F.scaled_dot_product_attention(
            query, key.expand(x.shape[0], -1, -1, -1), value.expand(x.shape[0], -1, -1, -1)
        )
        joined: Tensor = out + block.output(self.join(read))
        return joined


class QueriesOfTheSecondHalf(Decoder):
    """Only the later half asks; the rest keeps its value."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        half = query.shape[2] // 2
        visible = causal(at)[half:]
        out = F.scaled_dot_product_attention(query[:, :, half:], key, value, attn_mask=visible)
        return torch.cat((value[:, :, :half], out), dim=2)


class KeysOfTheFirstHalf(Decoder):
    """Every query reads the first half of the keys."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        half = (key.shape[2] + 1) // 2
        return F.scaled_dot_product_attention(query, key[:, :, :half], value[:, :, :half])


class FirstKeysOnly(Decoder):
    """Every query reads the first three keys and no others."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return F.scaled_dot_product_attention(query, key[:, :, :3], value[:, :, :3])


class KeysOfOthers(Decoder):
    """Row b of the batch reads the keys of row b - 1."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return super().attend(query, key.roll(1, 0), value.roll(1, 0), at)


class PositionWindowFromTheEnd(PositionedDecoder):
    """Keys within five of the *last* position are hidden from earlier queries."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        at_end = at.positions >= at.positions[:, -1:] - 5
        distance = at.positions[:, :, None] - at.positions[:, None, :]
        visible = (distance >= 0) & (~at_end[:, None, :] | (distance == 0))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])


class PackedPositions(PositionedDecoder):
    """A position that does not follow its neighbour starts a new document."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        breaks = at.positions.diff(dim=1, prepend=at.positions[:, :1] - 1) != 1
        document = breaks.cumsum(-1)
        same = document[:, :, None] == document[:, None, :]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=(same & causal(at))[:, None]
        )


class TurnedTriangle(SpelledDecoder):
    """A lower triangle, sliced, turned, sliced again: in the end an upper one."""

    triangle: Tensor

    def setup(self) -> None:
        super().setup()
        self.register_buffer("triangle", torch.ones(self.context, self.context).tril())

    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        keep = self.triangle[:length].T[:length]
        return scores.masked_fill(keep == 0, float("-inf"))


class InvertedWhere(SpelledDecoder):
    """The two branches are exchanged: the past is hidden."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return torch.where(causal(at).tril(-1), -1e9, scores)


class TwoKindsOfScores(SpelledDecoder):
    """Near keys are scored one way, far keys another."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        near = (at.positions[:, None] - at.positions[None, :]) < 4
        scores = torch.where(near, self.score(query, key), self.score(key, query))
        return self.weigh(self.mask(scores, at)) @ value


class SoftcapAfterMask(SpelledDecoder):
    """Minus infinity becomes minus the cap: hidden keys are seen after all."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return 4.0 * torch.tanh(super().mask(scores, at) / 4.0)


class ShrunkMask(SpelledDecoder):
    """A mask of -1e4 that the scale behind it shrinks to -2."""

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT * 2000.0

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return (scores + (1.0 - causal(at).to(scores.dtype)) * -1e4) * 2e-4


class OverwhelmedMask(SpelledDecoder):
    """Scores so large that -1e4 hides nothing for sure."""

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT * 3000.0

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores + (1.0 - causal(at).to(scores.dtype)) * -1e4


class ZeroOneFloatMask(Decoder):
    """A mask of ones and zeros passed as floats: it is added, not obeyed."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=causal(at).to(query.dtype)
        )


class BoolMaskAdded(SpelledDecoder):
    """True is one: the past is only a little likelier."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores + causal(at)


class SubtractedNegative(SpelledDecoder):
    """Two signs: the future gets plus ten thousand."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return scores - torch.where(causal(at), 0.0, -1e4)


class NegatedScores(SpelledDecoder):
    """Mask less scores: the least alike is read most."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        return torch.where(causal(at), 0.0, float("-inf")) - scores


class TransposedWeights(SpelledDecoder):
    """Each key hands out its value to the queries that read it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return self.weigh(self.mask(self.score(query, key), at)).mT @ value


class FractionalWindow(SpelledDecoder):
    """A window in tenths: at its edge rounding decides, differently along the sequence."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        where = at.positions.to(torch.float32) * 0.1
        near = where[:, None] - where[None, :] < 0.7
        return scores.masked_fill(~(near & causal(at)), float("-inf"))


class ByteIndices(SpelledDecoder):
    """Row and column numbers in eight bits: past 255 they begin again."""

    context: ClassVar[int] = 300

    def mask(self, scores: Tensor, at: At) -> Tensor:
        index = torch.arange(scores.shape[-1]).to(torch.uint8)
        return scores.masked_fill(index[:, None] < index[None, :], float("-inf"))


class BandOfZeros(SpelledDecoder):
    """Keys three to five back keep no score of their own: zero replaces it, and is not added."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        distance = at.positions[:, None] - at.positions[None, :]
        band = (distance >= 3) & (distance <= 5)
        return super().mask(scores.masked_fill(band, 0.0), at)


class EinsumTransposedWeights(SpelledDecoder):
    """Each key hands out its value to the queries that read it, in Einstein's notation."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        weights = self.weigh(self.mask(self.score(query, key), at))
        return torch.einsum("bhqk,bhqd->bhkd", weights, value)


class RoundedScores(SpelledDecoder):
    """Scores pass through bfloat16 in a float32 network: part of what it computes."""

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return super().score(query, key).to(torch.bfloat16).to(query.dtype)


class RoundedWeights(SpelledDecoder):
    def weigh(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, dim=-1).to(torch.bfloat16).to(scores.dtype)
