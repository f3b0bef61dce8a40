"""`memcompile distill`: fits the states of a policy to one model's attentions; can be taken up."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..evaluation.records import differences, write_whole
from ..models.memory import Policy
from ..passes.classify_tokens import classify_tokens
from ..passes.find_sites import find_sites
from ..passes.result import Site
from .attention_transfer import Activations, Frozen, StateOps, Transfer
from .capture import capture
from .evaluate import FileTokenizer
from .pipeline import Compiled, build_captured, normalise
from .policy_file import SUFFIX, fingerprint, fit, read_policy, read_tensors, write_policy
from .progress import bar, doing, note
from .settings import kernels as kernels_setting

if TYPE_CHECKING:
    from rich.table import Table

    from .load import Loaded

FORMAT, VERSION = "memcompile-distillation", 1
HELD_OUT = 8  # sequences that are never learnt from, where there are enough
LOOKS = 20  # how often a run measures on them


@dataclass(frozen=True)
class Given:
    """What the command line said, beside the model.

    Attributes:
        policy: gives some layers a state.
        data: the text to learn from, or its token ids.
        length: tokens a sequence, what opens it included; `batch` sequences a step.
        rate: the highest learning rate.
        keep_every: steps between states that a killed run is taken up from.
    """

    policy: Policy
    data: str | list[int]
    length: int
    batch: int
    steps: int
    rate: float
    seed: int
    keep_every: int
    kernels: str | None


@dataclass
class Progress:
    """How far a run is, apart from its weights.

    Attributes:
        train: sum of each layer's training errors since the last look.
        curve: what each look found: step, mean training errors since the one before, and the
            errors on sequences that are held out, by site.
    """

    step: int = 0
    seconds: float = 0.0
    train: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """What a distillation found, and the files it left."""

    sites: list[Site]
    progress: Progress
    settings: dict[str, Any]
    references: dict[str, str]
    files: list[Path]

    def errors(self) -> dict[str, tuple[float, float]]:
        """Relative squared error on what was held out, before and after, by site."""
        first, last = (self.progress.curve[i]["held_out"] for i in (0, -1))
        return {site.name: (first[site.name], last[site.name]) for site in self.sites}

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "sites": {
                site.name: {"layer": site.layer, "before": before, "after": after}
                for site in self.sites
                for before, after in (self.errors()[site.name],)
            },
            "curve": self.progress.curve,
            "seconds": round(self.progress.seconds, 1),
            "references": self.references,
        }


def distill(loaded: Loaded, name: str, max_context: int | None, given: Given, out: Path) -> Outcome:
    """Fits the states and writes the policy file `out`, a log and a picture beside it.

    While it runs, all that it has is kept in ``NAME.training.safetensors`` beside `out`; the same
    call goes on from there.

    Raises:
        NotRewritten: as `build`.
        ValueError: something given cannot be used; nothing is written then.
    """
    check_libraries()
    with doing("capture"):
        captured = capture(loaded.model, max_context=max_context)
    captured.name = name
    compiled = build_captured(
        captured, given.policy, max_context=max_context, check=False, kernels="off"
    )
    learning = _learning(compiled, given)
    text, about = _text(loaded, name, given)
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "memcompile": __version__,
        "torch": torch.__version__,
        "model": {"name": name, "weights": fingerprint(captured.program)},
        "policy": compiled.preset.to_json(),
        **about,
        **{key: getattr(given, key) for key in ("length", "batch", "steps", "rate", "seed")},
    }
    module, _ = normalise(captured.program)
    sites, _ = find_sites(module, classify_tokens(module))
    frozen = Frozen(module, sites, [site.name for site in learning])
    ops = StateOps(kernels_setting(given.kernels))
    transfer = Transfer(
        learning,
        compiled.memories,
        steps=given.steps,
        rate=given.rate,
        device=next(iter(module.graph.nodes)).meta["val"].device,
        ops=ops,
    )
    sequences = Sequences.cut(text, about["start"], given, compiled)
    kept = out.with_name(out.name.removesuffix(SUFFIX) + ".training.safetensors")
    progress = _take_up(kept, settings, transfer)
    run = _Run(frozen, transfer, sequences, progress, settings, kept)
    run.to_end(given)
    outcome = Outcome(learning, progress, settings, ops.references, [])
    outcome.files = _write(outcome, compiled, transfer, out)
    kept.unlink(missing_ok=True)
    return outcome


def check_libraries() -> None:
    """Refuses to start what could not be finished.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("memcompile distill needs matplotlib: pip install 'memcompile[eval]'")


def check_out(out: Path, force: bool) -> None:
    """Refuses a file that must not be written.

    Raises:
        ValueError: its name is not that of a policy file.
        FileExistsError: it is there, and `force` is not given or it is no policy file.
        FileNotFoundError: its folder is not.
    """
    if out.suffix != SUFFIX:
        raise ValueError(f"{out}: a policy file's name ends in {SUFFIX}; give --out NAME{SUFFIX}")
    if not out.resolve().parent.is_dir():
        raise FileNotFoundError(f"{out}: its folder does not exist; make it first")
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"{out}: already exists and is kept; give --force to replace it")
    try:
        read_policy(out)
    except (OSError, ValueError) as error:
        raise FileExistsError(
            f"{out}: not a policy file, so it is kept even with --force; give another --out"
        ) from error


def report(outcome: Outcome) -> Table:
    """One row a layer: its error before and after."""
    from rich.table import Table

    shown = Table(
        title="squared error of a layer's output, relative to dense's, on held-out text",
        title_justify="left",
    )
    shown.add_column("layer", justify="right")
    shown.add_column("name", overflow="fold")
    for column in ("before", "after"):
        shown.add_column(column, justify="right")
    for site in outcome.sites:
        errors = outcome.errors()[site.name]
        shown.add_row(str(site.layer), site.name, *(f"{error:.4g}" for error in errors))
    return shown


def _learning(compiled: Compiled, given: Given) -> list[Site]:
    """The sites that become states.

    Raises:
        ValueError: there is none, or the sequences are too short for them.
    """
    sites = [site for site in compiled.sites if compiled.memories[site.name].state is not None]
    if not sites:
        raise ValueError(
            f"policy {compiled.preset.preset!r} gives no layer of {compiled.report.model} a state, "
            "so there is nothing to fit; give a policy that does, as --policy hybrid"
        )
    window = max(compiled.memories[site.name].own_window for site in sites)
    if given.length <= window:
        raise ValueError(
            f"--length {given.length}: a window of {window} tokens holds it all, and the state "
            "would read nothing; give more, several windows at least"
        )
    limit = compiled.program.limit if compiled.program is not None else None
    if limit is not None and given.length > limit:
        raise ValueError(f"--length {given.length}: the model has positions for {limit} tokens")
    return sites


@dataclass(frozen=True)
class Sequences:
    """The text in sequences [count, length]: to learn from, and held out."""

    learnt: Tensor
    held_out: Tensor
    seed: int

    @classmethod
    def cut(
        cls, tokens: Sequence[int], start: Sequence[int], given: Given, compiled: Compiled
    ) -> Sequences:
        """Cuts tokens; every sequence is opened by `start`. Some, evenly spread, are held out.

        Raises:
            ValueError: there are too few tokens, or one that the model does not know.
        """
        room = given.length - len(start)
        count = len(tokens) // room if room > 0 else 0
        if count < given.batch + 1:
            raise ValueError(
                f"the text has {len(tokens)} tokens, {count} sequences of {given.length}; a batch "
                f"of {given.batch} and one to hold out need {given.batch + 1}: give more --data, "
                "or a smaller --length or --batch"
            )
        cut = torch.tensor(tokens[: count * room]).view(count, room)
        cut = torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), cut], 1)
        assert compiled.program is not None
        low, high = (int(token) for token in cut.aminmax())
        if low < 0 or high >= compiled.program.vocabulary:
            raise ValueError(
                f"the text holds the token {high if low >= 0 else low}, and the model knows "
                f"{compiled.program.vocabulary}; is it meant for another model?"
            )
        held = min(HELD_OUT, max(1, count // 8), count - given.batch)
        chosen = torch.tensor([(2 * i + 1) * count // (2 * held) for i in range(held)])
        rest = torch.ones(count, dtype=torch.bool).index_fill(0, chosen, False)
        return cls(cut[rest], cut[chosen], given.seed)

    def batch(self, step: int, size: int) -> Tensor:
        """What is learnt from at a step: a function of seed and step alone. Every sequence is used
        once before any is again."""
        count = len(self.learnt)
        rows = []
        for at in range(step * size, (step + 1) * size):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + at // count)
            rows.append(int(torch.randperm(count, generator=generator)[at % count]))
        return self.learnt[rows]


@dataclass
class _Run:
    """A distillation on its way."""

    frozen: Frozen
    transfer: Transfer
    sequences: Sequences
    progress: Progress
    settings: dict[str, Any]
    kept: Path
    steps_kept: int = 0

    def to_end(self, given: Given) -> None:
        progress, transfer = self.progress, self.transfer
        self.steps_kept = progress.step
        started = time.monotonic() - progress.seconds
        every = max(1, given.steps // LOOKS)
        try:
            with bar(given.steps, progress.step) as advance:
                if not progress.curve:
                    self._look()
                    transfer.calibrate(self.frozen(self.sequences.batch(0, given.batch)))
                while progress.step < given.steps:
                    tokens = self.sequences.batch(progress.step, given.batch)
                    errors = transfer.learn(self.frozen(tokens))
                    progress.step += 1
                    for name, error in errors.items():
                        progress.train[name] = progress.train.get(name, 0.0) + error
                    if progress.step % every == 0 or progress.step == given.steps:
                        self._look()
                    progress.seconds = time.monotonic() - started
                    if progress.step % given.keep_every == 0:
                        self._keep()
                    mean = sum(errors.values()) / len(errors)
                    advance(f"mean error {mean:.3g}")
        except KeyboardInterrupt:
            print(
                f"{self.steps_kept} of {given.steps} steps are kept in {self.kept}; the same "
                "command goes on",
                file=sys.stderr,
            )
            raise

    def _look(self) -> None:
        """Measures on the sequences that are held out."""
        progress = self.progress
        held = self.transfer.errors(self._held_out())
        entry: dict[str, Any] = {"step": progress.step}
        if progress.curve:
            since = progress.step - progress.curve[-1]["step"]
            entry["train"] = {name: total / since for name, total in progress.train.items()}
        progress.curve.append({**entry, "held_out": held})
        progress.train = {}
        worst = max(held, key=lambda name: held[name])
        mean = sum(held.values()) / len(held)
        note(
            f"step {progress.step}: error on held-out text {mean:.4g}, at most "
            f"{held[worst]:.4g} ({worst})"
        )

    def _held_out(self) -> Iterator[Mapping[str, Activations]]:
        for row in self.sequences.held_out:
            yield self.frozen(row[None])

    def _keep(self) -> None:
        from safetensors.torch import save

        about = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "progress": asdict(self.progress),
        }
        tensors = {name: t.cpu().contiguous() for name, t in self.transfer.state().items()}
        write_whole(self.kept, save(tensors, {FORMAT: json.dumps(about)}))
        self.steps_kept = self.progress.step


def _take_up(kept: Path, settings: Mapping[str, Any], transfer: Transfer) -> Progress:
    """What an earlier run of the same command has, put into `transfer`; nothing if there is none.

    Raises:
        ValueError: the file is damaged, or another command's.
    """
    if not kept.exists():
        return Progress()
    mend = f"remove {kept.name} to begin anew, or give another --out"
    about, tensors = read_tensors(kept, FORMAT, "the state of an unfinished distillation")
    held, progress = about.get("settings"), about.get("progress")
    if not isinstance(held, dict) or not isinstance(progress, dict):
        raise ValueError(f"{kept}: damaged: no settings or no progress; {mend}")
    told = differences(held, settings)
    if told:
        raise ValueError(f"{kept}: the state of another distillation ({told}); {mend}")
    try:
        taken = Progress(**progress)
        transfer.load(taken.step, tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{kept}: damaged: {error}; {mend}") from error
    return taken


def _text(loaded: Loaded, name: str, given: Given) -> tuple[list[int], dict[str, Any]]:
    """The tokens of the data, and what of them the result depends on."""
    start: list[int] = []
    if isinstance(given.data, list):
        tokens, tokenizer = given.data, None
    elif loaded.tokenizer is None:
        raise ValueError(
            f"{name}: has no tokenizer.json to read --data with; give token ids, with --ids"
        )
    else:
        fast = FileTokenizer(loaded.tokenizer / "tokenizer.json")
        tokens, tokenizer, start = fast.encode(given.data), fast.sha256, [*fast.start]
    digest = hashlib.sha256(repr(given.data).encode()).hexdigest()
    return tokens, {"data": digest, "tokenizer": tokenizer, "start": start}


def _write(outcome: Outcome, compiled: Compiled, transfer: Transfer, out: Path) -> list[Path]:
    from ..evaluation.plots import learning, save

    assert compiled.captured is not None
    base = out.name.removesuffix(SUFFIX)
    log = out.with_name(f"{base}.losses.json")
    write_whole(log, json.dumps(outcome.to_json(), indent=1, allow_nan=False) + "\n")
    title = f"{outcome.settings['model']['name']}, {compiled.preset.preset}"
    picture = save(learning(outcome.progress.curve, title), out.with_name(f"{base}.losses.png"))
    errors = {name: [*pair] for name, pair in outcome.errors().items()}
    policy = fit(
        compiled.preset,
        transfer.weights(),
        compiled.sites,
        compiled.captured.program,
        {"settings": outcome.settings, "errors": errors},
    )
    # Last, so that who finds it finds the rest.
    write_policy(out, policy)
    return [out, log, picture]
