"""Muon pushes singular values towards one and wants a gradient."""

from __future__ import annotations

import pytest
import torch

from memcompile.models.networks.optimizer import Muon, orthogonalize


def test_orthogonalize_flattens_the_spectrum() -> None:
    matrices = torch.randn(4, 24, 64)
    for given in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(given).float())
        assert 0.5 < float(values.min()) <= float(values.max()) < 1.5


def test_muon_without_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"needs a gradient; call backward first"):
        Muon([torch.zeros(2, 3, requires_grad=True)], 0.1).step()
