"""In-place writes: a graph that reads only what a node returns loses what was written into it.

Every decoder here writes into a tensor through a view, or through a statement whose result nobody
keeps. Some are ordinary spellings, the others hide a trap behind the write.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import At, Decoder, MaskedDecoder, SpelledDecoder, causal


class ScoresMaskedInPlace(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        scores.masked_fill_(~causal(at), float("-inf"))
        return scores


class ScoresScaledInPlace(SpelledDecoder):
    def score(self, query: Tensor, key: Tensor) -> Tensor:
        scores = query @ key.mT
        scores *= self.scale
        return scores


class MaskFilledInPlace(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        bias = torch.zeros(scores.shape[-2:], dtype=scores.dtype)
        bias.masked_fill_(~causal(at), float("-inf"))
        return scores + bias


class SinusoidsAssigned(Decoder):
    """The tutorial's table, made on the spot: zeros, then every other column written."""

    def setup(self) -> None:
        return

    def place(self, at: At) -> Tensor:
        dtype = self.head.weight.dtype
        table = torch.zeros(at.tokens.shape[1], self.hidden, dtype=dtype)
        angles = at.positions[:, None] * 0.6 ** torch.arange(self.hidden // 2)
        table[:, 0::2] = angles.sin().to(dtype)
        table[:, 1::2] = angles.cos().to(dtype)
        return table


class ChannelsScaledInPlace(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        x = x.clone()
        x[..., :10] *= 2.0
        return x


class PaddingZeroed(Decoder):
    """Token 0's stream is set to zero, each by itself."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        x = x.clone()
        x[at.tokens == 0] = 0.0
        return x


class RenormalisedEmbedding(Decoder):
    """max_norm: the look-up itself rescales rows of the table."""

    def setup(self) -> None:
        super().setup()
        self.renormed = nn.Embedding(self.vocabulary, self.hidden, max_norm=1.0)

    def embed(self, at: At) -> Tensor:
        renormed: Tensor = self.renormed(at.tokens)
        return super().embed(at) + renormed


class ShiftByAssignment(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        before = torch.zeros_like(x)
        before[:, 1:] = x[:, :-1]
        return x + before


class FirstTokenOverwritten(Decoder):
    """The first token of every call is marked."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        x = x.clone()
        x[:, 0] += 1.0
        return x


class LastTokenOverwritten(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        x = x.clone()
        x[:, -1] = 0.5
        return x


class MaskColumnCleared(MaskedDecoder):
    """A causal mask, and then nobody but itself may read token 2."""

    def visible(self, at: At) -> Tensor:
        visible = torch.ones(at.tokens.shape[1], at.tokens.shape[1], dtype=torch.bool).tril()
        visible[3:, 2:3] = False
        return visible


class MaskDilatedInPlace(SpelledDecoder):
    def mask(self, scores: Tensor, at: At) -> Tensor:
        keep = torch.ones(scores.shape[-2:]).tril()
        distance = at.positions[:, None] - at.positions[None, :]
        keep.masked_fill_(distance % 3 == 1, 0.0)
        return scores.masked_fill(keep == 0, float("-inf"))


class MaskOpenedInPlace(SpelledDecoder):
    """Hidden scores are put back by a second write."""

    def mask(self, scores: Tensor, at: At) -> Tensor:
        masked = scores.masked_fill(~causal(at), float("-inf"))
        distance = at.positions[:, None] - at.positions[None, :]
        masked.masked_fill_(distance == -1, 0.0)
        return masked


class PositionsEdited(Decoder):
    """Positions are counted, then those past five are moved on by three."""

    spare = 3

    def positions(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        positions[5:] += 3
        return positions


class PositionsEditedByValue(Decoder):
    """The same, told by the position itself."""

    spare = 3

    def positions(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        positions += 3 * (positions > 4)
        return positions


class KeysOverwritten(Decoder):
    """Keys are doubled through a view after they were made."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        key = key.contiguous()
        key.view(-1).mul_(2.0)
        return super().attend(query, key, value, at)


class SharedBufferWritten(Decoder):
    """A scratch buffer holds the stream from call to call: its old rows show through."""

    scratch: Tensor

    def setup(self) -> None:
        super().setup()
        self.register_buffer("scratch", torch.zeros(self.context, self.hidden))

    def mix(self, x: Tensor, at: At) -> Tensor:
        self.scratch[: x.shape[1]] += x.detach().mean(0)
        return x + self.scratch[: x.shape[1]]


class FunctionalDropout(Decoder):
    """F.dropout is on by default, whatever mode the module is in."""

    def mix(self, x: Tensor, at: At) -> Tensor:
        return F.dropout(x, 0.2)


class FunctionalDropoutOfWeights(SpelledDecoder):
    def weigh(self, scores: Tensor) -> Tensor:
        return F.dropout(torch.softmax(scores, dim=-1), 0.2)


class SdpaDropoutAlways(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, at: At) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.2, is_causal=True)


class RandomNoise(Decoder):
    def mix(self, x: Tensor, at: At) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class RandomTable(Decoder):
    """Dropout that is always on, over the table of positions."""

    def place(self, at: At) -> Tensor:
        return F.dropout(self.places.weight, 0.3)[at.positions]
