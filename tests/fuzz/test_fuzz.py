"""No command line and no file makes memcompile crash, hang, leave half a result or run code.

Replay what failed with ``MEMCOMPILE_FUZZ_REPLAY="line 17,archive 203" make fuzz``.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CASES = int(os.environ.get("MEMCOMPILE_FUZZ_CASES", "10000"))
SECONDS = float(os.environ.get("MEMCOMPILE_FUZZ_SECONDS", "3000"))
SEED = int(os.environ.get("MEMCOMPILE_FUZZ_SEED", "0"))
REPLAY = os.environ.get("MEMCOMPILE_FUZZ_REPLAY", "")
# A case takes a tenth of a second; on a loaded machine more.
_PATIENCE = 60.0
SHARES = {
    "line": 0.40,
    "archive": 0.24,
    "transformers": 0.10,
    "safetensors": 0.08,
    "package": 0.10,
    "policy file": 0.05,
    "pickle": 0.03,
}


class Worker:
    """A `fuzz_worker`, started anew when a case has killed or stopped it."""

    def __init__(self, zoo: Path, seed: int) -> None:
        self.zoo, self.seed = zoo, seed
        self.process: subprocess.Popen[str] | None = None

    def ask(self, kind: str, index: int) -> dict[str, Any]:
        """What the case did; `wrong` says so too if it hung or took the process with it."""
        process = self.process or self.start()
        assert process.stdin is not None
        process.stdin.write(f"{kind} {index}\n")
        process.stdin.flush()
        answer = self.read(process, _PATIENCE)
        if answer:
            outcome: dict[str, Any] = json.loads(answer)
            return outcome
        hangs = answer is None
        wrong = f"hangs: {_PATIENCE:.0f} s" if hangs else "the process died"
        self.stop()
        return {"kind": kind, "index": index, "arguments": [], "code": -1, "wrong": [wrong]}

    def start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fuzz_worker.py"), str(self.zoo), str(self.seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.read(self.process, 300) == "ready\n", "the worker did not start"
        return self.process

    def read(self, process: subprocess.Popen[str], seconds: float) -> str | None:
        """The next line, "" if the process ended, None if there is nothing in time."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the worker keeps the clean inputs; it makes them when it first starts."""
    return tmp_path_factory.mktemp("fuzz") / "zoo"


@pytest.fixture(scope="module")
def worker(zoo: Path) -> Iterator[Worker]:
    worker = Worker(zoo, SEED)
    yield worker
    worker.stop()


def spread(cases: int) -> list[tuple[str, int]]:
    """Cases of every kind by their shares, in turn, so that a time limit cuts all alike."""
    found = []
    for kind, share in SHARES.items():
        count = round(cases * share)
        found += [((index + 0.5) / count, kind, index) for index in range(count)]
    return [(kind, index) for _, kind, index in sorted(found)]


def fuzz(worker: Worker, cases: Iterable[tuple[str, int]], seconds: float) -> str:
    """Runs the cases; returns what was wrong, and prints how often each kind ended how."""
    started, codes, wrong = time.monotonic(), Counter[tuple[str, int]](), []
    log = os.environ.get("MEMCOMPILE_FUZZ_LOG")
    for kind, index in cases:
        if time.monotonic() - started > seconds:
            break
        outcome = worker.ask(kind, index)
        codes[kind, outcome["code"]] += 1
        if codes.total() % 500 == 0:
            print(f"{codes.total()} cases in {time.monotonic() - started:.0f} s", flush=True)
        if outcome["wrong"]:
            wrong.append(outcome)
            if log:
                with open(log, "a") as stream:
                    print(json.dumps(outcome), file=stream)
    total, taken = sum(codes.values()), time.monotonic() - started
    print(f"\n{total} cases in {taken:.0f} s, {len(wrong)} wrong")
    for kind in dict.fromkeys(kind for kind, _ in codes):
        ends = {code: n for (of, code), n in sorted(codes.items()) if of == kind}
        print(f"  {kind}: {sum(ends.values())}, exit codes {ends}")
    return "\n\n".join(_told(outcome) for outcome in wrong[:20])


def _told(outcome: dict[str, Any]) -> str:
    words = ", ".join(outcome["wrong"])
    text = f"{outcome['kind']} {outcome['index']}: {words}\n  {outcome['arguments']!r}"
    return f"{text}\n{outcome.get('error', '')[-2500:]}"


def test_a_slice_of_every_kind(worker: Worker) -> None:
    wrong = fuzz(worker, spread(60), seconds=100)
    assert not wrong, wrong


@pytest.mark.long
@pytest.mark.timeout(0)
def test_many_command_lines_and_files(worker: Worker) -> None:
    named = (case.strip().rpartition(" ") for case in REPLAY.split(",") if case.strip())
    cases = [(kind, int(index)) for kind, _, index in named] or spread(CASES)
    wrong = fuzz(worker, cases, SECONDS)
    assert not wrong, wrong
