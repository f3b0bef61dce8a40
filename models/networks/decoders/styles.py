"""Two decoders as their well-known small implementations write them, end to end."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import GroupedBeforeTranspose
from .frame import At, Block
from .layouts import GatedMlp
from .masking import TrilBuffer
from .positions import RotaryTables, SlicedTable


class NanoGpt(SlicedTable, TrilBuffer):
    """nanoGPT: sliced learned positions, one fused projection, a triangle buffer, a tied head."""

    layers: ClassVar[int] = 2

    def setup(self) -> None:
        super().setup()
        width = self.heads * self.key_dim
        self.fused = nn.ModuleList(nn.Linear(self.hidden, 3 * width) for _ in self.blocks)

    def attention(self, block: Block, x: Tensor, at: At) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            y.view(batch, length, self.heads, -1).transpose(1, 2)
            for y in self.fused[at.layer](x).split(self.heads * self.key_dim, dim=2)
        )
        out = self.attend(query, key, value, at).transpose(1, 2).contiguous()
        joined: Tensor = block.output(out.view(batch, length, -1))
        return joined

    def finish(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight)


class LlamaTables(GroupedBeforeTranspose, RotaryTables, GatedMlp):
    """llama2.c's: sliced rotary tables, pairs interleaved, KV heads repeated, a SiLU gate."""

    layers: ClassVar[int] = 2
