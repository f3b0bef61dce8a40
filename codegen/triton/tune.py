"""Measures block shapes on the GPU at hand and keeps the best: on request only, never at import."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...models.memory.parts import field_width
from ..spec import STATE_OPS, KernelSpec
from .blocks import Launch, launches, padded, table, tuned_path
from .emit import device_target, text, write
from .load import imported

ROLES = {
    "attend": ("decode", "prefill"),
    "append_index": ("append", "fold"),
    "combine": ("combine",),
    "state_step": ("step",),
    "state_chunk": ("solve", "walk", "read", "walk_back", "grad_query", "grad_key", "grad_value"),
}


def tune(
    spec: KernelSpec,
    batch: int = 1,
    kv_heads: int = 8,
    context: int = 32768,
    rows: int = 512,
    selected: int = 2048,
) -> dict[str, Launch]:
    """Times the candidates for each launch of a spec, and keeps the fastest in the cache.

    What is loaded afterwards uses them; a process that has loaded the spec keeps what it has.

    Args:
        batch, kv_heads, context: sizes of the memory it is timed on: sequences, KV heads, tokens.
        rows: new tokens of a chunk; decoding is timed with one.
        selected: tokens of the pages that lists name.

    Returns:
        the launches chosen, by role.

    Raises:
        RuntimeError: there is no GPU to measure on.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "tuning measures kernels on a GPU, and torch finds none; without tuning the table in "
            "codegen/triton/blocks.py holds"
        )
    target, device = device_target(), torch.device("cuda")
    chosen = table(spec, target)
    ranked = context // spec.page_size
    roles = ROLES.get(spec.op) or (_class_of(chosen, min(ranked, 256) if spec.among else ranked),)
    for role in roles:
        if role not in chosen:
            continue
        count = rows if role == "prefill" or spec.op == "state_chunk" else 1
        arguments = example(spec, device, batch, kv_heads, context, count, selected)
        best = math.inf
        for candidate in candidates(spec, role, chosen):
            took = _milliseconds(spec, target, candidate, arguments)
            if took < best:
                best, chosen = took, candidate
    kept = {
        role: {
            "constants": chosen[role].constants,
            "options": [chosen[role].warps, chosen[role].stages],
        }
        for role in chosen
    }
    file = tuned_path(spec, target)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=2) + "\n")
    return launches(spec, target)


def candidates(spec: KernelSpec, role: str, chosen: dict[str, Launch]) -> list[dict[str, Launch]]:
    """Launches that differ from `chosen` in one role; `chosen` is the first of them."""
    launch = chosen[role]
    shapes = [launch.constants]
    if spec.op == "attend":
        sizes = {
            "decode": ("BLOCK_N", (16, 32, 64, 128)),
            "prefill": ("BLOCK_M", (16, 32, 64, 128)),
        }
        name, values = sizes[role]
        shapes += [{**launch.constants, name: size} for size in values]
    elif spec.op in STATE_OPS:
        least = 8 if spec.op == "state_step" else 16
        most = padded(spec.value_dim)
        widths = [size for size in (8, 16, 32, 64) if least <= size <= most]
        shapes += [{**launch.constants, "BLOCK_V": size} for size in widths]
    made = [chosen]
    for shape, warps, stages in itertools.product(shapes, (2, 4, 8), (1, 2, 3, 4)):
        changed = {**chosen, role: replace(launch, constants=shape, warps=warps, stages=stages)}
        if "prefill" in changed:  # both are printed into one module, with blocks of one width
            other = changed["prefill"]
            width = {"BLOCK_N": changed["decode"].constants["BLOCK_N"]}
            changed["prefill"] = replace(other, constants={**other.constants, **width})
        if changed not in made:
            made.append(changed)
    return made


def example(
    spec: KernelSpec,
    device: torch.device,
    batch: int,
    kv_heads: int,
    context: int,
    rows: int,
    selected: int,
) -> list[Any]:
    """Arguments of a spec's operator on a random, full memory of `context` tokens a sequence."""
    dtype = spec.torch_dtype
    heads, slots = kv_heads * spec.group, spec.page_size * spec.span
    columns = -(-context // slots)
    count = batch * kv_heads * columns

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    given: dict[str, Any] = {
        "query": normal(batch, heads, rows, spec.key_dim),
        "key": normal(batch, kv_heads, rows, spec.key_dim),
        "value": normal(batch, kv_heads, rows, spec.value_dim),
        "page_table": torch.randperm(count, device=device).int().view(batch, kv_heads, columns),
        "position": torch.full((batch,), context - rows, dtype=torch.int32, device=device),
        "lengths": torch.full((batch,), rows, dtype=torch.int32, device=device),
        "bias": normal(count, spec.page_size, dtype=torch.float32),
        "scale": max(1, spec.key_dim) ** -0.5,
        "softcap": 30.0,
        "window": context,
        "sink_pages": 1,
        "window_pages": 1,
        "dense_below": 0,
        "child_size": 1,
        "ratio": 8,
    }
    given["record_table"] = given["child_table"] = given["page_table"]
    wanted = max(1, min(columns, selected // slots))
    if spec.pages != "all" or spec.among:
        order = torch.rand(batch, kv_heads, rows, columns, device=device).argsort(3)
        given["pages"] = order[..., :wanted].sort(3).values.int()
        given["candidates"] = order[..., :256].sort(3).values.int()
    if spec.op in ("attend", "append_index"):
        given["key_pages"] = normal(count, spec.page_size, spec.key_dim)
        given["value_pages"] = normal(count, spec.page_size, spec.value_dim)
        given["page_logits"] = normal(batch, heads, rows, columns, dtype=torch.float32)
        given["page_values"] = normal(count, spec.value_dim)
        given["page_bias"] = normal(count, 1, dtype=torch.float32)
    if spec.op in STATE_OPS:
        each, held = (batch, kv_heads, rows), (batch, kv_heads, spec.key_dim)
        share = torch.rand(each, device=device)
        # Of norm 1, so that a delta rule stays bounded.
        given["key"] = normal(*each, spec.key_dim) * spec.key_dim**-0.5
        given["beta"] = share
        given["decay"] = -0.1 * share if spec.decay == "gate" else -0.1 * share[0, :, 0]
        given["state"] = normal(*held, spec.value_dim, dtype=torch.float32)
        given["norm"] = normal(*held, dtype=torch.float32)
        given["grad_num"] = normal(batch, heads, rows, spec.value_dim, dtype=torch.float32)
        given["grad_den"] = normal(batch, heads, rows, dtype=torch.float32)
    given["budget_pages"] = given["capacity"] = wanted
    for name in spec.fields or (spec.score_fields if spec.score else ()):
        kind = torch.float32 if name == "log_count" else dtype
        width = field_width(name, spec.key_dim, spec.value_dim)
        for pool in ("index", "children"):
            given[f"{pool}_{name}"] = normal(count, width, dtype=kind)
    for i in range(spec.count):
        given[f"out{i}"] = normal(batch, heads, rows, spec.value_dim)
        given[f"lse{i}"] = normal(batch, heads, rows)
    return [given[name] for _, name in spec.arguments]


def _class_of(chosen: dict[str, Launch], pages: int) -> str:
    fitting = (role for role, launch in chosen.items() if launch.constants.get("PAGES", 0) >= pages)
    return next(fitting, "rank")


def _milliseconds(
    spec: KernelSpec, target: str, chosen: dict[str, Launch], arguments: list[Any]
) -> float:
    import triton
    from torch._library.triton import set_wrap_triton_enabled

    launcher = getattr(imported(write(spec, text(spec, target, chosen))), spec.op)
    try:
        # Kernels are launched at once: as operators of a graph they take a millisecond more.
        with set_wrap_triton_enabled(False):
            took: float = triton.testing.do_bench(
                lambda: launcher(*arguments), return_mode="median"
            )
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return math.inf
    return took
