"""Attacks on the proof: each decoder once broke a rule; it is declined, or stepped rightly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from stepping import assert_logits, calls_of, random_tokens, stepped
from torch import Tensor, nn

from memcompile.compiler.pipeline import build
from memcompile.passes.result import NotRewritten

V, C, H, D = 32, 16, 2, 8
HIDDEN = float("-inf")


class Decoder(nn.Module):
    """One block of spelled-out causal attention with three places to attack."""

    def __init__(self, mask=None, before=None, attend=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Embedding(V, C), nn.Embedding(512, C)
        self.qkv, self.out, self.head = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, V)
        self.register_buffer("tril", torch.ones(130, 130, dtype=torch.bool).tril())
        self.mask: Callable = mask or (lambda m, s: s.masked_fill(distance(s) < 0, HIDDEN))
        self.before: Callable = before or (lambda m, x, t: x)
        self.attend: Callable = attend or self.softmax_attention
        with torch.no_grad():
            self.qkv.weight.mul_(4)

    def softmax_attention(self, _: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.mask(self, q @ k.mT / math.sqrt(D)).softmax(-1) @ v

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = self.before(self, x, tokens)
        q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).split(C, -1))
        x = x + self.out(self.attend(self, q, k, v).transpose(1, 2).flatten(2))
        return self.head(x)


def iota(x: Tensor, **options) -> Tensor:
    """Positions of the last axis."""
    return torch.arange(x.shape[-1], **options)


def distance(scores: Tensor) -> Tensor:
    return iota(scores)[:, None] - iota(scores)


def ones(scores: Tensor, dtype=torch.float32) -> Tensor:
    return torch.ones(scores.shape[-1], scores.shape[-1], dtype=dtype)


def causal(scores: Tensor) -> Tensor:
    return scores.masked_fill(distance(scores) < 0, HIDDEN)


def compare(scores: Tensor, of: Callable[[Tensor], Tensor], **options) -> Tensor:
    at = of(iota(scores, **options))
    return scores.masked_fill(at[:, None] < at, HIDDEN)


def looked_up(scores: Tensor) -> Tensor:
    at = iota(scores)
    return scores.masked_fill(at[at - 1] >= at[:, None], -1e9)


# Masks that hide less, or more, than a careless reading of their code says.
MASKS = {
    "a boolean added is a bias of one": lambda m, s: s + ones(s, torch.bool).tril(),
    "filled with zero, not hidden": lambda m, s: causal(s.masked_fill(distance(s) >= 4, 0.0)),
    "replaced by zero, not hidden": lambda m, s: causal(torch.where(distance(s) < 4, s, 0.0)),
    "scores rounded to integers": lambda m, s: causal(s.to(torch.int32).float()),
    "scores rounded to eight bits": lambda m, s: causal(s.to(torch.float8_e4m3fn).float()),
    "scores cut off by a half": lambda m, s: causal((s * 1e4).half().float() * 1e-4),
    "a soft cap of zero": lambda m, s: causal(s.tanh() * 0),
    "dropout left on": lambda m, s: causal(F.dropout(s, 0.5, training=True)),
    "a distance that wraps around": lambda m, s: s.masked_fill(
        distance(s).to(torch.uint8) < 0, HIDDEN
    ),
    "positions in bfloat16": lambda m, s: compare(s, lambda at: at, dtype=torch.bfloat16),
    "positions lost in a large number": lambda m, s: compare(s, lambda at: at.float() + 1e30),
    "positions that overflow": lambda m, s: compare(s, lambda at: at * 2**62),
    "fractions that round": lambda m, s: s.masked_fill(
        iota(s)[:, None] * 0.1 + 0.3 < iota(s) * 0.1, HIDDEN
    ),
    "an index from the end": lambda m, s: looked_up(s),
    "an 8-bit product that wraps": lambda m, s: (
        s + ones(s, torch.int8).triu(1) * torch.tensor(-10000)
    ),
    "a multiple in rsub": lambda m, s: s.masked_fill(
        torch.rsub(iota(s)[:, None], 0, alpha=2) + iota(s) > 0, -1e9
    ),
    "bits read as another type": lambda m, s: (
        s + (ones(s, torch.int32).triu(1) * -20000).view(torch.float32).nan_to_num(0)
    ),
    "a buffer cut from its second column": lambda m, s: s.masked_fill(
        ~m.tril[: s.shape[-1], 1 : s.shape[-1] + 1], -1e9
    ),
}

# Operations that look at other tokens, or at the length.
MIXING = {
    "membership among the tokens": lambda m, x, t: x + torch.isin(t, t * 2)[..., None].float(),
    "odd lengths": lambda m, x, t: x * 2 if t.shape[1] % 2 else x,
    "one length": lambda m, x, t: x * 2 if t.shape[1] != 7 else x,
    "square batches": lambda m, x, t: x * 2 if t.shape[1] == t.shape[0] else x,
    "small batches": lambda m, x, t: x * 2 if t.numel() > 12 else x,
    "positions of row and token": lambda m, x, t: (
        x
        + (torch.arange(t.shape[0])[:, None] * 7 + iota(t))[
            torch.arange(t.shape[0])[:, None], iota(t)[None]
        ][..., None]
    ),
}


def heads_by_mask(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of scores, spread over two by the mask."""
    hidden = torch.where(distance(q @ k.mT) < 0, HIDDEN, 0.0).expand(1, H, -1, -1)
    return (q[:, :1] @ k[:, :1].mT + hidden).softmax(-1) @ v[:, :1]


def coarse_probabilities(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q @ k.mT).softmax(-1).to(torch.float8_e4m3fn).float() @ v


def three_factors(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(torch.einsum("bhid,bhjd,d->bhij", q, k, m.out.bias[:D])).softmax(-1) @ v


REFUSED = {
    **{name: {"mask": mask} for name, mask in MASKS.items()},
    **{name: {"before": before} for name, before in MIXING.items()},
    "heads made by a mask": {"attend": heads_by_mask},
    "probabilities in eight bits": {"attend": coarse_probabilities},
    "scores of three factors": {"attend": three_factors},
}


@pytest.mark.parametrize("name", REFUSED)
def test_attacks_are_declined(name):
    with pytest.raises(NotRewritten) as refused:
        build(Decoder(**REFUSED[name]).eval(), "dense", page_size=16, check=False)
    assert refused.value.declined


def window(scores: Tensor, before: Callable[[Tensor], Tensor]) -> Tensor:
    return causal(before(scores).masked_fill(distance(scores) >= 4, -1e4))


# What the same rules must go on accepting.
RIGHT = {
    "a fill replaces what was added": {
        "mask": lambda m, s: window(s, lambda y: y + 1e4 * (distance(s) >= 4))
    },
    "a fill under a where": {
        "mask": lambda m, s: torch.where(
            distance(s) >= 0,
            s.masked_fill(distance(s) >= 4, -1e9),
            torch.finfo(s.dtype).min,
        )
    },
    "a scale that a cast cuts off": {
        "mask": lambda m, s: causal(s * torch.tensor(1.7).to(torch.int64))
    },
    "a buffer shifted to causal": {
        "mask": lambda m, s: s.masked_fill(
            ~m.tril[3 : s.shape[-1] + 3, 3 : s.shape[-1] + 3], HIDDEN
        )
    },
    "membership among constants": {
        "before": lambda m, x, t: x + torch.isin(t, torch.tensor([3, 4, 5]))[..., None].float()
    },
    "a squeeze of all axes": {
        "before": lambda m, x, t: x + x.mean(-1, keepdim=True).squeeze().unsqueeze(-1)
    },
    "a squeeze of the token axis": {"before": lambda m, x, t: x.squeeze(1) * 2},
    "an operation with two results": {
        "before": lambda m, x, t: x + torch.frexp(iota(t).float())[0][:, None]
    },
    "swapaxes": {"before": lambda m, x, t: x.swapaxes(0, 1).sin().swapaxes(0, 1)},
    "a softmax of a number": {"before": lambda m, x, t: x * m.out.weight[0, 0].softmax(0)},
    "a lookup by row": {
        "before": lambda m, x, t: (
            x + torch.arange(t.shape[0])[torch.arange(t.shape[0])][:, None, None]
        )
    },
    "lengths up to a bound": {"before": lambda m, x, t: x * 2 if t.shape[1] < 50 else x},
}


@pytest.mark.parametrize("name", RIGHT)
def test_near_misses_still_step(name):
    model = Decoder(**RIGHT[name]).eval()
    compiled = build(model, "dense", page_size=16, check=False)
    for batch, calls in ((3, calls_of(23, 1)), (2, calls_of(23, 7, 1, 5)), (1, [9, 14])):
        tokens = random_tokens(V, batch, 23)
        assert_logits(model, stepped(compiled.engine(), tokens, calls), tokens)
