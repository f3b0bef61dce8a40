"""Records: kept line by line, resumed, healed, and never mixed with another run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memcompile.evaluation.records import (
    RECORDS,
    SETTINGS,
    fingerprint,
    key_of,
    open_records,
    write_whole,
)


def record(sample: int, **more: Any) -> dict[str, Any]:
    place = {"task": "single", "length": 64, "depth": 0.5, "sample": sample, "policy": "dense"}
    return {**place, "score": 1.0, **more}


def test_each_record_is_on_disk_when_it_was_added(tmp_path: Path) -> None:
    with open_records(tmp_path / "out", {"seed": 0}) as records:
        for sample in range(3):
            records.add(record(sample))
            lines = (tmp_path / "out" / RECORDS).read_text().splitlines()
            assert len(lines) == sample + 1
    assert json.loads((tmp_path / "out" / SETTINGS).read_text()) == {"seed": 0}


def test_a_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    with open_records(tmp_path, {"seed": 0, "lengths": (1, 2)}) as records:
        records.add(record(0))
    with open_records(tmp_path, {"seed": 0, "lengths": (1, 2)}) as records:
        assert key_of(record(0)) in records.done and key_of(record(1)) not in records.done
        records.add(record(1))
    assert len((tmp_path / RECORDS).read_text().splitlines()) == 2


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, kept: int, cut: int) -> None:
    with open_records(tmp_path, {}) as records:
        for sample in range(kept + 1):
            records.add(record(sample))
    path = tmp_path / RECORDS
    path.write_bytes(path.read_bytes()[:-cut])
    with open_records(tmp_path, {}) as records:
        assert len(records.done) == kept
        records.add(record(kept))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [*range(kept + 1)]


def test_another_run_is_refused_and_named(tmp_path: Path) -> None:
    with open_records(tmp_path, {"seed": 0, "model": "a"}) as records:
        records.add(record(0))
    before = (tmp_path / RECORDS).read_bytes()
    with (
        pytest.raises(ValueError, match=r"evaluation .seed was 0, is 1; new was null, is 2"),
        open_records(tmp_path, {"seed": 1, "model": "a", "new": 2}),
    ):
        pass
    assert (tmp_path / RECORDS).read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 1: no record"),
        ("{}", "line 1: no record"),
        ("not JSON", "line 1: no record"),
        (json.dumps(record(0, run="other")), "of another run .'other'"),
        (json.dumps({"run": fingerprint({})}), "line 1: no record of this run .'task'"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_lost(
    tmp_path: Path, line: str, message: str
) -> None:
    with open_records(tmp_path, {}):
        pass
    content = line + "\n" + json.dumps(record(1, run=fingerprint({}))) + "\n"
    (tmp_path / RECORDS).write_text(content)
    with pytest.raises(ValueError, match=message), open_records(tmp_path, {}):
        pass
    assert (tmp_path / RECORDS).read_text() == content


def test_a_folder_with_records_of_unknown_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text("")
    with pytest.raises(FileExistsError, match=f"without {SETTINGS}"), open_records(tmp_path, {}):
        pass
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(ValueError, match="damaged JSON"), open_records(tmp_path, {}):
        pass
    (tmp_path / SETTINGS).write_text("[]")
    with pytest.raises(ValueError, match="not the settings"), open_records(tmp_path, {}):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("mine")
    with (
        pytest.raises(FileExistsError, match="holds files, and none of an evaluation"),
        open_records(tmp_path, {"seed": 0}),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        open_records(tmp_path, {}),
        pytest.raises(BlockingIOError, match="another evaluation is writing here"),
        open_records(tmp_path, {}),
    ):
        pass
    with open_records(tmp_path, {}) as records:
        records.add(record(0))


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "text")
    write_whole(tmp_path / "a", b"bytes")
    assert (tmp_path / "a").read_bytes() == b"bytes"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
