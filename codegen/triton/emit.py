"""Prints the Triton source of a kernel spec for a target."""

from __future__ import annotations

import json
import textwrap
from functools import cache
from pathlib import Path

from .. import cache as store
from ..render import render
from ..spec import SCORE_TERMS, STATE_OPS, KernelSpec
from .blocks import (
    CANDIDATES,
    CLASSES,
    HEADS,
    LISTED,
    RECORDS,
    SHARE_TOKENS,
    Launch,
    architecture,
    chunk,
    launches,
    nearest,
    padded,
    pow2,
)

HERE = Path(__file__).parent
DEFAULT_TARGET = "cuda:sm_90"


@cache
def device_target() -> str:
    """The target of the GPU at hand; where there is none, the one that texts are shown for."""
    import torch

    if not torch.cuda.is_available():
        return DEFAULT_TARGET
    if torch.version.hip:
        name = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
        return nearest("hip", name)
    major, minor = torch.cuda.get_device_capability()
    return nearest("cuda", f"{major}{minor}")


def source(spec: KernelSpec, target: str | None = None) -> str:
    """The readable module of a spec: its kernels, and the function that launches them.

    Args:
        target: "cuda:sm_90", "hip:gfx942", ... (a key of blocks.ARCHITECTURES), which sets block
            shapes; None: the GPU at hand, or sm_90 without one.

    Raises:
        NotCovered: no template covers the spec on this target.
        ValueError: unknown target.
    """
    target = target or device_target()
    return text(spec, target, launches(spec, target))


def text(spec: KernelSpec, target: str, chosen: dict[str, Launch]) -> str:
    """The module of a spec with the given launches (see `blocks.launches`)."""
    template = f"{spec.template}.py.jinja"
    names = {
        "spec": spec,
        "pow2": pow2,
        "padded": padded,
        "cdiv": lambda a, b: -(-a // b),
        "title": _title(spec),
        "note": "\n".join(
            textwrap.wrap(
                f"Generated for {target} from codegen/triton/{template}: edits are lost. "
                f"Specification: {json.dumps(spec.to_json())}",
                100,
                break_long_words=False,
                break_on_hyphens=False,
            )
        ),
        **chosen,
    }
    if spec.op == "attend":
        names |= {
            "block_n": chosen["decode"].constants["BLOCK_N"],
            "block_s": LISTED,
            "records": min(chosen["decode"].constants["BLOCK_N"], RECORDS),
            "share_tokens": SHARE_TOKENS,
            "share_pages": max(1, SHARE_TOKENS // spec.page_size),
            "programs": architecture(target).programs,
        }
    elif spec.op == "score_select":
        names |= {
            "fields": spec.score_fields,
            "terms": SCORE_TERMS[spec.score],
            "heads": 16 if spec.dtype == "float32" else HEADS,
            "most_k": 64 if spec.dtype == "float32" or spec.key_dim > 256 else 256,
            "largest": CANDIDATES if spec.among else max(CLASSES),
            "classes": [(m, chosen[f"upto_{m}"]) for m in CLASSES if f"upto_{m}" in chosen],
        }
    elif spec.fold:
        names["share"] = chosen["fold"].constants["SHARE"]
        names["block_c"] = chosen["fold"].constants["BLOCK_C"]
    elif spec.op == "append_index":
        names["block_s"] = chosen["append"].constants["BLOCK_S"]
    elif spec.op == "state_chunk":
        names["chunk"] = chunk(spec)
    elif spec.op == "combine":
        names["block_r"] = chosen["combine"].constants["BLOCK_R"]
    return render(HERE / template, **names)


def _title(spec: KernelSpec) -> str:
    if spec.op == "attend":
        read = {"all": "every page", "listed": "the listed pages", "unlisted": "pages not listed"}
        others = ", of the others their records" if spec.summaries else ""
        return f"Reads {read[spec.pages]} of a paged memory{others}, one softmax a query."
    if spec.op == "score_select":
        kept = ", selects the best and keeps the queries' products with mean keys"
        then = kept if spec.page_logits else " and selects the best"
        which = "each row's candidates" if spec.among else "pages"
        return f"Scores {which} by {spec.score}{then}."
    if spec.fold:
        return "Writes records of groups, from the records of their children."
    if spec.op == "append_index":
        return "Writes new tokens into their pages" + (" and index." if spec.fields else ".")
    if spec.op in STATE_OPS:
        decay = {"": "", "constant": ", each head with its decay", "gate": ", gated"}[spec.decay]
        rule = "the delta rule" if spec.delta else "addition"
        done = "Gradients of reads of" if spec.backward else "Writes and reads"
        return f"{done} a state written by {rule}{decay}."
    return "Merges reads of disjoint keys by log-sum-exp."


def path(spec: KernelSpec, target: str | None = None) -> Path:
    """The file of a spec's module, written if need be.

    Triton and Inductor read a kernel's text from its file, which must therefore stay there.
    """
    return write(spec, source(spec, target))


def write(spec: KernelSpec, module: str) -> Path:
    """Keeps the text of a spec's module in a file whose folder is named after its content."""
    name = f"{spec.name}.py"

    def fill(folder: Path) -> None:
        (folder / name).write_text(module, encoding="utf-8")

    return store.publish(store.root() / "triton" / store.key(module), fill) / name
