"""Every memory through the protocol, on a network whose answers are known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from eval_case import SMALL, contender, induction_source, silently_dense, with_program

from memcompile.compiler.capture import capture
from memcompile.compiler.load import load
from memcompile.compiler.pipeline import build_captured
from memcompile.evaluation.protocol import Contender, ReadTooMuch, answer
from memcompile.evaluation.records import open_records
from memcompile.evaluation.run import Plan, prepare, readers, run
from memcompile.evaluation.summary import Row, summarise
from memcompile.evaluation.tasks import TASKS, make_prompt
from memcompile.models.memory import parse_policy
from memcompile.models.networks import induction

SCOUT = "scout:" + ",".join(f"{name}={value}" for name, value in SMALL.items())
WINDOW = "window:window=56,sinks=8,page_size=8"
POLICIES = {
    "dense": "dense:page_size=8",
    "scout": SCOUT,
    "hierarchical": "hierarchical:refine=32,levels=8+64,sinks=8,window=16,dense_layers=0",
    "summaries": "hierarchical:refine=0,levels=8+64,sinks=8,window=16,keep=no,dense_layers=0",
    "window": WINDOW,
    "heavy-hitter": "heavy-hitter:budget=64,page_size=8,sinks=8,window=16,dense_layers=0",
    "quest": "quest:budget=64,page_size=16,dense_layers=0",
    "hybrid": "hybrid:window=56,page_size=8",
    "mixture": "mixture:layers=0={},default={}".format(
        *(p.replace(",", ";") for p in (WINDOW, SCOUT))
    ),
}
OLD, RECENT = 0.5, 1.0


@pytest.fixture(scope="module")
def contenders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contender]:
    """Dense, and every other memory, over one capture of the network."""
    folder = induction.save(tmp_path_factory.mktemp("induction"))
    captured = capture(load(folder).model)
    return {
        name: contender(
            build_captured(captured, parse_policy(policy), check=False, kernels="off"), name
        )
        for name, policy in POLICIES.items()
    }


@pytest.fixture(scope="module")
def rows(
    contenders: dict[str, Contender], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, float], Row]:
    """One row a policy and depth."""
    plan = Plan(("single",), (640,), (OLD, RECENT), 2, seed=3, stride=16)
    every, source = [*contenders.values()], induction_source()
    with open_records(tmp_path_factory.mktemp("out") / "out", {}) as records:
        prepare(plan, source, every)
        run(plan, source, every, records)
        return {
            (row.policy, depth): row
            for depth in plan.depths
            for row in summarise(
                plan, every, [r for r in records.done.values() if r["depth"] == depth]
            )
        }


@pytest.mark.parametrize("policy", POLICIES)
def test_every_memory_reads_what_it_allows(rows: dict[tuple[str, float], Row], policy: str) -> None:
    """The run itself would have ended where an engine counted more pages."""
    dense, found = rows["dense", OLD], rows[policy, OLD]
    assert found.prompts == 2 and found.pages_read <= found.pages_dense
    if policy == "dense":
        return
    assert 4 * found.pages_read <= found.pages_dense
    assert found.bytes_read < dense.bytes_read and found.bytes_dense == dense.bytes_dense


def test_what_is_recent_is_found_by_all_and_what_is_old_by_those_that_keep_it(
    rows: dict[tuple[str, float], Row],
) -> None:
    scores = {place: row.value.mean for place, row in rows.items() if row.value}
    assert len(scores) == 2 * len(POLICIES)
    assert {scores[policy, RECENT] for policy in POLICIES} == {1.0}
    # Asked for a needle that it was not yet asked for, an account has no reason to keep it; a
    # summary of eight keys is none of them; and the states are not fitted.
    lost = {"window", "summaries", "heavy-hitter", "hybrid"}
    assert {policy for policy in POLICIES if scores[policy, OLD] < 0.5} == lost
    assert {scores[policy, OLD] for policy in lost} == {0.0}
    assert {scores[policy, OLD] for policy in POLICIES.keys() - lost} == {1.0}


def test_what_a_memory_gives_up_is_not_held(rows: dict[tuple[str, float], Row]) -> None:
    held = {policy: rows[policy, OLD].resident_bytes for policy in POLICIES}
    freed = {"window", "summaries", "heavy-hitter"}
    assert all(8 * held[policy] < held["dense"] for policy in freed)
    assert all(held["dense"] < held[policy] for policy in ("scout", "hierarchical", "quest"))
    assert held["window"] < held["mixture"] < held["scout"]
    states = {policy for policy in POLICIES if rows[policy, OLD].state_bytes}
    assert states == {policy for policy in POLICIES if rows[policy, OLD].stateful} == {"hybrid"}


def test_what_is_held_follows_from_the_tiers(contenders: dict[str, Contender]) -> None:
    tokens = torch.arange(333)[None] % (induction.VOCABULARY - 1) + 1
    for name, each in contenders.items():
        engine = each.make()
        engine.prefill(tokens[:, :-1])
        engine(tokens[:, -1:])
        state, stats = engine._state, engine.stats()
        assert state is not None
        assigned = stats.state_bytes
        for layout in each.layouts:
            for store in layout.stores():
                page = sum(math.prod(shape) * dtype.itemsize for shape, dtype in store.pools)
                assigned += page * int((state._tables[store.key].host >= 0).sum())
            if layout.memory.account is not None:
                assigned += 4 * layout.kv_heads * -(-333 // layout.memory.page_size)
        assert sum(layout.held_bytes(333) for layout in each.layouts) == assigned, name
        # Beside that there are tables, and the pages that pools have free.
        assert assigned < stats.resident_bytes < 2 * assigned + 4096, name


def test_one_read_serves_those_alone_that_hold_alike(contenders: dict[str, Contender]) -> None:
    hosts = readers([*contenders.values()])
    assert {name: host.name for name, host in hosts.items()} == {
        **{name: name for name in POLICIES},
        "dense": "scout",
    }
    # Other states may have other weights, which the layouts do not tell.
    other = dataclasses.replace(contenders["hybrid"], name="fitted")
    assert not other.serves(contenders["hybrid"]) and other.serves(other)
    smaller = dataclasses.replace(contenders["heavy-hitter"], name="smaller")
    assert smaller.serves(contenders["heavy-hitter"])


@pytest.mark.parametrize("policy", ["hierarchical", "window", "heavy-hitter"])
def test_a_memory_that_silently_runs_dense_ends_the_run(
    contenders: dict[str, Contender], policy: str
) -> None:
    source = induction_source()
    prompt = make_prompt(
        TASKS["single"],
        *(200, 0.5, 1),
        tokenizer=source.tokenizer,
        wording=source.wording,
        filler=source.filler,
    )
    cheat = with_program(contenders[policy], silently_dense)
    with pytest.raises(ReadTooMuch, match=f"policy '{policy}' read"):
        answer(cheat, prompt, source.tokenizer)
