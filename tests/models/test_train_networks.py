"""Training of the byte-level Llamas: it learns, resumes where it stopped, keeps its budget."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile.models.networks import recall, train
from memcompile.models.networks.bytes_llama import BytesLlama, BytesLlamaConfig, load, save
from memcompile.models.networks.recipes import LONG, RECIPES, SMALL, Recipe, Stage
from memcompile.models.networks.tasks import Diet

SIZES = BytesLlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
TEXT = b"".join(b"line %d of the filler\n" % i for i in range(2000))


def tiny(recipe: Recipe) -> Recipe:
    """The recipe on a tiny network and short documents, without its costly figures."""
    stages = tuple(
        replace(stage, tokens=1056, lengths=tuple(min(1056, length) for length in stage.lengths))
        for stage in recipe.stages
    )
    return replace(
        recipe,
        config=SIZES,
        stages=stages,
        watch=((128, 2),),
        watch_every=50,
        figures=((128, 2),),
        detail=(512, 1),
        tasks=recipe.tasks[:1],
        text=((64, 2, 1),),
    )


def run(out: Path, recipe: Recipe, steps: int, **options: Any) -> dict[str, Any]:
    return train.train(
        out, tiny(recipe), minutes=10, steps=steps, seed=3, text=TEXT, checkpoint_every=5, **options
    )


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_interrupted_run_ends_as_the_straight_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    straight = run(tmp_path / "straight", recipe, 12)
    draw = train.draw_batch

    def draw_until_interrupted(recipe: Recipe, seed: int, step: int, *rest: Any) -> Any:
        if step == 8:
            raise KeyboardInterrupt
        return draw(recipe, seed, step, *rest)

    monkeypatch.setattr(train, "draw_batch", draw_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", recipe, 12)
    assert (tmp_path / "resumed" / "resume.pt").is_file()
    monkeypatch.setattr(train, "draw_batch", draw)
    resumed = run(tmp_path / "resumed", recipe, 12)
    assert resumed["steps"] == straight["steps"] == 12
    assert resumed["tokens"] == straight["tokens"]
    weights = [load(tmp_path / name).state_dict() for name in ("straight", "resumed")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert not (tmp_path / "resumed" / "resume.pt").exists()


def test_state_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, LONG, 5)
    before = (tmp_path / "resume.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"resume\.pt was begun with .*'start': 0\.0.*another --out"
    ):
        run(tmp_path, LONG, 5, start=0.5)
    assert (tmp_path / "resume.pt").read_bytes() == before


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_loss_falls_and_is_logged(tmp_path: Path, recipe: Recipe) -> None:
    log = run(tmp_path, recipe, 100)
    assert log == json.loads((tmp_path / "training.json").read_text())
    first, last = log["curve"][0], log["curve"][-1]
    assert last["text_bits"] < first["text_bits"] < 8
    assert last["tokens"] == log["tokens"]
    assert 0 <= last["recall_128"] <= 1
    assert set(log["held_out"]["text_bits_per_byte"]) == {"64"}


def test_budget_of_minutes_ends_the_run(tmp_path: Path) -> None:
    log = train.train(tmp_path, tiny(LONG), minutes=0.01, steps=10**9, text=TEXT)
    assert 0 < log["steps"] < 10**4
    assert log["cpu_minutes"] / log["threads"] < 0.2


def test_training_goes_on_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "first", LONG, 10)
    seen: list[float] = []
    draw = train.draw_batch

    def watch(recipe: Recipe, seed: int, step: int, progress: float, text: bytes) -> Any:
        seen.append(progress)
        return draw(recipe, seed, step, progress, text)

    monkeypatch.setattr(train, "draw_batch", watch)
    # No step: what is written is what was read.
    monkeypatch.setattr(train, "VECTOR_RATE", 0.0)
    monkeypatch.setattr(train, "MATRIX_RATE", 0.0)
    log = run(tmp_path / "second", LONG, 10, weights=tmp_path / "first", start=0.6)
    weights = [load(tmp_path / name).state_dict() for name in ("first", "second")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert min(seen) >= 0.6
    assert log["begun_from"]["command"] == first["command"]
    assert "--start 0.6" in log["command"]


def test_foreign_sizes_and_shares_are_refused(tmp_path: Path) -> None:
    save(BytesLlama(replace(SIZES, hidden_size=48)), tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"hidden_size=48.*give a checkpoint of the recipe's"):
        run(tmp_path / "out", LONG, 5, weights=tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"start=1\.0 is not a share below 1"):
        run(tmp_path / "out", LONG, 5, start=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_batches_are_functions_of_seed_and_step(recipe: Recipe) -> None:
    small = tiny(recipe)
    for progress in (0.0, 0.3, 0.7, 1.0):
        first, again = (train.draw_batch(small, 3, 7, progress, TEXT) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        tokens, roles, positions = first
        assert tokens.shape == roles.shape
        assert positions.shape[1] == tokens.shape[1]
        assert bool((positions.diff(dim=1) >= 1).all())
        assert recall.ANSWER in roles
        other = train.draw_batch(small, 3, 8, progress, TEXT)[0]
        assert other.shape != tokens.shape or not torch.equal(other, tokens)


@pytest.mark.parametrize(
    ("step", "progress", "checksum"),
    [
        (0, 0.0, 3011890434),
        (700, 0.3, 2625699304),
        (1501, 0.65, 1072327798),
        (2300, 0.97, 1109860152),
    ],
)
def test_small_recipe_still_draws_what_bytes_small_read(
    step: int, progress: float, checksum: int
) -> None:
    """Checksums are those of the code that trained the shipped bytes-small."""
    tokens, roles, _ = train.draw_batch(SMALL, 0, step, progress, TEXT)
    read = bytes(tokens.flatten().tolist()) + bytes(roles.flatten().tolist())
    assert zlib.crc32(read) == checksum


def test_small_recipe_counts_every_byte_and_long_skips() -> None:
    assert not any(stage.reach for stage in SMALL.stages)
    farthest = max(stage.reach for stage in LONG.stages)
    assert 16384 <= farthest <= LONG.config.max_position_embeddings
    assert LONG.stages[-1].until == SMALL.stages[-1].until == 1.0


def test_answers_alone_are_the_answer_loss() -> None:
    """A network that knows nothing pays eight bits for every marked byte and none for others."""
    recipe = replace(tiny(LONG), stages=(Stage(1.0, (256,), Diet(dense=1.0, others=0.5)),))
    network = BytesLlama(SIZES)
    with torch.no_grad():
        network.model.norm.weight.zero_()
    tokens, roles, positions = train.draw_batch(recipe, 0, 0, 0.0, TEXT)
    for block in (0, 64):
        for loss in train.losses(network, tokens, roles, positions, block):
            assert loss.item() == pytest.approx(math.log(256))
    text, answer = train.losses(network, tokens, torch.zeros_like(roles), positions, 0)
    assert text.item() == answer.item() == 0.0


def test_command_line_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, "small", tiny(SMALL))
    assert train.main(["--out", str(tmp_path), "--steps", "2", "--minutes", "5"]) == 0
    log = json.loads((tmp_path / "training.json").read_text())
    assert log["command"].endswith("train --recipe small --minutes 5 --steps 2 --seed 0")
    assert json.loads(capsys.readouterr().out) == log["held_out"]


@pytest.mark.parametrize("seed", [-1, train.SEEDS])
def test_seeds_that_reach_held_out_documents_are_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}: give 0 to {train.SEEDS - 1}"):
        train.train(tmp_path, tiny(SMALL), seed=seed)
    last = (train.SEEDS - 1) * train.STEPS_A_SEED + train.STEPS_A_SEED - 1
    assert last < recall.HELD_OUT_SEEDS
