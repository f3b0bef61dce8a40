"""Train the byte-level Llama on library text and recall tasks, on a CPU in half an hour."""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import recall
from .bytes_llama import BytesLlama, BytesLlamaConfig, load, save


@dataclass(frozen=True)
class Schedule:
    """What is trained when: a stage holds until its share of the whole budget is spent."""

    until: float
    lengths: tuple[int, ...]
    dense: float


# Matching a key is learnt where nearly every line needs it; lengths grow once that is there.
STAGES = (
    Schedule(until=0.15, lengths=(128,), dense=0.75),
    Schedule(until=0.35, lengths=(256,), dense=0.4),
    Schedule(until=0.80, lengths=(256, 544, 544), dense=0.1),
    Schedule(until=1.00, lengths=(544, 544, 1056), dense=0.05),
)
TOKENS_PER_STEP = 4352
MATRIX_RATE = 0.02
VECTOR_RATE = 0.004
WARMUP_STEPS = 50
DECAY_FROM = 0.5


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is replaced by its nearest orthogonal matrix.

    The orthogonal factor comes from five steps of a quintic Newton-Schulz iteration (Jordan et
    al., "Muon", 2024). Matrices of one shape are worked on together.
    """

    def __init__(self, parameters: Iterable[Tensor], rate: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), matrices in shapes.items():
                updates = []
                for matrix in matrices:
                    if matrix.grad is None:
                        raise RuntimeError("Muon.step needs a gradient; call backward first.")
                    state = self.state[matrix]
                    if not state:
                        state["momentum"] = torch.zeros_like(matrix)
                    state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(state["momentum"], group["momentum"]))
                scale = -group["lr"] * math.sqrt(max(1.0, rows / columns))
                directions = orthogonalize(torch.stack(updates))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.add_(direction.to(matrix.dtype), alpha=scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push every singular value of matrices [N, r, c] near 1; computed in bfloat16."""
    x: Tensor = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def draw_batch(seed: int, step: int, progress: float, text: bytes) -> tuple[Tensor, Tensor]:
    """Documents and roles [B, T] of one step; a function of its arguments alone."""
    stage = next(stage for stage in STAGES if progress <= stage.until)
    rng = random.Random(seed * 100_000_007 + step)
    length = stage.lengths[step % len(stage.lengths)]
    documents = [
        recall.training_document(rng, text, length, rng.random() < stage.dense)
        for _ in range(TOKENS_PER_STEP // length)
    ]
    bytes_, roles = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).view(len(documents), length)
        for part in zip(*documents, strict=True)
    )
    return bytes_.long(), roles


def losses(network: BytesLlama, tokens: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats over text bytes and over answer bytes, apart."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(tokens[:, :-1])
    each = functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    role = roles[:, 1:].flatten()
    text, answer = (
        (each * (role == kind)).sum() / (role == kind).sum().clamp(min=1)
        for kind in (recall.TEXT, recall.ANSWER)
    )
    return text, answer


@torch.no_grad()
def recall_rate(network: BytesLlama, prompts: Sequence[recall.RecallPrompt]) -> float:
    """Share of prompts whose whole answer greedy decoding gives.

    All answer bytes are read at once: decoding is exact if and only if every byte is the likeliest
    one after the right bytes before it.
    """
    right = 0
    for start in range(0, len(prompts), 16):
        questions, answers = recall.recall_batch(prompts[start : start + 16])
        logits = network(torch.cat((questions, answers), dim=1)[:, :-1])
        guesses = logits[:, questions.shape[1] - 1 :].argmax(-1)
        right += int((guesses == answers).all(1).sum())
    return right / len(prompts)


@torch.no_grad()
def bits_per_byte(network: BytesLlama, length: int, windows: int = 128) -> float:
    """Mean loss in bits on held-out library text, in windows of `length` read from their start."""
    text = recall.library_text(held_out=True)
    stride = (len(text) - length - 1) // windows
    total = 0.0
    for start in range(0, windows, 16):
        rows = [
            list(text[i * stride : i * stride + length + 1])
            for i in range(start, min(start + 16, windows))
        ]
        tokens = torch.tensor(rows)
        logits = network(tokens[:, :-1]).flatten(0, 1)
        total += float(functional.cross_entropy(logits, tokens[:, 1:].flatten()) * len(rows))
    return total / windows / math.log(2)


def held_out_prompts(count: int, length: int, **options: Any) -> list[recall.RecallPrompt]:
    """Prompts of held-out seeds in held-out text."""
    seeds = range(recall.HELD_OUT_SEEDS, recall.HELD_OUT_SEEDS + count)
    return [recall.recall_prompt(length, seed, **options) for seed in seeds]


def evaluate(network: BytesLlama) -> dict[str, Any]:
    """The figures of the model card, on held-out seeds and files."""
    network.eval()
    return {
        "recall_by_length": {
            str(length): recall_rate(network, held_out_prompts(count, length))
            for length, count in ((128, 200), (256, 200), (512, 500), (768, 200), (1024, 200))
        },
        "recall_at_512_by_depth": {
            f"{depth:.1f}": recall_rate(network, held_out_prompts(100, 512, depth=depth))
            for depth in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
        },
        "recall_at_512_by_facts": {
            str(facts): recall_rate(network, held_out_prompts(200, 512, facts=facts))
            for facts in (2, 4, 8)
        },
        "text_bits_per_byte": {
            str(length): round(bits_per_byte(network, length), 3) for length in (512, 1024)
        },
    }


def train(
    out: Path,
    *,
    minutes: float,
    steps: int,
    seed: int,
    config: BytesLlamaConfig | None = None,
    text: bytes | None = None,
    checkpoint_every: int = 250,
) -> dict[str, Any]:
    """Train, evaluate and write the checkpoint folder; resumes from `out/resume.pt` if it is there.

    Args:
        out: folder for the checkpoint, its log and, while training, the resumable state.
        minutes: budget in minutes of fully used cores: processor time over torch's threads, so
            that other load on the machine does not change the result's meaning.
        steps: optimizer steps; stages and rates follow whichever of the two budgets is further on.
        seed: seeds weights and documents.
        config: sizes; None takes the defaults.
        text: training text; None takes the running Python's library, without the held-out files.
        checkpoint_every: steps between resumable states.
    """
    text = recall.library_text(held_out=False) if text is None else text
    torch.manual_seed(seed)
    network = BytesLlama(config)
    matrices = [p for name, p in network.named_parameters() if p.dim() == 2 and "layers" in name]
    rest = [p for name, p in network.named_parameters() if p.dim() != 2 or "layers" not in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, MATRIX_RATE),
        torch.optim.AdamW(rest, VECTOR_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    step, tokens_seen, cpu_seconds, wall_seconds = 0, 0, 0.0, 0.0
    curve: list[dict[str, float]] = []
    state_file = out / "resume.pt"
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        step, tokens_seen, curve = state["step"], state["tokens_seen"], state["curve"]
        cpu_seconds, wall_seconds = state["cpu_seconds"], state["wall_seconds"]
    out.mkdir(parents=True, exist_ok=True)
    cpu_start, wall_start = time.process_time() - cpu_seconds, time.monotonic() - wall_seconds

    means = torch.zeros(2)
    since = 0
    while True:
        cpu_seconds = time.process_time() - cpu_start
        wall_seconds = time.monotonic() - wall_start
        busy_minutes = cpu_seconds / 60 / torch.get_num_threads()
        progress = max(step / steps, busy_minutes / minutes)
        if progress >= 1:
            break
        rate = min((step + 1) / WARMUP_STEPS, 1.0, (1 - progress) / (1 - DECAY_FROM))
        for optimizer, base in zip(optimizers, (MATRIX_RATE, VECTOR_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = base * max(rate, 0.01)
        tokens, roles = draw_batch(seed, step, progress, text)
        text_loss, answer_loss = losses(network, tokens, roles)
        network.zero_grad(set_to_none=True)
        (text_loss + answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        since += 1
        tokens_seen += tokens.numel()
        means += torch.stack((text_loss.detach(), answer_loss.detach()))
        if step % 50 == 0:
            point = {
                "step": step,
                "tokens": tokens_seen,
                "busy_minutes": round(busy_minutes, 2),
                "text_bits": round(float(means[0]) / since / math.log(2), 3),
                "answer_bits": round(float(means[1]) / since / math.log(2), 3),
            }
            if step % 250 == 0:
                network.eval()
                point["recall_512"] = recall_rate(network, held_out_prompts(48, 512))
                network.train()
            curve.append(point)
            print(json.dumps(point), flush=True)
            means.zero_()
            since = 0
        if step % checkpoint_every == 0:
            state = {
                "network": network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "tokens_seen": tokens_seen,
                "curve": curve,
                "cpu_seconds": time.process_time() - cpu_start,
                "wall_seconds": time.monotonic() - wall_start,
            }
            partial = state_file.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(state_file)

    save(network, out)
    # Figures are those of the rounded weights that were written, not of the float32 ones.
    log = {
        "command": f"python -m memcompile.models.networks.train --minutes {minutes:g} "
        f"--steps {steps} --seed {seed}",
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "steps": step,
        "tokens": tokens_seen,
        "threads": torch.get_num_threads(),
        "cpu_minutes": round(cpu_seconds / 60, 1),
        "wall_minutes": round(wall_seconds / 60, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stages": [{**asdict(stage), "lengths": [*stage.lengths]} for stage in STAGES],
        "held_out": evaluate(load(out)),
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    state_file.unlink(missing_ok=True)
    return log


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the training run."""
    parser = argparse.ArgumentParser(prog="memcompile.models.networks.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=28.0, help="minutes of fully used cores")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and documents")
    options = parser.parse_args(arguments)
    log = train(options.out, minutes=options.minutes, steps=options.steps, seed=options.seed)
    print(json.dumps(log["held_out"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
