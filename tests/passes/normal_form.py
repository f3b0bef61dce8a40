"""Shared by the pass tests: a function over tokens, captured and unlifted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from memcompile.compiler.capture import capture
from memcompile.passes.strip_asserts import strip_asserts
from memcompile.passes.unlift import unlift


class Forward(nn.Module):
    """Embeds tokens to [B, T, 16] and hands them, with the module for weights, to `body`."""

    def __init__(self, body: Callable[[Forward, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(19, 16)
        self.project = nn.Linear(16, 16)
        self.register_buffer("tril", torch.ones(32, 32).tril())
        self.table = nn.Parameter(torch.randn(32, 16))
        self.body = body
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self, self.embedding(tokens))


def lowered(body: Callable[[Forward, Tensor], Tensor]) -> fx.GraphModule:
    """The unlifted graph of `body`, assertions stripped."""
    return strip_asserts(unlift(capture(Forward(body)).program).graph).graph


def heads(x: Tensor, count: int = 2) -> Tensor:
    """[B, T, 16] -> [B, count, T, 16 / count]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def targets(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
