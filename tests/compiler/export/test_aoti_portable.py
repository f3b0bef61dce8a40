"""`--emit aoti-portable`: a package of torch's own operations, and nothing beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from aoti_case import SCOUT, assert_equal, drive, largest_block, llama, traces, without_prefill

from memcompile.compiler.export import aoti_portable, inductor
from memcompile.compiler.export.contract import read_contract
from memcompile.compiler.export.driver import Driver
from memcompile.compiler.export.formats import Artefact
from memcompile.compiler.export.runners import runner
from memcompile.compiler.pipeline import Compiled, build
from memcompile.passes.result import NotRewritten


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return build(llama(), "scout", kernels="off", check=False, **SCOUT)


@pytest.fixture(scope="module")
def shipped(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portable") / "aoti-portable"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "graphs", without_prefill)
        artefact = aoti_portable.emit(folder, compiled, None)
    assert artefact.main == "engine.pt2" and artefact.notes[0] == "needs torch alone"
    assert {file.name for file in folder.iterdir()} == {"engine.pt2", "state.json"}
    return folder


def test_a_process_with_torch_alone(compiled: Compiled, shipped: Path, tmp_path: Path) -> None:
    """Odd chunks, then 64 steps."""
    told = traces(compiled, 160, 64)
    assert_equal(drive(shipped, told, tmp_path), told)


def test_no_cache_is_copied(shipped: Path) -> None:
    contract = read_contract(shipped)
    assert contract.outputs == ["logits"]
    artefact = Artefact("aoti-portable", shipped.name, "engine.pt2", {})
    driver = Driver(contract, runner(shipped, artefact, contract), 1, 1 << 16)
    driver(torch.ones(1, 90, dtype=torch.int64))
    assert largest_block(driver) < driver.state["site0_keys"].nbytes // 8


def test_a_delta_rule_is_refused(tmp_path: Path) -> None:
    ruled = build(llama(num_hidden_layers=4), "hybrid", kernels="off", check=False, write="delta")
    with pytest.raises(NotRewritten, match="a delta rule needs its rows one after the other"):
        aoti_portable.emit(tmp_path, ruled, None)
