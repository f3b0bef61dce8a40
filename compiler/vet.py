"""A serialised graph, checked and copied field by field, so that reading it can execute nothing.

Every string is checked by what it is for (see `vet_texts`), a field that is not known is refused,
and what only serves debugging is left out of the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .vet_texts import (
    PLAIN_NAME,
    SYMBOL,
    Refused,
    dotted,
    expression,
    guard,
    identifier,
    json_list,
    json_object,
    one_of,
    operator,
    shown,
    tree_text,
)

_VERIFIERS = {"TRAINING", "ATEN", ""}


def vet_program(data: Any, *, traces: bool = True) -> dict[str, Any]:
    """A copy of a serialised ExportedProgram that holds only what was checked.

    Args:
        traces: keep stack traces.

    Raises:
        Refused: a field that would be executed or is not known; the message names it.
    """
    program = json_object(data, "the program")
    graph = json_object(program.get("graph_module"), "graph_module")
    cleaned = _fields(program, _PROGRAM, "the program")
    cleaned["verifiers"] = [one_of(v, _VERIFIERS, "verifier") for v in program.get("verifiers", [])]
    cleaned["guards_code"] = [guard(text) for text in json_list(program.get("guards_code", []))]
    cleaned["graph_module"] = {
        "graph": _walk(graph.get("graph"), "graph"),
        "signature": _walk(graph.get("signature"), "signature"),
        "module_call_graph": _calls(graph.get("module_call_graph")),
        "metadata": {},
        "treespec_namedtuple_fields": {},
    }
    if not traces:
        _forget_traces(cleaned["graph_module"]["graph"])
    return cleaned


def vet_payloads(data: Any, config: str) -> dict[str, dict[str, Any]]:
    """The entries of a weights or constants config: name -> {path_name, is_param, tensor_meta}.

    Raises:
        Refused: an entry that is unpickled, or one without tensor metadata.
    """
    entries = json_object(json_object(data, config).get("config"), f"{config}: config")
    checked: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        dotted(name)
        fields = json_object(entry, f"{config}: {name}")
        path = fields.get("path_name")
        if not isinstance(path, str) or not PLAIN_NAME.fullmatch(path):
            raise Refused(f"{config}: entry {name!r} has the path {path!r}, not a plain file name")
        if fields.get("use_pickle") is not False:
            raise Refused(f"{config}: {name!r} is stored as a pickle ({path}), which can run code")
        if fields.get("tensor_meta") is None:
            raise Refused(f"{config}: {name!r} ({path}) is no tensor but an object")
        checked[name] = {
            "path_name": path,
            "is_param": fields.get("is_param") is True,
            "use_pickle": False,
            "tensor_meta": _walk(json_object(fields["tensor_meta"], "tensor_meta"), "tensor_meta"),
        }
    return checked


def _calls(entries: Any) -> list[dict[str, Any]]:
    """Only the root's calling convention: the others serve `unflatten`, which is not used."""
    calls: list[dict[str, Any]] = []
    for entry in json_list(entries):
        fields = json_object(entry, "module_call_graph")
        path, signature = dotted(fields.get("fqn", "")), fields.get("signature")
        if path != "":
            calls.append({"fqn": path, "signature": None})
        elif signature is not None:
            calls.append({"fqn": "", "signature": _call_signature(signature)})
    return calls


def _call_signature(signature: Any) -> dict[str, Any]:
    fields = json_object(signature, "module_call_graph: signature")
    names = fields.get("forward_arg_names")
    return {
        "inputs": [_walk(x, "inputs") for x in json_list(fields.get("inputs"))],
        "outputs": [_walk(x, "outputs") for x in json_list(fields.get("outputs"))],
        "in_spec": tree_text(fields.get("in_spec")),
        "out_spec": tree_text(fields.get("out_spec")),
        "forward_arg_names": None if names is None else [identifier(n) for n in json_list(names)],
    }


def _metadata(data: Any) -> dict[str, str]:
    """Where a node comes from, for reports; nothing else of its metadata."""
    kept = {}
    for key in ("stack_trace", "nn_module_stack"):
        text = json_object(data, "metadata").get(key)
        if isinstance(text, str):
            kept[key] = "".join(c for c in text if c == "\n" or c.isprintable())
    return kept


def _device(text: Any) -> str:
    known = ("cpu", "meta", "cuda", "mps", "xpu")
    kind = one_of(text, known, "device")
    if kind in ("cuda", "mps", "xpu") and not (
        torch.accelerator.is_available()
        and str(torch.accelerator.current_accelerator()).startswith(kind)
    ):
        raise Refused(
            f"it was exported for {kind}, which this machine does not have; export on cpu"
        )
    return kind


def _forget_traces(data: Any) -> None:
    for part in data.values() if isinstance(data, dict) else data:
        if isinstance(part, dict | list):
            _forget_traces(part)
    if isinstance(data, dict):
        data.pop("stack_trace", None)


def _names(data: Any, of: str) -> dict[str, Any]:
    return {identifier(name): _walk(value, of) for name, value in json_object(data, of).items()}


def _ranges(data: Any) -> dict[str, Any]:
    checked = {}
    for name, bounds in json_object(data, "range_constraints").items():
        if not SYMBOL.fullmatch(name):
            raise Refused(f"range_constraints has the symbol {shown(name)}")
        checked[name] = _walk(bounds, "range_constraints")
    return checked


def _versions(data: Any) -> dict[str, Any]:
    versions = json_object(data, "versions")
    return {identifier(name): _number(value) for name, value in versions.items()}


def _script_object(data: Any) -> Any:
    if data:
        raise Refused(
            "the graph holds a script or opaque object (custom_obj), which runs on loading"
        )
    return data


def _number(data: Any) -> Any:
    """A number, a truth value or nothing; JSON has no infinities, torch spells them."""
    if data is None or isinstance(data, bool | int | float):
        return data
    if data in ("Infinity", "-Infinity", "NaN"):
        return data
    raise Refused(f"{shown(data)} stands where a number is expected")


def _free_text(data: Any) -> str:
    if isinstance(data, str):
        return data
    raise Refused(f"{shown(data)} stands where a text is expected")


def _texts(data: Any) -> list[str]:
    return [_free_text(item) for item in json_list(data)]


def _numbers(data: Any) -> Any:
    return [_numbers(x) for x in data] if isinstance(data, list) else _number(data)


def _nested(data: Any) -> Any:
    return _walk(data, "a field")


_PROGRAM: dict[str, Callable[[Any], Any]] = {
    "opset_version": _versions,
    "range_constraints": _ranges,
    "schema_version": _versions,
    "torch_version": _free_text,
    # Read by vet_program itself.
    "graph_module": lambda data: None,
    "verifiers": lambda data: None,
    "guards_code": lambda data: None,
}

_NUMBER_FIELDS = """
    as_none as_int as_float as_bool as_scalar_type as_memory_format as_layout real imag index kind
    dtype layout requires_grad persistent min_val max_val is_single_tensor_return
    is_hop_single_tensor_return
"""
_NESTED_FIELDS = """
    arg args as_tensor as_tensors as_optional_tensor as_optional_tensors as_nested_tensors
    as_sym_int as_sym_ints as_sym_float as_sym_floats as_sym_bool as_sym_bools as_expr hint
    as_device as_graph as_complex graph nodes inputs outputs input_specs output_specs user_input
    parameter buffer tensor_constant token constant_input value user_output loss_output
    buffer_mutation gradient_to_parameter gradient_to_user_input user_input_mutation
    parameter_mutation sizes strides storage_offset device
"""
# Every field of a graph and its signature, by what it is for.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("name", "as_name"), identifier),
    **dict.fromkeys(("target", "as_operator"), operator),
    **dict.fromkeys(
        ("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name"), dotted
    ),
    **dict.fromkeys(("custom_obj", "custom_obj_values", "as_custom_obj"), _script_object),
    **dict.fromkeys(
        ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"),
        lambda data: _names(data, "values"),
    ),
    **dict.fromkeys(_NUMBER_FIELDS.split(), _number),
    **dict.fromkeys(
        ("as_ints", "as_floats", "as_bools", "as_int_lists", "as_float_lists"), _numbers
    ),
    **dict.fromkeys(_NESTED_FIELDS.split(), _nested),
    "as_string": _free_text,
    "as_strings": _texts,
    "as_string_to_argument": lambda data: _names(data, "arguments"),
    "expr_str": expression,
    "metadata": _metadata,
    "type": _device,
}


def _walk(data: Any, of: str) -> Any:
    if isinstance(data, dict):
        return _fields(data, _FIELDS, of)
    if isinstance(data, list):
        return [_walk(item, of) for item in data]
    return _number(data)


def _fields(
    data: dict[str, Any], known: dict[str, Callable[[Any], Any]], of: str
) -> dict[str, Any]:
    checked = {}
    for key, value in data.items():
        check = known.get(key)
        if check is None:
            if value in (None, False, "", [], {}):
                continue
            raise Refused(
                f"{of} has the field {shown(key)}, which this version of memcompile does not know"
            )
        if (value is None) or (key == "value" and value == {}):
            checked[key] = value
        else:
            checked[key] = check(value)
    return checked
