"""`memcompile inspect`: what each policy would make of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memcompile.models.memory import PRESETS


def test_inspect_shows_what_each_policy_would_do(say: Any, network: Path) -> None:
    said = say("inspect", network)
    assert said.code == 0
    for part in ("4/2×64", "causal", "dense", "scout"):
        assert part in said.out
    reports = json.loads(say("inspect", network, "--json").out)
    # A mixture of nothing is no policy of its own.
    assert {*reports} == PRESETS.keys() - {"mixture"}
    for name in reports:
        assert f"policy {name}: " in said.out
    assert not list(Path.cwd().iterdir())
