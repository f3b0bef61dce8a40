"""From a module to an engine that runs: with nothing cached, and again with everything cached."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .registry import Column, Outcome, Settings
from .rules import Bar

POLICIES = ("dense", "scout")
CACHES = ("MEMCOMPILE_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
MOST_SECONDS = {"cold": 120.0, "warm": 30.0}
MAX_CONTEXT = 32768
PROMPT = 16


def child(policy: str, quick: bool, kernels: str) -> None:
    """What the other process does: prints the seconds of each step of it as JSON."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def done(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[name] = now - started
        started = now

    import torch

    from .. import compile as compile_model
    from .decode import LLAMA, SMALL, llama

    done("imports")
    model = llama(SMALL if quick else LLAMA)
    done("model")
    choice = "off" if kernels == "reference" else "required"
    engine = compile_model(model, policy, max_context=MAX_CONTEXT, kernels=choice)
    done("compile")
    tokens = torch.arange(PROMPT)[None]
    with torch.no_grad():
        engine.prefill(tokens)
        done("first prefill")
        engine(tokens[:, :1])
        done("first step")
    print(json.dumps(seconds))


def timed(policy: str, caches: Path, settings: Settings) -> dict[str, Any]:
    """One child's seconds, its compile split into stages.

    Raises:
        RuntimeError: the child failed; its last words are in the message.
    """
    code = (
        "from memcompile.benchmarks.compile_time import child\n"
        f"child({policy!r}, {settings.quick!r}, {settings.kernels!r})"
    )
    own = {name: str(caches / name.lower()) for name in CACHES}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **own, "MEMCOMPILE_DEBUG": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"compiling the {policy} engine failed:\n{run.stderr[-2000:]}")
    seconds: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    stages = stages_of(run.stderr)
    # The report is printed before the time of the capture is known.
    stages["capture and the rest"] = max(0.0, seconds["compile"] - sum(stages.values()))
    running = seconds["compile"] + seconds["first prefill"] + seconds["first step"]
    return {"seconds": running, "parts": seconds, "stages": stages}


def stages_of(report: str) -> dict[str, float]:
    """The seconds of each stage, from the line of a report that lists them; empty without one."""
    found = re.search(r"^\s*seconds: (.*)$", report, re.MULTILINE)
    if found is None:
        return {}
    pairs = (part.rpartition(" ") for part in found[1].split(", "))
    return {name: float(value) for name, _, value in pairs}


def run(settings: Settings) -> Outcome:
    rows: list[dict[str, Any]] = []
    for policy in POLICIES:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold", "warm"):
                rows.append({"policy": policy, "caches": name})
                rows[-1] |= timed(policy, Path(folder), settings)
    return Outcome(rows, COLUMNS, bars(rows, proven=not settings.quick), {"prompt": PROMPT})


def bars(rows: list[dict[str, Any]], proven: bool = True) -> list[Bar]:
    """What issue 3 asks of 32 layers; the small model proves nothing."""
    return [
        Bar(
            f"{row['policy']}, {row['caches']}: module to running engine, s",
            row["seconds"] if proven else None,
            MOST_SECONDS[row["caches"]],
            at_least=False,
        )
        for row in rows
    ]


def _stages(row: dict[str, Any]) -> str:
    return " · ".join(f"{name} {seconds:.1f}" for name, seconds in row["stages"].items())


COLUMNS = (
    Column("policy", lambda row: row["policy"]),
    Column("caches", lambda row: row["caches"]),
    Column("s", lambda row: f"{row['seconds']:.1f}"),
    Column("first prefill", lambda row: f"{row['parts']['first prefill']:.1f}"),
    Column("first step", lambda row: f"{row['parts']['first step']:.1f}"),
    Column("stages, s", _stages),
)
