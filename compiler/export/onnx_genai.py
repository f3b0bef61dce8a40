"""ONNX for onnxruntime-genai: `--emit onnx-genai`.

genai keeps keys and values, a layer each, and no other state: `past_key_values.N.key` goes in,
`present.N.key` comes out, and an attention mask says which tokens there are. Policies that need
nothing else generate there; of the others it is said what genai has no place for.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.memory.places import Place, SitePlaces
from ...passes.make_functional import make_functional
from ...passes.result import Declined, NotRewritten
from ...runtime.site_layout import SiteLayout
from ..folder import tokenizer_files
from .contract import DEFAULT_CAPACITY
from .formats import Artefact
from .onnx_bodies import attach_bodies
from .onnx_check import check_model
from .onnx_fused import TRANSLATIONS
from .onnx_model import DOMAIN, OPSET, clean, exported, require_onnx, translation_table
from .onnx_ort import fuse
from .onnx_portable import MAIN, built, refuse_bfloat16_among
from .onnx_write import write_models

if TYPE_CHECKING:
    from ...runtime.engine import Program
    from ..pipeline import Compiled

CONFIG = "genai_config.json"
TOKENS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
PARTS = ("key", "value")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# Sizes that the graph is traced with; they are symbols, so any would do.
_BATCH, _NEW, _WHOLE, _UNITS = 3, 5, 11, 4


def emit(folder: Path, compiled: Compiled, source: Path | None) -> Artefact:
    """Writes the format `onnx-genai`; see `formats.emit_all`.

    Raises:
        NotRewritten: a memory whose state genai has no place for.
    """
    program, step = compiled.program, compiled.step
    assert program is not None and step is not None
    require_onnx()
    _refuse(program.layouts)
    sites = [
        SitePlaces(number, layout.memory, layout.kv_heads, (Place(layout.memory.page_size),))
        for number, layout in enumerate(program.layouts)
    ]
    graph = make_functional(step.policy, sites, program.ragged)
    notes, _ = fuse({MAIN: graph}, program.layouts)
    given, axes = _example(program.layouts)
    refuse_bfloat16_among([layout.dtype for layout in program.layouts], graph)
    model = exported(
        _Masked(graph, program.ragged).eval(),
        given,
        axes,
        translation_table(TRANSLATIONS),
        OPSET,
        input_names=[TOKENS, MASK, *_names(PAST, len(sites))],
        output_names=[LOGITS, *_names(PRESENT, len(sites))],
    )
    clean(model)
    attach_bodies([model])
    write_models(folder, {MAIN: model})
    check_model(folder / MAIN)
    config = genai_config(program, compiled, source)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    copied = tokenizer_files(source) if source is not None and source.is_dir() else []
    for file in copied:
        shutil.copyfile(file, folder / file.name)
    multiple = _multiple(program.layouts)
    notes.insert(0, "runs in onnxruntime-genai; the prompt is read through the policy, too")
    if any(node.domain == DOMAIN for node in model.graph):
        notes.append(
            f"search.max_length has to be a multiple of {multiple}, and past_present_share_buffer "
            "true: pages are looked for in whole ones"
        )
    if not copied:
        notes.append("no tokenizer lay beside the model: genai is given tokens, not text")
    return Artefact("onnx-genai", "onnx-genai", MAIN, built(), tuple(notes))


def _refuse(layouts: Sequence[SiteLayout]) -> None:
    """Refuses what genai would lose.

    Raises:
        NotRewritten: with each site that has no place there, and what of it has none.
    """
    declined = [
        Declined(why, layout.name, "onnx-genai") for layout in layouts if (why := _why_not(layout))
    ]
    shapes = {(layout.kv_heads, layout.key_dim, layout.value_dim) for layout in layouts}
    if len(shapes) > 1 or any(key != value for _, key, value in shapes):
        told = ", ".join(f"{h} heads of {k} and {v}" for h, k, v in sorted(shapes))
        declined.append(
            Declined(f"keys and values of one width in all layers are kept, not {told}", "", "")
        )
    if declined:
        raise NotRewritten(
            "onnxruntime-genai keeps keys and values alone, and this policy needs more; export "
            "onnx or onnx-ort, which `memcompile run --runtime onnxruntime` generates from",
            declined,
        )


def _why_not(layout: SiteLayout) -> str:
    memory = layout.memory
    if memory.state is not None:
        return (
            f"memory {memory.name!r} keeps a state beside a window of keys and values; a layer of "
            "genai has one or the other"
        )
    if memory.account is not None:
        return (
            f"memory {memory.name!r} keeps an account of its pages, which genai would not hand on"
        )
    if memory.fields:
        return f"memory {memory.name!r} keeps an index of its pages, which genai would not hand on"
    return ""


class _Masked(nn.Module):
    """A step that is told by a mask [B, tokens so far and new] where its tokens stand."""

    def __init__(self, step: nn.Module, ragged: bool) -> None:
        super().__init__()
        self.step, self.ragged = step, ragged

    def forward(self, tokens: Tensor, mask: Tensor, *state: Tensor) -> Any:
        new, whole = tokens.shape[1], mask.shape[1]
        old = torch.arange(whole) < whole - new
        held = torch.where(old, mask, 0).sum(1)
        position, lengths = held.to(torch.int32), (mask.sum(1) - held).to(torch.int32)
        return self.step(tokens, position, *([lengths] if self.ragged else []), *state)


def _example(layouts: Sequence[SiteLayout]) -> tuple[list[Tensor], list[Any]]:
    """Inputs of the model, and which of their axes are symbols."""
    from torch.export import Dim

    batch, new, whole, units = (Dim(name) for name in ("batch", "n", "tokens", "units"))
    # Pages are looked for in whole ones.
    multiple = _multiple(layouts)
    given = [
        torch.zeros(_BATCH, _NEW, dtype=torch.int64),
        torch.ones(_BATCH, _WHOLE, dtype=torch.int64),
    ]
    axes: list[Any] = [{0: batch, 1: new}, {0: batch, 1: whole}]
    for layout in layouts:
        shape = (_BATCH, layout.kv_heads, multiple * _UNITS, layout.key_dim)
        given += [torch.zeros(shape, dtype=layout.dtype) for _ in PARTS]
        axes += [{0: batch, 2: multiple * units if multiple > 1 else units} for _ in PARTS]
    return [given[0], given[1], *given[2:]], [axes[0], axes[1], tuple(axes[2:])]


def _multiple(layouts: Sequence[SiteLayout]) -> int:
    """Tokens that a cache has room for are a multiple of this."""
    return math.lcm(*(layout.memory.page_size for layout in layouts))


def _names(form: str, sites: int) -> list[str]:
    return [form.format(number, part) for number in range(sites) for part in PARTS]


def genai_config(program: Program, compiled: Compiled, source: Path | None) -> dict[str, Any]:
    """What genai is told of the model: names, sizes, which tokens end a text."""
    layout, sites = program.layouts[0], compiled.sites
    told = _told(source)
    length = told.get("max_position_embeddings")
    context = program.max_context or program.limit or length or DEFAULT_CAPACITY
    multiple = _multiple(program.layouts)
    model = {
        "type": "decoder",
        "vocab_size": program.vocabulary,
        "context_length": context,
        **_special(told),
        "decoder": {
            "session_options": {"provider_options": []},
            "filename": MAIN,
            "head_size": layout.key_dim,
            "hidden_size": sites[0].heads * layout.key_dim,
            "num_attention_heads": sites[0].heads,
            "num_key_value_heads": layout.kv_heads,
            "num_hidden_layers": len(program.layouts),
            "inputs": {
                "input_ids": TOKENS,
                "attention_mask": MASK,
                "past_key_names": PAST.format("%d", "key"),
                "past_value_names": PAST.format("%d", "value"),
            },
            "outputs": {
                "logits": LOGITS,
                "present_key_names": PRESENT.format("%d", "key"),
                "present_value_names": PRESENT.format("%d", "value"),
            },
        },
    }
    search = {
        "max_length": context // multiple * multiple or context,
        "do_sample": False,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}


def _told(source: Path | None) -> dict[str, Any]:
    """What the files beside a model say of it; those of generation come after its own."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = None if source is None else source / name
        if path is not None and path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            found |= {key: value for key, value in data.items() if value is not None}
    return found


def _special(told: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens that begin, end and pad a text, as far as there are any."""
    found = {key: told[key] for key in SPECIAL if key in told}
    end = found.setdefault("eos_token_id", [])  # none: a text is as long as it may be
    ends = end if isinstance(end, list) else [end]
    if ends:
        # genai takes it for padding wherever it stands in a prompt: none but an end will do.
        found.setdefault("pad_token_id", ends[0])
    return found
