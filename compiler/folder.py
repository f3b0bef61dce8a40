"""A transformers folder as a module: weights and JSON are read, code in the folder never runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .archive import one_line

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    # Not the tokenizer's own, but it says which of its tokens end a text.
    "generation_config.json",
)
_ATTENTIONS = ("eager", "sdpa")
_COUNT = re.compile(r"(n|num|decoder|encoder)_?(hidden_)?layers?|(n_routed|num|num_local)_experts")


def load_folder(folder: Path, dtype: str = "auto") -> nn.Module:
    """The causal language model in `folder`, in eval mode.

    Args:
        dtype: of its weights; "auto": what they were saved in.

    Raises:
        FileNotFoundError: the folder holds no model; the message lists what it holds.
        ValueError: its files are damaged, the model would need code from the folder, or
            transformers is not installed.
    """
    config = _config(folder)
    safetensors = _refuse_unknown_weights(folder)
    _refuse_code(folder, config)
    _refuse_counts(folder, config)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{folder}: a transformers folder needs transformers: pip install memcompile[hf]"
        ) from error
    try:
        with _quiet(transformers):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=safetensors,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with names
            )
    except Exception as error:  # transformers raises many types; each means "not loadable"
        kind = config.get("model_type")
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} cannot load this {kind!r} model: "
            f"{one_line(error)}"
        ) from error
    # transformers fills what is missing with random numbers and goes on.
    for fault in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(fault):
            names = ", ".join(sorted(str(name) for name in info[fault])[:3])
            raise ValueError(
                f"{folder}: the weights do not fit config.json: {len(info[fault])} "
                f"{fault.replace('_', ' ')} ({names}); check that both are of the same model"
            )
    assert isinstance(model, nn.Module)
    return model.eval()


def tokenizer_folder(folder: Path) -> Path | None:
    """`folder`, if a tokenizer lies in it."""
    return folder if any((folder / name).is_file() for name in _TOKENIZER_FILES[:1]) else None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in `folder`; data only, no code."""
    return [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]


def weight_files(folder: Path) -> list[Path]:
    """config.json and the weights in `folder`, in a fixed order: what the model is made of."""
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return [folder / "config.json", *sorted(files)]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        names = sorted(entry.name for entry in folder.iterdir())
        held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        found = f"it holds {held}" if names else "it is empty"
        if "manifest.json" in names:
            found += "; a folder that memcompile wrote is opened with `memcompile run`"
        raise FileNotFoundError(
            f"{folder}: a folder without config.json ({found}); expected a transformers folder, "
            "with config.json and *.safetensors"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged JSON: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(
            f"{path}: no model_type, so this is not the config of a transformers model"
        )
    return config


def _refuse_unknown_weights(folder: Path) -> bool:
    """Whether the weights are safetensors; False means pickled tensors, read with weights_only."""
    for index in folder.glob("*.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index}: damaged index of weight files") from error
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index}: names the file {file!r} outside of the folder")
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file}: missing; {index.name} names it")
    if any(folder.glob("*.safetensors")):
        return True
    if any(folder.glob("pytorch_model*.bin")):
        return False
    names = sorted(entry.name for entry in folder.iterdir())
    raise FileNotFoundError(
        f"{folder}: config.json without weights (it holds {', '.join(names[:5])}); expected "
        "*.safetensors; save the model with save_pretrained()"
    )


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    if config.get("auto_map"):
        raise ValueError(
            f"{folder}: config.json maps to code in the folder (auto_map), which memcompile never "
            f"runs; if transformers' own {config['model_type']!r} is the same model, remove the "
            "entry; otherwise load the module yourself and pass it to memcompile.compile"
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder}: an adapter (adapter_config.json) and not a whole model; merge it into its "
            "base model (merge_and_unload) and save that"
        )
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder}: the weights are quantised (quantization_config); save the model in "
            "float32, float16 or bfloat16"
        )
    for name in _attentions(config):
        # Other names are looked up on a hub and downloaded as code.
        if name is not None and name not in _ATTENTIONS:
            raise ValueError(
                f"{folder}: config.json asks for the attention implementation {name!r}; known are "
                f"{', '.join(_ATTENTIONS)}; remove the entry"
            )


def _refuse_counts(folder: Path, config: dict[str, Any]) -> None:
    """transformers builds as many layers as it is told, for hours if need be: each has a weight."""
    held = 0
    for path in weight_files(folder)[1:]:
        held += _tensors(path) or path.stat().st_size
    for key, value in _entries(config):
        if _COUNT.fullmatch(key) and isinstance(value, int) and value > held:
            raise ValueError(
                f"{folder}: config.json says {key}={value}, and the weights hold {held} tensors or "
                "bytes; check that both are of the same model"
            )


def _tensors(path: Path) -> int:
    """How many tensors a safetensors file holds; 0 if it is none, or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return len(list(file.keys()))
    except (SafetensorError, OSError):
        return 0


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, nested ones too."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(config, list):
        for item in config:
            yield from _entries(item)


def _attentions(config: Any) -> Iterator[Any]:
    if isinstance(config, dict):
        for key, value in config.items():
            if "attn_implementation" in key:
                yield from value.values() if isinstance(value, dict) else (value,)
            else:
                yield from _attentions(value)
    elif isinstance(config, list):
        for item in config:
            yield from _attentions(item)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and advice: a failure is one line on stderr."""
    log = transformers.utils.logging
    level = log.get_verbosity()
    shown = log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            log.enable_progress_bar()
