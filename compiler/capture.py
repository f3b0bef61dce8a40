"""Capture a stateless forward as one pre-dispatch ATen program, batch and tokens symbolic."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from ..passes.result import Declined, NotRewritten
from ..runtime.transformers_bridge import Origin, origin_of
from .signature import check_program

_SAMPLE_SHAPES = ((3, 13), (2, 5))


@dataclass
class Captured:
    """A model in the one form that every pass starts from.

    Attributes:
        program: exported program, inputs ``input_ids[B, T]`` int64 and, when the forward takes it,
            ``position_ids[B, T]`` int64; first output ``logits[B, T, V]``.
        takes_position_ids: whether `position_ids` is an input.
        name: class name of the model, for reports.
        forward: the model's own forward on the same inputs; None if only a program was given.
        origin: what a transformers model was, for its `generate`; None for others.
    """

    program: ExportedProgram
    takes_position_ids: bool
    name: str
    forward: Callable[..., Tensor] | None = None
    origin: Origin | None = None


def capture(model: nn.Module | ExportedProgram, *, max_context: int | None = None) -> Captured:
    """Export `model` with symbolic batch and token axes; an exported program is taken as it is.

    Args:
        model: module whose forward takes ``tokens[B, T]`` (and ``position_ids[B, T]``, if it has
            that argument) and returns logits ``[B, T, V]``, a tuple that starts with them, or an
            object with a ``logits`` attribute.
        max_context: the context for which length-dependent rotary tables (dynamic NTK, longrope)
            are resolved.

    Raises:
        NotRewritten: the forward cannot be captured with a symbolic token axis, and why.
    """
    if isinstance(model, ExportedProgram):
        check_program(model)
        return Captured(model, _takes_positions(model), "ExportedProgram")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module or an ExportedProgram, got {type(model).__name__}; "
            "paths go through memcompile.compile or the command line"
        )
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode: call model.eval() first, so that dropout "
            "and normalisation are those of inference"
        )
    forward, takes = _stateless_forward(model)
    with _frozen_rotary(model, max_context), _no_cache(model):
        program = _export(forward, takes, _device(model))
    held = _held(forward, model, max_context)
    return Captured(program, takes, type(model).__name__, held, origin_of(model))


def _takes_positions(program: ExportedProgram) -> bool:
    inputs = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    names = [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    ]
    for name in names:
        if all(user.target is torch.ops.aten.sym_size.int for user in inputs[name].users):
            raise NotRewritten(
                f"the exported program does not use its input {name!r}",
                [
                    Declined(
                        "nothing reads its values; torch.export merges inputs that were one tensor "
                        "when it traced: export again with two tensors, or without this input",
                        name,
                        "capture",
                    )
                ],
            )
    return len(names) == 2


class _Forward(nn.Module):
    """The forward that is compiled: tokens (and positions) in, logits out, no cache."""

    def __init__(self, model: nn.Module, takes_position_ids: bool, extra: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.takes_position_ids = takes_position_ids
        self.extra = extra

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        before = dict(self.model.named_buffers())
        logits = self._logits(input_ids, position_ids)
        replaced = [n for n, b in self.model.named_buffers() if before.get(n) is not b]
        if replaced:  # torch.export would keep the old value without a word
            raise NotRewritten(
                f"{type(self.model).__name__} keeps state of its own",
                [
                    Declined(
                        f"the forward replaces the buffer {replaced[0]!r}; a model that remembers "
                        "by itself cannot be given a memory",
                        replaced[0],
                        "capture",
                    )
                ],
            )
        return logits

    def _logits(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        if self.takes_position_ids:
            assert position_ids is not None
            torch._check(position_ids.shape[0] == input_ids.shape[0])
            torch._check(position_ids.shape[1] == input_ids.shape[1])
            out = self.model(input_ids, position_ids=position_ids, **self.extra)
        else:
            out = self.model(input_ids, **self.extra)
        logits = getattr(out, "logits", out[0] if isinstance(out, tuple | list) else out)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the forward of {type(self.model).__name__} returned {type(out).__name__}; "
                "expected logits[B, T, V], a tuple that starts with them, or an object with .logits"
            )
        return logits


def _stateless_forward(model: nn.Module) -> tuple[_Forward, bool]:
    parameters = inspect.signature(model.forward).parameters
    takes = "position_ids" in parameters
    extra: dict[str, Any] = {}
    if "use_cache" in parameters or getattr(model, "config", None) is not None:
        accepts = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "use_cache" in parameters or accepts:
            extra["use_cache"] = False
    return _Forward(model, takes, extra), takes


def _held(forward: _Forward, model: nn.Module, max_context: int | None) -> Callable[..., Tensor]:
    """The model's own forward under the same rotary resolution, for the self-check."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad(), _frozen_rotary(model, max_context), _no_cache(model):
            result: Tensor = forward(*inputs)
            return result

    return run


def _export(forward: _Forward, takes: bool, device: torch.device) -> ExportedProgram:
    failure: Exception | None = None
    for batch, tokens in _SAMPLE_SHAPES:
        ids = torch.zeros((batch, tokens), dtype=torch.int64, device=device)
        inputs: tuple[Tensor, ...] = (ids,)
        if takes:
            inputs += (torch.arange(tokens, device=device).expand(batch, tokens).contiguous(),)
        free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.export(
                    forward.eval(), inputs, dynamic_shapes=(free,) * len(inputs), strict=False
                )
        except NotRewritten:
            raise
        except Exception as error:  # torch.export raises many types; each means "not capturable"
            failure = failure or error
    assert failure is not None
    reason = _export_reason(failure)
    name = type(forward.model).__name__
    raise NotRewritten(
        f"{name} cannot be captured with a symbolic batch and token axis",
        [Declined(reason, _export_node(failure), "capture", _export_source(failure))],
    ) from failure


def _export_reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "specialized" in text or "Constraints violated" in text or "marked batch" in text:
        kind = "the forward fixes the length or the batch to a constant"
    elif "data-dependent" in text or "unbacked" in text:
        kind = "the forward branches on the values of a tensor"
    else:
        kind = f"torch.export raised {type(error).__name__}"
    return f"{kind}: {text[:400]}"


def _export_node(error: Exception) -> str:
    text = str(error)
    for line in text.splitlines():
        if "%" in line and "call_function" in line:
            return line.strip()[:160]
    return "(no graph)"


def _export_source(error: Exception) -> str:
    """The innermost frame outside torch: the user's own line."""
    trace = error.__traceback__
    last = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and not file.startswith("<") and not file.endswith("capture.py"):
            last = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return last


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """transformers reads `config.use_cache` in places that an argument does not reach."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "use_cache"):
        yield
        return
    before = config.use_cache
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


@contextlib.contextmanager
def _frozen_rotary(model: nn.Module, max_context: int | None) -> Iterator[None]:
    """Hold length-dependent rotary tables (dynamic NTK, longrope) at their value for `max_context`.

    Their frequencies change with the longest position seen, so keys written early would need
    rotating again later: no incremental step can equal them, unless the length is fixed up front.
    """
    changed: list[tuple[nn.Module, str, Tensor, Any]] = []
    try:
        for path, module in model.named_modules():
            kind = getattr(module, "rope_type", None)
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            if max_context is None:
                raise NotRewritten(
                    f"{type(model).__name__} has rotary frequencies that depend on the length",
                    [
                        Declined(
                            f"rotary type {kind!r} recomputes its frequencies from the longest "
                            "position; give max_context= to resolve them for that length",
                            path,
                            "capture",
                        )
                    ],
                )
            owner: Any = module
            frequency, attention_scaling = _resolved_rotary(owner, max_context)
            changed.append((module, kind, owner.inv_freq, owner.attention_scaling))
            owner.inv_freq = frequency.to(owner.inv_freq.device)
            owner.attention_scaling = attention_scaling
            owner.rope_type = "default"
        yield
    finally:
        for module, kind, frequency, scaling in changed:
            owner = module
            owner.rope_type, owner.inv_freq, owner.attention_scaling = kind, frequency, scaling


def _resolved_rotary(module: Any, max_context: int) -> tuple[Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    initialise = ROPE_INIT_FUNCTIONS[module.rope_type]
    original = getattr(module, "original_max_seq_len", 0)
    if module.rope_type != "longrope" and max_context <= original:
        return module.original_inv_freq.clone(), module.attention_scaling
    device = module.inv_freq.device
    frequency, scaling = initialise(module.config, device, seq_len=max_context)
    return frequency, scaling


def _device(model: nn.Module) -> torch.device:
    for tensor in list(model.parameters()) + list(model.buffers()):
        return tensor.device
    return torch.device("cpu")
