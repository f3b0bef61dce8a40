"""Memories: their vocabulary, the presets a user names, and the references of their operations."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from .dense import Dense
from .features import register_feature_map
from .heavy_hitter import HeavyHitter
from .hierarchical import Hierarchical
from .hybrid import Hybrid
from .mixture import Mixture
from .names import known, nearest
from .policy import Policy
from .quest import Quest
from .scout import Scout
from .text import parse_value, split_policy
from .window import Recent

__all__ = [
    "PRESETS",
    "Dense",
    "HeavyHitter",
    "Hierarchical",
    "Hybrid",
    "Mixture",
    "Policy",
    "Preset",
    "Quest",
    "Recent",
    "Scout",
    "check_options",
    "parse_policy",
    "parse_value",
    "preset",
    "preset_from_json",
    "register_feature_map",
    "split_policy",
]

Preset = Policy

PRESETS: dict[str, type[Policy]] = {
    kind.preset: kind
    for kind in (Dense, Scout, Hierarchical, Hybrid, Recent, HeavyHitter, Quest, Mixture)
}


def preset(name: str, **options: Any) -> Policy:
    """The preset called `name` with `options` as its fields.

    Raises:
        ValueError: unknown name or option (the known ones are listed), or a value out of range.
    """
    check_options(name, options)
    return PRESETS[name](**options)


def check_options(name: str, options: Mapping[str, Any], beside: Iterable[str] = ()) -> None:
    """Refuses options that the preset called `name` does not have, and texts that are none.

    Args:
        beside: what else whoever was asked takes, for the message.

    Raises:
        ValueError: unknown name or option (the closest and all known ones are named), or a value
            that should be a text.
    """
    known("policy", name, PRESETS)
    kind = PRESETS[name]
    fields = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    types = typing.get_type_hints(kind)
    for option, value in options.items():
        if option not in fields:
            raise ValueError(
                f"policy {name!r} has no option {option!r}; {nearest(option, [*fields, *beside])}"
            )
        # Numbers are checked where their range is.
        if types[option] is str and not isinstance(value, str):
            raise ValueError(f"{option} must be a text, got {value!r}")


def preset_from_json(data: dict[str, Any]) -> Policy:
    """Rebuilds a preset from its `to_json`.

    Raises:
        ValueError: no preset name in the data, or an unknown name or option.
    """
    if not isinstance(data, dict) or "preset" not in data:
        raise ValueError(f'a preset is {{"preset": name, ...}}, got {data!r}')
    return preset(data["preset"], **{k: v for k, v in data.items() if k != "preset"})


def parse_policy(text: str) -> Policy:
    """A policy as the command line writes it: `scout`, `scout:budget=512,dense_layers=0`.

    A policy within a policy has `;` between its settings: `hybrid:rest=scout:budget=512;window=64`.

    Raises:
        ValueError: unknown name or option, or a value that cannot be read or is out of range.
    """
    name, settings = split_policy(text)
    known("policy", name, PRESETS)
    types = typing.get_type_hints(PRESETS[name])
    options: dict[str, Any] = {}
    for setting in settings:
        option, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ValueError(f"policy {text!r}: expected FIELD=VALUE, got {setting!r}")
        if option in options:
            raise ValueError(f"policy {text!r}: option {option!r} is given twice")
        options[option] = parse_value(option, value, types[option]) if option in types else value
    return preset(name, **options)
