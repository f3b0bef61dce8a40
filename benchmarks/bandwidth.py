"""How fast this machine reads memory: the ceiling that every figure is a part of."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import buffers
from .rules import Contender, Timing, last_level_cache

# Each thread reads one stretch of memory as `streams` sequences side by side. How many the hardware
# follows best is not known beforehand, so several are tried. The sum keeps the reads alive.
SOURCE = r"""
#include <cstdint>
#include <thread>
#include <vector>

typedef uint64_t Words __attribute__((vector_size(64)));

template <int streams>
static uint64_t read_part(const Words* data, int64_t count) {
  const int64_t each = count / streams / 4 * 4;
  Words sums[streams * 4] = {};
  for (int64_t i = 0; i < each; i += 4)
    for (int s = 0; s < streams; ++s)
      for (int k = 0; k < 4; ++k) sums[s * 4 + k] += data[s * each + i + k];
  uint64_t total = 0;
  for (const Words& sum : sums)
    for (int lane = 0; lane < 8; ++lane) total += sum[lane];
  return total;
}

extern "C" uint64_t read_all(const void* data, int64_t bytes, int threads, int streams) {
  std::vector<uint64_t> totals(threads * 8);
  const int64_t words = bytes / 64 / threads;
  auto part = [&](int t) {
    const Words* from = static_cast<const Words*>(data) + t * words;
    totals[t * 8] = streams == 1   ? read_part<1>(from, words)
                    : streams == 2 ? read_part<2>(from, words)
                                   : read_part<4>(from, words);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(part, t);
  part(0);
  for (std::thread& other : others) other.join();
  uint64_t total = 0;
  for (int t = 0; t < threads; ++t) total += totals[t * 8];
  return total;
}
"""
STREAMS = (1, 2, 4)
FAR = 16
PREFIX = "read bandwidth"

Reader = Callable[[int, int, int, int], int]


def compiler() -> str | None:
    """The C++ compiler that a plain build finds."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def load_reader(folder: Path) -> Reader | None:
    """(address, bytes, threads, streams) -> sum of the words there; None without a compiler."""
    found = compiler()
    if found is None:
        return None
    source, library = folder / "read_all.cpp", folder / "read_all.so"
    source.write_text(SOURCE)
    options = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    done = subprocess.run(
        [found, *options, str(source), "-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return None
    read_all = ctypes.CDLL(str(library)).read_all
    read_all.restype = ctypes.c_uint64
    read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    reader: Reader = read_all
    return reader


def probes(cache: int | None = None) -> list[Contender]:
    """Contenders that do nothing but read, in torch's number of threads: for both kinds of pages,
    plain C++ in several access patterns and torch's own sum.

    They read FAR times the cache before they come round, so that nothing of it is found there.

    Args:
        cache: bytes to rotate past; None: the last-level cache.
    """
    size = FAR // 2 * (last_level_cache() if cache is None else cache)
    threads = torch.get_num_threads()
    found: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        reader = load_reader(Path(folder))
    for kind in buffers.KINDS:
        data = [buffers.empty((size // 4,), torch.float32, kind).fill_(1) for _ in range(2)]
        if reader is not None:
            for streams in STREAMS:
                found.append(
                    Contender(
                        f"{PREFIX} {kind} c++ x{streams}",
                        partial(_read_all, reader, data, threads, streams),
                        len(data),
                        size,
                    )
                )
        found.append(Contender(f"{PREFIX} {kind} torch sum", partial(_sum, data), len(data), size))
    return found


def _read_all(reader: Reader, data: list[Tensor], threads: int, streams: int, state: int) -> int:
    return reader(data[state].data_ptr(), data[state].nbytes, threads, streams)


def _sum(data: list[Tensor], state: int) -> Tensor:
    return data[state].sum()


def bandwidths(timings: Mapping[str, Timing], sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes a second that reads reach, by kind of pages: the fastest probe's median."""
    return {
        kind: max(
            sizes[name] / timing.median
            for name, timing in timings.items()
            if name.startswith(f"{PREFIX} {kind} ")
        )
        for kind in buffers.KINDS
    }


def kind_of(share: float | None) -> str:
    """Which bandwidth a tensor is held to whose memory lies in huge pages to this part."""
    return "huge" if share is not None and share > 0.5 else "ordinary"
