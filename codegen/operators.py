"""Operators of generated kernels: one schema and one fake kernel each, whatever implements them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .spec import KernelSpec

_lock = threading.Lock()


@cache
def library(namespace: str) -> torch.library.Library:
    """The one handle through which this process adds to a namespace."""
    return torch.library.Library(namespace, "FRAGMENT")


def define(namespace: str, spec: KernelSpec) -> torch._ops.OpOverload:
    """`namespace::spec.name`, defined on the first call of a process.

    A library of definitions for runtimes without Python may have defined the operator already;
    then only its fake kernel is added.
    """
    with _lock:
        return _define(namespace, spec)


@cache
def _define(namespace: str, spec: KernelSpec) -> torch._ops.OpOverload:
    name = f"{namespace}::{spec.name}"
    home = library(namespace)
    if not torch._C._dispatch_has_kernel(name):
        home.define(spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, fake(spec), lib=home)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, namespace), spec.name).default
    return overload


def fake(spec: KernelSpec) -> Callable[..., Any]:
    """What the kernel returns, as far as shapes and dtypes go."""
    names = [name for _, name in spec.arguments]

    def attend(*args: Any) -> tuple[Tensor, ...]:
        given = dict(zip(names, args, strict=True))
        query = given["query"]
        out = query.new_empty((*query.shape[:3], spec.value_dim), dtype=torch.float32)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        if not spec.page_lse:
            return out, lse
        pages = given["pages" if spec.pages == "listed" else "page_table"].shape[-1]
        return out, lse, query.new_empty((*query.shape[:3], pages), dtype=torch.float32)

    def score_select(*args: Any) -> Tensor | tuple[Tensor, Tensor]:
        given = dict(zip(names, args, strict=True))
        query, heads = given["query"], given["page_table"].shape[1]
        capacity = given["budget_pages" if spec.among else "capacity"]
        shape = (query.shape[0], heads, query.shape[2], capacity)
        selected: Tensor = query.new_empty(shape, dtype=torch.int32)
        if not spec.page_logits:
            return selected
        pages = given["page_table"].shape[2]
        return selected, query.new_empty((*query.shape[:3], pages), dtype=torch.float32)

    def append_index(*args: Any) -> None:
        return None

    def combine(*args: Any) -> tuple[Tensor, Tensor]:
        return args[0].new_empty(args[0].shape), args[1].new_empty(args[1].shape)

    def state(*args: Any) -> tuple[Tensor, ...]:
        given = dict(zip(names, args, strict=True))
        query = given["query"]
        if not spec.backward:
            out = query.new_empty((*query.shape[:3], spec.value_dim), dtype=torch.float32)
            return out, query.new_empty(query.shape[:3], dtype=torch.float32)
        inputs = [given.get(name.removeprefix("grad_")) for name in spec.returns]
        shapes = [(0,) if x is None else x.shape for x in inputs]
        return tuple(query.new_empty(shape, dtype=torch.float32) for shape in shapes)

    return {
        "attend": attend,
        "score_select": score_select,
        "append_index": append_index,
        "combine": combine,
        "state_step": state,
        "state_chunk": state,
    }[spec.op]


def definitions(namespace: str, schemas: Sequence[str]) -> str:
    """C++ that defines operators where there is no Python, unless somebody has.

    Args:
        schemas: "name(arguments) -> results" each.
    """
    lines = [
        "// Definitions of operators, apart from whatever implements them.",
        "#include <torch/library.h>",
        "",
        "#include <ATen/core/dispatch/Dispatcher.h>",
        "",
        "// Another engine of this process may have the same kernels.",
        "static void define(torch::Library& m, const char* name, const char* schema) {",
        f'  const std::string whole = std::string("{namespace}::") + name;',
        '  if (!c10::Dispatcher::singleton().findSchema({whole, ""})) m.def(schema);',
        "}",
        "",
        f"TORCH_LIBRARY_FRAGMENT({namespace}, m) {{",
    ]
    for schema in schemas:
        head, back = schema.split(" -> ")
        name, arguments = head[:-1].split("(", 1)
        lines += [f'  define(m, "{name}",', f'         "{name}("']
        line = ""
        for argument in arguments.split(", "):
            more = f"{line}, {argument}" if line else argument
            if len(more) > 78:
                lines.append(f'         "{line}, "')
                more = argument
            line = more
        lines += [f'         "{line}) -> {back}");'] if line else [f'         ") -> {back}");']
    return "\n".join([*lines, "}", ""])
