"""What the tests of the commands share."""

from __future__ import annotations

SMALL = ["--budget", "64", "--set", "page_size=8", "--set", "sinks=8", "--set", "window=16"]
SMALL += ["--set", "dense_layers=0"]


class Said:
    """What a call of the command line said, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
