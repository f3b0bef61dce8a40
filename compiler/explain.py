"""Explain: what a policy would make of a model, and what it reads of given tokens."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from ..models.memory import Policy
from .pipeline import build
from .report import Report, bytes_of


def explain(
    model: nn.Module | ExportedProgram | str | PathLike[str],
    tokens: Tensor | None = None,
    policy: Policy | str | PathLike[str] = "scout",
    **options: Any,
) -> Report:
    """What was rewritten, what was not and why; nothing that is declined raises.

    Args:
        tokens: int64 ``[B, n]``. When given they are run twice, densely and through the policy,
            and the report notes what was read and how often both expect the same next token.
        policy: name or file of a policy, with `options` for its fields, or a `Policy`; `options`
            are also those of `build`.

    Raises:
        ValueError: an unknown policy or option, or tokens of another shape or type.
        FileNotFoundError: `model` is a path, and nothing is there.
    """
    given: dict[str, Any] = {"strict": False, "check": False, **options}
    if tokens is None:
        given["kernels"] = "off"  # nothing is run
    compiled = build(model, policy, **given)
    report = compiled.report
    if tokens is None or compiled.program is None:
        return report
    dense, through = compiled.engine(), compiled.engine()
    expected = dense.prefill(tokens, all_logits=True).argmax(-1)
    agreed = (through(tokens).argmax(-1) == expected).double().mean().item()
    read = through.stats()
    report.notes.append(
        f"{tokens.numel()} tokens read {read.pages_read} of {read.pages_dense} pages and "
        f"{bytes_of(read.bytes_read)} of {bytes_of(read.bytes_dense)} (index included); the next "
        f"token is dense's at {agreed:.1%} of them"
    )
    return report
