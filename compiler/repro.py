"""A script that shows by itself what was declined: the region around it, with random weights.

The text is made of nothing that a graph brings along as text: names are rebuilt from letters,
digits and underscores, operators are taken from torch's own tables, literals are printed by their
type.
"""

from __future__ import annotations

import keyword
import math
import operator
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..evaluation.records import write_whole
from ..models.memory import Mixture, Policy
from ..passes.graph_tools import module_path
from ..passes.result import Declined
from .policy_file import FittedPolicy
from .region import (
    Cut,
    Edge,
    Graph,
    cut,
    edge_of,
    is_output,
    is_parameter,
    is_site,
    part,
    sinks,
)
from .source_text import Held, literal, weights_of, word_of

_DEPTHS = (6, 16, 48, 1 << 30)
_MOST_NODES = 4000
_NAMESPACES = ("aten", "prims", "memcompile")
_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.pow: "**",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_TAKEN = {"self", "torch", "nn", "aten", "memcompile", "operator", "math", "random", "input_ids"}
_TAKEN |= {"position_ids", "rows", "batch", "tokens", "main", "functional", "logits", "base", "ops"}

_SCRIPT = '''\
"""{title}

Written by `memcompile explain --repro`. The weights are random, of the model's shapes and types.
Exits with 0 if it is reproduced, with 1 if it is not.
"""

import sys
{standard}
import torch
from torch import nn

import memcompile
{imports}
aten = torch.ops.aten
_generator = torch.Generator().manual_seed(0)


def random(*shape, dtype=torch.float32):
    """Random values of a weight that was not kept."""
    if dtype.is_floating_point or dtype.is_complex:
        return (0.1 * torch.randn(shape, generator=_generator)).to(dtype)
    return torch.randint(2, shape, generator=_generator).to(dtype)


class Region(nn.Module):
    def __init__(self):
        super().__init__()
{weights}

    def forward(self, {inputs}):
{body}


POLICY = {policy}
OPTIONS = {options}
EXPECTED = {expected}


def main():
    report = memcompile.explain(
        Region().eval(), policy=POLICY, kernels="off", check={check}, **OPTIONS
    )
{tail}


if __name__ == "__main__":
    sys.exit(main())
'''
_DECLINED = """\
    for declined in report.declined:
        print(declined)
    found = any({match} for d in report.declined)
    print("reproduced" if found else "not reproduced")
    return 0 if found else 1"""
_REWRITTEN = """\
    print(report)
    return 0 if report.memories and not report.declined else 1"""


def write_repro(
    path: str | os.PathLike[str],
    graph: Graph,
    policy: Policy,
    site: str | None = None,
    mismatch: Declined | None = None,
) -> str:
    """Writes a script that reproduces a decline, and imports nothing but torch and memcompile.

    What it holds is tried first: of the region around the node that was declined, the smallest that
    is declined for the same reason by itself.

    Args:
        site: the attention to cut around, instead of the first decline.
        mismatch: the decline of a self-check, which names no node: the first attention that fails
            it by itself is written, else all of them.

    Returns:
        One line about what was written.

    Raises:
        ValueError: there is nothing to cut around, or the region calls what a script cannot.
    """
    if mismatch is not None and site is None:
        region, held, like = _mismatched(graph, policy, mismatch)
        declined: Declined | None = mismatch
    else:
        focus, declined = graph.focus(site)
        region, held, like = _smallest(graph, sinks(focus, declined), policy, declined)
    text = script(region, held, _policy_of(graph, policy, region, declined), declined)
    write_whole(Path(path), text.encode())
    what = f"{len(region.nodes)} of {len(graph.module.graph.nodes)} nodes"
    how = "" if like else "; with random weights it is not reproduced: the cause is in the weights"
    return f"{what} around {region.sinks[0].name}{how}"


def _smallest(
    graph: Graph, ends: list[fx.Node], policy: Policy, declined: Declined | None
) -> tuple[Cut, dict[fx.Node, Held], bool]:
    """The smallest of some regions that shows what the whole does, and whether it does."""
    for depth in _DEPTHS:
        region = cut(graph, ends, depth)
        if len(region.nodes) > _MOST_NODES:
            raise ValueError(
                f"the region around {ends[0].name} has {len(region.nodes)} nodes; a script of at "
                f"most {_MOST_NODES} is written"
            )
        held = weights_of(region)
        script(region, held, {"preset": "dense"}, declined)  # what cannot be printed is said first
        if _shows(region, held, _policy_of(graph, policy, region, declined), declined):
            return region, held, True
        if region.whole:
            break
    return region, held, False


def _mismatched(
    graph: Graph, policy: Policy, mismatch: Declined
) -> tuple[Cut, dict[fx.Node, Held], bool]:
    nodes = {node.name: node for node in graph.module.graph.nodes}
    for site in graph.sites:
        region, held, like = _smallest(graph, [nodes[site.node]], policy, mismatch)
        if like:
            return region, held, True
    output = next(n for n in reversed(graph.module.graph.nodes) if n.op == "output")
    region = cut(graph, [output.args[0]], 1 << 30)
    held = weights_of(region)
    return region, held, _shows(region, held, _policy_of(graph, policy, region, mismatch), mismatch)


def _shows(
    region: Cut, held: dict[fx.Node, Held], policy: dict[str, Any], declined: Declined | None
) -> bool:
    """Whether the region by itself is declined for the same reason, or rewritten if none is."""
    from .explain import explain

    generator = torch.Generator().manual_seed(0)
    module = part(region, {node: weight.value(generator) for node, weight in held.items()})
    options = {k: v for k, v in policy.items() if k != "preset"}
    checked = declined is None or declined.rule == "self_check"
    report = explain(module, policy=policy["preset"], kernels="off", check=checked, **options)
    if declined is None:
        return bool(report.memories) and not report.declined
    return any(_alike(found, declined) for found in report.declined)


def _alike(found: Declined, declined: Declined) -> bool:
    # A self-check's reason holds figures of the model's own weights.
    return found.rule == declined.rule and (
        declined.rule == "self_check" or found.reason == declined.reason
    )


def _policy_of(
    graph: Graph, policy: Policy, region: Cut, declined: Declined | None
) -> dict[str, Any]:
    """The policy's JSON for a region: of one attention, which stands in layer 0 there."""
    if declined is not None and declined.rule != "self_check":
        return {"preset": "dense"}  # what is declined is so under each
    layer = next((s.layer for s in graph.sites if s.node == region.sinks[0].name), None)
    if layer is None:
        return policy.to_json()
    if isinstance(policy, FittedPolicy):
        policy = policy.base
    if isinstance(policy, Mixture):
        policy = policy.layers.get(layer, policy.default)
    memory = policy.memory(layer, 0)
    options = policy.to_json()
    if "dense_layers" in options:
        options["dense_layers"] = 0 if memory.name != "dense" else 1
    if "state_layers" in options:
        options["state_layers"] = [0] if memory.state is not None else [1]
    return options


def script(
    region: Cut, held: dict[fx.Node, Held], policy: dict[str, Any], declined: Declined | None
) -> str:
    """The text of the script.

    Raises:
        ValueError: the region calls what a script cannot.
    """
    names = _names(region, held)
    weights = [f"self.{names[node]} = {_held_text(node, held[node])}" for node in held]
    body = _body(region, names)
    takes = ["input_ids"] + ["position_ids"] * region.takes_positions
    if not is_site(region) and not is_output(region):
        weights.append(f"self.base = nn.Parameter(random({region.rows}, 8), False)")
    used = "\n".join([*weights, *body])
    imports = ""
    if "torch.ops.memcompile" in used:
        imports += "import memcompile.models.ops  # registers torch.ops.memcompile.attention\n"
    if "distance(" in used:
        imports += _DISTANCE
    options = {key: value for key, value in policy.items() if key != "preset"}
    expected, tail = "None", _REWRITTEN
    if declined is not None:
        expected = f"({literal(declined.rule)}, {literal(_pathless(declined.reason))})"
        exact = declined.rule != "self_check" and _pathless(declined.reason) == declined.reason
        tail = _DECLINED.format(
            match="(d.rule, d.reason) == EXPECTED" if exact else "d.rule == EXPECTED[0]"
        )
    return _SCRIPT.format(
        title="What memcompile declines, by itself."
        if declined is not None
        else "One attention, by itself.",
        standard="import math\n" if " = math." in used else "",
        imports=imports,
        weights=_indented(weights or ["pass"], 8),
        inputs=", ".join(takes),
        body=_indented(body, 8),
        policy=literal(policy["preset"]),
        options=literal(options),
        expected=expected,
        check=declined is None or declined.rule == "self_check",
        tail=tail,
    )


_DISTANCE = '''

def distance(size):
    """Row minus column."""
    return torch.arange(size)[:, None] - torch.arange(size)[None]

'''


def _pathless(text: str) -> str:
    """A reason without the folders of the machine it was met on."""
    return re.sub(r"(?:[A-Za-z]:)?(?:[/\\][^\s/\\'\":,;]+)+[/\\]", ".../", text)


def _held_text(node: fx.Node, weight: Held) -> str:
    plain = weight.tensor is not None or not weight.dtype.is_floating_point
    if node.op == "get_attr" and (plain or not is_parameter(node)):
        return f"nn.Buffer({weight.text})"
    return f"nn.Parameter({weight.text}, False)"


def _body(region: Cut, names: dict[fx.Node, str]) -> list[str]:
    lines = []
    if region.edge or not (is_site(region) or is_output(region)):
        lines.append(f"rows = input_ids % {region.rows}")
    if region.edge:
        lines.append("batch, tokens = input_ids.shape")
    for node in region.edge:
        edge = edge_of(node, region.graph.classified)
        table = f"nn.functional.embedding(rows, self.{names[node]})"
        lines.append(f"{names[node]} = {table}{_spread(edge)}")
    place = ""
    for node in region.nodes:
        if node.op != "call_function":
            continue
        here = re.sub(r"[^A-Za-z0-9_.]", "_", module_path(node), flags=re.ASCII)[:80]
        if here.strip("_") == here and here not in ("", place):
            lines.append(f"# {here}")
            place = here
        lines.append(f"{names[node]} = {_call(node, names)}")
    ends = [names[node] for node in region.sinks]
    if is_site(region):
        return [*lines, f"return {ends[0]}.transpose(1, 2).flatten(2)"]
    if is_output(region):
        return [*lines, f"return {ends[0]}"]
    lines.append("logits = nn.functional.embedding(rows, self.base)")
    # The median declines with words that no other operation has.
    lines += [f"logits = logits + {end}.to(logits.dtype).median()" for end in ends]
    return [*lines, "return logits"]


def _spread(edge: Edge) -> str:
    sizes = ", ".join(["batch", "tokens", *(str(n) for n in edge.numbers)])
    spelled = {-1: "batch", -2: "tokens"}
    axes = [" * ".join(spelled.get(p, str(p)) for p in axis) or "1" for axis in edge.axes]
    text = f".reshape({sizes})"
    if edge.order != tuple(range(len(edge.order))):
        text += f".permute{edge.order}"
    if any(len(axis) != 1 for axis in edge.axes):
        text += f".reshape({', '.join(axes)})"
    return text


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    target: Any = node.target
    given = [_argument(value, names) for value in node.args]
    given += [f"{word_of(name)}={_argument(value, names)}" for name, value in node.kwargs.items()]
    if target is torch.ops.aten.sym_size.int and len(given) == 2:
        return f"{given[0]}.shape[{given[1]}]"
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        name = target._schema.name.split("::")[1]
        space = "aten" if target.namespace == "aten" else f"torch.ops.{target.namespace}"
        return f"{space}.{word_of(name)}.{word_of(target._overloadname)}({', '.join(given)})"
    if target is operator.getitem:
        return f"{given[0]}[{given[1]}]"
    if target in _INFIX and len(given) == 2:
        return f"{given[0]} {_INFIX[target]} {given[1]}"
    if target is operator.neg:
        return f"-{given[0]}"
    name = getattr(target, "__name__", "")
    if name.startswith("sym_") and getattr(torch, name, None) is target:
        return f"torch.{word_of(name)}({', '.join(given)})"
    if getattr(math, name, None) is target:
        return f"math.{word_of(name)}({', '.join(given)})"
    raise ValueError(
        f"the region calls {ascii(str(target))[:80]}, which is no operator of torch's own: no "
        "script without your code can show it"
    )


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return f"self.{names[value]}" if value.op == "get_attr" else names[value]
    if isinstance(value, list | tuple) and any(isinstance(part, fx.Node) for part in value):
        return f"[{', '.join(_argument(part, names) for part in value)}]"
    return literal(value)


def _names(region: Cut, held: dict[fx.Node, Held]) -> dict[fx.Node, str]:
    """A name of its own for each node, of plain letters, whatever the graph calls it."""
    inputs = [n for n in region.graph.module.graph.nodes if n.op == "placeholder"]
    names = dict(zip(inputs, ("input_ids", "position_ids"), strict=False))
    used = set(_TAKEN)
    for node in [*held, *region.nodes]:
        if node in names:
            continue
        word = re.sub(r"[^A-Za-z0-9_]", "_", node.name, flags=re.ASCII)[:60].strip("_") or "value"
        if word[0].isdigit() or keyword.iskeyword(word) or word in dir(torch.nn.Module):
            word = f"value_{word}"
        name, count = word, 1
        while name in used:
            count += 1
            name = f"{word}_{count}"
        used.add(name)
        names[node] = name
    return names


def _indented(lines: list[str], by: int) -> str:
    return "\n".join(" " * by + line for line in lines)
