"""Policies and values as a command line writes them: `scout:budget=512,dense_layers=0`."""

from __future__ import annotations

import collections.abc
import re
import typing
from types import NoneType
from typing import Any

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# A policy may have tuples of its own: only a + before another LAYER= ends it.
_BETWEEN_LAYERS = re.compile(r"\+(?=[^=+;:,]+=)")
_SPELLED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "none",
    tuple: "whole numbers with + between",
    collections.abc.Mapping: "LAYER=POLICY with + between",
}


def split_policy(text: str) -> tuple[str, list[str]]:
    """`scout:budget=512,dense_layers=0` -> its name and its settings."""
    name, _, fields = text.strip().partition(":")
    return name, [s.strip() for s in fields.split(",") if s.strip()]


def parse_value(name: str, text: str, kind: Any) -> Any:
    """`text` as a value of `kind`: a type or a union of types. None is written `none`, a tuple
    `1+3+5`, a mapping of layers `0=dense+3=scout:budget=512;window=64`.

    Raises:
        ValueError: it is none of them; what was expected is said.
    """
    kinds = (kind,) if typing.get_origin(kind) in (tuple, collections.abc.Mapping) else None
    kinds = kinds or typing.get_args(kind) or (kind,)
    origins = [typing.get_origin(k) or k for k in kinds]
    if NoneType in origins and text.lower() == "none":
        return None
    if bool in origins and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        if number in origins:
            try:
                return number(text)
            except ValueError:
                continue
    if tuple in origins:
        try:
            return tuple(int(word) for word in text.split("+"))
        except ValueError:
            pass
    if collections.abc.Mapping in origins:
        pairs = [part.partition("=") for part in _BETWEEN_LAYERS.split(text)]
        if all(equals for _, equals, _ in pairs):
            return {key.strip(): value.strip() for key, _, value in pairs}
    if str in origins or Any in origins:
        return text
    expected = " or ".join(_SPELLED.get(k, str(k)) for k in origins)
    raise ValueError(f"option {name!r}: expected {expected}, got {text!r}")
