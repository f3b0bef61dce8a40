"""The plain decoder that every hand-written network of this folder changes in one place."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class At(NamedTuple):
    """Where a layer stands.

    Attributes:
        tokens: int64 [B, T], the whole input.
        positions: int64 [T] or [B, T], what the network takes for the tokens' positions.
        layer: index of the block that is running.
    """

    tokens: Tensor
    positions: Tensor
    layer: int


def causal(at: At) -> Tensor:
    """True on and under the diagonal, bool [T, T]."""
    index = torch.arange(at.tokens.shape[1], device=at.tokens.device)
    return index[:, None] >= index[None, :]


class Block(nn.Module):
    """The weights of one layer: four projections, two norms, one MLP."""

    def __init__(self, hidden: int, query: int, key: int, value: int, output: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(hidden)
        self.before_mlp = nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, query)
        self.key = nn.Linear(hidden, key)
        self.value = nn.Linear(hidden, value)
        self.output = nn.Linear(output, hidden)
        self.up = nn.Linear(hidden, 2 * hidden)
        self.down = nn.Linear(2 * hidden, hidden)


class Decoder(nn.Module):
    """A causal decoder, tokens int64 [B, T] -> logits [B, T, vocabulary], T <= `context`.

    Every step is a method, so that a subclass spells one of them differently and shares the rest.
    Weights are drawn from `seed` alone and are large: attention is far from uniform and positions
    matter, so that anything read from the wrong place moves the logits by far more than rounding.
    `spare` rows stand in the table of positions beyond the first `context`.
    """

    vocabulary: ClassVar[int] = 29
    hidden: ClassVar[int] = 24
    heads: ClassVar[int] = 4
    kv_heads: ClassVar[int] = 4
    key_dim: ClassVar[int] = 6
    value_dim: ClassVar[int] = 6
    layers: ClassVar[int] = 1
    context: ClassVar[int] = 64
    spare: ClassVar[int] = 0

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.vocabulary, self.hidden)
        self.blocks = nn.ModuleList(
            Block(
                self.hidden,
                self.heads * self.key_dim,
                self.kv_heads * self.key_dim,
                self.kv_heads * self.value_dim,
                self.heads * self.value_dim,
            )
            for _ in range(self.layers)
        )
        self.last_norm = nn.LayerNorm(self.hidden)
        self.head = nn.Linear(self.hidden, self.vocabulary, bias=False)
        self.setup()
        self.draw(seed)
        self.eval()

    def setup(self) -> None:
        """Make the parameters and buffers that this decoder has beyond the blocks."""
        self.places = nn.Embedding(self.context + self.spare, self.hidden)

    def draw(self, seed: int) -> None:
        """Fill every parameter from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        norms = {
            id(m.weight)
            for m in self.modules()
            if isinstance(m, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
        }
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if id(parameter) in embeddings:
                    parameter.copy_(noise)
                elif id(parameter) in norms:
                    parameter.copy_(1.0 + 0.3 * noise)
                elif parameter.dim() < 2:
                    parameter.copy_(0.3 * noise)
                else:
                    parameter.copy_(1.5 / math.sqrt(parameter[0].numel()) * noise)

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.key_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(tokens, self.positions(tokens))

    def decode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of the tokens at these positions."""
        x = self.embed(At(tokens, positions, 0))
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = self.run_block(block, x, At(tokens, positions, layer))
        return self.finish(self.last_norm(x))

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1], device=tokens.device)

    def embed(self, at: At) -> Tensor:
        embedded: Tensor = self.embedding(at.tokens)
        return embedded + self.place(at)

    def place(self, at: At) -> Tensor:
        """The positional embedding, [T, hidden] or [B, T, hidden]."""
        placed: Tensor = self.places(at.positions)
        return placed

    def run_block(self, block: Block, x: Tensor, at: At) -> Tensor:
        x = self.mix(x, at)
        x = x + self.attention(block, block.before_attention(x), at)
        return x + self.mlp(block, block.before_mlp(x))

    def mix(self, x: Tensor, at: At) -> Tensor:
        """What happens to the residual stream [B, T, hidden] ahead of a block; here nothing."""
        return x

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        query, key, value = self.project(block, x)
        out = self.attend(self.rotate(query, at), self.rotate(key, at), value, at)
        joined: Tensor = block.output(self.join(out))
        return joined

    def project(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, T, Dk], key [B, Hkv, T, Dk], value [B, Hkv, T, Dv]."""
        batch, length, _ = x.shape
        query = block.query(x).view(batch, length, self.heads, self.key_dim)
        key = block.key(x).view(batch, length, self.kv_heads, self.key_dim)
        value = block.value(x).view(batch, length, self.kv_heads, self.value_dim)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def rotate(self, x: Tensor, at: At) -> Tensor:
        """Turn queries or keys [B, H, T, Dk] by their positions; here not at all."""
        return x

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        """[B, H, T, Dv] out of the projected tensors."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def join(self, out: Tensor) -> Tensor:
        """[B, H, T, Dv] -> [B, T, H * Dv]."""
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        out: Tensor = block.down(F.gelu(block.up(x)))
        return out

    def finish(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits


class SpelledDecoder(Decoder):
    """Attention as matmul, scale, mask, softmax, matmul, with the steps apart."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return self.weigh(self.mask(self.score(query, key), at)) @ value

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.transpose(-2, -1) / math.sqrt(self.key_dim)

    def mask(self, scores: Tensor, at: At) -> Tensor:
        length = scores.shape[-1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(hidden, float("-inf"))

    def weigh(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, dim=-1)


class MaskedDecoder(Decoder):
    """Attention by SDPA under the boolean mask that `visible` builds."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.visible(at))

    def visible(self, at: At) -> Tensor:
        """True where a query (row) may read a key (column): [T, T] or [B, 1, T, T]."""
        raise NotImplementedError

    @staticmethod
    def distance(at: At) -> Tensor:
        """Query index - key index, int64 [T, T]."""
        index = torch.arange(at.tokens.shape[1], device=at.tokens.device)
        return index[:, None] - index[None, :]


class PositionedDecoder(Decoder):
    """A decoder whose positions are an input, int64 [B, T]."""

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.decode(tokens, position_ids)


class RotaryDecoder(Decoder):
    """Rotary positions, computed from the positions on the spot; no positional embedding."""

    key_dim: ClassVar[int] = 8
    frequencies: Tensor

    def setup(self) -> None:
        self.register_buffer("frequencies", 1.0 / 20 ** (torch.arange(0, 8, 2) / 8))

    def embed(self, at: At) -> Tensor:
        embedded: Tensor = self.embedding(at.tokens)
        return embedded

    def angles(self, at: At) -> Tensor:
        """[T, Dk/2] or [B, 1, T, Dk/2]."""
        angles = at.positions[..., None].to(self.frequencies.dtype) * self.frequencies
        return angles if angles.dim() == 2 else angles[:, None]

    def rotate(self, x: Tensor, at: At) -> Tensor:
        angles = self.angles(at)
        return self.turn(x, angles.cos(), angles.sin())

    @staticmethod
    def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Rotate the halves of x [..., T, Dk] by cos and sin [..., T, Dk/2]."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
