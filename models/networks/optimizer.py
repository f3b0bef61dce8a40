"""Muon: momentum made orthogonal, for the matrices of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is replaced by its nearest orthogonal matrix.

    The orthogonal factor comes from five steps of a quintic Newton-Schulz iteration (Jordan et
    al., "Muon", 2024). Matrices of one shape are worked on together.
    """

    def __init__(self, parameters: Iterable[Tensor], rate: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), matrices in shapes.items():
                updates = []
                for matrix in matrices:
                    if matrix.grad is None:
                        raise RuntimeError("Muon.step needs a gradient; call backward first.")
                    state = self.state[matrix]
                    if not state:
                        state["momentum"] = torch.zeros_like(matrix)
                    state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(state["momentum"], group["momentum"]))
                scale = -group["lr"] * math.sqrt(max(1.0, rows / columns))
                directions = orthogonalize(torch.stack(updates))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.add_(direction.to(matrix.dtype), alpha=scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push every singular value of matrices [N, r, c] near 1; computed in bfloat16."""
    x: Tensor = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x
