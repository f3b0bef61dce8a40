"""Values as source text: literals by their type, and weights by the rule that makes them anew."""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from .region import Cut, edge_of, is_parameter

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Held:
    """A weight of the script: its text, and the value that the text makes."""

    def __init__(
        self, text: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ):
        self.text, self.tensor, self.shape, self.dtype = text, tensor, shape, dtype

    def value(self, generator: torch.Generator) -> Tensor:
        if self.tensor is not None:
            return self.tensor
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return (0.1 * torch.randn(self.shape, generator=generator)).to(self.dtype)
        return torch.randint(2, self.shape, generator=generator).to(self.dtype)


def weights_of(region: Cut) -> dict[fx.Node, Held]:
    """Every weight and table of a region. Constants that are a number or a mask are kept as the
    rule that makes them, for what they say decides what is declined; the others are drawn anew."""
    held = {}
    for node in region.edge:
        width = edge_of(node, region.graph.classified).width
        held[node] = _random((region.rows, width), node.meta["val"].dtype)
    for node in region.nodes:
        if node.op != "get_attr":
            continue
        tensor = operator.attrgetter(str(node.target))(region.graph.module)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{node.name} is a {type(tensor).__name__}, which no script can hold")
        known = None if is_parameter(node) else _rule(tensor.detach().cpu())
        held[node] = known or _random(tuple(tensor.shape), tensor.dtype)
    return held


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Held:
    sizes = ", ".join(str(int(size)) for size in shape)
    kind = "" if dtype is torch.float32 else f"dtype={literal(dtype)}"
    return Held(f"random({', '.join(filter(None, (sizes, kind)))})", None, shape, dtype)


def _rule(tensor: Tensor) -> Held | None:
    """A constant as an expression: one number, 0 1 2 3 ..., or a function of row minus column."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if dtype.is_complex or tensor.numel() == 0:
        return None
    sizes, kind = list(shape), literal(dtype)
    first = tensor.flatten()[0].item()
    if bool((tensor == first).all()):
        return Held(f"torch.full({sizes}, {literal(first)}, dtype={kind})", tensor, shape, dtype)
    count = tensor.numel()
    if not dtype.is_floating_point and torch.equal(tensor.flatten().long(), torch.arange(count)):
        text = f"torch.arange({count}, dtype={kind}).reshape({sizes})"
        return Held(text, tensor, shape, dtype)
    if len(shape) < 2 or shape[-1] != shape[-2] or count != shape[-1] ** 2:
        return None
    square, size = tensor.reshape(shape[-2:]), shape[-1]
    # The value at row - column = d stands in the first column below the diagonal, in row 0 above.
    steps = torch.cat([square[0].flip(0), square[1:, 0]])
    apart = torch.arange(size)[:, None] - torch.arange(size)[None]
    if not torch.equal(steps[apart + size - 1], square):
        return None
    text, runs = f"torch.full(({size}, {size}), {literal(steps[0].item())}, dtype={kind})", 1
    lines = [text]
    for at in range(1, len(steps)):
        if steps[at] != steps[at - 1]:
            runs += 1
            value = literal(steps[at].item())
            lines.append(
                f".where(distance({size}) < {at - size + 1}, torch.tensor({value}, dtype={kind}))"
            )
    if runs > 8:
        return None
    return Held("".join(lines) + f".reshape({sizes})", tensor, shape, dtype)


def literal(value: Any) -> str:
    """A value as source text, by its type; nothing else has a text here."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if type(value) is int:
        return str(value)
    if type(value) is float:
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, str):
        return ascii(str(value))
    if isinstance(value, torch.device):
        return 'torch.device("cpu")'
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return f"torch.{word_of(str(value).removeprefix('torch.'))}"
    if isinstance(value, list | tuple):
        parts = ", ".join(literal(part) for part in value)
        return f"[{parts}]" if isinstance(value, list) else f"({parts},)" if value else "()"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    raise ValueError(f"a {type(value).__name__} stands in the region, which no script can hold")


def word_of(text: str) -> str:
    """`text`, if it is a plain word.

    Raises:
        ValueError: it is not.
    """
    if not _WORD.fullmatch(text):
        raise ValueError(f"{ascii(text)[:80]} stands in the region where a plain word is expected")
    return text
