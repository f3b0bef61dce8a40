"""Train a byte-level Llama on library text and recall tasks, on a CPU or a GPU."""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import recall, tasks
from .bytes_llama import BytesLlama, load, save
from .measure import figures, watched
from .optimizer import Muon
from .recipes import RECIPES, Recipe

MATRIX_RATE = 0.02
VECTOR_RATE = 0.004
WARMUP_STEPS = 50
DECAY_FROM = 0.5
CURVE_STEPS = 50
STEPS_A_SEED = 100_000_007
# The documents of every seed below this one are drawn with seeds below those held out.
SEEDS = recall.HELD_OUT_SEEDS // STEPS_A_SEED


def draw_batch(
    recipe: Recipe, seed: int, step: int, progress: float, text: bytes
) -> tuple[Tensor, Tensor, Tensor]:
    """Documents, roles and positions [B, T] of one step; a function of its arguments alone."""
    stage = next(stage for stage in recipe.stages if progress <= stage.until)
    rng = random.Random(seed * STEPS_A_SEED + step)
    length = stage.lengths[step % len(stage.lengths)]
    documents = [
        recipe.documents(rng, text, length, stage.diet) for _ in range(stage.tokens // length)
    ]
    bytes_, roles = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).view(len(documents), length)
        for part in zip(*documents, strict=True)
    )
    if stage.reach:
        rows = [tasks.skipped_positions(rng, document, stage.reach) for document, _ in documents]
    else:
        rows = [list(range(length))]
    return bytes_.long(), roles, torch.tensor(rows)


def losses(
    network: BytesLlama, tokens: Tensor, roles: Tensor, positions: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats over text bytes and over answer bytes, apart."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = network(tokens[:, :-1], positions[:, :-1], block)
    each = functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    role = roles[:, 1:].flatten()
    text, answer = (
        (each * (role == kind)).sum() / (role == kind).sum().clamp(min=1)
        for kind in (recall.TEXT, recall.ANSWER)
    )
    return text, answer


def new_network(recipe: Recipe, seed: int, weights: Path | None) -> BytesLlama:
    """The recipe's network with fresh weights, or with those of a checkpoint folder."""
    torch.manual_seed(seed)
    network = BytesLlama(recipe.config)
    if weights is not None:
        given = load(weights)
        if given.config != recipe.config:
            raise ValueError(
                f"{weights} holds {given.config}, the recipe trains {recipe.config}; give a "
                "checkpoint of the recipe's sizes."
            )
        network.load_state_dict(given.state_dict())
    return network


@dataclass
class Progress:
    """How far a run is: all of its state but weights and momenta."""

    step: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def train(
    out: Path,
    recipe: Recipe,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    start: float = 0.0,
    weights: Path | None = None,
    device: str = "cpu",
    text: bytes | None = None,
    checkpoint_every: int = 100,
) -> dict[str, Any]:
    """Train, evaluate and write the checkpoint folder; resumes from `out/resume.pt` if it is there.

    Args:
        out: folder for the checkpoint, its log and, while training, the resumable state.
        recipe: network, documents and curriculum.
        minutes: budget in minutes of fully used cores: processor time over torch's threads, so
            that other load on the machine does not change the result's meaning.
        steps: optimizer steps; stages and rates follow whichever of the two budgets is further on.
        seed: seeds weights and documents.
        start: share of the curriculum that is left out; the budgets pay for the rest.
        weights: checkpoint folder to begin from; None begins with fresh weights.
        device: where the network trains.
        text: training text; None takes the running Python's library, without the held-out files.
        checkpoint_every: steps between resumable states.

    Returns:
        The log, as it is written to `out/training.json`.

    Raises:
        ValueError: `weights` holds a network of other sizes, `start` is not a share below one, or
            the resumable state belongs to another run.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(
            f"seed={seed}: give 0 to {SEEDS - 1}; documents of others would be drawn with seeds "
            "that are held out."
        )
    if not 0.0 <= start < 1.0:
        raise ValueError(f"start={start} is not a share below 1; give 0.0 for the whole recipe.")
    minutes = recipe.minutes if minutes is None else minutes
    steps = recipe.steps if steps is None else steps
    text = recall.library_text(held_out=False) if text is None else text
    network = new_network(recipe, seed, weights).to(device)
    matrices = [p for name, p in network.named_parameters() if p.dim() == 2 and "layers" in name]
    rest = [p for name, p in network.named_parameters() if p.dim() != 2 or "layers" not in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, MATRIX_RATE),
        torch.optim.AdamW(rest, VECTOR_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    begun = {"seed": seed, "start": start, "from": weights and str(weights)} | asdict(recipe.config)
    stages = [{**asdict(stage), "lengths": [*stage.lengths]} for stage in recipe.stages]
    begun["stages"] = stages
    done = Progress()
    state_file = out / "resume.pt"
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True, map_location=device)
        if state["begun"] != begun:
            raise ValueError(
                f"{state_file} was begun with {state['begun']}, asked for is {begun}; repeat the "
                "first, or give another --out."
            )
        network.load_state_dict(state["network"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        done = Progress(**state["progress"])
    out.mkdir(parents=True, exist_ok=True)
    cpu_start = time.process_time() - done.cpu_seconds
    wall_start = time.monotonic() - done.wall_seconds

    # The blocks are for processors; a GPU's fused attention is faster and keeps nothing.
    block = recipe.block if torch.device(device).type == "cpu" else 0
    means = torch.zeros(2, device=device)
    while True:
        done.cpu_seconds = time.process_time() - cpu_start
        done.wall_seconds = time.monotonic() - wall_start
        busy_minutes = done.cpu_seconds / 60 / torch.get_num_threads()
        spent = max(done.step / steps, busy_minutes / minutes)
        if spent >= 1:
            break
        progress = start + (1 - start) * spent
        rate = min((done.step + 1) / WARMUP_STEPS, 1.0, (1 - progress) / (1 - DECAY_FROM))
        for optimizer, base in zip(optimizers, (MATRIX_RATE, VECTOR_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = base * max(rate, 0.01)
        batch = draw_batch(recipe, seed, done.step, progress, text)
        tokens, roles, positions = (part.to(device) for part in batch)
        text_loss, answer_loss = losses(network, tokens, roles, positions, block)
        network.zero_grad(set_to_none=True)
        (text_loss + answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        done.step += 1
        done.tokens += tokens.numel()
        means += torch.stack((text_loss.detach(), answer_loss.detach())) / CURVE_STEPS
        if done.step % CURVE_STEPS == 0:
            text_bits, answer_bits = (means / math.log(2)).tolist()
            point = {
                "step": done.step,
                "tokens": done.tokens,
                "cpu_minutes": round(done.cpu_seconds / 60, 2),
                "text_bits": round(text_bits, 3),
                "answer_bits": round(answer_bits, 3),
            }
            if done.step % recipe.watch_every == 0:
                point |= watched(network, recipe)
            done.curve.append(point)
            print(json.dumps(point), flush=True)
            means.zero_()
        if done.step % checkpoint_every == 0:
            state = {
                "begun": begun,
                "network": network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "progress": asdict(done),
            }
            partial = state_file.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(state_file)

    save(network, out)
    name = next((name for name, known in RECIPES.items() if known == recipe), "of its own")
    command = (
        f"python -m memcompile.models.networks.train --recipe {name} --minutes {minutes:g} "
        f"--steps {steps} --seed {seed}"
    )
    log: dict[str, Any] = {
        "command": command if weights is None else f"{command} --from {weights} --start {start:g}",
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "steps": done.step,
        "tokens": done.tokens,
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu_minutes": round(done.cpu_seconds / 60, 1),
        "wall_minutes": round(done.wall_seconds / 60, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stages": stages,
        # Figures are those of the rounded weights that were written, not of the float32 ones.
        "held_out": figures(load(out).to(device), recipe),
        "curve": done.curve,
    }
    if weights is not None and (earlier := weights / "training.json").is_file():
        log["begun_from"] = json.loads(earlier.read_text(encoding="utf-8"))
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    state_file.unlink(missing_ok=True)
    return log


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the training run."""
    parser = argparse.ArgumentParser(prog="memcompile.models.networks.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--recipe", choices=RECIPES, default="small", help="what is trained")
    parser.add_argument("--minutes", type=float, help="minutes of fully used cores")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and documents")
    parser.add_argument("--from", type=Path, dest="weights", help="checkpoint folder to begin from")
    parser.add_argument("--start", type=float, default=0.0, help="share of the recipe left out")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    log = train(
        options.out,
        RECIPES[options.recipe],
        minutes=options.minutes,
        steps=options.steps,
        seed=options.seed,
        start=options.start,
        weights=options.weights,
        device=options.device,
    )
    print(json.dumps(log["held_out"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
