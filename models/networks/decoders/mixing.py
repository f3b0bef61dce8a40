"""Traps: operations beside attention that let one token see another, or the length.

None of these is a step of its own: fed token by token without a memory of its own, each gives
other numbers than the full forward. A compiler must remember what they need, or refuse.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import At, Block, Decoder


class CausalConvolution(Decoder):
    def setup(self) -> None:
        super().setup()
        self.convolution = nn.Conv1d(self.hidden, self.hidden, 3, groups=self.hidden)

    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = x + self.convolution(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        return mixed


class TrimmedConvolution(Decoder):
    """Mamba's: padded on both sides, the tail cut off."""

    def setup(self) -> None:
        super().setup()
        self.convolution = nn.Conv1d(self.hidden, self.hidden, 4, padding=3)

    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = x + self.convolution(x.mT)[..., : x.shape[1]].mT
        return mixed


class CausalPooling(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + F.avg_pool1d(F.pad(x.mT, (2, 0)), 3, stride=1).mT


class ShiftByPad(Decoder):
    """RWKV's token shift."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return 0.6 * x + 0.4 * F.pad(x, (0, 0, 1, -1))


class ShiftByRoll(Decoder):
    """A roll over tokens: the first one sees the last."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + 0.5 * torch.roll(x, 1, dims=1)


class ShiftByZeros(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + 0.5 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


class ShiftKeys(Decoder):
    """Every query reads the keys of the tokens before."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return super().attend(query, torch.roll(key, 1, dims=2), value, at)


class ShiftValues(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return super().attend(query, key, F.pad(value, (0, 0, 1, -1)), at)


class NextTokenPeek(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + 0.5 * F.pad(x[:, 1:], (0, 0, 0, 1))


class Bigram(Decoder):
    """A hashed n-gram embedding: token i beside token i - 1."""

    def setup(self) -> None:
        super().setup()
        self.pairs = nn.Embedding(31, self.hidden)

    def embed(self, at: At) -> Tensor:
        before = F.pad(at.tokens, (1, 0))[:, :-1]
        mixed: Tensor = super().embed(at) + self.pairs((at.tokens * 7 + before * 3) % 31)
        return mixed


class BigramByGather(Bigram):
    def embed(self, at: At) -> Tensor:
        index = (torch.arange(at.tokens.shape[1]) - 1).clamp(min=0)
        before = at.tokens.gather(1, index.expand_as(at.tokens))
        mixed: Tensor = Decoder.embed(self, at) + self.pairs((at.tokens * 5 + before) % 31)
        return mixed


class RunningSum(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + 0.2 * x.cumsum(dim=1)


class RunningMean(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return x + x.cumsum(dim=1) / count


class RunningMaximum(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x.cummax(dim=1).values


class RunningLogSum(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x.logcumsumexp(dim=1)


class TriangularMean(Decoder):
    """The lecture's bag of words: a row-normalised triangle times the stream."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        length = x.shape[1]
        triangle = torch.tril(torch.ones(length, length, dtype=x.dtype))
        return x + (triangle / triangle.sum(1, keepdim=True)) @ x


class TriangularSoftmax(Decoder):
    """The same through softmax of masked zeros: attention's outline, without keys."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        length = x.shape[1]
        triangle = torch.tril(torch.ones(length, length))
        weights = torch.zeros(length, length, dtype=x.dtype).masked_fill(triangle == 0, -torch.inf)
        return x + torch.softmax(weights, dim=-1) @ x


class MovingAverage(Decoder):
    """An exponential average by a Toeplitz table of decays."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        distance = at.positions[:, None] - at.positions[None, :]
        decay = torch.where(distance >= 0, 0.7 ** distance.clamp(min=0), 0.0).to(x.dtype)
        return x + decay @ x


class LearnedTokenMixing(Decoder):
    """A learned [context, context] table, sliced, masked, times the stream."""

    def setup(self) -> None:
        super().setup()
        self.mixing = nn.Parameter(torch.zeros(self.context, self.context))

    def mix(self, x: Tensor, at: At) -> Tensor:
        length = x.shape[1]
        return x + self.mixing[:length, :length].tril() @ x


class FirstTokenEverywhere(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x[:, :1]


class LastTokenEverywhere(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x[:, -1:]


class MeanSubtracted(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x - x.mean(dim=1, keepdim=True)


class SqueezeAndExcite(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * torch.sigmoid(x.sum(dim=1, keepdim=True))


class MaximumGate(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x / (1.0 + x.amax(dim=(1, 2), keepdim=True))


class LargestTokenGate(Decoder):
    """The gate hangs on the largest token of the whole input."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x * (1.0 + at.tokens.max() / self.vocabulary)


class TokensNormalised(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return F.normalize(x, dim=1)


class TokensAndChannelsNormalised(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return F.layer_norm(x, x.shape[1:])


class GroupNormOverTokens(Decoder):
    def setup(self) -> None:
        super().setup()
        self.group_norm = nn.GroupNorm(4, self.hidden)

    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = self.group_norm(x.mT).mT
        return mixed


class InstanceNormOverTokens(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True, correction=0)
        return (x - mean) / (deviation + 0.1)


class BatchNormOfTheBatch(Decoder):
    """No running statistics: batch and tokens are measured as they come."""

    def setup(self) -> None:
        super().setup()
        self.batch_norm = nn.BatchNorm1d(self.hidden, track_running_stats=False)

    def mix(self, x: Tensor, at: At) -> Tensor:
        padded = F.pad(x, (0, 0, 1, 0))
        mixed: Tensor = self.batch_norm(padded.mT).mT[:, 1:]
        return mixed


class KeysNormalisedOverTokens(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return super().attend(query, 4.0 * F.normalize(key, dim=-2), value, at)


class SoftmaxOverTokens(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x.shape[1] * torch.softmax(x, dim=1)


class SortedTokens(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x.sort(dim=1).values


class ExpertChoice(Decoder):
    """Each expert takes its best tokens: who is taken hangs on everybody."""

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        affinity = torch.softmax(x[..., :4], dim=-1)
        floor = affinity.topk(1, dim=1).values
        taken = (affinity >= floor).to(x.dtype).sum(-1, keepdim=True)
        return super().mlp(block, x) * (1.0 + taken)


class FourierMixing(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = x + torch.fft.fft(x, dim=1).real
        return mixed


class GatedRecurrence(Decoder):
    def setup(self) -> None:
        super().setup()
        self.recurrence = nn.GRU(self.hidden, self.hidden, batch_first=True)

    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = x + self.recurrence(x)[0]
        return mixed


class PythonLoop(Decoder):
    """A recurrence written as a loop over the length."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for index in range(x.shape[1]):
            state = 0.8 * state + x[:, index]
            states.append(state)
        return torch.stack(states, dim=1)


class LinearAttention(Decoder):
    """Un-normalised, by running sums of outer products."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        query, key = F.elu(query) + 1, F.elu(key) + 1
        state = torch.einsum("bhtd,bhte->bhtde", key, value).cumsum(dim=2)
        return torch.einsum("bhtd,bhtde->bhte", query, state) * 0.1


class LinearAttentionMatrix(Decoder):
    """The same as a masked product without softmax."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return (query @ key.mT).tril() @ value * 0.1


class Retention(Decoder):
    """RetNet's: scores times a table of decays, no softmax."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        distance = at.positions[:, None] - at.positions[None, :]
        decay = torch.where(distance >= 0, 0.9**distance, 0.0).to(query.dtype)
        return (query @ key.mT * decay) @ value * 0.3


class ReluAttention(Decoder):
    """ReLU instead of softmax, divided by the length."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return (query @ key.mT).relu().tril() @ value / query.shape[2]


class SigmoidAttention(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return torch.sigmoid(query @ key.mT - 1.0).tril() @ value


class ChunkedPairs(Decoder):
    """Two tokens at a time share an MLP; even lengths only."""

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        pairs = x.view(x.shape[0], x.shape[1] // 2, 2, self.hidden)
        return super().mlp(block, pairs + pairs.flip(2)).view(x.shape)


class PooledPairs(Decoder):
    """[B, T, C] seen as [B, T / 2, 2 C]; even lengths only."""

    def setup(self) -> None:
        super().setup()
        self.pair = nn.Linear(2 * self.hidden, 2 * self.hidden)

    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = self.pair(x.reshape(x.shape[0], -1, 2 * self.hidden)).reshape(x.shape)
        return mixed


class HalvesExchanged(Decoder):
    """The two halves of the input change places."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        half = x.shape[1] // 2
        return x + torch.cat((x[:, half:], x[:, :half]), dim=1)


class UnfoldedWindows(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        windows = F.pad(x, (0, 0, 3, 0)).unfold(1, 4, 1)
        return x + windows.amax(dim=-1)


class EveryOtherToken(Decoder):
    """Odd tokens see their even neighbour."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x[:, ::2].repeat_interleave(2, dim=1)[:, : x.shape[1]]


class NeighbourByIndex(Decoder):
    """Tokens indexed by a function of the position."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x[:, at.positions // 2 * 2]


class ReversedByIndex(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        index = torch.arange(x.shape[1] - 1, -1, -1)
        return x + x.index_select(1, index)


class FlippedStream(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + 0.5 * x.flip(1)


class ScrambledBatchAndTokens(Decoder):
    """view(T, B): the axes are exchanged by reshape, not by transpose."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        batch, length, hidden = x.shape
        return x + x.reshape(length, batch, hidden).transpose(0, 1)


class ScrambledChannels(Decoder):
    """A [B, C, T] tensor read as [B, T, C]."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x.transpose(1, 2).reshape(x.shape)


class ForgottenTranspose(Decoder):
    """[B, H, T, D] joined as [B, T, H * D] without the transpose: right at T = 1 alone."""

    def join(self, out: Tensor) -> Tensor:
        batch, _, length, _ = out.shape
        return out.reshape(batch, length, -1)


class ForgottenHeadTranspose(Decoder):
    """Heads taken by view from [B, T, H * D] as [B, H, T, D]: right at T = 1 alone."""

    def project(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        query, key, value = (
            y.view(batch, self.heads, length, -1)
            for y in (block.query(x), block.key(x), block.value(x))
        )
        return query, key, value


class OuterTokens(Decoder):
    """A Gram matrix of all tokens flows back into each."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + 0.05 * x @ (x.mT @ x)


class SameTokenCount(Decoder):
    """How often a token's own id occurs in the input so far."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        same = at.tokens[:, :, None] == at.tokens[:, None, :]
        count = same.tril().sum(-1, keepdim=True)
        return x * (1.0 + 0.2 * count)


class CallCounter(Decoder):
    """A buffer that each call moves: the second call is another function."""

    calls: Tensor

    def setup(self) -> None:
        super().setup()
        self.register_buffer("calls", torch.zeros(1))

    def mix(self, x: Tensor, at: At) -> Tensor:
        self.calls += 1.0
        return x * (1.0 + 0.1 * self.calls)


class LastLogitsOnly(Decoder):
    def finish(self, x: Tensor) -> Tensor:
        return super().finish(x[:, -1:])


class LogitsNormalisedOverTokens(Decoder):
    def finish(self, x: Tensor) -> Tensor:
        return super().finish(x).log_softmax(dim=1)


class LogitsSummed(Decoder):
    """Each token's logits are all logits so far."""

    def finish(self, x: Tensor) -> Tensor:
        return super().finish(x).cumsum(1)


class DoubledTokens(Decoder):
    """Each token stands twice in the sequence that attention sees."""

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        doubled = torch.stack((x, x.flip(-1)), dim=2).flatten(1, 2)
        out = super().attention(block, doubled, at)
        return out[:, 1::2]


class SqueezedGate(Decoder):
    """A gate with its token axis squeezed: nothing happens until a call brings one token."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        gate = torch.sigmoid(x.sum(-1, keepdim=True)).squeeze(1)
        return x * gate


class SqueezedQueries(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return super().attend(query.squeeze(2) * 1.5, key, value, at)


class BatchMean(Decoder):
    """Every row sees the mean of all rows at its own token."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + x.mean(0, keepdim=True)


class LastLogitsByIndex(Decoder):
    """nanoGPT at inference: the head runs on x[:, [-1], :]."""

    def finish(self, x: Tensor) -> Tensor:
        return super().finish(x[:, [-1], :])


class LogitsTransposed(Decoder):
    """[B, V, T], the way a cross entropy likes them."""

    def finish(self, x: Tensor) -> Tensor:
        return super().finish(x).transpose(1, 2)


class SuccessorPresent(Decoder):
    """Is the token that follows in the vocabulary anywhere in the input?"""

    def mix(self, x: Tensor, at: At) -> Tensor:
        present = torch.isin(at.tokens + 1, at.tokens)
        return x * (1.0 + present[..., None].to(x.dtype))
