"""What the proof knows of positions, tables and masks, and what it refuses, node by node."""

from __future__ import annotations

import pytest
import torch
from normal_form import lowered
from torch import nn

from memcompile.compiler.capture import capture
from memcompile.passes.classify_tokens import Gather, Rematerialise, classify_tokens
from memcompile.passes.exact import Affine, Steps
from memcompile.passes.strip_asserts import strip_asserts
from memcompile.passes.token_axes import BATCH, TOKEN, Kind, Mixed, Value
from memcompile.passes.unlift import unlift


def judged(body):
    """The classification, and the value of the last call before the output."""
    module = lowered(body)
    state = classify_tokens(module)
    output = next(n for n in module.graph.nodes if n.op == "output")
    return state, output.args[0], state.values[output.args[0]]


def local(m, x):
    x = nn.functional.layer_norm(m.project(x), (16,))
    return (x.unflatten(-1, (4, 4)).transpose(1, 2).flatten(1, 2).unflatten(1, (4, -1))).relu()


def test_local_work_stays_local():
    _, _, value = judged(local)
    assert value == Value(((BATCH,), (4,), (TOKEN,), (4,)), Kind.LOCAL)


POSITIONS = {
    "arange": (lambda m, x: torch.arange(x.shape[1]), Affine(0, ((0, 1),))),
    "offset": (lambda m, x: torch.arange(x.shape[1]) + 2, Affine(2, ((0, 1),))),
    "started": (lambda m, x: torch.arange(3, x.shape[1] + 3), Affine(3, ((0, 1),))),
    "stepped": (lambda m, x: torch.arange(x.shape[1]) * 2 - 1, Affine(-1, ((0, 2),))),
    "cumsum": (lambda m, x: torch.ones(x.shape[:2]).long().cumsum(1), Affine(1, ((1, 1),))),
    "from_first": (
        lambda m, x: torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:1],
        Affine(0, ((0, 1),)),
    ),
    "repeated": (
        lambda m, x: torch.arange(x.shape[1])[:, None].repeat(x.shape[0], 1, 3),
        Affine(0, ((1, 1),)),
    ),
    "distance": (
        lambda m, x: torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]),
        Affine(0, ((0, 1), (1, -1))),
    ),
    "triangle": (
        lambda m, x: torch.ones(x.shape[1], x.shape[1]).tril(),
        Steps((0,), (0.0, 1.0), 0, 1),
    ),
    "upper": (
        lambda m, x: torch.full((x.shape[1], x.shape[1]), -2.0).triu(1),
        Steps((0,), (-2.0, 0.0), 0, 1),
    ),
    "buffer": (lambda m, x: m.tril[: x.shape[1], : x.shape[1]], Steps((0,), (0.0, 1.0), 0, 1)),
    "buffer_4d": (
        lambda m, x: m.tril.view(1, 1, 32, 32)[:, :, : x.shape[1], : x.shape[1]] == 0,
        Steps((0,), (True, False), 2, 3),
    ),
    "band": (
        lambda m, x: (torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None]).abs() < 3,
        None,
    ),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_and_masks_are_known_exactly(name):
    body, exact = POSITIONS[name]
    _, _, value = judged(body)
    if exact is None:
        assert isinstance(value, Mixed)
    else:
        assert value.exact == exact
        assert value.kind in (Kind.POSITION, Kind.CONSTANT)


def test_exact_values_are_the_values():
    for name, (body, exact) in POSITIONS.items():
        if exact is None:
            continue
        module = lowered(body)
        _, _, value = judged(body)
        with torch.no_grad():
            real = module(torch.randint(19, (3, 6)))
        shape = real.shape
        grid = torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")
        if isinstance(value.exact, Affine):
            known = value.exact.offset + sum(c * grid[a] for a, c in value.exact.coefficients)
        else:
            distance = grid[value.exact.row] - grid[value.exact.col]
            known = torch.tensor([value.exact.at(int(d)) for d in distance.flatten()])
            known = known.reshape(shape)
        assert torch.equal(known.to(real.dtype), real), name


def test_tables_are_gathered_and_bounded():
    state, node, value = judged(lambda m, x: m.table[2 : x.shape[1] + 2])
    assert value.kind is Kind.POSITION
    assert state.rewrites[node] == Gather(0, 2)
    assert [b.limit for b in state.bounds] == [30]


def test_embedded_positions_are_bounded():
    state, _, value = judged(
        lambda m, x: nn.functional.embedding(torch.arange(x.shape[1]) + 2, m.table)
    )
    assert value == Value(((TOKEN,), (16,)), Kind.POSITION)
    assert [b.limit for b in state.bounds] == [30]


def test_rows_of_a_constant_may_be_gathered_by_each_token():
    def body(m, x):
        rows = torch.arange(x.shape[1])[None, :, None].repeat(x.shape[0], 1, 16)
        return torch.gather(m.table.repeat(x.shape[0], 1, 1), 1, rows)

    state, _, value = judged(body)
    assert value == Value(((BATCH,), (TOKEN,), (16,)), Kind.POSITION)
    assert [b.limit for b in state.bounds] == [32]
    _, _, value = judged(lambda m, x: torch.gather(x, 1, x.argsort(-1)))
    assert isinstance(value, Mixed)


def test_looking_along_known_values_is_rematerialised():
    state, node, _ = judged(lambda m, x: torch.ones(x.shape[:2]).cumsum(1))
    assert state.rewrites[node] == Rematerialise(Affine(1.0, ((1, 1.0),)), ((BATCH,), (TOKEN,)))


REFUSED = {
    "reduces over the token axis": lambda m, x: x - x.mean(1, keepdim=True),
    "reduces over the batch axis": lambda m, x: x - x.mean(0, keepdim=True),
    "runs along the token axis": lambda m, x: x.softmax(1),
    "accumulates data along the token axis": lambda m, x: x.cumsum(1),
    "normalises over the batch axis": lambda m, x: nn.functional.batch_norm(
        x.transpose(1, 2), None, None, training=True
    ).transpose(1, 2),
    "takes a part of the token axis": lambda m, x: x[:, 1:],
    "takes one token or row out of the sequence": lambda m, x: x[:, -1],
    "concatenates along the token axis": lambda m, x: torch.cat([x, x], 1),
    "pads the token axis": lambda m, x: nn.functional.pad(x, (0, 0, 1, 0)),
    "a convolution over tokens": lambda m, x: nn.functional.conv1d(
        x.transpose(1, 2), m.table.view(16, 16, 2), padding=1
    ),
    "sums over the token axis": lambda m, x: x.transpose(1, 2) @ x,
    "compares tokens with each other": lambda m, x: x @ x.transpose(1, 2),
    "aten.flip.default is not known to keep tokens apart": lambda m, x: x.flip(1),
    "aten.roll.default is not known to keep tokens apart": lambda m, x: x.roll(1, 1),
    "reads other tokens by index": lambda m, x: x[:, torch.arange(x.shape[1])],
    "used as data": lambda m, x: x / x.shape[1],
    "a slice that starts at a place computed": lambda m, x: m.table[x.shape[1] : x.shape[1] + 1],
    "mixes the token axis": lambda m, x: x.reshape(x.shape[1], x.shape[0], 16),
    "a range whose length is not": lambda m, x: torch.arange(x.shape[1] * 2),
    "positions that are not counted from the start": lambda m, x: nn.functional.embedding(
        torch.arange(x.shape[1]) - 1, m.table
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_the_reason(reason):
    _, _, value = judged(REFUSED[reason])
    assert isinstance(value, Mixed)
    assert reason in value.declined.reason


def test_the_first_refusal_is_the_one_reported():
    _, _, value = judged(lambda m, x: (x.cumsum(1).relu() + 1).mean(1))
    assert isinstance(value, Mixed)
    assert "cumsum" in value.declined.node


def test_positions_given_as_input():
    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(19, 16)

        def forward(self, tokens, position_ids):
            first = position_ids[:, :1]
            packed = (position_ids.diff(prepend=first - 1) != 1).cumsum(-1)
            return self.embedding(tokens) + (position_ids + packed)[..., None]

    module = strip_asserts(unlift(capture(Positioned().eval()).program).graph).graph
    state = classify_tokens(module)
    diff, cumsum, total = (
        next(n for n in module.graph.nodes if name in str(n.target))
        for name in ("diff", "cumsum", "unsqueeze")
    )
    assert state.values[diff].exact == Steps.uniform(1)
    assert state.values[cumsum].exact == Steps.uniform(0)
    assert state.values[total].exact == Affine(0, ((1, 1),))
