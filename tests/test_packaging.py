"""The root is the package: what the wheel and the sdist hold, and that nothing loads twice."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
NOT_PACKAGES = {"tests", "docs", "examples", "build", "dist", "out"}


def folders_with_sources() -> list[Path]:
    return sorted(
        {
            path.parent
            for path in ROOT.rglob("*.py")
            if not any(
                part.startswith(".") or part in NOT_PACKAGES
                for part in path.relative_to(ROOT).parts[:-1]
            )
        }
    )


def test_the_package_list_names_every_folder() -> None:
    found = [
        ".".join(["memcompile", *folder.relative_to(ROOT).parts])
        for folder in folders_with_sources()
    ]
    assert sorted(PACKAGES) == sorted(found), "pyproject.toml: [tool.setuptools] packages"
    missing = [
        f"{f}/__init__.py" for f in folders_with_sources() if not (f / "__init__.py").exists()
    ]
    assert not missing


def test_tests_are_no_package_and_have_names_of_their_own() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(names)


def test_nothing_of_the_checkout_is_loaded_under_another_name() -> None:
    strangers = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or name.split(".")[0] in ("memcompile", "__main__"):
            continue
        path = Path(file).resolve()
        # torch.ops, for one, claims a file that is nowhere.
        inside = (
            path.exists()
            and path.is_relative_to(ROOT)
            and not path.relative_to(ROOT).parts[0].startswith(".")
        )
        if inside and path.relative_to(ROOT).parts[0] not in ("tests", "examples"):
            strangers.append(f"{name} from {path.relative_to(ROOT)}")
    assert not strangers


@pytest.mark.parametrize("guarded", [True, False], ids=["confcutdir", "without"])
def test_confcutdir_is_what_keeps_the_root_from_loading_twice(
    tmp_path: Path, guarded: bool
) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "__init__.py").write_text("")
    (checkout / "tests" / "test_probe.py").write_text(
        "import sys\ndef test_probe():\n    assert 'checkout' not in sys.modules\n"
    )
    addopts = PROJECT["tool"]["pytest"]["ini_options"]["addopts"] if guarded else ""
    (checkout / "pytest.ini").write_text(f"[pytest]\naddopts = {addopts}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is guarded, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    # A copy, so that the build leaves no folders behind in the checkout.
    copy = tmp_path_factory.mktemp("copy") / "any-name"
    copied = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if copied.returncode:
        pytest.skip("not a git checkout: the files that belong to the project are not known")
    for name in filter(None, copied.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        f"memcompile/{path.relative_to(ROOT).as_posix()}"
        for folder in folders_with_sources()
        for path in folder.glob("*.py")
    }
    assert expected <= set(names)
    assert "memcompile/py.typed" in names and "memcompile/compiler/report.html.jinja" in names
    outside = [
        name
        for name in names
        if name.split("/")[0] != "memcompile" and not name.split("/")[0].endswith(".dist-info")
    ]
    assert not outside
    surplus = [name for name in names if name.split("/")[1] in NOT_PACKAGES]
    assert not surplus, surplus[:5]
    for path in (ROOT / "models/networks").glob("checkpoints/*/*"):
        if path.suffix in (".json", ".safetensors", ".md"):
            assert f"memcompile/{path.relative_to(ROOT).as_posix()}" in names


def test_the_sdist_holds_what_make_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"Makefile", "constraints.txt", "pyproject.toml", "LICENSE", "examples/demo.py"}
    assert wanted <= names
    assert "tests/conftest.py" in names


def test_the_installed_wheel_runs_from_anywhere(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import importlib.metadata as m, memcompile\n"
        "print(memcompile.__file__, memcompile.policies(), memcompile.__version__)\n"
        "points = m.entry_points(group='torch_dynamo_backends', name='memcompile')\n"
        "(backend,) = {p.value for p in points}\n"
        "(script,) = {p for p in m.entry_points(group='console_scripts', name='memcompile')}\n"
        "print(backend, script.load().__name__, m.version('memcompile'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        # This folder first, and not the checkout's own place on the path.
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    assert "scout" in done.stdout
    assert "memcompile.compiler.backend:memcompile" in done.stdout
    assert PROJECT["project"]["version"] in done.stdout
