"""Export archives: what torch would execute is refused, and what is data comes through whole."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from archive_payloads import (
    CONSTANTS,
    PLANTS,
    PROGRAM,
    WEIGHTS,
    Decoder,
    Entries,
    Plant,
    edit,
    exported,
    saved,
    write_entries,
)
from torch import Tensor, nn

from memcompile.compiler.archive import read_program
from memcompile.compiler.load import load
from memcompile.compiler.vet_texts import Refused, expression, guard, identifier


@pytest.fixture(scope="module")
def clean() -> Entries:
    torch.manual_seed(0)
    return saved(exported())


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_code_never_runs(plant: Plant, clean: Entries, tmp_path: Path) -> None:
    entries, marker = dict(clean), tmp_path / "marker"
    plant.plant(entries, marker)
    assert entries != clean
    path = write_entries(entries, tmp_path / "model.pt2")
    if plant.names:
        with pytest.raises(ValueError) as refusal:
            load(path)
        message = str(refusal.value)
        assert message.startswith(f"{path}: ") and "\n" not in message
        for word in plant.names:
            assert word in message, message
    else:
        program = load(path).program
        assert program is not None
        ids = torch.zeros(2, 5, dtype=torch.int64)
        program.module()(ids, ids)
    assert not marker.exists()


@pytest.mark.parametrize("plant", [p for p in PLANTS if p.fires], ids=lambda plant: plant.name)
def test_the_payload_is_live(
    plant: Plant, clean: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself runs it: the test above is not about duds."""
    entries, marker = dict(clean), tmp_path / "marker"
    plant.plant(entries, marker)
    path = write_entries(entries, tmp_path / "model.pt2")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("planted_module", None)
    ids = torch.zeros(3, 7, dtype=torch.int64)
    with contextlib.suppress(Exception), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        program = torch.export.load(path)
        if plant.fires == "run":
            module: Any = program.module()
            module.validate_inputs = False
            module(ids, ids)
    if not marker.exists():
        pytest.skip(f"torch {torch.__version__} does not run it any more")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def test_what_is_data_comes_through_unchanged(clean: Entries, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    program = exported(model)
    torch.export.save(program, tmp_path / "model.pt2")
    read = read_program(tmp_path / "model.pt2")
    ids, positions = torch.randint(0, 11, (2, 9)), torch.arange(9).expand(2, 9)
    assert torch.equal(read.module()(ids, positions), model(ids, positions))
    assert {k: v.shape for k, v in read.state_dict.items()} == {
        k: v.shape for k, v in program.state_dict.items()
    }
    ours, theirs = (
        [
            (n.op, str(n.target), n.name, str(n.meta.get("val")).strip("[()]"))
            for n in p.graph.nodes
            if n.op != "output"
        ]
        for p in (read, program)
    )
    assert ours == theirs
    stacks = [n.meta.get("nn_module_stack") for n in read.graph.nodes if "scaled" in n.name]
    assert stacks and stacks[0]
    assert read.range_constraints == program.range_constraints


def test_tied_weights_stay_tied(clean: Entries, tmp_path: Path) -> None:
    read = read_program(write_entries(clean, tmp_path / "model.pt2"))
    tied = read.state_dict["head.weight"], read.state_dict["embed.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_data_types(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Decoder().to(dtype)
    torch.export.save(exported(model), tmp_path / "model.pt2")
    read = read_program(tmp_path / "model.pt2")
    assert torch.equal(read.state_dict["mix.weight"], model.mix.weight)


def test_symbolic_arithmetic_and_subgraphs_are_read(tmp_path: Path) -> None:
    """Shape expressions with powers and quotients, a no_grad region, ** on a symbol."""

    class Shapes(Decoder):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            with torch.no_grad():
                steps = torch.arange(input_ids.shape[1] * 2, device=input_ids.device)[::2] // 2
            mask = steps[:, None] >= steps[None, :]
            x = self.embed(input_ids) * input_ids.shape[1] ** -0.5
            q, k, v = (y.unsqueeze(1) for y in self.mix(x).chunk(3, -1))
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.head(x + out.squeeze(1).reshape(-1, 8).view(*input_ids.shape, 8))

    model = Shapes().eval()
    torch.export.save(exported(model), tmp_path / "model.pt2")
    read = read_program(tmp_path / "model.pt2")
    ids = torch.randint(0, 11, (2, 9))
    assert torch.equal(read.module()(ids, ids), model(ids, ids))


def damaged(change: Callable[[Entries], None]) -> Callable[[Entries, Path], Path]:
    def make(entries: Entries, path: Path) -> Path:
        entries = dict(entries)
        change(entries)
        return write_entries(entries, path)

    return make


def first_weight(entries: Entries) -> str:
    return "data/weights/" + json.loads(entries[WEIGHTS])["config"]["mix.weight"]["path_name"]


def fake_weight(entries: Entries) -> None:
    """What an export under FakeTensorMode saves; torch loads zeros instead."""
    entries[first_weight(entries)] = b""


def short_weight(entries: Entries) -> None:
    entries[first_weight(entries)] = entries[first_weight(entries)][:-4]


def traversal(entries: Entries) -> None:
    edit(entries, WEIGHTS, lambda d: d["config"]["mix.weight"].update(path_name="../../x"))


def twice(entries: Entries, path: Path) -> Path:
    write_entries(entries, path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(f"model/{PROGRAM}", b"{}")
    return path


def deflated(entries: Entries, path: Path) -> Path:
    """A bomb: small on disk, a gigabyte unpacked."""
    write_entries(entries, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/weights/weight_99", bytes(1 << 24))
    return path


def overlapping(entries: Entries, path: Path) -> Path:
    """Many names for the same bytes: small on disk, large when read."""
    write_entries({**entries, "data/weights/big": bytes(1 << 16)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (big,) = (e for e in archive.infolist() if e.filename.endswith("big"))
        for number in range(50):
            alias = copy.copy(big)
            alias.filename = f"model/data/weights/big_{number}"
            archive.filelist.append(alias)
        archive._didModify = True  # type: ignore[attr-defined]
    return path


def climbing(entries: Entries, path: Path) -> Path:
    return write_entries({**entries, "../../../etc/x": b""}, path)


def flipped(entries: Entries, path: Path) -> Path:
    """One bit of a weight changed: its checksum tells."""
    write_entries(entries, path)
    data = bytearray(path.read_bytes())
    data[data.index(entries[first_weight(entries)])] ^= 1
    path.write_bytes(data)
    return path


def cut(entries: Entries, path: Path) -> Path:
    write_entries(entries, path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def big_endian(entries: Entries) -> None:
    entries["byteorder"] = b"big"


DAMAGED: dict[str, tuple[Callable[[Entries, Path], Path], str]] = {
    "truncated": (cut, "truncated or damaged zip"),
    "flipped bit": (flipped, "Bad CRC-32"),
    "entry twice": (twice, "is in there twice"),
    "compressed": (deflated, "compressed or encrypted"),
    "overlapping": (overlapping, "claim"),
    "path traversal": (climbing, "not a plain path"),
    "payload outside": (damaged(traversal), "not a plain file name"),
    "no program": (damaged(lambda e: e.__delitem__(PROGRAM)), "no exported program"),
    "no weights": (damaged(lambda e: e.__delitem__(first_weight(e))), "'mix.weight' should be"),
    "no config": (damaged(lambda e: e.__delitem__(WEIGHTS)), "no entry"),
    "fake weights": (damaged(fake_weight), "holds 0 bytes"),
    "short weights": (damaged(short_weight), "bytes where"),
    "big endian": (damaged(big_endian), "endian"),
    "no JSON": (damaged(lambda e: e.update({PROGRAM: b"{"})), "is damaged"),
    "deep JSON": (damaged(lambda e: e.update({PROGRAM: b"[" * 200_000})), "is damaged"),
    "another schema": (
        damaged(lambda e: edit(e, PROGRAM, lambda d: d["schema_version"].update(major=99))),
        "cannot read this exported program",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_line(case: str, clean: Entries, tmp_path: Path) -> None:
    make, words = DAMAGED[case]
    path = make(dict(clean), tmp_path / "model.pt2")
    with pytest.raises(ValueError) as refusal:
        load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 700
    assert words in message


def test_nothing_is_left_behind(
    clean: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    read_program(write_entries(clean, tmp_path / "model.pt2"))
    with pytest.raises(ValueError):
        read_program(flipped(clean, tmp_path / "flipped.pt2"))
    assert not list(scratch.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flipped.pt2", "model.pt2", "scratch"]


def test_trust_loads_what_is_refused(clean: Entries, tmp_path: Path) -> None:
    entries, marker = dict(clean), tmp_path / "marker"
    plant = next(p for p in PLANTS if p.name == "opaque object")
    plant.plant(entries, marker)
    with contextlib.suppress(ValueError), quiet():  # the object is no tensor, so it goes no further
        load(write_entries(entries, tmp_path / "model.pt2"), trust_pickle=True)
    assert marker.exists()


EXPRESSIONS = {
    "32*s0": True,
    "Mul(Integer(4), Symbol('s70', positive=True, integer=True))": True,
    "Pow(Symbol('s70', integer=True), Integer(2))": True,
    "FloorDiv(s0 + 1, 2)": True,
    "Float('0.5', precision=53)": True,
    "Max(1, Min(s0, 64)) >= 2": True,
    "-oo": True,
    "__import__('os')": False,
    "s0.__class__": False,
    "Symbol('__import__(\"os\")')": False,
    "Symbol('s0', positive='x')": False,
    "Symbol(**{})": False,
    "[s0 for s0 in 1,]": False,
    "(lambda: 1)()": False,
    "s0[0]": False,
    "f'{s0}'": False,
    "'os'": False,
    "open": False,
    "sympify('1')": False,
    "s0; s1": False,
    "s0\n1": False,
    "s0 if s0 else s1": False,
    "(s0 := 1)": False,
    "10**10**10": False,
    "Pow(Pow(9, 64), 64)": False,
    "Pow(2, 9999)": False,
    "s0**s1": False,
    "LShift(1, 10**9)": False,
    "9" * 5000: False,
    "(" * 300 + ")" * 300: False,
    "": False,
}


@pytest.mark.parametrize("text", EXPRESSIONS, ids=lambda text: text[:30] or "empty")
def test_shape_expressions(text: str) -> None:
    if EXPRESSIONS[text]:
        assert expression(text).replace(" ", "") == text.replace(" ", "")
    else:
        with pytest.raises(Refused, match="shape expression"):
            expression(text)


GUARDS = {
    "L['input_ids'].size()[1] == L['position_ids'].size()[1]": True,
    "2 <= L['args'][0].size()[0] and L['x'].stride()[1] % 8 == 0": True,
    "max(1, L['x'].size()[0]) <= 2048": True,
    "__import__('os')": False,
    "L['x'].__class__": False,
    "L['x'].size().__class__": False,
    "L[__import__('os')]": False,
    "L['x'].size()[f()]": False,
    "torch.load('x')": False,
    "math.floor(1)": False,
    "True, 1": False,
    "max(1, key=print)": False,
}


@pytest.mark.parametrize("text", GUARDS)
def test_guards(text: str) -> None:
    if GUARDS[text]:
        assert guard(text) == text
    else:
        with pytest.raises(Refused):
            guard(text)


@pytest.mark.parametrize("name", ["a.b", "a b", "a\n", "1a", "a'", 'a"', "a(", None, 3, "ﬁ"])
def test_identifiers(name: Any) -> None:
    with pytest.raises(Refused):
        identifier(name)
    assert identifier("as_1") == "as_1"


def spec_of(of: str, kind: str, keys: list[str]) -> Callable[[Entries], None]:
    def change(data: Any) -> None:
        signature = data["graph_module"]["module_call_graph"][0]["signature"]
        leaf = {"type": None, "context": None, "children_spec": []}
        spec = {"type": kind, "context": json.dumps(keys), "children_spec": [leaf] * len(keys)}
        signature[of] = json.dumps([1, spec])

    return lambda entries: edit(entries, PROGRAM, change)


def test_an_output_of_transformers_is_read_without_it(clean: Entries, tmp_path: Path) -> None:
    kind = "transformers.modeling_outputs.CausalLMOutputWithPast"
    path = damaged(spec_of("out_spec", kind, ["logits"]))(clean, tmp_path / "model.pt2")
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert read_program(path).module()(ids, ids)["logits"].shape == (2, 5, 11)


@pytest.mark.parametrize("of", ["in_spec", "out_spec"])
def test_a_cache_in_the_signature_is_named(of: str, clean: Entries, tmp_path: Path) -> None:
    kind = "transformers.cache_utils.DynamicCache"
    path = damaged(spec_of(of, kind, ["a", "b"]))(clean, tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"takes or returns a cache .*use_cache=False"):
        load(path)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


STRAY = (None, 0, -1, 1 << 40, "", True, [], {}, "x", 1.5, [1], {"as_int": 1}, {"name": "x"}, "s0")


@pytest.mark.parametrize("seed", range(36))
def test_any_change_is_read_or_refused_in_one_line(
    seed: int, clean: Entries, tmp_path: Path
) -> None:
    random, entries = Random(seed), dict(clean)
    name = (PROGRAM, PROGRAM, PROGRAM, PROGRAM, WEIGHTS, CONSTANTS)[seed % 6]
    data = json.loads(entries[name])
    *path, last = random.choice(list(places(data)))
    holder = data
    for key in path:
        holder = holder[key]
    holder[last] = random.choice(STRAY)
    entries[name] = json.dumps(data).encode()
    path_on_disk = write_entries(entries, tmp_path / "model.pt2")
    try:
        load(path_on_disk)
    except ValueError as refusal:
        assert str(refusal).startswith(f"{path_on_disk}: ") and "\n" not in str(refusal)
