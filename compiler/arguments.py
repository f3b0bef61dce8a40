"""Words of the command line as values: policies with their options, numbers, token ids."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Known to every policy, beside the fields of its own.
BUILD_OPTIONS: dict[str, Any] = {"max_context": int | None}


class BadInput(Exception):
    """What the user gave cannot be used; the text is the one line to print."""


def policy_options(
    policy: str, settings: Iterable[str], *, budget: int | None, max_context: int | None
) -> dict[str, Any]:
    """The options of `build` that the command line gave, with the types of the policy's fields.

    Raises:
        BadInput: unknown policy or field, a value of another type, or a field given twice.
    """
    from ..models.memory import PRESETS, parse_value, preset
    from .policy_file import is_file, read_policy

    held = read_policy(Path(policy)) if is_file(policy) else None
    kind = policy if held is None else held.preset
    if kind not in PRESETS:
        raise BadInput(f"unknown policy {policy!r}{nearest(policy, PRESETS)}")
    types = {**typing.get_type_hints(PRESETS[kind]), **BUILD_OPTIONS}
    own = [field.name for field in dataclasses.fields(PRESETS[kind])]  # type: ignore[arg-type]
    known = [*own, *BUILD_OPTIONS]
    options: dict[str, Any] = {}
    given = [*settings]
    given += [f"budget={budget}"] if budget is not None else []
    given += [f"max_context={max_context}"] if max_context is not None else []
    for setting in given:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise BadInput(f"--set {setting!r}: expected FIELD=VALUE, as in --set page_size=32")
        if name not in known:
            raise BadInput(f"policy {policy!r} has no option {name!r}{nearest(name, known)}")
        if name in options:
            raise BadInput(f"option {name!r} is given twice")
        try:
            options[name] = parse_value(name, text.strip(), types[name])
        except ValueError as error:
            raise BadInput(str(error)) from None
    # A value out of range is refused here, before the model is read.
    fields = {name: value for name, value in options.items() if name in own}
    if held is None:
        preset(kind, **fields)
    else:
        held.with_options(fields)
    return options


def split_spec(spec: str) -> tuple[str, list[str]]:
    """`scout:budget=512,page_size=32` -> the policy and its settings; the same with the path of a
    policy file."""
    from ..models.memory import split_policy
    from .policy_file import SUFFIX, is_file

    path, colon, fields = spec.strip().rpartition(f"{SUFFIX}:")
    if colon:
        return path + SUFFIX, split_policy(f":{fields}")[1]
    return (spec.strip(), []) if is_file(spec.strip()) else split_policy(spec)


def parse_policies(specs: Iterable[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """`scout:budget=512,dense_layers=0` -> its name in figures, the policy and its options.

    Raises:
        BadInput: unknown policy or field, a value of another type, or a policy given twice.
    """
    from .policy_file import policy_name

    chosen: dict[str, tuple[str, dict[str, Any]]] = {}
    for spec in specs:
        policy, settings = split_spec(spec)
        options = policy_options(policy, settings, budget=None, max_context=None)
        if "max_context" in options:
            raise BadInput(f"--policy {spec!r}: give --max-context, which holds for all policies")
        values = ",".join(f"{name}={_spelled(value)}" for name, value in sorted(options.items()))
        name = policy_name(policy)
        name = f"{name}:{values}" if values else name
        if name in chosen:
            raise BadInput(f"policy {name!r} is given twice")
        chosen[name] = (policy, options)
    return chosen


def _spelled(value: Any) -> str:
    """A value as `parse_value` reads it."""
    if isinstance(value, dict):
        return "+".join(f"{name}={policy}" for name, policy in value.items())
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def parse_numbers(flag: str, text: str, kind: type[Any]) -> tuple[Any, ...]:
    """Numbers with commas between."""
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError:
        spelled = {int: "whole numbers", float: "numbers"}[kind]
        raise BadInput(f"{flag}: expected {spelled} with commas between, got {text!r}") from None


def parse_ids(text: str) -> list[int]:
    """Token ids separated by white space or commas."""
    words = text.replace(",", " ").split()
    wrong = next((word for word in words if not word.isdecimal()), None)
    if wrong is not None:
        raise BadInput(f"--ids: expected whole numbers, found {wrong!r}")
    tokens = [int(word) for word in words]
    if tokens and max(tokens) >= 1 << 63:
        raise BadInput(f"--ids: no model has a token {max(tokens)}")
    return tokens


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, and all of them."""
    names = list(known)
    close = closest(name, names)
    guess = f"did you mean {close!r}? " if close is not None else ""
    return f"; {guess}known: {', '.join(names)}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a wrong one was meant to be; letters' case aside."""
    names = {known_name.lower(): known_name for known_name in known}
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return names[close[0]] if close else None


def nearest_path(path: Path) -> str:
    """The end of a message about a path with nothing there: the folder on the way that is missing,
    or the closest name in its folder; empty if there is none."""
    parent = path.parent
    if not parent.is_dir():
        missing = next(p for p in (parent, *parent.parents) if p.parent.is_dir() or p == p.parent)
        return f" (its folder {missing} is not there)"
    try:
        close = closest(path.name, (entry.name for entry in parent.iterdir()))
    except OSError:
        return ""
    return f" (did you mean {parent / close}?)" if close is not None else ""
