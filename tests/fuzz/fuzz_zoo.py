"""The clean inputs that every fuzzed case starts from: one tiny model in every form."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "compiler"))

import torch
from archive_payloads import Decoder, exported
from safetensors.torch import save_file
from torch import nn

from memcompile.compiler.package import write
from memcompile.compiler.pipeline import build
from memcompile.compiler.policy_file import fit, write_policy
from memcompile.models.memory.state import state_weights

ARCH = "archive_payloads:Decoder"
SMALL = {"budget": 32, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 0}


class Flat(nn.Module):
    """No attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(input_ids))
        return logits


def make(zoo: Path) -> None:
    """Fills `zoo`; contexts are of 64 tokens, so that no command of a few words works for long."""
    torch.manual_seed(0)
    zoo.mkdir(parents=True)
    model = Decoder().eval()
    program = exported(model)
    torch.export.save(program, zoo / "model.pt2")
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids = torch.zeros(2, 5, dtype=torch.int64)
    flat = torch.export.export(Flat().eval(), (ids,), dynamic_shapes=(free,))
    torch.export.save(flat, zoo / "flat.pt2")
    torch.save(model.state_dict(), zoo / "state.pt")
    torch.save(model, zoo / "module.pt")
    save_file({name: t.clone() for name, t in model.state_dict().items()}, zoo / "s.safetensors")
    (zoo / "config.json").write_text('{"width": 8}')
    write(zoo / "engine", build(program, "scout", kernels="off", **SMALL))
    bare = build(program, "hybrid", kernels="off", state_layers=(0,), window=8, page_size=8)
    (site,) = bare.sites
    fitted = {site.name: state_weights(bare.memories[site.name], 1, 1, 8)}
    assert bare.captured is not None
    policy = fit(bare.preset, fitted, bare.sites, bare.captured.program, {})
    write_policy(zoo / "fitted.safetensors", policy)
    _llama(zoo / "llama")
    (zoo / "text.txt").write_text("one two three\n" * 40)
    (zoo / "ids.txt").write_text(" ".join(str(i % 11) for i in range(200)))
    (zoo / "noise.bin").write_bytes(bytes(range(256)) * 4)
    (zoo / "empty").write_bytes(b"")
    (zoo / "hollow").mkdir()


def _llama(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).eval().save_pretrained(folder)
    words = ["one", "two", "three", "prompt", *"abcdefg", "<unk>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def copy(zoo: Path, into: Path, *names: str) -> None:
    """Some of the zoo, or all of it, as files of the case's own."""
    for entry in [zoo / name for name in names] if names else zoo.iterdir():
        if entry.is_dir():
            shutil.copytree(entry, into / entry.name)
        else:
            shutil.copyfile(entry, into / entry.name)


def manifest_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "manifest.json").read_text())
    return found
