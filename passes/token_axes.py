"""What is known of a value: its batch and token axes, what it depends on, its exact form."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from .exact import Exact
from .graph_tools import describe, source_line
from .result import Declined

# An axis is an ordered product of atoms, as in a row-major view: batch, tokens, numbers.
BATCH, TOKEN = "batch", "token"
Atom = str | int
Axis = tuple[Atom, ...]


class Kind(enum.IntEnum):
    """What a value depends on besides its own index; later kinds include the earlier."""

    CONSTANT = 0
    POSITION = 1
    LOCAL = 2


@dataclass(frozen=True)
class Value:
    """A value whose element for token t can be computed when token t arrives.

    Attributes:
        axes: the axes of the tensor; at most one holds the token axis, unless `exact` is known.
        kind: constant; a function of the position; or of the token's own data ("local").
        exact: the values themselves, for positions and masks.
        tensor: the tensor itself, for small constants that are not parameters.
        cut: (axis, start) of token-long slices taken from a constant table.
    """

    axes: tuple[Axis, ...]
    kind: Kind = Kind.CONSTANT
    exact: Exact | None = None
    tensor: torch.Tensor | None = None
    cut: tuple[tuple[int, int], ...] = ()

    @property
    def token_axes(self) -> list[int]:
        return [i for i, axis in enumerate(self.axes) if TOKEN in axis]


@dataclass(frozen=True)
class Mixed:
    """A value for which no incremental computation is known, and the node where that began."""

    declined: Declined


class Refused(Exception):
    """Raised by a rule that cannot vouch for a node."""


def mixed(node: fx.Node, reason: str) -> Mixed:
    return Mixed(Declined(reason, describe(node), "derive_step", source_line(node)))


@dataclass(frozen=True)
class Extents:
    """The two symbols of the graph, and how sizes are read in terms of them."""

    batch: sympy.Expr
    token: sympy.Expr

    def monomial(self, size: sympy.Expr) -> tuple[int, int, int]:
        """(coefficient, power of batch, power of token) of a size, e.g. 4*B*T -> (4, 1, 1)."""
        coefficient, b, t = size, 0, 0
        for factor in sympy.Mul.make_args(size):
            if factor == self.batch:
                b, coefficient = b + 1, coefficient / self.batch
            elif factor == self.token:
                t, coefficient = t + 1, coefficient / self.token
        if not coefficient.is_Integer or int(coefficient) < 0 or b > 1 or t > 1:
            raise Refused(f"an axis of size {size}, which is no multiple of the number of tokens")
        return int(coefficient), b, t

    def axis(self, size: sympy.Expr) -> Axis:
        """The axis a factory makes for a size; a product of batch and tokens is batch-major."""
        coefficient, b, t = self.monomial(size)
        atoms: list[Atom] = [*([BATCH] * b), *([TOKEN] * t)]
        if coefficient != 1:
            atoms.append(coefficient)
        return tuple(atoms)

    def depends(self, size: sympy.Expr) -> bool:
        """Whether a number is computed from the length or the batch size."""
        return bool(size.free_symbols & (self.token.free_symbols | self.batch.free_symbols))


def merge_numbers(atoms: Sequence[Atom]) -> Axis:
    out: list[Atom] = []
    for atom in atoms:
        if atom == 1:
            continue
        if out and isinstance(atom, int) and isinstance(out[-1], int):
            out[-1] *= atom
        else:
            out.append(atom)
    return tuple(out)


def reshape(
    axes: tuple[Axis, ...], sizes: Sequence[sympy.Expr], extents: Extents
) -> tuple[Axis, ...]:
    """The axes of a row-major view with the given sizes; raises where it would mix tokens."""
    pending: list[Atom] = [atom for axis in axes for atom in axis]
    out: list[Axis] = []
    for size in sizes:
        coefficient, b, t = extents.monomial(size)
        taken: list[Atom] = []
        while (coefficient, b, t) != (1, 0, 0):
            if not pending:
                raise Refused("a view of another number of elements")
            atom = pending.pop(0)
            if atom == BATCH and b:
                b -= 1
            elif atom == TOKEN and t:
                t -= 1
            elif isinstance(atom, int) and coefficient % atom == 0:
                coefficient //= atom
            elif isinstance(atom, int) and coefficient > 1 and math.gcd(atom, coefficient) > 1:
                part = math.gcd(atom, coefficient)
                if part != coefficient:
                    raise Refused("a view that cuts across axes")
                pending.insert(0, atom // part)
                atom, coefficient = part, 1
            else:
                raise Refused("a view that mixes the token axis with another")
            taken.append(atom)
        out.append(merge_numbers(taken))
    if any(atom != 1 for atom in pending):
        raise Refused("a view of another number of elements")
    return tuple(out)


def broadcast(shapes: Sequence[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """The axes of an elementwise result; raises where tokens would meet another axis."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Axis] = []
    for i in range(rank):
        here = {s[i - rank] for s in shapes if len(s) >= rank - i}
        here.discard(())
        if len(here) > 1:
            raise Refused("two different axes meet in one elementwise operation")
        out.append(here.pop() if here else ())
    return tuple(out)
