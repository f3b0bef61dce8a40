"""Memories: their vocabulary, the presets a user names, and the references of their operations."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from .dense import Dense
from .parts import known
from .scout import Scout
from .spec import Memory


class Preset(Protocol):
    """A policy with a name: options in, one `Memory` a site out."""

    def memory(self, layer: int, window: int) -> Memory: ...

    def to_json(self) -> dict[str, Any]: ...


PRESETS: dict[str, type[Dense] | type[Scout]] = {"dense": Dense, "scout": Scout}


def preset(name: str, **options: Any) -> Dense | Scout:
    """The preset called `name` with `options` as its fields.

    Raises:
        ValueError: unknown name or option (the known ones are listed), or a value out of range.
    """
    known("policy", name, PRESETS)
    kind = PRESETS[name]
    names = [f.name for f in dataclasses.fields(kind)]
    for option in options:
        if option not in names:
            raise ValueError(f"policy {name!r} has no option {option!r}; known: {', '.join(names)}")
    return kind(**options)


def preset_from_json(data: dict[str, Any]) -> Dense | Scout:
    """Rebuilds a preset from its `to_json`.

    Raises:
        ValueError: no preset name in the data, or an unknown name or option.
    """
    if not isinstance(data, dict) or "preset" not in data:
        raise ValueError(f'a preset is {{"preset": name, ...}}, got {data!r}')
    return preset(data["preset"], **{k: v for k, v in data.items() if k != "preset"})
