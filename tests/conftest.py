"""What every test shares: the update switch for golden text, and quiet, repeatable arithmetic."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write golden texts instead of comparing"
    )
    parser.addoption("--long", action="store_true", help="run the tests marked long, too")
    parser.addoption("--browser", action="store_true", help="run the tests marked browser, too")
    parser.addoption("--pictures", metavar="DIR", help="where tests of pages keep their pictures")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in ("long", "browser"):
        if not config.getoption(f"--{marker}"):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"{marker}: make test-{marker}"))


# Commands of this environment (cmake) are found as they are in a shell that has activated it.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# Hundreds of small models are compiled here; the tests of kernels ask for them by name.
os.environ.setdefault("MEMCOMPILE_KERNELS", "off")


class TorchRandom:
    """torch's generator, for hypothesis to seed before each example: a failure then replays."""

    def seed(self, value: int) -> None:
        import torch

        torch.manual_seed(value)

    def getstate(self) -> Any:
        import torch

        return torch.get_rng_state()

    def setstate(self, state: Any) -> None:
        import torch

        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis only keeps a weak reference
hypothesis.register_random(TORCH_RANDOM)
# The gate gives one answer for one tree; HYPOTHESIS_PROFILE=default looks for new examples.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run, whatever ran before."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with tests/golden/NAME; `--update-golden` writes it instead."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert path.exists(), f"no golden text {path.name}: run pytest --update-golden and read it"
        assert text == path.read_text(), (
            f"{path.name} changed; if on purpose, run pytest --update-golden and read the diff"
        )

    return check
