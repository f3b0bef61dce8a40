"""transformers folders: loaded in the type they were saved in; nothing that lies in them runs."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_payloads import code, torch_pickle

from memcompile.compiler.load import load

transformers = pytest.importorskip("transformers")


def tiny(**options: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert (loaded.kind, loaded.name, loaded.tokenizer) == (
        "transformers",
        "LlamaForCausalLM",
        None,
    )
    assert loaded.module is not None and not loaded.module.training
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.module(ids).logits, model(ids).logits)
    assert loaded.module.lm_head.weight.dtype == dtype  # type: ignore[union-attr]


def test_the_tokenizer_is_found(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert load(folder).tokenizer == folder


def test_the_fingerprint_follows_the_weights(folder: Path) -> None:
    before = load(folder).sha256
    assert load(folder).sha256 == before
    tiny().save_pretrained(folder)
    assert load(folder).sha256 != before


def as_bin(folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_tensors_are_read_as_tensors(folder: Path) -> None:
    before = load(folder).module
    after = load(as_bin(folder)).module
    assert before is not None and after is not None
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)  # type: ignore[union-attr, arg-type]


def pickled_weights(folder: Path, marker: Path) -> None:
    (as_bin(folder) / "pytorch_model.bin").write_bytes(torch_pickle(marker))


def remote_code(folder: Path, marker: Path) -> None:
    (folder / "modeling_x.py").write_text(code(marker))
    config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})


def generation_code(folder: Path, marker: Path) -> None:
    """Read only when generation is asked for, and then only with trust."""
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(marker))


def hub_kernel(folder: Path, marker: Path) -> None:
    config(folder, attn_implementation="kernels-community/flash-attn")


def nested_hub_kernel(folder: Path, marker: Path) -> None:
    config(folder, text_config={"_attn_implementation": "some/where"})


def adapter(folder: Path, marker: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}})
    )


def outside(folder: Path, marker: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CODE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "pickle in the weights": (pickled_weights, "cannot load this 'llama' model"),
    "code by auto_map": (remote_code, "auto_map"),
    "code for generation": (generation_code, ""),
    "kernel from a hub": (hub_kernel, "'kernels-community/flash-attn'; known are eager, sdpa"),
    "nested kernel": (nested_hub_kernel, "'some/where'; known are eager, sdpa"),
    "adapter": (adapter, "merge_and_unload"),
    "weights outside": (outside, "'../elsewhere.safetensors' outside of the folder"),
}


@pytest.mark.parametrize("case", CODE)
def test_code_in_the_folder_never_runs(case: str, folder: Path, tmp_path: Path) -> None:
    plant, words = CODE[case]
    plant(folder, tmp_path / "marker")
    if words:
        assert words in refusal(folder)
    else:
        load(folder)
    assert not (tmp_path / "marker").exists()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def engine(folder: Path) -> None:
    no_config(folder)
    (folder / "manifest.json").write_text("{}")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def another_model(folder: Path) -> None:
    """Weights that lack a layer: transformers would go on with random ones."""
    config(folder, num_hidden_layers=2)


def another_size(folder: Path) -> None:
    config(folder, vocab_size=30)


FAULTS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no config": (no_config, FileNotFoundError, "without config.json (it holds generation_config"),
    "empty": (empty, FileNotFoundError, "without config.json (it is empty)"),
    "an engine": (engine, FileNotFoundError, "`memcompile run`"),
    "no weights": (no_weights, FileNotFoundError, "config.json without weights"),
    "damaged config": (lambda f: (f / "config.json").write_text("{") and None, ValueError, "JSON"),
    "list as config": (lambda f: (f / "config.json").write_text("[]") and None, ValueError, "list"),
    "no model type": (lambda f: config(f, model_type=None), ValueError, "no model_type"),
    "unknown type": (lambda f: config(f, model_type="nix"), ValueError, "this 'nix' model"),
    "no decoder": (lambda f: config(f, model_type="vit"), ValueError, "this 'vit' model"),
    "cut weights": (cut, ValueError, "cannot load this 'llama' model"),
    "missing shard": (missing_shard, FileNotFoundError, "model.safetensors.index.json names it"),
    "missing layer": (another_model, ValueError, "missing keys (model.layers.1."),
    "other size": (another_size, ValueError, "the weights do not fit config.json"),
    "quantised": (
        lambda f: config(f, quantization_config={"quant_method": "fp8"}),
        ValueError,
        "the weights are quantised",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_one_line(case: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    break_it, kind, words = FAULTS[case]
    break_it(folder)
    capfd.readouterr()
    assert words in refusal(folder, kind)
    assert capfd.readouterr() == ("", "")


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def absent(name: str, *args: Any, **options: Any) -> Any:
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert "pip install memcompile[hf]" in refusal(folder)


@pytest.mark.parametrize("count", [1 << 40, 1 << 64])
def test_more_layers_than_weights_are_not_built(count: int, folder: Path) -> None:
    config(folder, num_hidden_layers=count)
    assert f"num_hidden_layers={count}, and the weights hold" in refusal(folder)
    config(folder, num_hidden_layers=1, text_config={"num_experts": count})
    assert f"num_experts={count}" in refusal(as_bin_of(folder))


def as_bin_of(folder: Path) -> Path:
    """The same weights in a file whose tensors nobody counts before it is read."""
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder
