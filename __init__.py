"""Compiles dense attention models into models with a chosen memory architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from pathlib import Path

    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from .compiler.graph_report import GraphReport
    from .compiler.report import Report
    from .models.memory import Policy
    from .runtime.attention_interface import CachedAttention
    from .runtime.engine import Engine

__version__ = "0.1.0"
__all__ = [
    "compile",
    "explain",
    "export",
    "graphs",
    "invalidate",
    "policies",
    "register_attention",
]

# Every import stands inside the function that needs it: `import memcompile` alone loads no
# compiler, and takes no longer than it has to.


def compile(
    model: nn.Module | ExportedProgram | str | PathLike[str],
    policy: Policy | str | PathLike[str] = "scout",
    **options: Any,
) -> Engine:
    """Give every attention of `model` the memory that `policy` describes.

    Args:
        model: a module, an exported program, or a path to a file or folder that holds one.
        policy: name of a memory policy, one of `policies()`, the file of a fitted one, or a
            `memcompile.models.memory.Policy`, one of your own, say, with its fields.
        options: fields of the policy (``budget=2048``, ``page_size=64``, …), and those of
            `memcompile.compiler.pipeline.build`: ``max_context``, ``strict``, ``check``,
            ``kernels``, and for a path ``trust_pickle``, ``arch``, ``arch_config``.

    Returns:
        The engine: ``prefill(tokens[B, n])`` reads dense, ``engine(tokens[B, n])`` reads through
        the policy; both return float logits ``[B, n, V]`` and append the tokens to the memory.
        ``engine.generate`` and ``engine.stream`` continue prompts; ``engine.transformers`` is a
        transformers model again, for transformers' own ``generate``.

    Raises:
        ValueError: an unknown policy or option; the message lists the known ones.
        TypeError: `policy` is none, or gives something else than a `Memory`.
        FileNotFoundError: `model` is a path, and nothing is there.
        NotRewritten: no attention could be rewritten (with ``strict=False``: never).
    """
    from .compiler.pipeline import build

    return build(model, policy, **options).engine()


def explain(
    model: nn.Module | ExportedProgram | str | PathLike[str],
    tokens: Tensor | None = None,
    policy: Policy | str | PathLike[str] = "scout",
    **options: Any,
) -> Report:
    """What `policy` makes of each attention of `model`, and why not of the others.

    Args:
        tokens: int64 ``[B, n]`` to run, so that the report can say what was read.
        options: as for `compile`, and ``repro="FILE.py"``, a script of what was declined;
            ``dump_graph="FILE.svg"``, a drawing of it; ``site="NAME"``, of that attention instead.

    Returns:
        The report; ``print(report)`` shows it as a table.

    Raises:
        ValueError, FileNotFoundError: as `compile`. What cannot be rewritten raises nothing here.
    """
    from .compiler.explain import explain

    return explain(model, tokens, policy, **options)


def export(
    model: nn.Module | ExportedProgram | str | PathLike[str],
    out: str | PathLike[str],
    formats: Sequence[str],
    policy: Policy | str | PathLike[str] = "scout",
    *,
    targets: Sequence[str] = (),
    force: bool = False,
    **options: Any,
) -> Path:
    """Compile `model` and write it to the folder `out`, as engines that leave Python behind.

    Args:
        out: appears whole or not at all; what `memcompile run` and `verify` take.
        formats: "aoti", "aoti-portable", "onnx", "onnx-ort", "onnx-ort-cuda",
            "onnx-genai", "tensorrt", "tensorrt-rtx", "triton-server"; each becomes a folder in
            `out`, with the `state.json` that says how it is driven. See docs/shipping.md.
        targets: GPUs, which need not be there, whose kernels are compiled into the folder:
            "cuda:sm_90", "hip:gfx942", … See docs/kernels.md.
        force: replace `out` if memcompile wrote it.
        options: as for `compile`.

    Returns:
        `out`.

    Raises:
        ValueError, FileNotFoundError, NotRewritten: as `compile`; an unknown format, or a memory
            that cannot be exported in one.
        FileExistsError: `out` exists, and `force` is not given.
        ImportError: a format needs a library that is not installed; the message names it.
    """
    from .compiler.export.export import export

    return export(model, out, formats, policy, targets=targets, force=force, **options)


def policies() -> list[str]:
    """Names of the known policies."""
    from .models.memory import PRESETS

    return sorted(PRESETS)


def graphs(*, clear: bool = False) -> list[GraphReport]:
    """What `torch.compile(backend="memcompile")` made of each graph of this process, oldest first.

    Args:
        clear: forget the reports afterwards.

    Returns:
        the reports: ``kind``, ``attentions``, ``rewritten``, ``declined``, ``calls`` with the pages
        that were read; ``print(report)`` shows all of it.
    """
    from .compiler.graph_report import reports

    return reports(clear)


def invalidate(cache: Any) -> int:
    """Forget what the backend knows of a cache that was changed behind its back.

    What torch counts as a write is noticed: a cache that was cropped, reordered, reset, filled anew
    or overwritten in part. Not noticed are writes past that count (through `.data`, numpy or a
    pointer), and single keys or values of inference tensors overwritten in the midst of a context.

    Args:
        cache: a cache of transformers, or the tensors of one, in any nesting of lists and tuples.

    Returns:
        how many attentions' indexes were forgotten; they are made again when the cache is read.

    Raises:
        TypeError: something else than a cache or tensors.
    """
    from .compiler.backend import invalidate

    return invalidate(cache)


def register_attention(
    policy: Policy | str | PathLike[str] = "scout", *, name: str = "memcompile", **options: Any
) -> CachedAttention:
    """Make `policy` an attention function of transformers: `model.set_attn_implementation(name)`.

    From then on decode steps of such a model read its cache (DynamicCache, StaticCache) through the
    policy; prompts are read densely. Nothing is compiled, and the model's own loop stays as it is.

    Args:
        policy: as for `compile`; one that keeps pages alone.
        name: of the entry; registered again, it is replaced.
        options: fields of the policy, and ``kernels`` and ``decode_tokens`` as for
            `torch.compile(backend="memcompile")`.

    Returns:
        what counts: ``calls``, with the pages that were read, and why calls were dense;
        ``print`` shows it.

    Raises:
        ValueError: an unknown policy or option (the known ones are listed), a policy that a cache
            cannot serve, or a name that is somebody else's.
        ImportError: transformers is not installed, or too old.
    """
    from .compiler.attention_entry import register_attention

    return register_attention(policy, name, options)
