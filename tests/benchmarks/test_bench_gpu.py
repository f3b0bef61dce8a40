"""The GPU command's device-independent parts, on the CPU: the checks catch, the table tells."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile.benchmarks import gpu, results
from memcompile.benchmarks.gpu import Clock
from memcompile.benchmarks.gpu_cases import CASES, TINY, Case
from memcompile.benchmarks.gpu_numerics import check, error_and_allowed
from memcompile.codegen.spec import KernelSpec
from memcompile.models import ops

CPU = torch.device("cpu")
OVERLOADS = (
    *("page_lse", "page_logits", "summaries", "backward"),
    *("record_table", "fold", "among"),
)


def broken(op: str, spoil: Any) -> Any:
    """Kernels that are the references, but `spoil` changes what `op` returns or writes."""

    def load(specs: Iterable[KernelSpec]) -> dict[KernelSpec, Any]:
        return {spec: lambda *args, s=spec: call(s, args) for spec in specs}

    def call(spec: KernelSpec, args: tuple[Any, ...]) -> Any:
        given = dict(zip((name for _, name in spec.arguments), args, strict=True))
        overload = "".join(f".{name}" for name in OVERLOADS if getattr(spec, name))
        result = ops.operator(spec.op + overload)(*family_arguments(spec, given))
        spoilt = spoil(given if spec.op == "append_index" or spoil is forgotten else result)
        return result if spoilt is None else spoilt

    return load


def family_arguments(spec: KernelSpec, given: dict[str, Any]) -> tuple[Any, ...]:
    if spec.op == "append_index":
        index = [given[f"index_{field}"] for field in spec.fields]
        if spec.fold:
            children = [given[f"children_{field}"] for field in spec.fields]
            names = ("child_table", "page_table", "position", "lengths")
            last = (index, list(spec.fields), given["child_size"], given["ratio"])
            return (children, *(given[name] for name in names), *last)
        tables = ("page_table", "record_table") if spec.record_table else ("page_table",)
        names = ("key", "value", *tables, "position", "lengths", "key_pages", "value_pages")
        return (*(given[name] for name in names), index, list(spec.fields))
    if spec.op == "score_select":
        fields = list(spec.score_fields)
        index = [given[f"index_{field}"] for field in fields]
        whole = ("sink_pages", "window_pages", "capacity", "budget_pages", "dense_below")
        whole = ("sink_pages", "window_pages", "budget_pages") if spec.among else whole
        tables = ("page_table", "candidates") if spec.among else ("page_table",)
        return (
            *(given["query"], index, fields, *(given[name] for name in tables), given["position"]),
            *(given["lengths"], spec.score, spec.page_size, *(given[name] for name in whole)),
        )
    if spec.summaries:
        tensors = ("query", "key_pages", "value_pages", "page_table", "pages", "page_logits")
        rest = ("page_values", "page_bias", "position", "lengths", "scale")
        return (*(given[name] for name in tensors + rest), given.get("softcap", 0.0))
    if spec.op == "attend":
        tensors = (given["query"], given["key_pages"], given["value_pages"], given.get("bias"))
        lists = (given["page_table"], given.get("pages"), spec.pages == "unlisted")
        numbers = (given["scale"], given.get("softcap", 0.0), given.get("window", 0), spec.span)
        return (*tensors, *lists, given["position"], given["lengths"], *numbers)
    if spec.op.startswith("state"):
        names = ("query", "key", "value", "decay", "beta", "lengths")
        last = ("grad_num", "grad_den") if spec.backward else ("state", "norm")
        return tuple(given.get(name) for name in names + last)
    outs = [given[f"out{i}"] for i in range(spec.count)]
    return (outs, [given[f"lse{i}"] for i in range(spec.count)])


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_the_references_pass_every_check(case: Case, dtype: torch.dtype) -> None:
    found = check(case, dtype, CPU, None)
    assert found["passed"], found
    assert found["kernel"] == "reference"


def test_the_cases_cover_every_operation_and_reading() -> None:
    for cases in (CASES, TINY):
        assert {case.op for case in cases} == {*ops.FAMILIES.values()}
    assert {case.pages for case in CASES} == {"all", "listed", "unlisted", "records"}
    assert {(case.key_dim, case.value_dim) for case in CASES if case.shared} == {(576, 512)}
    assert any(case.softcap for case in CASES)
    assert any(case.window for case in CASES)
    assert any(case.rows > 1 for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES)


def scaled(result: Any) -> Any:
    return (result[0] * 1.1, *result[1:])


def shifted(result: Any) -> Any:
    return (result[0], result[1] + 0.5)


def poisoned(result: Any) -> Any:
    result[0][0, 0, 0, 0] = torch.nan
    return result


def wrong_page(lists: torch.Tensor) -> torch.Tensor:
    changed = lists.clone()
    changed[0, 0, 0, 0] = 3  # drops the sink
    return changed.sort(-1).values


def unwritten(given: dict[str, Any]) -> None:
    given["index_mean"].mul_(1.1)


def kept_wrongly(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (results[0], results[1] + 0.01)


def kept_too_much(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (results[0], results[1].clamp_min(-100))


def moved(given: dict[str, Any]) -> None:
    given["key_pages"].copy_(given["key_pages"].roll(1, 0))


def forgotten(given: dict[str, Any]) -> None:
    given["state"].mul_(0.9)


@pytest.mark.parametrize(
    ("case", "spoil"),
    [
        (Case("attend", 16, 8, page_size=16), scaled),
        (Case("attend", 16, 8, page_size=16), shifted),
        (Case("attend", 16, 8, page_size=16, pages="listed"), poisoned),
        (Case("attend.summaries", 16, 8, page_size=16), scaled),
        (Case("attend.summaries", 16, 8, page_size=16), shifted),
        (Case("score_select.page_logits", 8, page_size=16, score="box"), kept_wrongly),
        (Case("score_select.page_logits", 8, page_size=16), kept_too_much),
        (Case("combine", value_dim=8), scaled),
        (Case("score_select", 8, page_size=16), wrong_page),
        (Case("append_index", 8, 8, page_size=16), unwritten),
        (Case("append_index", 8, 8, page_size=16), moved),
        (Case("append_index.record_table", 8, 8, page_size=16), unwritten),
        (Case("append_index.fold", 8, 8, page_size=16), unwritten),
        (Case("score_select.among", 8, page_size=16), wrong_page),
        (Case("state_step", 8, 8, rows=2), scaled),
        (Case("state_step", 8, 8, rule="normalised", rows=2), shifted),
        (Case("state_step", 8, 8, decay="gate", rows=2), forgotten),
        (Case("state_chunk", 8, 8, rule="delta", rows=9), poisoned),
        (Case("state_chunk", 8, 8, rule="delta", rows=9), forgotten),
        (Case("state_chunk.backward", 8, 8, rows=9), scaled),
    ],
)
def test_a_wrong_kernel_is_caught(case: Case, spoil: Any) -> None:
    honest = check(case, torch.float16, CPU, broken(case.op, lambda result: result))
    assert honest["passed"], honest
    found = check(case, torch.float16, CPU, broken(case.op, spoil))
    assert not found["passed"]


def test_a_kernel_that_breaks_is_a_failure_and_not_the_end() -> None:
    def load(specs: Iterable[KernelSpec]) -> dict[KernelSpec, Any]:
        raise RuntimeError("no such instruction")

    place = gpu.Place(CPU, load, 1 << 10, verified=False)
    found = gpu.one_check(place, TINY[0], torch.float16)
    assert not found["passed"]
    assert "no such instruction" in found["raised"]


def test_what_is_not_finite_is_an_infinite_error() -> None:
    truth = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    good = torch.tensor([1.0, -torch.inf])
    assert error_and_allowed(good, good, truth)[0] == 0
    for bad in ([torch.nan, -torch.inf], [1.0, 0.0], [1.0, torch.inf]):
        error, allowed = error_and_allowed(torch.tensor(bad), good, truth)
        assert error > allowed


def test_time_that_is_spent_is_said_and_not_overrun() -> None:
    now = [0.0]
    clock = Clock(100.0, now=lambda: now[0])
    assert clock.allows("first", 50)
    now[0] = 60.0
    assert not clock.allows("second", 50)
    assert clock.allows("third", 30)
    assert clock.skipped == ["second: 60 of 100 s were spent"]


def test_numerics_stop_in_time_and_the_rest_is_kept() -> None:
    now = [0.0]

    def tick() -> float:
        now[0] += 1.0
        return now[0]

    place = gpu.Place(CPU, None, 1 << 10, verified=False)
    done, left = gpu.numerics(place, Clock(10.0, now=tick), TINY, 0.5)
    assert 0 < len(done) < 2 * len(TINY)
    assert len(done) + len(left) == 2 * len(TINY)


def test_a_dry_run_goes_all_the_way_and_claims_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--dry", "--rounds", "1", "--minutes", "4", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("gpu-2")
    result = json.loads(path.read_text())
    assert set(results.REQUIRED) <= set(result)
    assert result["verified"] is False
    assert len(result["numerics"]) == 2 * len(TINY)
    assert result["captured_step"]["changed_inputs_followed"] is True
    assert [(row["batch"], row["context"]) for row in result["rows"]] == [(1, 96), (2, 96)]
    for row in result["rows"]:
        assert "raised" not in row
        assert set(row["parts_us"]) == {"append_index", "score_select", "attend"}
        assert row["baseline"] in row["torch_us"]
    lines = capsys.readouterr().out.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.split()[:1] == ["batch"]]
    told = 3 + len(result["states"]) + len(result["rows"]) + 1
    assert len([line for line in lines if "(unverified)" in line]) == told
    assert {row["case"].split()[0] for row in result["states"]} == {"state_step", "state_chunk"}
    assert all(row["us"] > 0 and row["floor_bytes"] > 0 for row in result["states"])
    assert all("(unverified)" in line for line in lines[head + 1 : head + 3])


@pytest.mark.long
def test_a_dry_run_takes_the_triton_kernels_through_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    # In a process of its own: triton reads whether to interpret when it is imported.
    options = ("--dry", "--kernels", "triton", "--rounds", "1", "--out", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "memcompile.benchmarks.gpu", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: bfloat16: Triton's interpreter" in done.stdout
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert len(result["numerics"]) == len(TINY)
    assert all(checked["kernel"] != "reference" for checked in result["numerics"])
    assert result["captured_step"]["changed_inputs_followed"] is True


def test_what_was_left_out_or_failed_stands_in_the_table() -> None:
    found = {
        "verified": False,
        "gpu": {"name": "x"},
        "bandwidth": 1e9,
        "numerics": [
            {"case": "a", "dtype": "float16", "passed": False, "error": 2.0, "allowed": 1.0}
        ],
        "captured_step": {},
        "decode": [{"batch": 1, "context": 9, "raised": "OutOfMemoryError: full"}],
        "skipped": ["decode at batch 8: 400 of 420 s were spent"],
        "seconds": 5.0,
    }
    told = gpu.table(found)
    assert "FAILED a float16: error 2.00e+00 > 1.00e+00" in told
    assert "FAILED batch 1, context 9: OutOfMemoryError: full" in told
    assert "left out: decode at batch 8" in told


def test_without_a_gpu_it_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "--dry" in capsys.readouterr().err
