"""A process that compiles: jobs come in as lines of JSON, answers go out as lines of JSON.

python -m memcompile.codegen.triton.worker
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any


def main() -> None:
    # What compilers print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    from ..spec import KernelSpec, NotCovered
    from .bundle import bundle

    try:
        folder = bundle(KernelSpec.from_json(job["spec"]), job["target"], job["width"])
    except NotCovered as reason:
        return {"not_covered": str(reason)}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror or str(error), error.filename]}
    except Exception as error:  # compilers raise anything
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"}
    return {"folder": str(folder)}


if __name__ == "__main__":
    main()
