"""Mixture: a policy for each layer that is named, and one for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from .names import whole
from .policy import Policy, numbered
from .spec import Memory


@dataclass(frozen=True)
class Mixture(Policy):
    """Preset `mixture`: `layers` says which policy each layer has, `default` which the others.

    A policy is given as the command line writes it ("scout:budget=512"), as its JSON, or as an
    object.

    Attributes:
        layers: by the layer's number, or the name of its attention.
        default: policy of the layers that are not named.
    """

    preset: ClassVar[str] = "mixture"
    layers: Mapping[int | str, Any] = field(default_factory=dict)
    default: Any = "dense"

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise ValueError(
                f'layers maps layers to policies, as in {{0: "dense", 3: "scout:budget=512"}}, '
                f"got {self.layers!r}"
            )
        chosen: dict[int | str, Policy] = {}
        for given, policy in self.layers.items():
            # JSON writes numbers as text.
            layer = int(given) if isinstance(given, str) and given.isdecimal() else given
            if not isinstance(layer, str):
                whole("layers", layer, 0)
            if layer in chosen:
                raise ValueError(f"layer {layer!r} is given two policies")
            chosen[layer] = _policy(policy)
        object.__setattr__(self, "layers", chosen)
        object.__setattr__(self, "default", _policy(self.default))

    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the site at `layer` whose own sliding window is `window` (0 = none)."""
        chosen: Policy = self.layers.get(layer, self.default)
        return chosen.memory(layer, window)

    def for_layers(self, names: Sequence[str]) -> Self:
        at = numbered(self.layers, names)
        if len({*at.values()}) < len(at):
            twice = [layer for layer in at if [*at.values()].count(at[layer]) > 1]
            raise ValueError(f"{twice} name one layer by number and by name; give it one policy")
        layers: dict[int | str, Policy]
        layers = {at[layer]: policy.for_layers(names) for layer, policy in self.layers.items()}
        return replace(self, layers=layers, default=self.default.for_layers(names))

    def to_json(self) -> dict[str, Any]:
        layers = {str(layer): policy.to_json() for layer, policy in self.layers.items()}
        return {"preset": self.preset, "default": self.default.to_json(), "layers": layers}


def _policy(given: Any) -> Policy:
    from . import parse_policy, preset_from_json

    if isinstance(given, Policy):
        chosen = given
    else:
        chosen = (
            parse_policy(given.replace(";", ","))
            if isinstance(given, str)
            else preset_from_json(given)
        )
    if isinstance(chosen, Mixture):
        raise ValueError("a mixture is made of other policies, not of mixtures; name the layers")
    return chosen
