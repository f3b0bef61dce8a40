"""Distillation: what the frozen model gives, how states learn it, and that no kill costs more than
it may."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from archive_payloads import Decoder, exported
from safetensors.torch import load_file, save_file
from tolerance import assert_close_to_float64
from torch import Tensor, fx

from memcompile import codegen
from memcompile.codegen.cpp import NoCompiler
from memcompile.compiler import distill
from memcompile.compiler.attention_transfer import Activations, Frozen, StateOps, Transfer
from memcompile.compiler.cli import main
from memcompile.compiler.distill import Given, Sequences
from memcompile.compiler.pipeline import build, normalise
from memcompile.compiler.policy_file import read_policy
from memcompile.evaluation.plots import learning
from memcompile.models.memory import preset
from memcompile.models.memory.state import joined, reads, state_weights
from memcompile.models.ops import operator
from memcompile.passes.classify_tokens import classify_tokens
from memcompile.passes.find_sites import find_sites
from memcompile.passes.result import MaskRule, Site

CAUSAL = MaskRule("causal")
CPU = torch.device("cpu")


def site(name: str, **changes: Any) -> Site:
    plain = Site(name, 0, name, 4, 2, 8, 8, CAUSAL, 0.3, 0.0, torch.float32)
    return dataclasses.replace(plain, **changes)


def transfer(sites: list[Site], steps: int = 60, **options: Any) -> Transfer:
    memory = preset("hybrid", window=4, page_size=8, **options).memory(1, 0)
    memories = {each.name: memory for each in sites}
    ops = StateOps("off")
    return Transfer(sites, memories, steps=steps, rate=0.05, device=CPU, ops=ops)


def activations(of: Site, options: Mapping[str, Any], shift: float, seed: int) -> Activations:
    """What a state with weights of its own would give: a state can learn it exactly."""
    memory = preset("hybrid", window=4, page_size=8, **options).memory(1, 0)
    generator = torch.Generator().manual_seed(7)  # of the weights, the same for every batch

    def moved(tensor: Tensor) -> Tensor:
        return tensor + 0.3 * torch.randn(tensor.shape, generator=generator)

    plain = state_weights(memory, of.heads, of.kv_heads, of.key_dim)
    weights = {name: moved(tensor) + (name == "mass") * shift for name, tensor in plain.items()}
    generator.manual_seed(seed)
    query, key, value = (
        2 * torch.randn(2, heads, 24, 8, generator=generator)
        for heads in (of.heads, of.kv_heads, of.kv_heads)
    )
    both = reads(query, key, value, memory, weights, of.scale, of.softcap)
    return Activations(query, key, value, joined(weights, *both))


# --- the frozen model ---


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_frozen_model_gives_what_each_attention_takes_and_gives(softcap: float) -> None:
    class Two(Decoder):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            x = self.embed(input_ids) + torch.nn.functional.embedding(position_ids, self.table)
            for _ in range(2):
                q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.mix(x).chunk(3, 2))
                logits = q @ k.mT / 2
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                n = x.shape[1]
                hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
                out = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v
                x = x + out.transpose(1, 2).flatten(2)
            return self.head(x)

    model = Two()
    tokens = torch.randint(11, (3, 17))
    positions = torch.arange(17).expand(3, 17).contiguous()

    def watched(dtype: torch.dtype) -> tuple[fx.GraphModule, list[Site], dict[str, Any]]:
        """The normal form in one precision, and what its attentions take and give there."""
        module, _ = normalise(exported(model.to(dtype)))
        sites, _ = find_sites(module, classify_tokens(module))
        names, seen = {each.node: each.name for each in sites}, {}

        class Watch(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.name in names:
                    taken = self.fetch_args_kwargs_from_env(n)[0][:3]
                    seen[names[n.name]] = [*taken, result]
                return result

        with torch.no_grad():
            Watch(module).run(tokens, positions)
        return module, sites, seen

    _, _, truth = watched(torch.float64)
    module, sites, plain = watched(torch.float32)
    assert [each.softcap for each in sites] == [softcap] * 2
    for wanted in ([sites[0].name], [sites[1].name, sites[0].name]):
        found = Frozen(module, sites, wanted)(tokens)
        assert [*found] == wanted
        for name, ours in found.items():
            four = (ours.query, ours.key, ours.value, ours.out)
            for actual, eager, exact in zip(four, plain[name], truth[name], strict=True):
                assert_close_to_float64(actual, eager, exact, reduction=17 * 8)


# --- learning ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": "gate", "feature_map": "elu"},
        {"write": "delta", "decay": "constant", "feature_map": "identity"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_a_state_learns_what_a_state_can_give(options: dict[str, Any]) -> None:
    of = site("a")
    learner = transfer([of], **options)
    held = [{"a": activations(of, options, 3.0, seed=99)}]
    before = learner.errors(held)["a"]
    learner.calibrate({"a": activations(of, options, 3.0, seed=0)})
    for step in range(60):
        learner.learn({"a": activations(of, options, 3.0, seed=step)})
    assert learner.errors(held)["a"] < before / 5


@pytest.mark.parametrize("options", [{}, {"normalised": False}], ids=["normalised", "mixed"])
def test_calibration_finds_a_share_where_there_was_none(options: dict[str, Any]) -> None:
    of = site("a", scale=20.0)  # the window's log-sum-exp is far above what features give
    learner = transfer([of], **options)
    given = {"a": activations(of, options, 60.0, seed=0)}
    before = learner.errors([given])["a"]
    learner.calibrate(given)
    assert learner.errors([given])["a"] < before
    if not options:
        assert float(learner.weights()["a"]["temper"].max()) < 0.5


def test_layers_learn_apart() -> None:
    one, two = site("a"), site("b", scale=0.7)
    alone, both = transfer([one]), transfer([one, two])
    for step in range(3):
        given = {name: activations(one, {}, 1.0, seed=step) for name in "ab"}
        alone.learn(given)
        both.learn(given)
    assert all(
        torch.equal(tensor, both.weights()["a"][name])
        for name, tensor in alone.weights()["a"].items()
    )
    assert not torch.equal(both.weights()["a"]["query_map"], both.weights()["b"]["query_map"])


def test_an_error_that_is_not_finite_ends_the_run() -> None:
    given = activations(site("a"), {}, 1.0, seed=0)
    given.query[0, 0, 9] = float("inf")
    with pytest.raises(ValueError, match=r"step 1: the error of 'a' is nan; give a lower rate"):
        transfer([site("a")]).learn({"a": given})


def test_the_rate_rises_and_falls() -> None:
    learner = transfer([site("a")], steps=200)
    rates = []
    for learner.step in range(200):
        rates.append(learner._schedule())
    assert rates[0] < rates[1] < rates[3] <= 1 and rates[-1] < 0.001
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_kernels_run_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def generated(specs: list[Any], device: str) -> dict[Any, Callable[..., Any]]:
        assert device == "cpu"
        (spec,) = specs
        if spec.backward:
            raise NoCompiler("no C++ compiler: install one")

        def run(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, *held: Tensor) -> Any:
            called.append(spec.op)
            return operator("state_chunk")(query, key, value, None, None, lengths, *held)

        return {spec: run}

    monkeypatch.setattr(codegen, "load", generated)
    of = site("a")
    given = activations(of, {}, 1.0, seed=0)
    learners = {kernels: transfer([of]) for kernels in ("off", "auto", "required")}
    for kernels, learner in learners.items():
        learner._ops._kernels = kernels
    learners["auto"].learn({"a": given})
    assert called == ["state_chunk"]
    assert learners["auto"]._ops.references == {
        "state_chunk.backward": "no C++ compiler: install one"
    }
    learners["off"].learn({"a": given})
    assert [*learners["off"]._ops.references.values()] == ["kernels=off"] * 2
    for name, tensor in learners["off"].weights()["a"].items():
        assert torch.equal(tensor, learners["auto"].weights()["a"][name])
    with pytest.raises(RuntimeError, match="kernels='required', but no C\\+\\+ compiler"):
        learners["required"].learn({"a": given})


# --- the text ---


def given(**changes: Any) -> Given:
    policy = preset("hybrid", state_layers=(0,), window=8, page_size=8)
    plain = Given(policy, [1], 10, 2, 4, 0.02, 3, 2, "off")
    return dataclasses.replace(plain, **changes)


def cut(tokens: list[int], start: list[int] | None = None, **changes: Any) -> Sequences:
    compiled: Any = SimpleNamespace(program=SimpleNamespace(vocabulary=1000))
    return Sequences.cut(tokens, start or [], given(**changes), compiled)


def test_sequences_are_learnt_from_once_before_any_is_again_and_never_if_held_out() -> None:
    made = cut(list(range(990)), start=[7])
    assert made.learnt.shape[1] == made.held_out.shape[1] == 10
    assert len(made.held_out) == distill.HELD_OUT
    assert bool((made.learnt[:, 0] == 7).all())
    learnt, held = ({*rows[:, 1].tolist()} for rows in (made.learnt, made.held_out))
    assert learnt | held == set(range(0, 990, 9)) and not learnt & held
    steps = len(made.learnt) // 2
    seen = [int(row[1]) for step in range(steps) for row in made.batch(step, 2)]
    assert sorted(seen) == sorted(learnt)
    assert torch.equal(made.batch(5, 2), made.batch(5, 2))
    assert not torch.equal(made.batch(0, 2), made.batch(steps, 2))
    other = dataclasses.replace(made, seed=4)
    assert not torch.equal(made.batch(0, 2), other.batch(0, 2))
    assert len(cut(list(range(30))).held_out) == 1


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        (29, {}, "29 tokens, 2 sequences of 10; a batch of 2 and one to hold out need 3: give"),
        (29, {"start": [*range(10)]}, "0 sequences of 10"),
        (1010, {}, "the token 1009, and the model knows 1000; is it meant for another model"),
    ],
)
def test_a_text_that_does_not_do_is_refused(
    tokens: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cut(list(range(tokens)), **changes)


# --- the command ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text of token ids that repeat themselves."""
    folder = tmp_path_factory.mktemp("distill")
    torch.manual_seed(0)
    torch.export.save(exported(Decoder(scale=4.0)), folder / "decoder.pt2")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (13,), generator=generator).repeat(80).tolist()
    (folder / "ids.txt").write_text(" ".join(map(str, ids)))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy to write in."""
    return Path(shutil.copytree(made, tmp_path / "here"))


@pytest.fixture
def say(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.delenv("MEMCOMPILE_DEBUG", raising=False)
    monkeypatch.chdir(here)

    def run(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        code = main(["distill", "decoder.pt2", *map(str, arguments)])
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


POLICY = ["--policy", "hybrid:state_layers=0,window=8", "--set", "page_size=8"]
SMALL = [*POLICY, "--data", "ids.txt", "--ids", "--length", 40, "--batch", 2, "--steps", 30]
SMALL += ["--checkpoint-every", 10, "--lr", 0.05]


def test_distill_writes_a_policy_a_log_and_a_picture(say: Any, here: Path) -> None:
    said = say(*SMALL)
    assert said.code == 0, said.err
    assert "step 0: error on held-out text" in said.err and "step 30:" in said.err
    assert "before" in said.out and "not generated: state_chunk: kernels=off" in said.out
    policy = read_policy(here / "decoder.hybrid.safetensors")
    log = json.loads((here / "decoder.hybrid.losses.json").read_text())
    assert (here / "decoder.hybrid.losses.png").read_bytes()[1:4] == b"PNG"
    assert not (here / "decoder.hybrid.training.safetensors").exists()
    (name,) = policy.sites
    before, after = policy.training["errors"][name]
    assert after < before / 2
    assert log["sites"][name] == {"layer": 0, "before": before, "after": after}
    assert [entry["step"] for entry in log["curve"]] == list(range(31))
    assert log["settings"]["rate"] == 0.05 and str(here) not in json.dumps(log)
    built = build(here / "decoder.pt2", here / "decoder.hybrid.safetensors")
    assert built.program is not None

    again = say(*SMALL)
    assert again.code == 2 and "already exists and is kept; give --force" in again.err
    assert say(*SMALL, "--force", "--steps", 1, "--json").code == 0


@pytest.mark.parametrize("moment", ["learning", "keeping"])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    say: Any, here: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    assert say(*SMALL, "--out", "whole.safetensors").code == 0
    out = f"{moment}.safetensors"
    ran: list[int] = []
    learn, write = Transfer.learn, distill.write_whole
    deadly = [17] if moment == "learning" else []

    def learning_dies(self: Transfer, given: Any) -> Any:
        ran.append(self.step)
        if self.step in deadly:
            deadly.clear()
            raise KeyboardInterrupt
        return learn(self, given)

    def keeping_dies(path: Path, data: Any) -> None:
        if moment == "keeping" and ran[-1] == 19 and ran.count(19) == 1:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(Transfer, "learn", learning_dies)
    monkeypatch.setattr(distill, "write_whole", keeping_dies)
    said = say(*SMALL, "--out", out)
    assert said.code == 130 and not (here / out).exists()
    assert f"10 of 30 steps are kept in {moment}.training.safetensors; the same" in said.err
    count = len(ran)
    assert say(*SMALL, "--out", out).code == 0
    assert ran[count:] == list(range(10, 30))
    assert (here / out).read_bytes() == (here / "whole.safetensors").read_bytes()
    curves = [
        json.loads((here / f"{name}.losses.json").read_text())["curve"]
        for name in ("whole", moment)
    ]
    assert curves[0] == curves[1]


def test_what_another_command_kept_is_refused(
    say: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Transfer.learn

    def dies(self: Transfer, given: Any) -> Any:
        if self.step == 12:
            raise KeyboardInterrupt
        return learn(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(Transfer, "learn", dies)
        assert say(*SMALL, "--out", "x.safetensors").code == 130
    kept = here / "x.training.safetensors"
    whole = kept.read_bytes()
    said = say(*SMALL, "--lr", 0.01, "--seed", 5, "--out", "x.safetensors")
    assert said.code == 2
    for part in ("seed was 0, is 5", "rate was 0.05, is 0.01", "remove x.training.safetensors"):
        assert part in said.err
    assert kept.read_bytes() == whole

    kept.write_bytes(whole[:-20])
    said = say(*SMALL, "--out", "x.safetensors")
    assert said.code == 2 and "damaged, or no safetensors" in said.err
    kept.write_bytes(whole)
    tensors = load_file(kept)
    from safetensors import safe_open

    with safe_open(kept, "pt") as file:
        about = file.metadata()
    tensors.pop(next(iter(tensors)))
    save_file(tensors, kept, about)
    said = say(*SMALL, "--out", "x.safetensors")
    assert said.code == 2 and "its tensors are not those of this policy and model" in said.err
    held = json.loads(about[distill.FORMAT])
    save_file(tensors, kept, {distill.FORMAT: json.dumps({**held, "progress": 3})})
    said = say(*SMALL, "--out", "x.safetensors")
    assert said.code == 2 and "no settings or no progress" in said.err
    save_file(tensors, kept)
    said = say(*SMALL, "--out", "x.safetensors")
    assert said.code == 2 and "not the state of an unfinished distillation" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "scout"], "policy 'scout' gives no layer of decoder.pt2 a state"),
        (["--policy", "x.safetensors"], "x.safetensors: fitted already; give a policy by its name"),
        (["--policy", "hybird"], "did you mean 'hybrid'?"),
        (["--set", "max_context=9"], "give --max-context"),
        (["--length", 8], "--length 8: a window of 8 tokens holds it all"),
        (["--length", 65], "--length 65: the model has positions for 64 tokens"),
        (["--length", 60, "--batch", 40], "a batch of 40 and one to hold out need 41"),
        (["--out", "policy.pt"], "policy.pt: a policy file's name ends in .safetensors"),
        (["--out", "no/x.safetensors"], "no/x.safetensors: its folder does not exist"),
        (["--out", "other.safetensors", "--force"], "not a policy file, so it is kept even with"),
        (["--data", "absent.txt"], "absent.txt: no such file"),
        (["--data", "binary.txt"], "binary.txt: expected UTF-8 text, found byte 0xff at 2"),
        (["--steps", 0], "0 is not in the range"),
        (["--lr", 0], "0.0 is not in the range"),
    ],
)
def test_the_command_refuses_in_one_line(
    say: Any, here: Path, arguments: list[object], message: str
) -> None:
    (here / "binary.txt").write_bytes(b"1 \xff")
    save_file({"x": torch.ones(1)}, here / "other.safetensors")
    before = sorted(here.iterdir())
    said = say(*SMALL, *arguments)
    assert said.code == 2 and message in said.err
    assert sorted(here.iterdir()) == before


def test_text_needs_a_tokenizer_and_pictures_their_library(
    say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = say(*POLICY, "--data", "ids.txt", "--length", 40)
    assert said.code == 2 and "no tokenizer.json to read --data with; give token ids" in said.err
    monkeypatch.setattr(distill.importlib.util, "find_spec", lambda name: None)
    said = say(*SMALL)
    assert said.code == 2 and "distill needs matplotlib: pip install 'memcompile[eval]'" in said.err


def test_the_picture_has_a_line_a_layer_and_its_training() -> None:
    curve = [
        {"step": 0, "held_out": {"a": 0.5, "b": 0.25}},
        {"step": 3, "held_out": {"a": 0.2, "b": 0.125}, "train": {"a": 0.3, "b": 0.2}},
    ]
    (axes,) = learning(curve, "a title").axes
    drawn = [(line.get_xdata(), line.get_ydata()) for line in axes.lines]
    assert [[*map(list, pair)] for pair in drawn] == [
        [[0, 3], [0.5, 0.2]],
        [[3], [0.3]],
        [[0, 3], [0.25, 0.125]],
        [[3], [0.2]],
    ]
    assert axes.get_title() == "a title" and axes.get_yscale() == "log"
