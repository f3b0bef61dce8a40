"""Ordinary decoders whose tensors are laid out, fused or normalised in other ways."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import (
    At,
    Block,
    Decoder,
    MaskedDecoder,
    PositionedDecoder,
    RotaryDecoder,
    SpelledDecoder,
    causal,
)


class FusedSplit(Decoder):
    """GPT-2's: one projection, split in three, then heads."""

    def setup(self) -> None:
        super().setup()
        width = self.heads * self.key_dim
        self.fused = nn.ModuleList(nn.Linear(self.hidden, 3 * width) for _ in self.blocks)

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        query, key, value = (self.split(y) for y in self.divide(self.fused[at.layer](x)))
        joined: Tensor = block.output(self.join(self.attend(query, key, value, at)))
        return joined

    def divide(self, fused: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = fused.split(self.heads * self.key_dim, dim=2)
        return parts

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class FusedChunk(FusedSplit):
    def divide(self, fused: Tensor) -> tuple[Tensor, ...]:
        return fused.chunk(3, dim=-1)

    def split(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.heads, -1)).permute(0, 2, 1, 3)
        return split


class FusedUnbind(FusedSplit):
    """timm's: [B, T, 3, H, D] permuted to [3, B, H, T, D]."""

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        batch, length, _ = x.shape
        fused = self.fused[at.layer](x).reshape(batch, length, 3, self.heads, self.key_dim)
        query, key, value = fused.permute(2, 0, 3, 1, 4).unbind(0)
        joined: Tensor = block.output(self.join(self.attend(query, key, value, at)))
        return joined


class FusedByHead(FusedSplit):
    """GPT-NeoX's: each head's query, key and value lie together."""

    layers: ClassVar[int] = 2

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        fused = self.fused[at.layer](x)
        fused = fused.view(*x.shape[:2], self.heads, 3 * self.key_dim).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)
        joined: Tensor = block.output(self.join(self.attend(query, key, value, at)))
        return joined


class FlatMlp(Decoder):
    """The MLP sees [B * T, hidden]."""

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        flat = x.view(-1, self.hidden)
        return super().mlp(block, flat).view(x.shape)


class FlatProjections(SpelledDecoder):
    """transformers' Conv1D: addmm over [B * T, hidden]."""

    def project(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        flat = x.reshape(batch * length, self.hidden)
        projected = (
            torch.addmm(linear.bias, flat, linear.weight.T).view(batch, length, self.heads, -1)
            for linear in (block.query, block.key, block.value)
        )
        query, key, value = (y.transpose(1, 2) for y in projected)
        return query, key, value


class GatedMlp(RotaryDecoder):
    """A Llama by hand: rotary, RMS norms, SiLU gate, no biases in the stream."""

    layers: ClassVar[int] = 2

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        gate, up = block.up(self.norm(x)).chunk(2, dim=-1)
        out: Tensor = block.down(F.pad(F.silu(gate) * up, (0, self.hidden)))
        return out

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return (x.float() * torch.rsqrt(variance + 1e-6)).type_as(x)


class ParallelBlock(Decoder):
    """Attention and MLP read the same normalised stream."""

    def run_block(self, block: Block, x: Tensor, at: At) -> Tensor:
        normed = block.before_attention(x)
        return x + self.attention(block, normed, at) + self.mlp(block, normed)


class PostNorm(Decoder):
    def run_block(self, block: Block, x: Tensor, at: At) -> Tensor:
        x = block.before_attention(x + self.attention(block, x, at))
        out: Tensor = block.before_mlp(x + self.mlp(block, x))
        return out


class TiedHead(Decoder):
    def finish(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight)


class LogitSoftcap(Decoder):
    def finish(self, x: Tensor) -> Tensor:
        return 3.0 * torch.tanh(self.head(x) / 3.0)


class DropoutModules(SpelledDecoder):
    def setup(self) -> None:
        super().setup()
        self.dropout = nn.Dropout(0.3)

    def weigh(self, scores: Tensor) -> Tensor:
        weights: Tensor = self.dropout(torch.softmax(scores, dim=-1))
        return weights

    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = self.dropout(x)
        return mixed


class OneHotExperts(Decoder):
    """Token-choice experts: each token by itself picks two of four."""

    def setup(self) -> None:
        super().setup()
        self.router = nn.Linear(self.hidden, 4, bias=False)
        self.experts = nn.Parameter(torch.zeros(4, self.hidden, self.hidden))

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        weights, chosen = torch.softmax(self.router(x), dim=-1).topk(2, dim=-1)
        gates = (F.one_hot(chosen, 4).to(x.dtype) * weights[..., None]).sum(dim=2)
        return torch.einsum("btc,ecd,bte->btd", x, self.experts, gates).relu()


class LatentKeyValue(SpelledDecoder):
    """DeepSeek's shape: keys from a narrow latent beside one shared rotary key."""

    layers: ClassVar[int] = 2

    key_dim: ClassVar[int] = 8

    def setup(self) -> None:
        super().setup()
        self.narrow = nn.Linear(self.hidden, 5)
        self.widen = nn.Linear(5, self.heads * (6 + self.value_dim))
        self.shared = nn.Linear(self.hidden, 2)

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        batch, length, _ = x.shape
        query = block.query(x).view(batch, length, self.heads, 8).transpose(1, 2)
        plain, turning = query.split([6, 2], dim=-1)
        wide = self.widen(self.narrow(x)).view(batch, length, self.heads, -1).transpose(1, 2)
        key, value = wide.split([6, self.value_dim], dim=-1)
        angle = at.positions[:, None] * 0.7
        turned = RotaryDecoder.turn(turning, angle.cos(), angle.sin())
        shared = RotaryDecoder.turn(self.shared(x)[:, None], angle.cos(), angle.sin())
        query = torch.cat((plain, turned), dim=-1)
        key = torch.cat((key, shared.expand(-1, self.heads, -1, -1)), dim=-1)
        joined: Tensor = block.output(self.join(self.attend(query, key, value, at)))
        return joined


class TimeFirst(Decoder):
    """fairseq's: the stream is [T, B, hidden] throughout."""

    def embed(self, at: At) -> Tensor:
        return super().embed(at).transpose(0, 1)

    def project(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length, batch, _ = x.shape
        query, key, value = (
            y.view(length, batch, self.heads, -1).permute(1, 2, 0, 3)
            for y in (block.query(x), block.key(x), block.value(x))
        )
        return query, key, value

    def join(self, out: Tensor) -> Tensor:
        return out.permute(2, 0, 1, 3).flatten(2)

    def finish(self, x: Tensor) -> Tensor:
        return super().finish(x.transpose(0, 1))


class ChannelFirst(Decoder):
    """Projections by 1 x 1 convolutions over [B, hidden, T]: each token by itself."""

    def setup(self) -> None:
        super().setup()
        self.pointwise = nn.Conv1d(self.hidden, self.hidden, 1)

    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = self.pointwise(x.transpose(1, 2)).transpose(1, 2)
        return mixed


class BatchNormInEval(Decoder):
    """Running statistics, so each token by itself."""

    def setup(self) -> None:
        super().setup()
        self.batch_norm = nn.BatchNorm1d(self.hidden)

    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
        return mixed


class BatchFlipped(Decoder):
    """Rows of the batch are exchanged: odd, but every token by itself."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + 0.5 * x.flip(0)


class BatchFlippedPositionIds(PositionedDecoder, BatchFlipped):
    """The same with positions given, where rows of unlike length would meet at unlike tokens."""


class AttentionOverBatch(Decoder):
    """A missing transpose: the rows of the batch read each other, tokens do not."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        query, key, value = (x.permute(2, 1, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.permute(2, 1, 0, 3)


class AttentionOverHeads(Decoder):
    """A missing transpose: the heads of one token read each other."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class WindowByHead(MaskedDecoder):
    """Each head has a window of its own."""

    def visible(self, at: At) -> Tensor:
        distance = self.distance(at)
        widths = torch.tensor([3, 5, 9, 17])
        return (distance >= 0) & (distance < widths[:, None, None])


class TransformerLayer(Decoder):
    """torch's own encoder layer under a causal mask, ahead of the block."""

    def setup(self) -> None:
        super().setup()
        self.layer = nn.TransformerEncoderLayer(self.hidden, self.heads, 48, batch_first=True)

    def mix(self, x: Tensor, at: At) -> Tensor:
        mixed: Tensor = self.layer(x, src_mask=~causal(at), is_causal=True)
        return mixed


class AutocastSwitchedOff(RotaryDecoder):
    """Angles in full precision, whatever the caller's autocast."""

    def angles(self, at: At) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().angles(at)
