"""A policy of a user's own: taken by `compile`, `explain` and the backend, and refused in words."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import memcompile
from memcompile.compiler import backend
from memcompile.compiler.package import write
from memcompile.compiler.pipeline import OPTIONS, build
from memcompile.compiler.policy_file import choose, policy_name
from memcompile.models.memory import Mixture, Policy, Scout
from memcompile.models.memory.spec import (
    Index,
    Memory,
    Pages,
    Read,
    Score,
    Select,
    Sinks,
    Window,
)
from memcompile.models.networks.decoders import Decoder


@dataclass(frozen=True)
class Narrowing(Policy):
    """Half the budget in every further layer."""

    preset: ClassVar[str] = "narrowing"
    budget: int = 64

    def memory(self, layer: int, window: int) -> Memory:
        return Memory(
            "narrowing",
            Pages(8),
            Sinks(8),
            Window(8),
            Index(("min", "max")),
            Score("box"),
            Select("top-k", self.budget >> layer),
            Read(compensate=False),
        )


@dataclass(frozen=True)
class Answers(Policy):
    """Whatever it is told to answer."""

    preset: ClassVar[str] = "answers"
    memory_is: Any = field(default=None)

    def memory(self, layer: int, window: int) -> Memory:
        return self.memory_is  # type: ignore[no-any-return]


class Plain(Policy):
    preset: ClassVar[str] = "plain"

    def memory(self, layer: int, window: int) -> Memory:
        return Memory("plain", Pages(8))


@dataclass(frozen=True)
class Nameless(Policy):
    def memory(self, layer: int, window: int) -> Memory:
        return Memory("nameless", Pages(8))


@dataclass(frozen=True)
class Usurper(Scout):
    """Another scout under the scout's name."""


def test_compile_takes_a_policy_object():
    model, tokens = Decoder(0), torch.randint(29, (1, 60))
    engine = memcompile.compile(model, policy=Narrowing(budget=32), kernels="off")
    engine.prefill(tokens[:, :-1])
    before = dataclasses.replace(engine.stats())
    engine(tokens[:, -1:])
    after = engine.stats()
    # 8 pages of 8 hold 60 tokens, for each KV head; 4 of them are read.
    read, dense = after.pages_read - before.pages_read, after.pages_dense - before.pages_dense
    assert read > 0 and 2 * read == dense


def test_explain_and_the_report_name_it():
    report = memcompile.explain(Decoder(0), policy=Narrowing(budget=48))
    assert (report.policy, report.options) == ("narrowing", {"budget": 48})
    assert "narrowing: 6 pages of 8 by box" in str(report)


def test_the_backend_takes_a_policy_object(monkeypatch: pytest.MonkeyPatch):
    def step(query, keys, values, new, at):
        keys.index_copy_(2, at, new), values.index_copy_(2, at, new)
        visible = torch.arange(keys.shape[2]) <= at
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=visible[None, None, None]
        )

    torch._dynamo.reset()
    # Operation by operation: Inductor has tests of its own.
    monkeypatch.setattr(backend, "_compiled", lambda gm, inputs, patches: gm)
    query, keys, values, new = (torch.randn(1, 2, n, 8) for n in (1, 64, 64, 1))
    options = {"policy": Narrowing(budget=32), "kernels": "off"}
    fast = torch.compile(step, backend="memcompile", options=options)
    with torch.no_grad():
        fast(query, keys, values, new, torch.tensor([60]))
    report = memcompile.graphs()[-1]
    assert (report.policy, report.options["budget"], report.rewritten) == ("narrowing", 32, 1)
    # 4 of the 8 pages that hold 61 tokens, for each of 2 KV heads.
    assert (report.calls.pages_read, report.calls.pages_held) == (8, 16)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policy": Narrowing}, "got the class Narrowing"),
        ({"policy": Narrowing(), "budget": 8}, "has its fields already"),
    ],
)
def test_the_backend_refuses_what_is_no_policy(options, text):
    torch._dynamo.reset()
    fast = torch.compile(Decoder(0), backend="memcompile", options=options)
    with pytest.raises(Exception, match=text):
        fast(torch.randint(29, (2, 9)))


def test_an_object_of_a_known_policy_is_that_policy():
    assert choose(Scout(budget=512), {}) == choose("scout", {"budget": 512})
    assert policy_name(Scout()) == "scout"


@pytest.mark.parametrize(
    ("policy", "options", "error", "text"),
    [
        (3, {}, TypeError, "expected a policy's name, a policy file or a Policy, got int 3"),
        (None, {}, TypeError, "got NoneType None"),
        (
            Memory("m", Pages(8)),
            {},
            TypeError,
            r"return it from memory\(\) of a Policy of your own",
        ),
        (Narrowing, {}, TypeError, r"got the class Narrowing: make one, Narrowing\(\.\.\.\)"),
        (Narrowing(), {"budget": 8}, ValueError, "has its fields already; make it with budget=8"),
        (Plain(), {}, TypeError, "Plain is no dataclass; put @dataclass"),
        (Nameless(), {}, TypeError, "Nameless has the name None; give it one"),
        (Usurper(), {}, ValueError, "Usurper has the name of the policy 'scout', which it is not"),
    ],
)
def test_what_is_no_policy_is_refused(policy, options, error, text):
    with pytest.raises(error, match=text):
        memcompile.compile(Decoder(0), policy=policy, **options)


@pytest.mark.parametrize(
    ("given", "meant"), [("bugdet", "budget"), ("kernel", "kernels"), ("strikt", "strict")]
)
def test_the_option_that_was_meant_is_named(given, meant):
    with pytest.raises(
        ValueError, match=f"no option '{given}'; did you mean '{meant}'\\? known: b"
    ):
        memcompile.compile(Decoder(0), policy="scout", **{given: 1})


def test_what_build_takes_is_known_to_its_messages():
    own = [name for name in inspect.signature(build).parameters if name not in ("model", "policy")]
    assert own == [*OPTIONS, "options"]


@pytest.mark.parametrize("given", [None, "dense"])
def test_a_policy_that_gives_no_memory_is_refused(given):
    with pytest.raises(TypeError, match=r"layer 0 .*; its memory\(\) has to return a Memory"):
        memcompile.compile(Decoder(0), policy=Answers(given), kernels="off")


@pytest.mark.parametrize(
    "policy", [Narrowing(budget=48), Mixture(default=Narrowing(budget=48))], ids=["own", "mixture"]
)
def test_a_folder_or_a_script_does_not_hold_a_class(policy, tmp_path: Path):
    compiled = build(Decoder(0), policy, kernels="off", check=False)
    with pytest.raises(ValueError, match="is of a class of your own, which a folder cannot hold"):
        write(tmp_path / "out", compiled)
    with pytest.raises(ValueError, match=r"a script cannot hold .*unknown policy 'narrowing'"):
        memcompile.explain(Decoder(0), policy=policy, repro=tmp_path / "declined.py")
    assert not [*tmp_path.iterdir()]
