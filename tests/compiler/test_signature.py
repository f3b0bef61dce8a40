"""Exported programs that cannot be given a memory are refused by name, with the mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from archive_payloads import Decoder, exported
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from memcompile.compiler.load import check_program

FREE = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


def ids(batch: int = 3, tokens: int = 7) -> Tensor:
    return torch.zeros(batch, tokens, dtype=torch.int64)


def export(module: nn.Module, inputs: tuple[Any, ...], shapes: tuple[Any, ...]) -> ExportedProgram:
    return torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)


class Tokens(Decoder):
    """Tokens alone."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids, torch.zeros_like(input_ids))


class Cached(Tokens):
    def forward(self, input_ids: Tensor, past_key: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids) + past_key.sum()


class CachedUnnamed(Tokens):
    def forward(self, input_ids: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids) + x.sum()


class Masked(Tokens):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids) * attention_mask[..., None]


class Keeping(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("key_cache", torch.zeros(2))

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        self.key_cache.add_(1)
        return super().forward(input_ids)


class KeepingSlices(Keeping):
    def forward(self, input_ids: Tensor) -> Tensor:
        self.key_cache[:1].copy_(torch.ones(1))
        return Tokens.forward(self, input_ids)


class Returning(Tokens):
    def forward(self, input_ids: Tensor) -> Any:
        out = super().forward(input_ids)
        return out, out[:, None] * 1


class Last(Tokens):
    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids)[:, -1]


class Branching(Tokens):
    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        scale = 2.0 if input_ids.shape[1] > 5 else 1.0
        return super().forward(input_ids) * scale


class Spelled(Decoder):
    """Attention in plain arithmetic."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + nn.functional.embedding(position_ids, self.table)
        q, k, v = self.mix(x).chunk(3, -1)
        return self.head(x + (q @ k.transpose(1, 2)).softmax(-1) @ v)


class Embedded(Decoder):
    def forward(self, inputs_embeds: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(inputs_embeds)


class Alternating(Tokens):
    """Pairs tokens up: holds for even lengths only."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        out = super().forward(input_ids)
        return out.reshape(out.shape[0], -1, 2, 11).sum(2).repeat_interleave(2, 1)


REFUSED: dict[str, tuple[Callable[[], ExportedProgram], str]] = {
    "static tokens": (
        lambda: export(Tokens(), (ids(),), ({0: Dim.DYNAMIC},)),
        "the token axis of the exported program is static: input_ids[s",
    ),
    "static batch": (
        lambda: export(Tokens(), (ids(),), ({1: Dim.DYNAMIC},)),
        "the batch axis of the exported program is static: input_ids[3, s",
    ),
    "static positions": (
        lambda: export(Decoder(), (ids(), ids(1, 7)), (FREE, {1: Dim.DYNAMIC})),
        "the batch axis of the exported program is static: position_ids[1, s",
    ),
    "even tokens": (
        lambda: export(
            Tokens(), (ids(3, 8),), ({0: Dim.DYNAMIC, 1: 2 * Dim("half", min=2, max=64)},)
        ),
        "the token axis of the exported program is not free: input_ids[s",
    ),
    "guard on the length": (
        lambda: export(Alternating(), (ids(3, 8),), (FREE,)),
        "the exported program holds only where (",
    ),
    "branch on the length": (
        lambda: export(Branching(), (ids(),), (FREE,)),
        "token axis of at least 6 only",
    ),
    "decomposed": (
        lambda: exported().run_decompositions(),
        "decomposed into core ATen operators (",
    ),
    "decomposed, spelled out": (
        lambda: exported(Spelled()).run_decompositions(),
        "decomposed into core ATen operators (_softmax, ",
    ),
    "cache by name": (
        lambda: export(Cached(), (ids(), torch.zeros(4, 2)), (FREE, {})),
        "takes a cache: past_key[4, 2]; export the forward without a cache",
    ),
    "cache by shape": (
        lambda: export(CachedUnnamed(), (ids(), torch.zeros(2, 2, 4, 2)), (FREE, {})),
        "takes a cache: x[2, 2, 4, 2]",
    ),
    "cache in a buffer": (
        lambda: export(Keeping(), (ids(),), (FREE,)),
        "it writes key_cache; export the forward without a cache",
    ),
    "cache in a slice of a buffer": (
        lambda: export(KeepingSlices(), (ids(),), (FREE,)),
        "it writes key_cache; export the forward without a cache",
    ),
    "cache in a buffer, functional": (
        lambda: export(Keeping(), (ids(),), (FREE,)).run_decompositions({}),
        "it writes key_cache; export the forward without a cache",
    ),
    "cache returned": (lambda: export(Returning(), (ids(),), (FREE,)), "returns a cache[s"),
    "attention mask": (
        lambda: export(Masked(), (ids(), ids()), (FREE, FREE)),
        "takes input_ids, attention_mask; expected input_ids and, optionally, position_ids",
    ),
    "embeddings": (
        lambda: export(Embedded(), (torch.zeros(3, 7, 8),), (FREE,)),
        "takes inputs_embeds[s",
    ),
    "last logits only": (
        lambda: export(Last(), (ids(),), (FREE,)),
        "expected logits [B, T, V] of every token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        check_program(make())
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "make",
    [
        exported,
        lambda: exported(Spelled()),
        lambda: exported().run_decompositions({}),
        lambda: export(Tokens(), (ids(),), (FREE,)),
        lambda: export(Tokens(), (ids(),), ({0: Dim("b"), 1: Dim("t", max=512)},)),
    ],
    ids=["positions", "spelled out", "functional", "tokens", "bounded"],
)
def test_accepted(make: Callable[[], ExportedProgram]) -> None:
    check_program(make())
