"""Hybrid: some layers keep a state of fixed size beside an exact window, the others their pages.

What a state is stands in `state.py`. Its weights are fitted to the attention it stands for by
`memcompile distill`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from .features import feature_map
from .names import whole
from .policy import Policy, numbered
from .spec import Memory, Pages, State, Window


@dataclass(frozen=True)
class Hybrid(Policy):
    """Preset `hybrid`: named layers become a state with a window, the rest follows `rest`.

    Attributes:
        state_layers: layers that become states; None: every second one, from the second on.
        rest: policy of the other layers, as a command line writes it: "dense",
            "scout:budget=1024".
        window: tokens that a state layer reads exactly.
        page_size: tokens a page of a state layer's window.
        decay, write, feature_map, features: see `State`.
        normalised: one softmax with the window; None: wherever the write is additive.
    """

    preset: ClassVar[str] = "hybrid"
    state_layers: tuple[int, ...] | None = None
    rest: str = "dense"
    window: int = 64
    page_size: int = 64
    decay: str = "none"
    write: str = "additive"
    feature_map: str = "softmax"
    features: int | None = None
    normalised: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.state_layers, list):  # as JSON and command lines have it
            object.__setattr__(self, "state_layers", tuple(self.state_layers))
        if self.state_layers is not None:
            if not isinstance(self.state_layers, tuple) or not self.state_layers:
                raise ValueError(
                    f"state_layers must name layers, got {self.state_layers!r}; None takes every "
                    "second one"
                )
            for layer in self.state_layers:
                whole("state_layers", layer, 0)
        self.state_memory()
        self._rest()

    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the site at `layer` whose own sliding window is `window` (0 = none)."""
        chosen = layer % 2 == 1 if self.state_layers is None else layer in self.state_layers
        return self.state_memory() if chosen and not window else self._rest().memory(layer, window)

    def state_memory(self) -> Memory:
        """The memory of a layer that becomes a state."""
        normalised = self.normalised
        if normalised is None:
            normalised = self.write == "additive" and feature_map(self.feature_map).positive
        return Memory(
            name="hybrid",
            pages=Pages(self.page_size),
            window=Window(self.window),
            state=State(self.decay, self.write, self.feature_map, self.features, normalised),
        )

    def for_layers(self, names: Sequence[str]) -> Self:
        numbered(self.state_layers or (), names)
        return self

    def _rest(self) -> Policy:
        from . import parse_policy

        rest = parse_policy(self.rest.replace(";", ","))
        if isinstance(rest, Hybrid):
            raise ValueError(f"rest={self.rest!r} is the policy of layers without a state")
        return rest
