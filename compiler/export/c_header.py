"""kernels.json as a C header, so that a launch needs no parser: arrays, and a function for each
number that is computed from sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

TYPES = "memcompile_kernels.h"
_C_TYPES = {"*bf16": "MEMC_BF16", "*fp16": "MEMC_FP16", "*fp32": "MEMC_FP32", "*i32": "MEMC_I32"}
_WORD = re.compile(r"[A-Za-z_]\w*")


def header(index: dict[str, Any]) -> str:
    """The text of kernels.h for what `kernel_folder.index_of` returns."""
    prefix = identifier(index["target"])
    kernels = [*index["kernels"]]
    parts = [
        f"/* Kernels for {index['target']}, written by memcompile {index['memcompile']}: "
        "kernels.json as C. Compiled, not run. */",
        f"#ifndef MEMC_{prefix.upper()}_H",
        f"#define MEMC_{prefix.upper()}_H",
        "",
        f'#include "../{TYPES}"',
    ]
    for number, operator in enumerate(index["operators"]):
        parts += ["", *_Operator(operator, index, kernels, f"{prefix}_{number}").lines()]
    parts += ["", *_kernels(index, prefix), "", *_operators(index, prefix)]
    capability = index["capability"]
    folder = index["target"].replace(":", "-")
    parts += [
        "",
        f"static const memc_target {prefix} = {{",
        f"    {quoted(index['target'])}, {quoted(folder)},",
        f"    {capability[0] * 10 + capability[1] if capability else 0},",
        f"    {len(index['operators'])}, {prefix}_operators, {len(kernels)}, {prefix}_kernels,",
        "};",
        "",
        "#endif",
    ]
    return "\n".join(parts) + "\n"


def target_list(folders: Iterable[str]) -> str:
    """The text of targets.h: the kernels of several targets, and a list of them."""
    found = [*folders]
    names = ", ".join(f"&{identifier(folder)}" for folder in found)
    lines = ["/* Every target that kernels were compiled for. */", "#ifndef MEMC_TARGETS_H"]
    lines += ["#define MEMC_TARGETS_H", ""]
    lines += [f'#include "{folder}/kernels.h"' for folder in found]
    lines += ["", f"static const memc_target *const memc_targets[] = {{{names}}};"]
    return "\n".join([*lines, f"enum {{ memc_target_count = {len(found)} }};", "", "#endif", ""])


def identifier(target: str) -> str:
    """A target as a name in C: cuda:sm_90 -> cuda_sm_90."""
    return re.sub(r"\W", "_", target)


def quoted(text: str) -> str:
    """A string literal of C."""
    escaped = "".join(
        c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\{ord(c) & 255:03o}"
        for c in text
    )
    return f'"{escaped}"'


class _Operator:
    """What one operator becomes."""

    def __init__(
        self, operator: dict[str, Any], index: dict[str, Any], kernels: Sequence[str], prefix: str
    ) -> None:
        self.operator, self.kernels, self.prefix = operator, kernels, prefix
        self.about = index["kernels"]
        self.formulas: dict[str, str] = {}
        arguments = operator["arguments"]
        self.tensors: dict[tuple[str, str, str], dict[str, Any]] = {}
        for argument in arguments:
            if "shape" in argument:
                self.tensors[_key(argument["name"], argument)] = argument
        self.argument_count = len(self.tensors)
        for variant in operator["variants"]:
            for step in variant["steps"]:
                if "allocate" in step:
                    made = {**step, "name": step["allocate"], "written": False}
                    self.tensors.setdefault(_key(made["name"], made), made)
        self.numbers = [x["name"] for x in arguments if x["type"] == "fp32"]
        derived = dict.fromkeys(
            name for variant in operator["variants"] for name in variant["derived"]
        )
        given = [
            word
            for argument in arguments
            for text in (*argument.get("shape", ()), *argument.get("strides", ()))
            for word in _words(text)
        ]
        given += [x["name"] for x in arguments if x["type"] == "i32"]
        given = [*dict.fromkeys(name for name in given if name not in derived)]
        self.given_count = len(given)
        self.sizes = [*given, *derived]

    def lines(self) -> list[str]:
        """Definitions in the order that C needs them in."""
        variants = [
            self._variant(at, variant) for at, variant in enumerate(self.operator["variants"])
        ]
        tensors = [self._tensor(tensor) for tensor in self.tensors.values()]
        p = self.prefix
        returns = [str(self._place(name)) for name in self.operator["returns"]] or ["-1"]
        told = [f"/* {self.operator['name']} */"]
        told += [
            f"static int64_t {name}(const int64_t *s) {{ (void)s; return {body}; }}"
            for body, name in self.formulas.items()
        ]
        told += [*(line for lines, _ in variants for line in lines)]
        told += [
            f"static const char *const {p}_sizes[] = {{{', '.join(map(quoted, self.sizes))}}};"
        ]
        told += [f"static const memc_tensor {p}_tensors[] = {{", *tensors, "};"]
        numbers = ", ".join(map(quoted, self.numbers)) or "0"
        told += [f"static const char *const {p}_numbers[] = {{{numbers}}};"]
        told += [f"static const int {p}_returns[] = {{{', '.join(returns)}}};"]
        told += [f"static const memc_variant {p}_variants[] = {{"]
        return [*told, *(entry for _, entry in variants), "};"]

    def entry(self) -> str:
        """Its line in the list of operators."""
        p, told = self.prefix, self.operator
        counts = f"{len(self.sizes)}, {self.given_count}, {p}_sizes"
        tensors = f"{len(self.tensors)}, {self.argument_count}, {p}_tensors"
        rest = f"{len(self.numbers)}, {p}_numbers, {len(told['returns'])}, {p}_returns"
        variants = f"{len(told['variants'])}, {p}_variants"
        return f"    {{{quoted(told['name'])}, {counts}, {tensors},\n     {rest}, {variants}}},"

    def _variant(self, at: int, variant: dict[str, Any]) -> tuple[list[str], str]:
        name = f"{self.prefix}_{at}"
        tests = [self._c(text) for text in variant["when"]]
        tests += [f"{self._c(size)} == {value}" for size, value in variant["fixed"].items()]
        lines = [
            f"static int {name}_holds(const int64_t *s) {{",
            "    (void)s;",
            f"    return {' && '.join(f'({test})' for test in tests) or '1'};",
            "}",
            f"static void {name}_derive(int64_t *s) {{",
            "    (void)s;",
            *(f"    {self._c(n)} = {self._c(text)};" for n, text in variant["derived"].items()),
            "}",
        ]
        steps = []
        for number, step in enumerate(variant["steps"]):
            given = "0, 0, 0, 0, 0"
            if "allocate" in step:
                place = self._place(step["allocate"], step)
                filled = step.get("filled_with")
                value = {"-inf": "-INFINITY", "inf": "INFINITY"}.get(filled or "", filled)
                fill = f"1, {value}" if filled is not None else "0, 0"
                steps.append(f"    {{MEMC_ALLOCATE, {place}, 0, {fill}, 0, {{0, 0, 0}}, 0, 0}},")
            elif "copy" in step:
                source, target = self._place(step["copy"]), self._place(step["to"])
                steps.append(f"    {{MEMC_COPY, {source}, {target}, 0, 0, 0, {{0, 0, 0}}, 0, 0}},")
            else:
                parameters = f"{name}_{number}"
                given = self._parameters(step, parameters, lines)
                grid = ", ".join(self._formula(extent) for extent in step["grid"])
                kernel = self.kernels.index(f"{self.operator['name']}.{step['launch']}")
                steps.append(f"    {{MEMC_LAUNCH, 0, 0, 0, 0, {kernel}, {{{grid}}}, {given}}},")
        lines += [f"static const memc_step {name}_steps[] = {{", *steps, "};"]
        return lines, f"    {{{name}_holds, {name}_derive, {len(steps)}, {name}_steps}},"

    def _parameters(self, step: dict[str, Any], name: str, lines: list[str]) -> str:
        """Defines what a kernel is given; its entry in the step."""
        kernel = self.about[f"{self.operator['name']}.{step['launch']}"]
        own = [parameter for parameter in kernel["parameters"] if not parameter.get("null")]
        lines += [f"static const memc_parameter {name}[] = {{"]
        for parameter, value in zip(own, step["arguments"], strict=True):
            multiple = parameter.get("multiple_of", 1)
            if parameter["type"].startswith("*"):
                source, at, size = "MEMC_TENSOR", self._place(value), "0"
            elif parameter["type"] == "fp32":
                source, at, size = "MEMC_NUMBER", self.numbers.index(value), "0"
            else:
                source, at, size = "MEMC_SIZE", 0, self._formula(value)
            lines += [f"    {{{quoted(parameter['name'])}, {source}, {at}, {size}, {multiple}}},"]
        lines += ["};"]
        return f"{len(own)}, {name}"

    def _tensor(self, tensor: dict[str, Any]) -> str:
        shape = ", ".join(self._formula(extent) for extent in tensor["shape"])
        strides = ", ".join(self._formula(x) for x in tensor.get("strides", ())) or "0"
        head = f"{quoted(tensor['name'])}, {_C_TYPES[tensor['type']]}, {int(tensor['written'])}"
        return f"    {{{head}, {len(tensor['shape'])}, {{{shape}}}, {{{strides}}}}},"

    def _place(self, name: str, like: dict[str, Any] | None = None) -> int:
        """Where a tensor stands; one that is allocated in several shapes by its shape."""
        keys = [*self.tensors]
        if like is not None:
            return keys.index(_key(name, like))
        return next(at for at, key in enumerate(keys) if key[0] == name)

    def _formula(self, text: int | str) -> str:
        """The function that computes it."""
        body = self._c(str(text))
        return self.formulas.setdefault(body, f"{self.prefix}_f{len(self.formulas)}")

    def _c(self, text: str) -> str:
        def spelled(word: re.Match[str]) -> str:
            if word[0] in ("max", "min"):
                return f"memc_{word[0]}"
            return f"s[{self.sizes.index(word[0])}]"

        return _WORD.sub(spelled, text.replace("//", "/"))


def _key(name: str, tensor: dict[str, Any]) -> tuple[str, str, str]:
    return name, tensor["type"], str(tensor["shape"])


def _words(text: int | str) -> list[str]:
    return [word for word in _WORD.findall(str(text)) if word not in ("max", "min")]


def _kernels(index: dict[str, Any], prefix: str) -> list[str]:
    lines = [f"static const memc_kernel {prefix}_kernels[] = {{"]
    for name, kernel in index["kernels"].items():
        words = [name, *(kernel[key] for key in ("entry", "binary", "assembly", "written_for"))]
        nulls = sum(parameter.get("null", False) for parameter in kernel["parameters"])
        figures = f"{kernel['threads']}, {kernel['shared']}, {nulls}, {kernel['registers']}"
        lines += [f"    {{{', '.join(map(quoted, words))}, {figures}}},"]
    return [*lines, "};"]


def _operators(index: dict[str, Any], prefix: str) -> list[str]:
    kernels = [*index["kernels"]]
    entries = [
        _Operator(operator, index, kernels, f"{prefix}_{number}").entry()
        for number, operator in enumerate(index["operators"])
    ]
    return [f"static const memc_operator {prefix}_operators[] = {{", *entries, "};"]
