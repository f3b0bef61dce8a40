"""Every spelling of attention becomes one node with the right operands; look-alikes are left."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from normal_form import Forward, heads, lowered, targets
from tolerance import assert_close_to_float64

from memcompile.compiler.capture import capture
from memcompile.passes.fold_attention import fold_attention
from memcompile.passes.strip_asserts import strip_asserts
from memcompile.passes.unlift import unlift
from memcompile.passes.verify import verify

ATTENTION = "memcompile.attention.default"


def causal(x):
    t = x.shape[1]
    return torch.ones(t, t, dtype=torch.bool, device=x.device).tril()


def finish(out):
    return out.transpose(1, 2).flatten(2)


def sdpa(m, x):
    return finish(
        F.scaled_dot_product_attention(
            heads(x), heads(m.project(x)), heads(x), is_causal=True, scale=0.3
        )
    )


def sdpa_without_heads(m, x):
    return F.scaled_dot_product_attention(x, m.project(x), x, attn_mask=causal(x))


def spelled(m, x):
    q, k, v = heads(x), heads(m.project(x)), heads(x)
    s = (q @ k.transpose(-1, -2)) / math.sqrt(8)
    return finish(s.masked_fill(~causal(x), float("-inf")).softmax(-1) @ v)


def scale_after_mask(m, x):
    q, k, v = heads(x), heads(m.project(x)), heads(x)
    mask = torch.where(causal(x), 0.0, -1e9)
    return finish(((q @ k.mT + mask) * 0.25).softmax(-1) @ v)


def where_fill(m, x):
    q, k, v = heads(x), heads(m.project(x)), heads(x)
    s = torch.where(causal(x), q @ k.mT, torch.finfo(x.dtype).min)
    return finish(F.dropout(s.softmax(-1), 0.5, training=False) @ v)


def soft_cap(m, x):
    q, k, v = heads(x), heads(m.project(x)), heads(x)
    s = 3 * torch.tanh(q @ k.mT * 0.4 / 3)
    return finish(s.masked_fill(~causal(x), float("-inf")).softmax(-1) @ v)


def two_masks(m, x):
    q, k, v = heads(x), heads(m.project(x)), heads(x)
    t = torch.arange(x.shape[1])
    near = torch.where(t[:, None] - t < 4, 0.0, float("-inf"))
    s = (q @ k.mT).masked_fill(~causal(x), float("-inf")) + near
    return finish(s.softmax(-1) @ v)


def einsum(m, x):
    q, k, v = (y.unflatten(-1, (2, 8)) for y in (x, m.project(x), x))
    s = torch.einsum("bihd,bjhd->bhij", q, k).masked_fill(~causal(x), float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v).flatten(2)


def flattened_heads(m, x):
    b, t, _ = x.shape
    q, k, v = (heads(y).reshape(b * 2, t, 8) for y in (x, m.project(x), x))
    mask = torch.where(causal(x), 0.0, -1e9)
    s = torch.baddbmm(mask.to(x.dtype).expand(b * 2, t, t), q, k.transpose(1, 2), alpha=0.35)
    return finish(torch.bmm(s.softmax(-1), v).view(b, 2, t, 8))


def upcast_scores(m, x):
    """GPT-J: scores in float32 whatever the model's type, probabilities in the values' type."""
    q, k, v = heads(x).float(), heads(m.project(x)).float(), heads(x)
    s = (q @ k.mT).masked_fill(~causal(x), float("-inf"))
    return finish(s.softmax(-1).to(v.dtype) @ v)


SPELLINGS = [
    sdpa,
    sdpa_without_heads,
    spelled,
    scale_after_mask,
    where_fill,
    soft_cap,
    two_masks,
    einsum,
    flattened_heads,
]


@pytest.mark.parametrize("body", SPELLINGS, ids=lambda f: f.__name__)
def test_folds_and_keeps_the_values(body):
    module = lowered(body)
    result = fold_attention(module)
    verify(module, "fold_attention")
    assert (result.applied, result.declined) == (1, [])
    names = targets(module)
    assert names.count(ATTENTION) == 1
    assert not any("softmax" in n or "scaled_dot" in n for n in names)
    model, tokens = Forward(body), torch.randint(19, (3, 7))
    with torch.no_grad():
        eager, folded = model(tokens), module(tokens)
        truth = Forward(body).double()(tokens)
    assert_close_to_float64(folded, eager, truth, reduction=7 * 16)


def other_axis(m, x):
    return x.softmax(1)


def gate(m, x):
    return x.softmax(-1) * x


def double_cap(m, x):
    s = torch.tanh(torch.tanh(heads(x) @ heads(x).mT))
    return finish(s.softmax(-1) @ heads(x))


def summed_bias(m, x):
    return finish(
        (heads(x) @ heads(x).mT + m.table[: x.shape[1], :1]).softmax(-1).relu() @ heads(x)
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (other_axis, "another axis than the last"),
        (gate, "stands between the scores and the softmax"),
        (double_cap, "two soft caps"),
        (summed_bias, "not multiplied with values"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_look_alikes_are_declined_where_the_match_ended(body, reason):
    result = fold_attention(lowered(body))
    assert result.applied == 0
    assert [reason in d.reason for d in result.declined] == [True]
    assert result.declined[0].rule == "fold_attention"
    assert result.declined[0].node.startswith("%")


def test_half_precision_probabilities_of_float32_scores_fold():
    class Half(Forward):
        def forward(self, tokens):
            return self.body(self, self.embedding(tokens).bfloat16())

    model = Half(upcast_scores)
    model.project.bfloat16()
    module = strip_asserts(unlift(capture(model).program).graph).graph
    assert fold_attention(module).applied == 1
