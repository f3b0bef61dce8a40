"""Policy files: a policy with the weights that were fitted for its states, for one model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..evaluation.records import write_whole
from ..models.memory import PRESETS, Policy, check_options, preset, preset_from_json
from ..models.memory.spec import Memory
from ..models.memory.state import state_weights
from .archive import one_line

if TYPE_CHECKING:
    from ..passes.result import Site

FORMAT, VERSION = "memcompile-policy", 1
SUFFIX = ".safetensors"
_SHAPE = ("heads", "kv_heads", "key_dim", "value_dim")
_FACTS = ("layer", *_SHAPE)


@dataclass(frozen=True)
class FittedPolicy(Policy):
    """A policy, and the weights that were fitted for the states it gives to one model's layers.

    Attributes:
        base: the policy, of the model's layers (`for_layers`).
        sites: by site name its layer, heads, kv_heads, key_dim and value_dim.
        fitted: by site name the tensors of `state_weights`, float32.
        model: `fingerprint` of the model they were fitted to.
        training: how they were fitted and what came of it, as JSON values.

    Raises:
        ValueError: a site without a state, or tensors that its state does not have.
    """

    base: Policy
    sites: Mapping[str, Mapping[str, int]]
    fitted: Mapping[str, Mapping[str, Tensor]]
    model: str
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sites or self.sites.keys() != self.fitted.keys():
            raise ValueError(
                f"tensors for the sites {_names(self.fitted)}, shapes of the sites "
                f"{_names(self.sites)}; give both for each site, and at least one"
            )
        for name, facts in self.sites.items():
            _check_facts(name, facts)
            memory = self.base.memory(facts["layer"], 0)
            _check_tensors(name, facts, memory, self.fitted[name])

    @property
    def preset(self) -> str:  # type: ignore[override]
        """The name of the policy."""
        return self.base.preset

    def memory(self, layer: int, window: int) -> Memory:
        """As the policy's."""
        return self.base.memory(layer, window)

    def for_layers(self, names: Sequence[str]) -> Self:
        """As the policy's; which sites the weights are for is checked by `check`."""
        return dataclasses.replace(self, base=self.base.for_layers(names))

    def to_json(self) -> dict[str, Any]:
        """The policy's: what was fitted for it has no place in JSON."""
        return self.base.to_json()

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The policy with other options, which leave the memories of the fitted sites as they are.

        Raises:
            ValueError: an unknown option, or one that the weights depend on.
        """
        changed = preset_from_json({**self.base.to_json(), **options})
        for name, facts in self.sites.items():
            layer = facts["layer"]
            if changed.memory(layer, 0) != self.base.memory(layer, 0):
                raise ValueError(
                    f"with {', '.join(f'{k}={v!r}' for k, v in options.items())} the site {name!r} "
                    "has another memory than the one its weights were fitted for; leave that to "
                    "the policy file, or distil again"
                )
        return dataclasses.replace(self, base=changed)

    def check(self, sites: Iterable[Site]) -> None:
        """Refuses a model that the weights cannot belong to.

        Raises:
            ValueError: a fitted site is missing there, or stands elsewhere, or has other heads.
        """
        there = {site.name: site for site in sites}
        for name, facts in self.sites.items():
            if name not in there:
                raise ValueError(
                    f"weights were fitted for the site {name!r}, which this model does not have; "
                    f"its sites are {_names(there)}: give the policy of this model"
                )
            found = {fact: getattr(there[name], fact) for fact in _FACTS}
            if found != dict(facts):
                raise ValueError(
                    f"weights were fitted for the site {name!r} with {_spelled(facts)}, and this "
                    f"model has it with {_spelled(found)}: give the policy of this model"
                )

    def notes(self, program: ExportedProgram) -> list[str]:
        """What a reader of a report has to know of the weights' use with this program."""
        if fingerprint(program) == self.model:
            return []
        return [
            "the states' weights were fitted to another model of the same shape: its weights differ"
        ]

    @property
    def sha256(self) -> str:
        """Fingerprint of the fitted tensors."""
        flat = self._flat()
        return _digest((name, flat[name]) for name in sorted(flat))

    def _flat(self) -> dict[str, Tensor]:
        return {
            f"{site}/{key}": tensor
            for site, tensors in self.fitted.items()
            for key, tensor in tensors.items()
        }


def fit(
    chosen: Policy,
    fitted: Mapping[str, Mapping[str, Tensor]],
    sites: Iterable[Site],
    program: ExportedProgram,
    training: Mapping[str, Any] | None = None,
) -> FittedPolicy:
    """Weights at hand as a policy of the model whose sites and program these are.

    Raises:
        ValueError: as `FittedPolicy` and its `check`.
    """
    sites = list(sites)
    facts = {site.name: {fact: getattr(site, fact) for fact in _FACTS} for site in sites}
    unknown = [name for name in fitted if name not in facts]
    if unknown:
        raise ValueError(
            f"weights for {_names(unknown)}, and the model's sites are {_names(facts)}"
        )
    mine = {name: facts[name] for name in fitted}
    return FittedPolicy(chosen, mine, fitted, fingerprint(program), training or {})


def choose(
    policy: Policy | str | os.PathLike[str],
    options: Mapping[str, Any],
    beside: Iterable[str] = (),
) -> Policy:
    """What a user gives as a policy: the name of a preset, a policy file, or an object.

    Args:
        options: fields of the policy.
        beside: names of the options that whoever asks takes beside them, for messages.

    Raises:
        ValueError, FileNotFoundError: as `preset` and `read_policy`; or options beside an object.
        TypeError: something else, or an object that lacks what a policy has.
    """
    if isinstance(policy, Policy):
        _check_own(policy)
        if options:
            raise ValueError(
                f"policy is a {type(policy).__name__} and has its fields already; make it with "
                f"{', '.join(f'{k}={v!r}' for k, v in options.items())}, and give it alone"
            )
        return policy
    if not isinstance(policy, str | os.PathLike):
        raise TypeError(f"expected a policy's name, a policy file or a Policy, {_instead(policy)}")
    if not is_file(policy):
        check_options(str(policy), options, beside)
        return preset(str(policy), **options)
    return read_policy(Path(policy)).with_options(options)


def _check_own(policy: Policy) -> None:
    """Refuses a policy that reports and keys could not tell from another."""
    kind = type(policy)
    if not dataclasses.is_dataclass(policy):
        raise TypeError(f"{kind.__name__} is no dataclass; put @dataclass(frozen=True) above it")
    name = getattr(policy, "preset", None)
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"{kind.__name__} has the name {name!r}; give it one, as in "
            'preset: ClassVar[str] = "mine"'
        )
    if not isinstance(policy, FittedPolicy) and PRESETS.get(name, kind) is not kind:
        raise ValueError(
            f"{kind.__name__} has the name of the policy {name!r}, which it is not; give it another"
        )


def check_named(policy: Policy, what: str, instead: str) -> None:
    """Refuses a policy that its JSON does not tell: a class of a user's own, or a mixture of some.

    Args:
        what, instead: what cannot hold it, and what to do.

    Raises:
        ValueError: it is one.
    """
    try:
        preset_from_json(policy.to_json())
    except ValueError as error:
        raise ValueError(
            f"policy {policy.preset!r} is of a class of your own, which {what} cannot hold "
            f"({error}); {instead}"
        ) from None


def _instead(policy: object) -> str:
    """What was given in a policy's place, and how it becomes one."""
    if isinstance(policy, Memory):
        return (
            "got a Memory, which is of one attention: return it from memory() of a Policy of your "
            "own"
        )
    if isinstance(policy, type) and issubclass(policy, Policy):
        return f"got the class {policy.__name__}: make one, {policy.__name__}(...)"
    return f"got {type(policy).__name__} {policy!r}"


def is_file(policy: Policy | str | os.PathLike[str]) -> bool:
    """Whether a policy is given by its file, and not by its name."""
    if isinstance(policy, Policy):
        return False
    return isinstance(policy, os.PathLike) or policy.endswith(SUFFIX)


def policy_name(policy: Policy | str | os.PathLike[str]) -> str:
    """A policy's name in figures and folders: a file's without its place."""
    if isinstance(policy, Policy):
        return policy.preset
    return Path(policy).name.removesuffix(SUFFIX) if is_file(policy) else str(policy)


def fingerprint(program: ExportedProgram) -> str:
    """Digest of a model's weights, the same for its module, its program and its package."""
    return _digest((name, program.state_dict[name]) for name in sorted(program.state_dict))


def write_policy(path: Path, policy: FittedPolicy) -> None:
    """Writes a policy file, which appears complete or stays as it was."""
    from safetensors.torch import save

    about = {
        "format": FORMAT,
        "version": VERSION,
        "preset": policy.base.to_json(),
        "sites": {name: dict(facts) for name, facts in policy.sites.items()},
        "model": policy.model,
        "training": dict(policy.training),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in policy._flat().items()}
    write_whole(path, save(tensors, {FORMAT: json.dumps(about)}))


def read_policy(path: Path) -> FittedPolicy:
    """Reads a policy file; it holds numbers and JSON, and nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, something else, or of another version.
    """
    about, tensors = read_tensors(path, FORMAT, "a policy file, as `memcompile distill` writes it")
    if about.get("version") != VERSION:
        raise ValueError(
            f"{path}: a policy file of version {about.get('version')!r}; this memcompile reads "
            f"version {VERSION}: use the memcompile that wrote it, or distil again"
        )
    expected = {"preset": dict, "sites": dict, "model": str, "training": dict}
    for key, kind in expected.items():
        if not isinstance(about.get(key), kind):
            raise ValueError(f"{path}: damaged: its {key!r} is {about.get(key)!r}")
    fitted: dict[str, dict[str, Tensor]] = {name: {} for name in about["sites"]}
    for name, tensor in tensors.items():
        site, _, key = name.rpartition("/")
        if site not in fitted:
            raise ValueError(f"{path}: damaged: the tensor {name!r} belongs to none of its sites")
        fitted[site][key] = tensor
    try:
        chosen = preset_from_json(about["preset"])
        return FittedPolicy(chosen, about["sites"], fitted, about["model"], about["training"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be used: {error}") from error


def read_tensors(path: Path, key: str, expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a safetensors file of ours says of itself, JSON under `key`, and its tensors.

    Args:
        expected: what the file should be, for the messages.

    Raises:
        FileNotFoundError, ValueError: it is not there, damaged, or something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise FileNotFoundError(f"{path}: {found}; expected {expected}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or no safetensors: {one_line(error)}") from error
    if text is None:
        raise ValueError(f"{path}: a safetensors file, but not {expected}")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: what it says of itself: {one_line(error)}") from error
    if not isinstance(about, dict) or about.get("format") != key:
        raise ValueError(f"{path}: damaged: it does not say that it is {expected}")
    return about, tensors


def _check_facts(name: str, facts: Any) -> None:
    known = isinstance(facts, Mapping) and set(facts) == {*_FACTS}
    if not known or not all(type(value) is int and value >= 0 for value in facts.values()):
        raise ValueError(f"the site {name!r} is {facts!r}; expected numbers for {_names(_FACTS)}")
    if not all(facts[fact] for fact in _SHAPE) or facts["heads"] % facts["kv_heads"]:
        raise ValueError(f"the site {name!r} has {_spelled(facts)}, which no attention has")


def _check_tensors(
    name: str, facts: Mapping[str, int], memory: Memory, tensors: Mapping[str, Tensor]
) -> None:
    if memory.state is None:
        raise ValueError(
            f"weights were fitted for the site {name!r}, which has no state under the policy but "
            f"the memory {memory.name!r}"
        )
    # Shapes alone: a damaged file may claim any number of heads.
    try:
        with torch.device("meta"):
            wanted = state_weights(memory, facts["heads"], facts["kv_heads"], facts["key_dim"])
    except RuntimeError as error:  # more elements than a tensor can have
        raise ValueError(
            f"the site {name!r} has {_spelled(facts)}, which no attention has"
        ) from error
    if tensors.keys() != wanted.keys():
        raise ValueError(
            f"the site {name!r} has the tensors {_names(tensors)}; its state has {_names(wanted)}"
        )
    for key, plain in wanted.items():
        tensor = tensors[key]
        if tensor.shape != plain.shape or tensor.dtype != plain.dtype:
            raise ValueError(
                f"{name}/{key} is {list(tensor.shape)} {tensor.dtype}; expected "
                f"{list(plain.shape)} {plain.dtype}"
            )
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            raise ValueError(f"{name}/{key}: {wrong} of {tensor.numel()} numbers are not finite")


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _spelled(facts: Mapping[str, int]) -> str:
    return ", ".join(f"{fact} {facts[fact]}" for fact in _FACTS)
