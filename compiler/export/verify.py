"""Exported engines against eager: every one that runs here, driven by its contract alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...evaluation.records import write_whole
from ...runtime.engine import Engine, Program
from ..in_float32 import (
    HALVES,
    TYPICAL,
    InFloat32,
    error_over_eager,
    farthest,
    program_in_float32,
)
from ..manifest import MANIFEST, artefacts, check_artefact, read_manifest
from ..progress import doing
from ..results import now
from ..self_check import rounding
from .contract import read_contract
from .driver import Call, Driver
from .formats import Artefact, this_machine
from .runners import CannotRun, check_drives, has_prefill, prefill_runner, runner

if TYPE_CHECKING:
    from rich.table import Table

BATCHES = (1, 3)
# How a prompt is split into calls: odd, with single tokens; then the rest in larger ones.
SPLIT = (37, 1, 5, 90, 1, 1, 120, 1, 63, 211, 7)


@dataclass(frozen=True)
class Verdict:
    """What became of one engine.

    Attributes:
        format: of the artefact.
        outcome: "equal", "differs", or "not run".
        reason: why it was not run, or what differs.
        calls: that were compared.
        tokens: of all sequences, prompt and generated.
        largest: difference of a logit from eager's.
        allowed: what rounding may make of it.
        changed: tokens that would be generated and are not eager's, although eager's choice stands
            out by more than `allowed`.
        error_over_eager: in 16 bit, how many times as far from float32 as eager's are the logits
            of a typical token.
    """

    format: str
    outcome: str
    reason: str = ""
    calls: int = 0
    tokens: int = 0
    largest: float = 0.0
    allowed: float = 0.0
    changed: int = 0
    error_over_eager: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Trace:
    """What eager made of a batch, call by call.

    Attributes:
        tokens, logits: of each call, [B, n] and [B, n, V].
        allowed: rounding of a logit, as eager itself shows it.
        densely: how many of the calls, from the first, read everything.
        exact: in 16 bit, what eager makes of all the tokens in float32, [B, N, V].
    """

    tokens: list[Tensor]
    logits: list[Tensor]
    allowed: float
    densely: int = 0
    exact: Tensor | None = None


def verify(
    folder: Path,
    formats: Sequence[str] = (),
    *,
    prompt: int | None = None,
    steps: int = 64,
    trust_native: bool = False,
) -> list[Verdict]:
    """Runs the exported engines in a folder that memcompile wrote beside eager.

    Both are fed the same random prompt in odd chunks, then the token that eager finds likeliest,
    step by step; one sequence, then three; once more with the prompt read densely, where there is
    an engine for that. What came out is noted in the manifest.

    Args:
        formats: those to run; () runs all.
        prompt: its tokens; None: so many that every memory leaves something out, as far as the
            model's context goes.
        steps: tokens generated.
        trust_native: run AOTInductor packages, too, which are native code.

    Raises:
        FileNotFoundError, ValueError: it is no such folder, a file of it was changed, or it holds
            no engine of a format.
    """
    from ..package import open_compiled

    manifest = read_manifest(folder)
    held = artefacts(manifest, folder / MANIFEST)
    missing = [name for name in formats if name not in [a.format for a in held]]
    if not held or missing:
        there = ", ".join(a.format for a in held) or "none"
        wanted = f"no {missing[0]} engine" if missing else "no exported engine"
        raise ValueError(f"{folder}: {wanted} in it (it holds {there}); build it with --emit")
    chosen = [a for a in held if not formats or a.format in formats]
    for artefact in chosen:
        check_artefact(folder, manifest, artefact)
    with doing("eager"):
        compiled = open_compiled(folder, kernels="off")
        program, step = compiled.program, compiled.step
        assert program is not None and step is not None
        traces = [trace(program, batch, prompt, steps) for batch in BATCHES]
        if any(has_prefill(folder / artefact.folder) for artefact in chosen):
            traces += [trace(program, batch, prompt, steps, densely=True) for batch in BATCHES]
        weights = dict(step.dense.state_dict())
    verdicts = []
    for artefact in chosen:
        with doing(artefact.format):
            try:
                check_drives(artefact, trust_native)
            except CannotRun as reason:
                verdicts.append(Verdict(artefact.format, "not run", str(reason)))
                continue
            verdicts.append(compare(folder / artefact.folder, artefact, traces, weights))
    _note(folder, manifest, held, verdicts)
    return verdicts


def trace(
    program: Program, batch: int, prompt: int | None, steps: int, *, densely: bool = False
) -> Trace:
    """What eager makes of a random prompt and of the tokens it finds likeliest after it.

    Args:
        densely: the prompt reads everything, what follows through the policy.
    """
    limit = program.limit
    if limit is not None:
        steps = min(steps, max(1, limit // 2))
    length = prompt if prompt is not None else enough(program)
    if limit is not None:
        length = max(1, min(length, limit - steps))
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(program.vocabulary, (batch, length), generator=generator)
    eager, other = (Engine(program, always_select=True) for _ in range(2))

    def read(engine: Engine, piece: Tensor) -> Tensor:
        return engine.prefill(piece, all_logits=True) if densely else engine(piece)

    fed = [*tokens.split(_pieces(length), 1)]
    made = [read(eager, piece) for piece in fed]
    # The same tokens split otherwise: what rounding makes of them.
    whole = read(other, tokens)
    noise = float((whole.double() - torch.cat(made, 1).double()).abs().max())
    pieces = len(fed)
    for _ in range(steps):
        fed.append(made[-1][:, -1:].argmax(-1))
        made.append(eager(fed[-1]))
    scale = max(float(logits.double().abs().max()) for logits in made)
    # Other compilers sum in another order and have exponentials of their own, layer after layer.
    # What is lost or misplaced shows at the size of the logits, thousands of times as large.
    band = scale * rounding(made[0].dtype, len(program.layouts), length)
    allowed, exact = 4 * noise + band, None
    if made[0].dtype in HALVES:
        with InFloat32():
            wide = Engine(program_in_float32(program), always_select=True)
            prompt_read = [read(wide, piece) for piece in fed[:pieces]]
            exact = torch.cat([*prompt_read, *(wide(piece) for piece in fed[pieces:])], 1)
        allowed = farthest(torch.cat(made, 1), exact)
    return Trace(fed, made, allowed, pieces if densely else 0, exact)


def enough(program: Program) -> int:
    """Tokens after which every memory has left something out, and every ring has come round."""
    far = [layout.memory.reads_all_below for layout in program.layouts if layout.memory.selects]
    rings = [layout.table_key.reach or 0 for layout in program.layouts]
    return min(4096, max(200, *(2 * n + 100 for n in far), *(n + 700 for n in rings if n), 0))


def _pieces(length: int) -> list[int]:
    pieces: list[int] = []
    for size in (*SPLIT, *([300] * (length // 300 + 1))):
        left = length - sum(pieces)
        if left > 0:
            pieces.append(min(size, left))
    return pieces


def compare(
    folder: Path, artefact: Artefact, traces: Sequence[Trace], weights: Mapping[str, Tensor]
) -> Verdict:
    """One engine, and the one for its prompts, against what eager made.

    Args:
        weights: of the model, by name, for engines that are given them.
    """
    verdict = Verdict(artefact.format, "equal")
    contract = read_contract(folder)
    try:
        call = runner(folder, artefact, contract)
        prefill = prefill_runner(folder, artefact, contract, weights)
        for made in traces:
            if not made.densely or prefill is not None:
                driver = Driver(contract, call, len(made.tokens[0]))
                verdict = _follow(verdict, driver, made, prefill or call)
    except CannotRun as reason:
        return Verdict(artefact.format, "not run", str(reason))
    except Exception as error:  # a runtime may raise anything; the others are still to be run
        text = " ".join(str(error).split())[:300]
        return replace(verdict, outcome="differs", reason=f"{type(error).__name__}: {text}")
    if verdict.reason:
        return replace(verdict, outcome="differs")
    return verdict


def _follow(verdict: Verdict, driver: Driver, made: Trace, prefill: Call) -> Verdict:
    call, answers = driver.call, []
    for number, (tokens, expected) in enumerate(zip(made.tokens, made.logits, strict=True)):
        driver.call = prefill if number < made.densely else call
        got = driver(tokens)
        verdict = _compared(verdict, number, got, expected, made.allowed)
        answers.append(got)
    if made.exact is None:
        return verdict
    times = error_over_eager(torch.cat(answers, 1), torch.cat(made.logits, 1), made.exact)
    wrong = "" if times <= TYPICAL else f"{times:.2g} times as far from float32 as eager"
    # A part that is not a number counts as infinitely far.
    times = max(verdict.error_over_eager, times if math.isfinite(times) else math.inf)
    return replace(verdict, reason=verdict.reason or wrong, error_over_eager=times)


def _compared(
    verdict: Verdict, number: int, got: Tensor, expected: Tensor, allowed: float
) -> Verdict:
    reason = verdict.reason
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise ValueError(
            f"call {number}: logits are {got.dtype} {list(got.shape)}; eager's are "
            f"{expected.dtype} {list(expected.shape)}"
        )
    difference = (got.double() - expected.double()).abs()
    largest = float(difference.max()) if bool(got.isfinite().all()) else math.inf
    best = expected.double().topk(2, -1)
    clear = best.values[..., 0] - best.values[..., 1] > 2 * allowed
    changed = int((clear & (got.argmax(-1) != best.indices[..., 0])).sum())
    if not largest <= allowed and not reason:
        reason = f"call {number} of {tuple(expected.shape[:2])} tokens: logits differ"
    return replace(
        verdict,
        reason=reason,
        calls=verdict.calls + 1,
        tokens=verdict.tokens + expected.shape[0] * expected.shape[1],
        largest=max(verdict.largest, largest),
        allowed=max(verdict.allowed, allowed),
        changed=verdict.changed + changed,
    )


def _note(
    folder: Path, manifest: dict[str, Any], held: list[Artefact], verdicts: Sequence[Verdict]
) -> None:
    """Writes into the manifest what ran here and what was found."""
    found = {verdict.format: verdict for verdict in verdicts if verdict.outcome != "not run"}
    listed = []
    for artefact in held:
        verdict = found.get(artefact.format)
        if verdict is not None:
            ran = {"when": now(), **this_machine()}
            equal = {**ran, **verdict.to_json()} if verdict.outcome == "equal" else None
            artefact = replace(artefact, run=ran, verified=equal)
        listed.append(artefact.to_json())
    text = json.dumps({**manifest, "artefacts": listed}, indent=1) + "\n"
    write_whole(folder / MANIFEST, text)


def table(verdicts: Sequence[Verdict]) -> Table:
    """For people."""
    from rich.table import Table

    shown = Table(title="exported engines against eager")
    for name in ("format", "outcome"):
        shown.add_column(name, no_wrap=True)
    for name in ("calls", "tokens", "largest difference", "allowed", "tokens changed"):
        shown.add_column(name, justify="right")
    shown.add_column("why", overflow="fold")
    for verdict in verdicts:
        ran = verdict.outcome != "not run"
        figures = [""] * 5
        if ran:
            figures = [f"{x:.2g}" for x in (verdict.largest, verdict.allowed)]
            figures = [str(verdict.calls), str(verdict.tokens), *figures, str(verdict.changed)]
        shown.add_row(verdict.format, verdict.outcome, *figures, verdict.reason)
    return shown
