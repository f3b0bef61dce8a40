"""Step graphs: which sites there are, what the graph becomes, and that it runs in steps."""

from __future__ import annotations

import pytest
import torch
from normal_form import Forward, heads, lowered
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from memcompile.compiler.pipeline import build
from memcompile.passes.classify_tokens import classify_tokens
from memcompile.passes.find_sites import find_sites
from memcompile.passes.fold_attention import fold_attention
from memcompile.passes.remember import decline_step
from memcompile.passes.result import MaskRule, NotRewritten


def attend(mask, **options):
    def body(m, x):
        q, k = heads(m.project(x)), heads(x)
        out = scaled_dot_product_attention(q, k, k, attn_mask=mask(m, x), **options)
        return out.transpose(1, 2).flatten(2)

    return body


def causal(m, x):
    t = torch.arange(x.shape[1])
    return t <= t[:, None]


def window(m, x):
    t = torch.arange(x.shape[1])
    distance = t[:, None] - t
    return (distance >= 0) & (distance < 5)


def found(body):
    module = lowered(body)
    fold_attention(module)
    return find_sites(module, classify_tokens(module))


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (causal, MaskRule("causal")),
        (window, MaskRule("window", 5)),
        (lambda m, x: m.tril[: x.shape[1], : x.shape[1]].log(), MaskRule("causal")),
    ],
)
def test_sites_carry_their_rule(mask, rule):
    (site,), declined = found(attend(mask, scale=0.5))
    assert not declined
    assert (site.rule, site.heads, site.kv_heads, site.key_dim) == (rule, 2, 2, 8)
    assert (site.scale, site.softcap, site.group) == (0.5, 0.0, 1)
    assert site.dense_bytes(100) == (5 if rule.window else 100) * 2 * 16 * 4


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda m, x: None, "not causal"),
        (lambda m, x: causal(m, x) | (torch.arange(x.shape[1]) < 3), "not understood"),
        (lambda m, x: causal(m, x).float() * 2, "adds 2"),
        (lambda m, x: x[:, :, 0] > 0, "not understood"),
        (lambda m, x: m.table[:1, :1] > 0, "not understood"),
    ],
)
def test_masks_that_are_not_understood(mask, reason):
    def body(m, x):
        given = mask(m, x)
        given = (
            given[:, None, None] if given is not None and given.shape[0] == x.shape[0] else given
        )
        return attend(lambda m, x: given)(m, x)

    sites, (declined,) = found(body)
    assert not sites
    assert reason in declined.reason
    assert declined.rule == "find_sites"
    assert declined.source.endswith(".py:29")


def test_the_output_must_be_logits_of_every_token():
    module = lowered(lambda m, x: x.flatten(0, 1))
    (declined,) = decline_step(module, classify_tokens(module))
    assert "expected logits" in declined.reason


def positioned(m, x):
    return attend(causal)(m, x + m.table[: x.shape[1]])


@pytest.mark.parametrize("read", ["dense", "policy"])
def test_step_graph_text(read, golden):
    options = {"page_size": 8, "budget": 32, "sinks": 8, "window": 8, "dense_layers": 0}
    program = build(Forward(positioned), "scout", check=False, **options).program
    golden(f"step_{read}.txt", getattr(program, read).code.strip() + "\n")


def test_dead_mask_code_is_gone():
    program = build(Forward(attend(causal)), "dense").program
    kept = [str(node.target) for node in program.dense.graph.nodes]
    assert not any("aten.le" in name or "aten.arange" in name for name in kept)


def test_weights_are_shared_not_copied():
    model = Forward(positioned)
    program = build(model, "scout", check=False).program
    pointers = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in program.policy.parameters()} <= pointers


def test_self_check_catches_a_wrong_derivation(monkeypatch):
    """The second line of defence: leave out the shift of a table, as a naive rewrite would."""
    from memcompile.passes import remember as module

    monkeypatch.setattr(module._Builder, "_positions", lambda self: self._iota(), raising=True)
    with pytest.raises(NotRewritten, match="the derived step does not reproduce the forward"):
        build(Forward(positioned), "dense")
    build(Forward(positioned), "dense", check=False)


def test_self_check_catches_a_forward_that_is_not_its_own_prefix():
    class OneRow(nn.Module):
        """torch.export assumes at least two rows, so only the check sees this branch."""

        def __init__(self):
            super().__init__()
            self.inner = Forward(positioned)

        def forward(self, tokens):
            scale = 2.0 if tokens.shape[0] == 1 else 1.0
            return self.inner(tokens) * scale

    with pytest.raises(NotRewritten, match=r"batch 1 in policy calls of"):
        build(OneRow().eval(), "dense")

    class OneToken(OneRow):
        def forward(self, tokens):
            scale = 2.0 if tokens.shape[1] == 1 else 1.0
            return self.inner(tokens) * scale

    with pytest.raises(NotRewritten, match="not the prefix of the forward"):
        build(OneToken().eval(), "dense")
