"""Compiles many specs for many targets at once, in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import IO, Any

from .. import cache as store
from ..spec import KernelSpec, NotCovered
from .blocks import launches
from .bundle import folder_of

# A process takes a second or two to start, which is what a few kernels take to compile.
LEAST_JOBS = 4


@dataclass(frozen=True)
class Job:
    """A spec for a target; `width` is that of its lists, where it is compiled for them."""

    spec: KernelSpec
    target: str
    width: int | None = None


def check_compiler() -> None:
    """Refuses to go on where nothing could be compiled; cheap, to be asked before the work.

    Raises:
        ImportError: triton is not installed.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "kernels for GPUs are compiled by triton, which is not installed: pip install triton"
        ) from error


def compile_jobs(
    jobs: Sequence[Job], done: Callable[[Job], None], most: int | None = None
) -> dict[Job, Path | NotCovered]:
    """The folder of every job (see `bundle`), or why no template covers it.

    What is in the cache already is not compiled again. Nothing is left running when this ends,
    however it ends.

    Args:
        done: called after each job, in this thread.
        most: processes at once; as many as there are cores if not given.

    Raises:
        ImportError: triton is not installed.
        OSError: the cache cannot be written.
        RuntimeError: a kernel cannot be compiled.
    """
    answers: dict[Job, Path | NotCovered] = {}
    left: list[Job] = []
    for job in dict.fromkeys(jobs):
        try:
            folder = folder_of(job.spec, job.target, job.width)
        except NotCovered as reason:
            answers[job] = reason
        else:
            if not store.intact(folder):
                left.append(job)
                continue
            answers[job] = folder
        done(job)
    if left:
        # The longest first, so that they do not end alone.
        left.sort(key=lambda job: -len(launches(job.spec, job.target)))
        cores = most or len(os.sched_getaffinity(0))  # triton is for Linux
        answers |= _Pool(min(cores, -(-len(left) // LEAST_JOBS))).run(left, done)
    return answers


class _Pool:
    """Processes, and a thread for each that hands it one job after the other."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.finished: Queue[tuple[Job | None, Path | Exception]] = Queue()

    def run(self, jobs: Sequence[Job], done: Callable[[Job], None]) -> dict[Job, Path | NotCovered]:
        waiting = deque(jobs)
        answers: dict[Job, Path | NotCovered] = {}
        # Triton keeps what it compiles, too: once is enough.
        scratch = tempfile.TemporaryDirectory(prefix="memcompile-")
        workers = [_Worker(waiting, self.finished, scratch.name) for _ in range(self.count)]
        try:
            for worker in workers:
                worker.thread.start()
            while len(answers) < len(jobs):
                job, answer = self.finished.get()
                if job is None or (
                    isinstance(answer, Exception) and not isinstance(answer, NotCovered)
                ):
                    assert isinstance(answer, Exception)
                    raise answer
                answers[job] = answer
                done(job)
        finally:
            waiting.clear()
            for worker in workers:
                worker.end()
            scratch.cleanup()
        return answers


class _Worker:
    """A process, started by the thread that serves it: an interrupt, which reaches the main thread
    alone, cannot come between a process and whoever ends it."""

    def __init__(
        self,
        waiting: deque[Job],
        finished: Queue[tuple[Job | None, Path | Exception]],
        scratch: str,
    ) -> None:
        self.waiting, self.finished, self.scratch = waiting, finished, scratch
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.started = threading.Event()
        self.process: subprocess.Popen[str] | None = None
        self.said: IO[bytes] | None = None

    def end(self) -> None:
        """Ends it, and whatever compiler it has started."""
        if self.thread.ident is None:
            return
        self.started.wait()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.thread.join()
        streams: list[IO[Any] | None] = [self.said]
        if self.process is not None:
            streams += [self.process.stdin, self.process.stdout]
        for stream in streams:
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _start(self) -> None:
        # The same modules as here, whatever this process added to its path; never the interpreter.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment.setdefault("TRITON_CACHE_DIR", self.scratch)
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (`end` closes it)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # so that what it starts ends with it
        )

    def _serve(self) -> None:
        try:
            self._start()
        except OSError as error:
            self.finished.put((None, error))
            return
        finally:
            self.started.set()
        while True:
            try:
                job = self.waiting.popleft()
            except IndexError:
                return
            self.finished.put((job, self._ask(job)))

    def _ask(self, job: Job) -> Path | Exception:
        asked = {"spec": job.spec.to_json(), "target": job.target, "width": job.width}
        assert self.process is not None and self.said is not None
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        line = _exchange(stdin, stdout, json.dumps(asked))
        what = f"{job.spec.name} for {job.target}"
        if not line:
            code = self.process.wait()
            self.said.seek(0)
            text = " ".join(self.said.read().decode(errors="replace").split())[-500:]
            return RuntimeError(f"{what}: the compiler ended with {code}: {text}")
        answer: dict[str, Any] = json.loads(line)
        if "folder" in answer:
            return Path(answer["folder"])
        if "not_covered" in answer:
            return NotCovered(answer["not_covered"])
        if "os_error" in answer:
            number, text, name = answer["os_error"]
            return OSError(number, text, name) if number is not None else OSError(text)
        return RuntimeError(f"{what}: {answer['failed']}")


def _exchange(stdin: IO[str], stdout: IO[str], line: str) -> str:
    try:
        stdin.write(line + "\n")
        stdin.flush()
    except OSError:
        return ""
    return stdout.readline()
