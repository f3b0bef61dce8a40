"""What the GPU command checks: calls of operations, each on a paged memory laid out by hand.

Sequences are ragged, pages in random order, one of them missing; every slot that was never written
is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.memory.parts import field_width

SCOUT_FIELDS = ("mean", "std", "value_mean", "log_count")


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        op: an operation of `models.ops` on a memory, with its overload.
        rows: new tokens n of the longest sequence.
        shared: values are the first `value_dim` elements of their keys.
        pages: attend reads "all", "listed" or "unlisted" pages, or "records": those of the pages
            that are not listed. attend.summaries has a list in any case.
        score: of score_select; append_index writes the fields of it.
        decay, rule: of a state: "", "constant" or "gate"; "additive", "normalised" or "delta". Its
            key_dim is that of mapped keys.
    """

    op: str
    key_dim: int = 128
    value_dim: int = 128
    group: int = 4
    page_size: int = 64
    rows: int = 1
    shared: bool = False
    pages: str = "all"
    softcap: float = 0.0
    window: int = 0
    score: str = "mean-std"
    count: int = 2
    decay: str = ""
    rule: str = "additive"

    @property
    def name(self) -> str:
        if self.op == "combine":
            return f"combine ×{self.count}"
        if self.op.startswith("state"):
            said = [self.op, f"{self.key_dim}/{self.value_dim}", f"group {self.group}"]
            return " ".join([*said, f"n {self.rows}", self.decay or "no decay", self.rule])
        said = [self.op, f"{self.key_dim}/{self.value_dim}", f"page {self.page_size}"]
        said += [f"group {self.group}"] if not self.op.startswith("append_index") else []
        said += [f"n {self.rows}"]
        said += [self.pages] if self.op in ("attend", "attend.page_lse") else []
        said += [self.score] if self.op.startswith("score_select") else []
        said += [
            name for name in ("shared", "softcap", "window") if getattr(self, name) and name != ""
        ]
        return " ".join(said)


# What a scout step of a common model needs stands first: it is tested even where time is short.
CASES = (
    Case("append_index"),
    Case("score_select.page_logits"),
    Case("attend"),
    Case("attend.summaries"),
    Case("score_select"),
    Case("attend", pages="listed"),
    Case("combine"),
    Case("attend", rows=17),
    Case("append_index", rows=70),
    Case("attend", key_dim=576, value_dim=512, group=16, shared=True),
    Case("attend.summaries", rows=3),
    Case("score_select.page_logits", rows=3),
    Case("attend.summaries", key_dim=576, value_dim=512, group=16, shared=True),
    Case("attend.summaries", key_dim=64, value_dim=96, group=5, page_size=16, softcap=30.0),
    Case("score_select.page_logits", key_dim=64, group=3, page_size=16, score="box"),
    Case("attend", pages="records"),
    Case("attend", pages="unlisted"),
    Case("attend", key_dim=64, value_dim=64, group=8, page_size=16, softcap=30.0, window=96),
    Case("attend", pages="listed", rows=3),
    Case("score_select", rows=3),
    Case("score_select", key_dim=64, group=3, page_size=16, score="box"),
    Case("attend", key_dim=256, value_dim=256, group=2, page_size=32),
    Case("attend", key_dim=96, value_dim=32, group=3, page_size=16, rows=5),
    Case("attend.page_lse", pages="listed"),
    Case("append_index", key_dim=576, value_dim=512, shared=True),
    Case("attend", key_dim=576, value_dim=512, group=16, shared=True, pages="listed"),
    Case("score_select", key_dim=64, group=1, page_size=16, score="mean"),
    Case("score_select", group=8, score="ball"),
    Case("score_select.page_logits", key_dim=576, group=16, score="ball"),
    Case("attend", key_dim=32, value_dim=32, group=1, page_size=128, window=100, rows=4),
    Case("combine", count=3),
    Case("append_index.record_table", rows=70),
    Case("append_index.fold"),
    Case("append_index.fold", key_dim=64, value_dim=96, page_size=16, score="ball"),
    Case("score_select.among"),
    Case("score_select.among", key_dim=64, group=3, page_size=16, score="box", rows=3),
    Case("state_step", decay="gate", rule="normalised"),
    Case("state_chunk", decay="gate", rule="normalised", rows=200),
    Case("state_chunk.backward", decay="gate", rule="normalised", rows=200),
    Case("state_step", decay="gate", rule="delta"),
    Case("state_chunk", decay="gate", rule="delta", rows=200),
    Case("state_step", key_dim=256, rows=4),
    Case("state_chunk", key_dim=256, value_dim=64, decay="constant", rows=70),
    Case("state_chunk", key_dim=64, value_dim=96, group=5, rule="delta", rows=130),
    Case("state_chunk.backward", key_dim=96, value_dim=40, group=3, rule="normalised", rows=70),
)
TINY = (
    Case("append_index", key_dim=8, value_dim=8, page_size=16, rows=3),
    Case("score_select", key_dim=8, page_size=16, group=3),
    Case("score_select.page_logits", key_dim=8, page_size=16, group=3, rows=2, score="box"),
    Case("attend", key_dim=16, value_dim=8, page_size=16, group=3, rows=2),
    Case("attend.summaries", key_dim=16, value_dim=8, page_size=16, group=3, rows=2),
    Case("attend", key_dim=16, value_dim=8, page_size=16, pages="listed"),
    Case("attend", key_dim=16, value_dim=8, page_size=16, pages="records"),
    Case("attend", key_dim=16, value_dim=8, page_size=16, group=2, shared=True, softcap=5.0),
    Case("attend.page_lse", key_dim=16, value_dim=8, page_size=16, pages="listed"),
    Case("combine", value_dim=8),
    Case("append_index.record_table", key_dim=8, value_dim=8, page_size=16, rows=3),
    Case("append_index.fold", key_dim=8, value_dim=8, page_size=16),
    Case("score_select.among", key_dim=8, page_size=16, group=3, rows=2),
    Case("state_step", key_dim=16, value_dim=8, group=3, decay="gate", rule="normalised", rows=2),
    Case("state_chunk", key_dim=16, value_dim=8, group=2, decay="constant", rule="delta", rows=9),
    Case("state_chunk.backward", key_dim=8, value_dim=8, group=2, decay="gate", rows=9),
)


@dataclass
class Laid:
    """A case's memory on the CPU, in the element type under test."""

    case: Case
    dtype: torch.dtype
    seed: int = 0
    kv_heads: int = 2
    query: Tensor = field(init=False)
    new: tuple[Tensor, Tensor] = field(init=False)
    pools: tuple[Tensor, Tensor] = field(init=False)
    index: dict[str, Tensor] = field(init=False)
    table: Tensor = field(init=False)
    position: Tensor = field(init=False)
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, size = self.case, self.case.page_size
        make = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make).to(self.dtype)

        held = [11 * size + size // 2, 7 * size - 1, 1]
        rows = [case.rows, max(1, case.rows - 1), case.rows]
        self.position = torch.tensor(held, dtype=torch.int32)
        self.lengths = torch.tensor(rows, dtype=torch.int32)
        end = [h + n for h, n in zip(held, rows, strict=True)]
        columns = -(-max(end) // size) + 1
        batch, heads = len(held), self.kv_heads
        self.query = normal(batch, heads * case.group, case.rows, case.key_dim)
        count = batch * heads * columns
        order = torch.randperm(count, generator=make).int().view(batch, heads, columns)
        page = torch.arange(columns)
        used = page < -(-torch.tensor(end) // size)[:, None]
        self.table = torch.where(used[:, None], order, -1)
        keys = torch.full((count, size, case.key_dim), torch.nan, dtype=self.dtype)
        values = torch.full((count, size, case.value_dim), torch.nan, dtype=self.dtype)
        written = torch.tensor(held if case.op.startswith("append_index") else end)
        for b in range(batch):
            token = torch.arange(int(written[b]))
            for h in range(heads):
                at = self.table[b, h, token // size].long(), token % size
                keys[at] = normal(len(token), case.key_dim)
                values[at] = normal(len(token), case.value_dim)
        if not case.op.startswith("append"):
            self.table[0, 1, 2] = -1  # a hole
        if case.shared:
            values = keys[..., : case.value_dim]
        self.pools = (keys, values)
        new = normal(batch, heads, case.rows, case.key_dim)
        value = new if case.shared else normal(batch, heads, case.rows, case.key_dim)
        self.new = (new, value[..., : case.value_dim])
        names = {"box": ("min", "max"), "ball": ("mean", "radius"), "mean": ("mean",)}
        fields = names.get(case.score, SCOUT_FIELDS)
        if case.op == "score_select.page_logits":
            fields = ("mean", *(field for field in fields if field != "mean"))
        self.index = {}
        for name in fields:
            width = field_width(name, case.key_dim, case.value_dim)
            wide = torch.float32 if name == "log_count" else self.dtype
            drawn = torch.randn(count, width, generator=make)
            self.index[name] = (drawn.abs() if name in ("std", "radius", "max") else drawn).to(wide)
        if "min" in self.index:
            self.index["min"] = -self.index["min"].abs()

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.case.key_dim)

    def lists(self, width: int = 5) -> Tensor:
        """Distinct pages a row, some of them none, int32 [B, Hkv, n, width]."""
        make = torch.Generator().manual_seed(self.seed + 1)
        columns = self.table.shape[2]
        shape = (*self.table.shape[:2], self.case.rows, columns)
        lists = torch.rand(shape, generator=make).argsort(-1)[..., :width].sort(-1).values.int()
        lists[..., width // 2] = -1
        return lists
