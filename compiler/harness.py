"""`lm_eval --model memcompile`: a model of EleutherAI's lm-evaluation-harness, from a path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from ..evaluation.lm_eval import EngineLM
from ..evaluation.protocol import Contender
from ..models.memory import preset
from .evaluate import FileTokenizer, package_subject, subject_of
from .load import load
from .manifest import is_package
from .pipeline import build_captured
from .policy_file import choose, policy_name


@register_model("memcompile")
class MemcompileLM(EngineLM):
    """What `--model_args path=...,policy=...,FIELD=VALUE` describes.

    Args:
        path: a model, or a folder that memcompile wrote.
        policy: name or file of a policy; None: the folder's own, dense for a model.
        max_length: as for `EngineLM`.
        max_context: as for `build`; of a model only.
        kernels: as for `build`.
        options: fields of the policy. What the harness itself adds is ignored: batch_size,
            max_batch_size, device.

    Raises:
        FileNotFoundError, ValueError: the path or an option cannot be used, or there is no
            tokenizer.json.
        NotRewritten: the model cannot be compiled.
    """

    def __init__(
        self,
        path: str,
        policy: str | None = None,
        max_length: int | None = None,
        max_context: int | None = None,
        kernels: str | None = None,
        **options: Any,
    ) -> None:
        for ignored in ("batch_size", "max_batch_size", "device"):
            options.pop(ignored, None)
        place = Path(path)
        subject = (
            package_subject(place)
            if is_package(place)
            else subject_of(load(place), place.resolve().name, max_context)
        )
        if subject.tokenizer is None:
            raise ValueError(f"{path}: holds no tokenizer.json, which lm_eval's tasks need")
        if policy is None and options:
            raise ValueError(f"{sorted(options)} are fields of a policy; give policy=NAME too")
        own = subject.preset if subject.preset is not None else preset("dense")
        chosen = own if policy is None else choose(policy, options)
        compiled = build_captured(
            subject.captured,
            chosen,
            max_context=subject.max_context,
            check=subject.preset is None,
            kernels=kernels,
        )
        program = compiled.program
        assert program is not None
        name = chosen.preset if policy is None else policy_name(policy)
        tokenizer = FileTokenizer(subject.tokenizer / "tokenizer.json")
        contender = Contender(name, compiled.engine, program.layouts, program.limit)
        super().__init__(contender, tokenizer, tokenizer.end, max_length)


if __name__ == "__main__":
    # Versions of lm_eval that do not look for entry points learn of the model by this way in.
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
