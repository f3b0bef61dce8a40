"""What every policy shares: its name, its JSON, and a check of the layers it names."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

from .spec import Memory


class Policy(ABC):
    """A policy with a name: fields in, one `Memory` a site out; subclasses are frozen dataclasses.

    `dense_layers`, where a policy has it, is the number of first layers that stay dense.
    """

    preset: ClassVar[str]

    @abstractmethod
    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the site at `layer` whose own sliding window is `window` (0 = none)."""

    def memory_at(self, layer: int, window: int) -> Memory:
        """`memory`, of which a reader may rely on what it gives.

        Raises:
            TypeError: a policy of a user's own gave something else.
        """
        memory = self.memory(layer, window)
        if not isinstance(memory, Memory):
            raise TypeError(
                f"policy {self.preset!r} gives the attention at layer {layer} "
                f"{type(memory).__name__}, {memory!r}; its memory() has to return a Memory"
            )
        return memory

    def for_layers(self, names: Sequence[str]) -> Self:
        """The policy for a model whose attentions have these names, in order.

        Raises:
            ValueError: it names a layer that is not there; those that are there are listed.
        """
        return self

    def to_json(self) -> dict[str, Any]:
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        plain = {k: [*v] if isinstance(v, tuple) else v for k, v in fields.items()}
        return {"preset": self.preset, **plain}


def numbered(layers: Iterable[int | str], names: Sequence[str]) -> dict[int | str, int]:
    """The number of each layer, which is given by number or by its attention's name.

    Raises:
        ValueError: there is none; the layers are listed.
    """
    found: dict[int | str, int] = {}
    for layer in layers:
        if isinstance(layer, str) and layer in names:
            found[layer] = names.index(layer)
        elif isinstance(layer, int) and layer < len(names):
            found[layer] = layer
        else:
            listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise ValueError(f"there is no layer {layer!r}; this model's are {listed}")
    return found
