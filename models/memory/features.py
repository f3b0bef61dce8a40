"""Feature maps of a state: what queries and keys pass through, so that a product can be summed.

A map takes [..., r], the learned projection of queries or keys, to [..., m] features. It is a plain
function of tensors: it is traced into the step graph, where Inductor prints it with what is around
it, in C++ or Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .names import known


@dataclass(frozen=True)
class FeatureMap:
    """A map with what must be known of it.

    Attributes:
        apply: [..., r] -> [..., width * r].
        positive: whether every feature is >= 0, which a normalised read needs.
        width: features for each projected element.
    """

    apply: Callable[[Tensor], Tensor]
    positive: bool
    width: int = 1


def _elu(x: Tensor) -> Tensor:
    """elu(x) + 1 (2006.16236)."""
    return torch.nn.functional.elu(x) + 1


def _softmax(x: Tensor) -> Tensor:
    """softmax of x and of -x, side by side (Hedgehog, 2402.04347)."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "softmax": FeatureMap(_softmax, positive=True, width=2),
    "elu": FeatureMap(_elu, positive=True),
    "relu": FeatureMap(torch.relu, positive=True),
    "identity": FeatureMap(lambda x: x, positive=False),
}
_BUILT_IN = frozenset(FEATURE_MAPS)


def feature_map(name: str) -> FeatureMap:
    """The map called `name`.

    Raises:
        ValueError: there is none; the known ones are listed.
    """
    try:
        known("feature map", name, FEATURE_MAPS)
    except ValueError as error:
        raise ValueError(f"{error}; register_feature_map adds one") from None
    return FEATURE_MAPS[name]


def register_feature_map(
    name: str, apply: Callable[[Tensor], Tensor], *, positive: bool = False
) -> None:
    """Make `apply` known as a feature map, for this process.

    Args:
        apply: [..., r] -> [..., width * r], each row by itself, in operations that torch can trace.
        positive: its features are never negative: a normalised read may use it.

    Raises:
        ValueError: the name is a built-in's, or `apply` does not do what a feature map does; what
            it did is said.
    """
    if name in _BUILT_IN:
        raise ValueError(f"feature map {name!r} is built in; give another name")
    from torch.fx.experimental.proxy_tensor import make_fx

    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, 5, 16, generator=generator)
    try:
        made = make_fx(apply, tracing_mode="symbolic")(probe)(probe)
    except Exception as error:  # the function is the user's own
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"feature map {name!r} cannot be traced: {text}") from error
    if not isinstance(made, Tensor) or made.shape[:2] != (3, 5) or made.dim() != 3:
        found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"feature map {name!r} made {found} of (3, 5, 16); expected (3, 5, m)")
    if made.shape[2] % 16:
        raise ValueError(
            f"feature map {name!r} makes {made.shape[2]} features of 16; expected a multiple of 16"
        )
    alone = torch.stack([apply(row[None])[0] for row in probe.flatten(0, 1)]).view_as(made)
    if not torch.allclose(alone, made):
        raise ValueError(
            f"feature map {name!r} mixes rows: what it makes of a row depends on the others"
        )
    if positive and bool((made < 0).any()):
        raise ValueError(f"feature map {name!r} is given as positive, but made {float(made.min())}")
    FEATURE_MAPS[name] = FeatureMap(apply, positive, made.shape[2] // 16)
