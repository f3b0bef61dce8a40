"""`memcompile eval`: builds the engines, and hands them to the evaluation."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..evaluation.filler import Filler, NumberFiller, ProseFiller, TextFiller
from ..evaluation.protocol import Contender
from ..evaluation.records import check_folder, open_records, write_whole
from ..evaluation.run import DENSE, Item, Plan, Source, expected, prepare, run
from ..evaluation.summary import Row, summarise
from ..evaluation.tables import markdown, table
from ..evaluation.tasks import tasks_of
from ..evaluation.text_loss import NAME as TEXT_LOSS
from ..evaluation.tokens import NumberTokenizer, Tokenizer
from ..evaluation.wordings import BYTES, NATURAL, PROFILES, Wording, numbers, templates
from ..models.memory import Preset, preset
from ..models.memory.dense import Dense
from ..models.networks.recall import library_text
from .archive import one_line
from .package import read as read_package
from .policy_file import FittedPolicy, choose
from .progress import bar, doing
from .settings import kernels as kernels_setting

if TYPE_CHECKING:
    from rich.console import Group

    from .capture import Captured
    from .load import Loaded

FORMAT, VERSION = "memcompile-evaluation", 2
SUMMARY, TABLE = "summary.json", "table.md"


@dataclass(frozen=True)
class Given:
    """What the command line said, beside the model.

    Attributes:
        policies: by the name that the figures carry: the preset's name, or its file, and options.
        tasks, lengths: None: the defaults.
        text: files that filler and text loss are taken from.
        wording: name of a profile; None: by the tokenizer.
        start: token that opens every sequence of a model without a tokenizer.
    """

    policies: Mapping[str, tuple[str, Mapping[str, Any]]]
    tasks: tuple[str, ...] | None
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    stride: int
    text: tuple[Path, ...]
    wording: str | None
    start: int | None
    kernels: str | None


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, however it came.

    Attributes:
        sha256: fingerprint of its weights and program.
        preset: the policy it was compiled with; None for a model that was not.
        tokenizer: the folder with its tokenizer.json, or None.
    """

    name: str
    captured: Captured
    sha256: str
    max_context: int | None
    preset: Preset | None = None
    tokenizer: Path | None = None


@dataclass
class Outcome:
    """What an evaluation found, and the files it left.

    Attributes:
        notes: what a reader has to know of a policy, and what is not so of dense too.
    """

    rows: list[Row]
    title: str
    settings: dict[str, Any]
    notes: list[str]
    files: list[Path] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "title": self.title,
            "settings": self.settings,
            "notes": self.notes,
            "rows": [row.to_json() for row in self.rows],
        }


class FileTokenizer:
    """A tokenizer.json, with what it puts in front of every sequence.

    Raises:
        ValueError: the file is damaged, or `tokenizers` is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError as error:
            raise ValueError(
                f"{path}: reading it needs the package `tokenizers`: pip install 'memcompile[hf]'"
            ) from error
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises its base class
            raise ValueError(f"{path}: no tokenizer that can be read: {one_line(error)}") from error
        # Cutting and padding are settings of whoever used it last, not of the model.
        self._fast.no_truncation()
        self._fast.no_padding()
        self._path = path
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    @cached_property
    def start(self) -> list[int]:
        plain, full = self.encode("a"), [*self._fast.encode("a").ids]
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        return full[:at]

    @cached_property
    def end(self) -> int | None:
        """The token that ends a text, as tokenizer_config.json beside it says."""
        config = self._path.with_name("tokenizer_config.json")
        if not config.is_file():
            return None
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{config}: damaged JSON: {error}") from error
        word = named.get("content") if isinstance(named, dict) else named
        found: int | None = self._fast.token_to_id(word) if isinstance(word, str) else None
        return found

    @property
    def vocabulary(self) -> int:
        size: int = self._fast.get_vocab_size()
        return size

    def encode(self, text: str) -> list[int]:
        return [*self._fast.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._fast.decode([*tokens])
        return text


def subject_of(loaded: Loaded, name: str, max_context: int | None) -> Subject:
    """A model as it was loaded."""
    from .capture import capture

    with doing("capture"):
        captured = capture(loaded.model, max_context=max_context)
    captured.name = name
    return Subject(name, captured, loaded.sha256, max_context, tokenizer=loaded.tokenizer)


def package_subject(folder: Path) -> Subject:
    """The model in a folder that memcompile wrote."""
    with doing("read"):
        package = read_package(folder)
    return Subject(
        folder.resolve().name,
        package.captured,
        package.sha256,
        package.max_context,
        package.preset,
        folder if (folder / "tokenizer.json").is_file() else None,
    )


def evaluate(subject: Subject, given: Given, folder: Path) -> Outcome:
    """Runs what `folder` does not hold yet, then writes its tables and pictures anew.

    Raises:
        ReadTooMuch: a policy read what its memory does not allow.
        ValueError: something given cannot be used; nothing is run then.
    """
    check_libraries()
    presets = _presets(subject, given)
    source, about = _source(subject, given)
    plan = Plan(
        given.tasks or _default_tasks(source),
        given.lengths,
        given.depths,
        given.samples,
        given.seed,
        given.stride,
    )
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "memcompile": __version__,
        "torch": torch.__version__,
        "model": {"name": subject.name, "sha256": subject.sha256},
        "policies": {name: _described(chosen) for name, chosen in presets.items()},
        "plan": plan.to_json(),
        **about,
        "kernels": kernels_setting(given.kernels),
        "max_context": subject.max_context,
    }
    # All that may be refused comes before the folder is written to.
    check_folder(folder, settings)
    contenders, notes = _contenders(subject, presets, given.kernels)
    prepare(plan, source, contenders)
    with open_records(folder, settings) as records:
        keys = [item.key(contender.name) for item, contender in expected(plan, contenders)]
        try:
            with bar(sum(key not in records.done for key in keys)) as advance:

                def told(item: Item, policy: str) -> None:
                    advance(f"{item.task} {item.length} {policy}")

                run(plan, source, contenders, records, told)
        except KeyboardInterrupt:
            kept = f"{len(records.done)} of {len(keys)} are kept in {folder}"
            print(f"{kept}; the same command goes on", file=sys.stderr)
            raise
        done = [*records.done.values()]
    title = f"{subject.name}: {', '.join(plan.tasks)}"
    outcome = Outcome(summarise(plan, contenders, done), title, settings, notes)
    outcome.files = _write(outcome, done, folder)
    return outcome


def check_libraries() -> None:
    """Refuses to start what could not be finished.

    Raises:
        ValueError: a library of the extra `eval` is not installed.
    """
    missing = [name for name in ("scipy", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"memcompile eval needs {' and '.join(missing)}: pip install 'memcompile[eval]'"
        )


def report(outcome: Outcome) -> Group:
    """The rows as a table."""
    return table(outcome.rows, outcome.title, outcome.notes)


def _presets(subject: Subject, given: Given) -> dict[str, Preset]:
    """By name, dense first."""
    policies: dict[str, Preset]
    policies = {name: choose(kind, options) for name, (kind, options) in given.policies.items()}
    if not policies and subject.preset is not None:
        policies = {subject.preset.to_json()["preset"]: subject.preset}
    dense = [name for name, chosen in policies.items() if isinstance(chosen, Dense)]
    others = {name: chosen for name, chosen in policies.items() if name not in dense}
    if len(dense) > 1 or not others:
        found = f"{len(dense)} of {DENSE!r} and {len(others)} others"
        raise ValueError(
            f"{subject.name}: policies to hold against {DENSE!r} are needed, and at most one "
            f"{DENSE!r}, got {found}; give --policy, as in --policy scout:budget=512"
        )
    # Pages of one size let dense share what the others have read.
    size = next(iter(others.values())).memory(0, 0).page_size
    reference = policies[dense[0]] if dense else preset(DENSE, page_size=size)
    return {DENSE: reference, **others}


def _described(chosen: Preset) -> dict[str, Any]:
    """All of a policy that figures depend on."""
    about = chosen.to_json()
    return about | {"fitted": chosen.sha256} if isinstance(chosen, FittedPolicy) else about


def _source(subject: Subject, given: Given) -> tuple[Source, dict[str, Any]]:
    """What prompts are made of, and what of that the figures depend on."""
    texts = [_read(path) for path in given.text]
    text = "\n".join(texts) if texts else None
    tokenizer: Tokenizer
    filler: Filler
    wording: Wording
    if subject.tokenizer is None:
        if given.text or given.wording:
            raise ValueError(
                f"{subject.name}: --text and --wording need a tokenizer.json, and it has none; "
                "without them its prompts are token ids"
            )
        vocabulary = _vocabulary(subject.captured)
        start = () if given.start is None else (given.start,)
        tokenizer = NumberTokenizer(vocabulary, start)
        wording, filler = numbers(vocabulary, start), NumberFiller(vocabulary, start)
        about: dict[str, Any] = {"tokenizer": None}
    else:
        if given.start is not None:
            raise ValueError(f"{subject.name}: --start goes with models without a tokenizer.json")
        tokenizer = FileTokenizer(subject.tokenizer / "tokenizer.json")
        bytewise = tokenizer.vocabulary == 256
        wording = PROFILES[given.wording] if given.wording else (BYTES if bytewise else NATURAL)
        if text is None and bytewise:
            # What the shipped checkpoints were trained on, the files that training left out.
            text = library_text(held_out=True).decode()
        filler = ProseFiller() if text is None else TextFiller(text)
        about = {"tokenizer": tokenizer.sha256}
    about["start"] = [*tokenizer.start]
    about["wording"] = templates(wording)
    about["text"] = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    return Source(tokenizer, wording, filler, text), about


def _default_tasks(source: Source) -> tuple[str, ...]:
    return (*tasks_of(source.wording), *([TEXT_LOSS] if source.text is not None else []))


def _vocabulary(captured: Captured) -> int:
    """Token ids that a model takes, told from its embedding."""
    from .pipeline import build_captured

    program = build_captured(captured, preset(DENSE), check=False, kernels="off").program
    assert program is not None
    return program.vocabulary


def _contenders(
    subject: Subject, presets: Mapping[str, Preset], kernels: str | None
) -> tuple[list[Contender], list[str]]:
    """Dense first; and notes on the others."""
    from .pipeline import build_captured

    contenders: list[Contender] = []
    notes: dict[str, list[str]] = {}
    for name, chosen in presets.items():
        with doing(name):
            compiled = build_captured(
                subject.captured,
                chosen,
                max_context=subject.max_context,
                check=subject.preset is None,  # a package was checked when it was written
                kernels=kernels,
            )
        program = compiled.program
        assert program is not None
        contenders.append(Contender(name, compiled.engine, program.layouts, program.limit))
        notes[name] = compiled.report.notes
    told = [f"{name}: {n}" for name, own in notes.items() for n in own if n not in notes[DENSE]]
    return contenders, told


def _write(outcome: Outcome, records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    from ..evaluation.plots import plot

    write_whole(folder / SUMMARY, json.dumps(outcome.to_json(), indent=1, allow_nan=False) + "\n")
    write_whole(folder / TABLE, markdown(outcome.rows, outcome.title, outcome.notes))
    return [folder / SUMMARY, folder / TABLE, *plot(outcome.rows, records, folder)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise ValueError(f"{path}: expected UTF-8 text, found {found}") from None
