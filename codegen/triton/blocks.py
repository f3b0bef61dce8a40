"""Block shapes, warps and pipeline stages of generated kernels: a table, by architecture.

The table holds what is reasonable from the shapes alone: it is not the outcome of measurements.
`tune` measures on a GPU and keeps its choice in the cache, which then comes before the table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import cache
from ..spec import KernelSpec, NotCovered

KB = 1024


@dataclass(frozen=True)
class Architecture:
    """What bounds a choice of blocks.

    Attributes:
        shared: bytes of shared memory that one program can have.
        programs: programs that fill the device: twice the multiprocessors of its largest member.
        warp: threads of a warp.
    """

    shared: int
    programs: int
    warp: int = 32


ARCHITECTURES = {
    "cuda:sm_80": Architecture(163 * KB, 216),
    "cuda:sm_86": Architecture(99 * KB, 168),
    "cuda:sm_89": Architecture(99 * KB, 284),
    "cuda:sm_90": Architecture(227 * KB, 264),
    "cuda:sm_100": Architecture(227 * KB, 296),
    "cuda:sm_120": Architecture(99 * KB, 376),
    "hip:gfx90a": Architecture(64 * KB, 220, warp=64),
    "hip:gfx942": Architecture(64 * KB, 608, warp=64),
    "hip:gfx950": Architecture(160 * KB, 512, warp=64),
}

# attend, per family of architectures and widest head up to:
#   slots a block | one new token: warps, stages | a chunk of tokens: rows a block, warps, stages
ATTEND = {
    "cuda:sm_80": {
        64: (64, 4, 3, 64, 4, 3),
        128: (64, 4, 3, 64, 8, 2),
        256: (32, 4, 3, 64, 8, 2),
        1024: (32, 8, 2, 16, 8, 2),
    },
    "cuda:sm_90": {
        64: (64, 4, 4, 64, 4, 3),
        128: (64, 4, 4, 64, 4, 3),
        256: (64, 8, 3, 64, 8, 2),
        1024: (32, 8, 2, 16, 8, 2),
    },
    "cuda:sm_120": {
        64: (64, 4, 3, 64, 4, 2),
        128: (64, 4, 2, 64, 8, 2),
        256: (32, 4, 2, 32, 4, 2),
        1024: (32, 8, 1, 16, 8, 1),
    },
    "hip": {
        64: (64, 4, 2, 64, 4, 2),
        128: (64, 4, 1, 64, 4, 1),
        256: (32, 4, 1, 32, 4, 1),
        1024: (16, 4, 1, 16, 4, 1),
    },
}
# float32 is multiplied without matrix units, from registers: small blocks, everywhere.
ATTEND_FLOAT32 = {
    64: (32, 4, 2, 32, 4, 2),
    128: (16, 4, 2, 16, 4, 2),
    256: (16, 4, 2, 16, 4, 2),
    1024: (16, 8, 1, 16, 8, 1),
}
FAMILY = {
    "cuda:sm_86": "cuda:sm_120",
    "cuda:sm_89": "cuda:sm_120",
    "cuda:sm_100": "cuda:sm_90",
    "hip:gfx90a": "hip",
    "hip:gfx942": "hip",
    "hip:gfx950": "hip",
}
SHARE_TOKENS = 128  # slots that are worth a program of their own
LISTED = 64  # entries of a list that are compared with a block of pages at a time
RECORDS = 64  # pages read by their records at a time, at most: the bits of an integer

# score_select: pages scored at a time, and warps by the most pages that one program ranks in
# registers. Wider tables are scored by many programs, then ranked by another: two launches.
SCORED = 64
SCORED_FLOAT32 = 16
CLASSES = {256: 4, 1024: 4, 4096: 8, 8192: 16}
CANDIDATES = 4096  # of a row, at most
RANKED = 4096  # of a wider table, ranks looked at together
HEADS = 64  # query heads scored at a time

FOLDING = 16  # programs of a KV head that share the groups to fold; mostly there are none

# state_chunk: rows a chunk, which are also the extents of its blocks. float32 as above.
CHUNK = 64
CHUNK_FLOAT32 = 32
STEP_TILE = 4096  # elements of a state that a program of state_step holds, where 8 columns allow it


@dataclass(frozen=True)
class Launch:
    """How one kernel of a generated file is launched.

    Attributes:
        kernel: its function's name.
        constants: what the kernel takes as compile-time constants.
        warps, stages: of Triton.
    """

    kernel: str
    constants: dict[str, int] = field(hash=False)
    warps: int
    stages: int


def pow2(size: int) -> int:
    """The least power of two that is at least `size`; 0 for 0."""
    return 1 << (size - 1).bit_length() if size else 0


def padded(dim: int) -> int:
    """The extent of a block along a head's elements: matrix units take 16 at least; 0 for 0."""
    return max(16, pow2(dim)) if dim else 0


def architecture(target: str) -> Architecture:
    """What is known of a target.

    Raises:
        ValueError: unknown target; the known ones are listed.
    """
    if target not in ARCHITECTURES:
        raise ValueError(f"unknown target {target!r}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[target]


def nearest(backend: str, arch: str) -> str:
    """The target whose code and table a device uses: itself, or the next older of its kind.

    Args:
        backend, arch: "cuda" and "103", or "hip" and "gfx942".
    """
    name = f"cuda:sm_{arch}" if backend == "cuda" else f"hip:{arch}"
    if name in ARCHITECTURES:
        return name
    if backend != "cuda":
        return "hip:gfx942"
    older = [t for t in ARCHITECTURES if t.startswith("cuda") and _capability(t) <= int(arch)]
    return max(older, key=_capability, default="cuda:sm_80")


def _capability(target: str) -> int:
    return int(target.removeprefix("cuda:sm_"))


def launches(spec: KernelSpec, target: str) -> dict[str, Launch]:
    """Every launch that the spec's file makes on a target, by its role in the template.

    Raises:
        NotCovered: no block of the spec fits the target's shared memory.
        ValueError: unknown target.
    """
    chosen = table(spec, target)
    for role, choice in tuned(spec, target).items():
        chosen[role] = Launch(chosen[role].kernel, choice["constants"], *choice["options"])
    return chosen


def table(spec: KernelSpec, target: str) -> dict[str, Launch]:
    """`launches` as the table has them, whatever was tuned."""
    arch = architecture(target)
    if spec.op == "attend":
        return _attend(spec, target, arch)
    families = {
        "score_select": _score_select,
        "append_index": _append_index,
        "combine": _combine,
        "state_step": _state_step,
        "state_chunk": _state_chunk,
    }
    return families[spec.op](spec)


def chunk(spec: KernelSpec) -> int:
    """Rows of a chunk of state_chunk."""
    return CHUNK_FLOAT32 if spec.dtype == "float32" else CHUNK


def tuned(spec: KernelSpec, target: str) -> dict[str, Any]:
    """What `tune` kept for a spec on a target: by role, constants and [warps, stages]."""
    path = tuned_path(spec, target)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def tuned_path(spec: KernelSpec, target: str) -> Path:
    """Where the choices for a spec on a target are kept."""
    return cache.root() / "tuned" / target.replace(":", "_") / f"{spec.name}.json"


def _attend(spec: KernelSpec, target: str, arch: Architecture) -> dict[str, Launch]:
    if not spec.shared_kv and max(spec.key_dim, spec.value_dim) > 256:
        raise NotCovered(
            f"attend: keys of {spec.key_dim} beside values of {spec.value_dim} on a GPU; heads "
            "above 256 are covered where a value is a part of its key"
        )
    widest = max(padded(spec.key_dim), padded(spec.value_dim))
    table = ATTEND_FLOAT32 if spec.dtype == "float32" else ATTEND[FAMILY.get(target, target)]
    row = next(row for most, row in table.items() if widest <= most)
    block_n, warps, stages, most_m, prefill_warps, prefill_stages = row
    block_m = min(max(16, pow2(spec.group)), most_m)
    item = 4 if spec.dtype == "float32" else 2
    rest = padded(spec.key_dim - spec.value_dim) if spec.shared_kv else padded(spec.key_dim)
    width = (padded(spec.value_dim) + rest) * item
    key = width if spec.shared_kv else rest * item

    def fits(rows: int, slots: int, stages: int) -> bool:
        # Blocks of 64 rows and more are multiplied from shared memory on sm_90 and sm_100, which
        # holds one stage more.
        direct = rows >= 64 and target in ("cuda:sm_90", "cuda:sm_100")
        deep = stages if direct else max(1, stages - 1)
        held = deep * slots * width + rows * key  # blocks of keys and values; queries
        return held + rows * slots * item <= arch.shared - 2 * KB

    if spec.pages != "all":
        most_m = block_m
    while not fits(block_m, block_n, 1) or not fits(most_m, block_n, 1):
        if block_n <= 16:
            raise NotCovered(f"attend: {spec.name} needs more shared memory than {target} has")
        block_n //= 2
    while not fits(block_m, block_n, stages):
        stages -= 1
    while not fits(most_m, block_n, prefill_stages):
        prefill_stages -= 1
    slots = {"BLOCK_N": block_n}
    merge = Launch("merge_splits", {"BLOCK_S": 16 if spec.value_dim <= 256 else 8}, 4, 2)
    if spec.summaries:
        slots["LIST"] = LISTED  # launchers take what holds their lists
    chosen = {"decode": Launch(spec.name, {"BLOCK_M": block_m, **slots}, warps, stages)}
    if spec.pages == "all":
        chosen["prefill"] = Launch(
            spec.name, {"BLOCK_M": most_m, **slots}, prefill_warps, prefill_stages
        )
    return {**chosen, "merge": merge}


def _score_select(spec: KernelSpec) -> dict[str, Launch]:
    tile = SCORED_FLOAT32 if spec.dtype == "float32" else SCORED
    constants = {"BLOCK_P": tile}
    # Of 16 warps a thread has 128 registers: too few where products are kept beside 8192 ranks.
    most_warps = 8 if spec.page_logits else 16
    chosen = {
        f"upto_{most}": Launch(spec.name, {**constants, "PAGES": most}, min(warps, most_warps), 2)
        for most, warps in CLASSES.items()
        if most <= CANDIDATES or not spec.among
    }
    if spec.among:
        return chosen
    chosen["rank"] = Launch("rank_pages", constants, 4, 2)
    chosen["choose"] = Launch("choose_pages", {"BLOCK_R": RANKED}, 8, 1)
    return chosen


def _append_index(spec: KernelSpec) -> dict[str, Launch]:
    width = max(1, pow2(spec.key_dim), pow2(spec.value_dim))
    if spec.fold:
        children = max(4, min(16, 4096 // width))
        return {"fold": Launch(spec.name, {"BLOCK_C": children, "SHARE": FOLDING}, 4, 1)}
    slots = min(spec.page_size, max(4, 8192 // width))
    return {"append": Launch(spec.name, {"BLOCK_S": slots}, 8 if slots * width >= 4096 else 4, 1)}


def _combine(spec: KernelSpec) -> dict[str, Launch]:
    rows = max(1, 1024 // max(1, pow2(spec.value_dim)))
    return {"combine": Launch(spec.name, {"BLOCK_R": rows}, 4, 1)}


def _state_step(spec: KernelSpec) -> dict[str, Launch]:
    columns = min(pow2(spec.value_dim), max(8, STEP_TILE // pow2(spec.key_dim)))
    return {"step": Launch(spec.name, {"BLOCK_V": columns}, 4, 1)}


def _state_chunk(spec: KernelSpec) -> dict[str, Launch]:
    most = chunk(spec)
    block = {
        "BLOCK_K": min(most, padded(spec.key_dim)),
        "BLOCK_V": min(most, padded(spec.value_dim)),
    }
    walk = Launch("walk_chunks", block, 4, 2)
    if spec.backward:
        return {
            "walk": walk,
            "walk_back": Launch("walk_back", block, 4, 2),
            "grad_query": Launch(spec.name, block, 4, 2),
            "grad_key": Launch("key_gradient", block, 4, 2),
            "grad_value": Launch("value_gradient", block, 4, 2),
        }
    read = Launch(spec.name, block, 4, 2)
    if not spec.delta:
        return {"walk": walk, "read": read}
    # All features of a column are in one program's registers, and its copies in shared memory.
    float32, tall = spec.dtype == "float32", spec.key_dim > 128
    columns = {"BLOCK_K": 64 if tall else block["BLOCK_K"], "BLOCK_V": 16}
    warps = 8 if float32 or spec.key_dim > 256 else 4
    walk = Launch("walk_chunks", columns, warps, 1 if float32 or tall else 2)
    return {"solve": Launch("solve_chunks", block, 4, 2), "walk": walk, "read": read}
