"""An export that is interrupted, or killed, leaves nothing that could be taken for an engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from aoti_case import llama

from memcompile.compiler.manifest import is_package
from memcompile.compiler.package import write
from memcompile.compiler.pipeline import build

# Two exports, each of which stops in the midst of its package.
EXPORTS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
sys.path.insert(0, sys.argv[2])
from aoti_case import llama
from memcompile.compiler.export import inductor
from memcompile.compiler.package import write
from memcompile.compiler.pipeline import build

def half(traced, package):
    package.write_bytes(b"half an engine")
    print("half", flush=True)
    time.sleep(100)

inductor.trace_flat = inductor.check_operations = lambda *given: None
inductor.compile_package = half
compiled = build(llama(), "dense", kernels="off", check=False)
for attempt in range(2):
    try:
        write(sys.argv[1], compiled, emit=["aoti-portable"])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.stdin.readline()  # until it has been seen that nothing is left
"""


def test_nothing_is_half_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (sys.executable, "-c", EXPORTS, out, Path(__file__).parent)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*map(str, command)], text=True, **pipes) as running:  # type: ignore[call-overload]
        assert running.stdin is not None
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == "half\n", running.stderr.read()
        (scratch,) = tmp_path.iterdir()  # a folder of another name until it is whole
        assert scratch.name.startswith(".out.")
        os.kill(running.pid, signal.SIGINT)
        assert running.stdout.readline() == "interrupted\n", running.stderr.read()
        assert not list(tmp_path.iterdir())
        running.stdin.write("\n")
        running.stdin.flush()
        assert running.stdout.readline() == "half\n", running.stderr.read()
        os.kill(running.pid, signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and not out.exists()
    write(out, build(llama(), "dense", kernels="off", check=False))
    assert is_package(out) and {path.name for path in tmp_path.iterdir()} == {"out", left.name}
