"""The vocabulary: every part round-trips through JSON, and every contradiction is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from memcompile.models.memory import (
    PRESETS,
    Dense,
    Hierarchical,
    Hybrid,
    Mixture,
    Scout,
    parse_policy,
    preset,
    preset_from_json,
)
from memcompile.models.memory.parts import PARTS, SCORE_FIELDS, Part, field_width, fields_for
from memcompile.models.memory.spec import (
    Account,
    Archive,
    Budget,
    Consolidate,
    Evict,
    Index,
    Memory,
    Pages,
    Prefix,
    Read,
    Refresh,
    Score,
    Select,
    Sinks,
    State,
    Window,
    Write,
)

EVERY_PART: list[Part] = [
    Sinks(4),
    Window(256),
    Pages(16),
    Index(("mean", "std"), levels=(16, 32)),
    State("gate", "delta", "elu", features=16, normalised=False),
    Archive("compacted", 32),
    Prefix(8),
    Write("admit", threshold=0.5),
    Score("ball"),
    Select("top-p", 128),
    Read(compensate=True),
    Account("mass", decay=0.5),
    Consolidate("attention-match", trigger="full"),
    Evict("lowest", tokens=96, delay=3),
    Refresh(32),
    Budget("measured", shares=(0.25, 0.75)),
]


OTHER_THAN_DEFAULT: dict[str, dict[str, Any]] = {
    "dense": {"page_size": 16},
    "scout": {"page_size": 16},
    "hierarchical": {"levels": (16, 64), "refine": 0, "keep": False},
    "hybrid": {"state_layers": (0, 3), "rest": "scout:budget=512", "write": "delta"},
    "window": {"window": 512},
    "heavy-hitter": {"decay": 0.5},
    "quest": {"budget": 512},
    "mixture": {"layers": {0: "dense", "b": "scout:budget=512"}, "default": "quest"},
}


def selecting(**changes: object) -> Memory:
    parts: dict[str, object] = {
        "name": "m",
        "pages": Pages(8),
        "sinks": Sinks(8),
        "window": Window(9),
        "index": Index(("mean", "std")),
        "score": Score("mean-std"),
        "select": Select("top-k", 64),
    }
    return Memory(**{**parts, **changes})  # type: ignore[arg-type]


def test_the_vocabulary_is_the_designs() -> None:
    assert {type(part) for part in EVERY_PART} == set(PARTS.values())
    assert [*PARTS] == [
        *("sinks", "window", "pages", "index", "state", "archive", "prefix"),
        *("write", "score", "select", "read", "account"),
        *("consolidate", "evict", "refresh", "budget"),
    ]


@pytest.mark.parametrize("part", EVERY_PART, ids=lambda part: part.kind_name)
def test_a_part_survives_json(part: Part) -> None:
    data = json.loads(json.dumps(part.to_json()))
    assert type(part).from_json(data) == part
    assert Part.from_json(data) == part


@pytest.mark.parametrize(
    "memory",
    [
        Dense().memory(0, 0),
        Scout().memory(5, 0),
        selecting(min_context=80),
        *(kind().memory(3, 0) for kind in PRESETS.values()),
        Memory("all", Pages(16), **{p.kind_name: p for p in EVERY_PART if p.kind_name in (
            "archive", "prefix", "write", "account", "consolidate", "evict", "refresh",
            "budget")}),
    ],
    ids=["dense", "scout", "min_context", *PRESETS, "every part"],
)  # fmt: skip
def test_a_memory_survives_json(memory: Memory) -> None:
    assert Memory.from_json(json.loads(json.dumps(memory.to_json()))) == memory


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    given = preset(name, **OTHER_THAN_DEFAULT[name])
    assert given != preset(name)
    assert preset_from_json(json.loads(json.dumps(given.to_json()))) == given
    assert preset(name) == PRESETS[name]()


def test_counts_of_pages_follow_from_tokens() -> None:
    memory = selecting(min_context=100)
    assert (memory.sink_pages, memory.window_pages, memory.budget_pages) == (1, 2, 8)
    assert (memory.capacity, memory.dense_below) == (13, 100)
    plain = selecting()
    assert (plain.capacity, plain.dense_below) == (8, 0)
    dense = Memory("dense", Pages(8))
    assert (dense.capacity, dense.selects, dense.fields) == (0, False, ())


def test_scout_is_dense_where_it_should_be() -> None:
    scout = Scout(page_size=32)
    assert scout.memory(0, 0) == scout.memory(1, 0) == Dense(32).memory(1, 0)
    assert scout.memory(9, 128) == Dense(32).memory(9, 128)
    assert scout.memory(2, 0).selects
    everything = Scout(budget=None).memory(2, 0)
    assert not everything.selects
    assert not everything.compensate
    assert everything.name == "scout"


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("score", SCORE_FIELDS)
def test_the_index_holds_what_the_score_needs(score: str, compensate: bool) -> None:
    fields = fields_for(score, compensate)
    assert Scout(score=score, compensate=compensate).memory(2, 0).fields == fields
    assert {*SCORE_FIELDS[score]} <= {*fields}
    assert ("value_mean" in fields) == compensate
    assert sum(field_width(field, 7, 5) for field in ("mean", "value_mean", "radius")) == 13


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sinks(0), r"sinks.tokens must be a whole number of at least 1, got 0"),
        (lambda: Window(1.5), r"window.tokens must be a whole number .* got 1.5"),
        (lambda: Prefix(True), r"prefix.tokens must be a whole number .* got True"),
        (lambda: Pages("64"), r"page_size must be a whole number .* got '64'"),
        (lambda: Pages(48), r"page_size must be 1 or a power of two from 8 to 1024, got 48"),
        (lambda: Pages(24), r"page_size must be 1 or a power of two from 8 to 1024, got 24"),
        (lambda: Pages(2048), r"power of two from 8 to 1024, got 2048"),
        (lambda: Index(()), r"index.fields must name some of"),
        (
            lambda: Index(("median",)),
            r"unknown index field 'median'; did you mean 'mean'\? known: mean, std",
        ),
        (lambda: Index(("mean", "mean")), r"names a field twice"),
        (lambda: field_width("median", 1, 1), r"unknown index field 'median'"),
        (lambda: State("hebb"), r"unknown decay 'hebb'; known: none, constant, gate"),
        (lambda: State(write="add"), r"unknown write 'add'; known: additive, delta"),
        (lambda: State(feature_map="tanh"), r"unknown feature map 'tanh'; known: softmax, elu,"),
        (lambda: State(normalised=1), r"normalised must be True or False, got 1"),
        (lambda: State(features=12), r"features must be a multiple of 8, got 12"),
        (lambda: State(write="delta"), r"a delta rule subtracts .* give normalised=False"),
        (lambda: State(feature_map="identity"), r"'identity' may give negative ones; give norm"),
        (lambda: Index(("mean",), [8]), r"levels must be a tuple of token counts, got \[8\]"),
        (lambda: Index(("mean",), (8, 12)), r"each a multiple of the one before, got \(8, 12\)"),
        (lambda: Index(("mean",), (8, 8)), r"levels must grow, each .* got \(8, 8\)"),
        (lambda: Index(("mean",), (0, 8)), r"levels must be a whole number of at least 1, got 0"),
        (lambda: Archive("text", 1), r"unknown archive content 'text'; known: compacted, states"),
        (lambda: Archive("states", 0), r"archive.slots must be a whole number of at least 1"),
        (lambda: Write("erase"), r"unknown write 'erase'; known: append, admit, merge"),
        (lambda: Write("admit", 2), r"write.threshold must be a number from 0 to 1, got 2"),
        (lambda: Score(["mean"]), r"unknown score \['mean'\]; known: mean"),
        (lambda: Score("cosine"), r"unknown score 'cosine'; known: mean, mean-std, box, ball"),
        (lambda: Select("all"), r"unknown selection 'all'; known: top-k, top-p, threshold"),
        (lambda: Select("held", 8), r"selection of what is held anyway has no budget, got 8"),
        (lambda: Select(budget=0), r"budget must be a whole number of at least 1, got 0"),
        (lambda: Read("yes"), r"compensate must be True or False, got 'yes'"),
        (lambda: Account("age"), r"unknown account 'age'; known: mass, salience, last-use"),
        (lambda: Account("mass", "x"), r"account.decay must be a number from 0 to 1, got 'x'"),
        (lambda: Consolidate("zip"), r"unknown consolidation 'zip'; known: attention-match"),
        (lambda: Consolidate("pool", "noon"), r"unknown trigger 'noon'; known: full"),
        (lambda: Evict("random"), r"unknown eviction 'random'; known: oldest"),
        (lambda: Evict("oldest", delay=-1), r"evict.delay must be a whole number of at least 0"),
        (lambda: Evict("lowest"), r"'lowest' needs the number of tokens that are kept"),
        (lambda: Evict("oldest", 64), r"'oldest' with tokens=64: .* the others take none"),
        (lambda: Evict("lowest", 0), r"evict.tokens must be a whole number of at least 1, got 0"),
        (lambda: selecting(evict=Evict("oldest")), r"a read that never comes back to them"),
        (lambda: Memory("m", Pages(), evict=Evict("lowest", 64)), r"needs an Account to tell them"),
        (
            lambda: Memory(
                "m", Pages(8), sinks=Sinks(9), account=Account(), evict=Evict("lowest", 16)
            ),
            r"16 tokens is 2 pages of 8, but sinks \(2\), window \(0\) and the open page already",
        ),
        (
            lambda: Memory("m", Pages(8), score=Score(), select=Select("held", None)),
            r"score is given, but a selection of what is held anyway has nothing to choose",
        ),
        (
            lambda: Memory(
                "m", Pages(8), index=Index(("mean",)), read=Read(True), select=Select("held", None)
            ),
            r"a read with compensate=True needs the index fields .* add \['value_mean', 'log_",
        ),
        (
            lambda: selecting(index=Index(("mean", "std"), (16,))),
            r"levels \(16,\) stand in for pages of 8 tokens .* the first must be the page size",
        ),
        (
            lambda: Memory("m", Pages(8), state=State()),
            r"it needs a Window, and has no other part beside it",
        ),
        (
            lambda: selecting(state=State()),
            r"has no sinks, index, select beside it",
        ),
        (
            lambda: replace(Hierarchical(dense_layers=0).memory(0, 0), min_context=9999),
            r"min_context is not there for memories of several levels",
        ),
        (lambda: Refresh(0), r"refresh.every must be a whole number of at least 1"),
        (lambda: Budget("pyramid"), r"unknown budget rule 'pyramid'; known: uniform, measured"),
        (lambda: Budget("measured"), r"'measured' needs one share a KV head"),
        (lambda: Budget("uniform", (0.5,)), r"'uniform' takes none"),
        (lambda: Budget("measured", (1.5,)), r"budget.shares must be a number from 0 to 1"),
        (lambda: Part.from_json({"tokens": 4}), r"a part of a memory is"),
        (lambda: Part.from_json({"part": "heap"}), r"unknown part 'heap'; known: sinks, window"),
        (lambda: Sinks.from_json({"part": "window", "tokens": 4}), r"expected the part 'sinks'"),
        (lambda: Part.from_json({"part": "sinks", "size": 1}), r"unknown key of sinks 'size'"),
        (lambda: Memory.from_json({"heap": 1}), r"unknown key of a memory 'heap'; known: name"),
        (
            lambda: Memory.from_json({"name": "m", "pages": Pages().to_json(), "min_context": {}}),
            r"unknown part of a memory 'min_context'",
        ),
        (
            lambda: Memory.from_json({"name": "m", "pages": Sinks(4).to_json()}),
            r"expected the part 'pages', got 'sinks'",
        ),
        (lambda: Memory("m", Pages(), score=Score()), r"score is given but nothing is selected"),
        (lambda: Memory("m", Pages(), min_context=9), r"min_context is given but nothing is sel"),
        (lambda: Memory("m", Pages(), read=Read(True)), r"nothing is selected and so nothing is s"),
        (lambda: selecting(score=None), r"a selection needs a Score and an Index; give both"),
        (lambda: selecting(score=Score("box")), r"'box' .* needs the index fields \('min', 'max'"),
        (lambda: selecting(read=Read(True)), r"add \['value_mean', 'log_count'\]"),
        (
            lambda: selecting(select=Select(budget=31)),
            r"31 tokens is 3 pages of 8, but sinks \(1\), window \(2\) and the open page already "
            r"take 4; give budget >= 32",
        ),
        (lambda: selecting(min_context=63), r"min_context=63 is below the budget of 64"),
        (lambda: selecting(min_context="9"), r"min_context must be a whole number"),
        (lambda: Scout(budget=100), r"give budget >= 384"),
        (lambda: Scout(budget=-5), r"budget must be a whole number of at least 1, got -5"),
        (lambda: Scout(budget=512.0), r"budget must be a whole number .* got 512.0"),
        (lambda: Scout(budget=None, compensate=None), r"compensate must be True or False"),
        (lambda: Scout(budget=None, score="best"), r"unknown score 'best'"),
        (lambda: Scout(sinks=-1), r"sinks must be a whole number of at least 0, got -1"),
        (lambda: Scout(dense_layers="2"), r"dense_layers must be a whole number"),
        (lambda: Scout(budget=None, min_context=8), r"min_context needs a budget"),
        (lambda: Dense(page_size=3), r"page_size must be 1 or a power of two"),
        (lambda: preset("fast"), r"unknown policy 'fast'; known: dense, scout, hierarchical"),
        (lambda: preset("dense", budget=1), r"policy 'dense' has no option 'budget'; known: p"),
        (lambda: preset_from_json({"name": "dense"}), r"a preset is"),
    ],
)
def test_refusals_say_what_was_given_and_how_to_mend(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "part",
    [
        *(p for p in EVERY_PART if p.kind_name in ("archive", "prefix", "write", "consolidate")),
        *(p for p in EVERY_PART if p.kind_name in ("refresh", "select", "budget")),
        Account("salience"),
    ],
    ids=lambda part: part.kind_name,
)
def test_parts_without_an_operation_are_vocabulary_but_not_built(part: Part) -> None:
    memory = selecting(**{part.kind_name: part})
    with pytest.raises(ValueError, match=rf"'m' cannot be built: .*{part.kind_name}"):
        memory.check_lowered()


@pytest.mark.parametrize(
    ("evict", "text"),
    [
        (Evict("lowest", tokens=64, delay=3), "evict with a delay of 3"),
        (Evict("threshold"), "evict 'threshold'"),
    ],
)
def test_evictions_that_are_words_only_are_refused(evict: Evict, text: str) -> None:
    memory = Memory("m", Pages(8), account=Account(), evict=evict)
    with pytest.raises(ValueError, match=text):
        memory.check_lowered()


def test_what_can_be_built_is_not_refused() -> None:
    for memory in (selecting(), *(kind().memory(3, 0) for kind in PRESETS.values())):
        memory.check_lowered()


def test_a_policy_in_a_mixture_may_have_tuples_of_its_own() -> None:
    text = "mixture:layers=0=hierarchical:levels=8+32;refine=0+2=hybrid:state_layers=1+2+b=dense"
    assert parse_policy(text) == Mixture(
        layers={
            0: Hierarchical(refine=0, levels=(8, 32)),
            2: Hybrid(state_layers=(1, 2)),
            "b": Dense(),
        }
    )
    with pytest.raises(ValueError, match=r"expected LAYER=POLICY with \+ between, got 'dense'"):
        parse_policy("mixture:layers=dense")
    with pytest.raises(ValueError, match="made of other policies, not of mixtures"):
        parse_policy("mixture:layers=0=mixture")
    with pytest.raises(ValueError, match="layer 0 is given two policies"):
        Mixture(layers={0: "dense", "0": "scout"})
