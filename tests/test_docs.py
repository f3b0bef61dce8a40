"""What the README shows is run as it stands, and what the documents point to exists."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import click
import pytest
import torch
from transcript_case import Shell

import memcompile

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in that looks like the checkout to whoever reads from it."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_readme_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(folder, monkeypatch)
    lines = [
        line.partition("#")[0].strip()
        for block in blocks((ROOT / "README.md").read_text(), "bash")
        for line in block.splitlines()
        if not line.startswith("make ")
    ]
    said = []
    for line in lines:
        said.append(shell.run(line))
        assert shell.code == 0, said[-1]
    # Built, run twice, evaluated; each said something.
    assert [line.partition("memcompile ")[2].split()[0] for line in lines] == [
        "models/networks/checkpoints/bytes-small",
        *("run", "run", "eval"),
    ]
    assert all(said)
    assert (folder / "bytes-small.scout" / "manifest.json").is_file()
    assert (folder / "bytes-small.scout" / "report.html").is_file()
    assert (folder / "out/table.md").is_file()


def test_the_python_of_the_readme_and_the_backend_guide_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other: they compile the same step, which takes seconds, once."""
    torch._dynamo.reset()
    memcompile.graphs(clear=True)
    said = {}
    for page in ("README.md", "docs/backend.md"):
        code = "\n".join(blocks((ROOT / page).read_text(), "python"))
        exec(compile(code, page, "exec"), {})
        said[page] = capsys.readouterr().out
    assert "policy scout: bytes that a step reads" in said["README.md"]
    assert "4 of 4 attentions read their cache through policy 'scout'" in said["README.md"]
    assert "calls: 9 through the policy, 0 dense" in said["docs/backend.md"]


def test_the_policy_of_ones_own_in_the_memory_guide_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "docs/memory.md").read_text().partition("### A policy of your own")[2]
    code = blocks(section, "python")[0]
    # A dataclass looks its module up.
    monkeypatch.setitem(sys.modules, "memory_md", types.ModuleType("memory_md"))
    exec(compile(code, "memory.md", "exec"), {"__name__": "memory_md"})
    assert "policy ends" in capsys.readouterr().out


def test_the_command_of_the_evaluation_guide_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from memcompile.compiler.cli import main

    (block,) = blocks((ROOT / "docs/evaluation.md").read_text(), "bash")
    assert main(shlex.split(block.replace("\\\n", " "))[1:]) == 0, capsys.readouterr().err
    assert "no claim: budget > 1/8" not in capsys.readouterr().out
    assert (folder / "out/table.md").is_file()


def test_the_commands_of_the_distillation_guide_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from memcompile.compiler.cli import main

    (block,) = blocks((ROOT / "docs/distill.md").read_text(), "bash")
    for line in block.replace("\\\n", " ").splitlines():
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert (folder / "fitted/policy.safetensors").is_file()
    assert (folder / "fitted.losses.png").is_file()


def test_the_python_of_the_evaluation_guide_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks((ROOT / "docs/evaluation.md").read_text(), "python")
    exec(compile(code, "evaluation.md", "exec"), {})
    assert capsys.readouterr().out.startswith("1.0 ")


def test_the_python_of_the_generation_guide_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "\n".join(blocks((ROOT / "docs/generation.md").read_text(), "python"))
    exec(compile(code, "generation.md", "exec"), {})
    assert "{'dense': 7, 'policy': 7}" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_make_targets_in_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"`make ([a-z]+)", document.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name}: {target}"


def test_every_option_of_the_command_line_is_documented() -> None:
    from memcompile.compiler.cli import commands

    def every(command: click.Command) -> list[click.Command]:
        if not isinstance(command, click.Group):
            return [command]
        return [found for own in command.commands.values() for found in every(own)]

    text = (ROOT / "docs/cli.md").read_text()
    missing = [
        flag
        for command in every(commands)
        for parameter in command.params
        for flag in parameter.opts
        if flag.startswith("--") and flag not in text
    ]
    assert not missing


def test_every_option_of_every_policy_is_documented() -> None:
    import dataclasses

    from memcompile.models.memory import PRESETS

    text = (ROOT / "docs/memory.md").read_text()
    for name, kind in PRESETS.items():
        assert f"`{name}`" in text
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in text, f"{name}: {field.name}"
