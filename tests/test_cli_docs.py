"""Every command line in the documentation, the workflows and the Makefile is one that the real program accepts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from evit_deploy import errors
from evit_deploy.cli import EXIT_INTERRUPTED, EXIT_STDOUT_CLOSED, EXIT_TERMINATED, PROGRAM, app

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
DOCUMENTS = [
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *WORKFLOWS,
        ROOT / "Makefile",
        ROOT / ".ci/run",
    )
    if path.name != "CHANGELOG.md"
]
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]

# A command begins a line (behind a prompt, a path, a YAML key or a make variable) or stands in backquotes.
BEGIN = re.compile(
    r"""(?:^\s*(?:[-#$@]\s*)?(?:run:\s+)?(?:"?[\w$(){}./]*/)?|`)(?:"?\$?evit[-_]deploy"?) (?=[a-z-])""", re.M
)


def command_lines(path: Path) -> Iterator[str]:
    """The arguments of each command line in a file, as text."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    for match in BEGIN.finditer(text):
        rest = text[match.end() :].split("\n", 1)[0]
        if match.group().lstrip().startswith("`"):
            rest = rest.split("`", 1)[0]
        yield rest


def arguments_of(line: str) -> list[str]:
    """The words of a command line without what a shell would do with it; variables stand for one word each."""
    line = re.sub(r"\$\{\{.*?\}\}|\$\(\w+\)", "X", line)
    line = re.sub(r'"\$@"|(?<!")\$[A-Z_]+', "", line)  # variables that hold options, or nothing
    line = re.sub(r"\s(?:[|;>]|&&|2>).*", "", line)
    return shlex.split(line, comments=True)


def check(line: str) -> None:
    """Parse a command line as far as possible without running it; raises what the program would."""
    arguments = arguments_of(line)
    if arguments[0].startswith("-"):
        assert arguments in (["--help"], ["--version"]), line
        return
    path, subcommand, rest = command_of(arguments)
    if "--help" not in rest:
        subcommand.make_context(path, rest)


def command_of(words: list[str]) -> tuple[str, Any, list[str]]:
    """How a command is called, the command, and its arguments; a group's first argument is one of its commands."""
    path, command, rest = PROGRAM, typer.main.get_command(app), words
    while hasattr(command, "commands"):
        path, command, rest = f"{path} {rest[0]}", command.commands[rest[0]], rest[1:]
    return path, command, rest


CASES = [
    pytest.param(line, id=f"{path.relative_to(ROOT)}: {line}") for path in DOCUMENTS for line in command_lines(path)
]


@pytest.mark.parametrize("line", CASES)
def test_the_program_accepts(line: str) -> None:
    synopsis = "[" in line or "..." in line
    if synopsis:
        assert set(re.findall(r"--[a-z][a-z-]+", line)) <= options_of(line.split())
        return
    check(line)


def options_of(words: list[str]) -> set[str]:
    """Every long option of the command that a line begins with."""
    _, command, _ = command_of(words)
    return {word for p in command.params for word in (*p.opts, *p.secondary_opts)} | {"--help"}


def test_the_documents_have_command_lines() -> None:
    """The finder finds: a few that must be among the cases."""
    lines = [str(case.values[0]) for case in CASES]
    starts = ("export m3.pt --output m3.evit --no-verify", 'verify "$work/digits.evit"', 'export "$CHECKPOINT"')
    for start in (*starts, "kernels pack --arch 87", "kernels unpack orin.zip"):
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.parametrize(
    "line",
    [
        "export m3.pt --no-verfy",
        "exprot m3.pt",
        "verify a.evit b.evit",
        "bench --batch",
        "kernels lst",
        "kernels pack --archs 87",
        "kernels unpack",
    ],
)
def test_the_check_refuses(line: str) -> None:
    base = typer.BadParameter.__mro__[2]
    with pytest.raises((base, KeyError)):
        check(line)


# Workflows


def load(path: Path) -> dict[str, Any]:
    """A workflow; YAML 1.1 reads the key `on` as true."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {("on" if key is True else key): value for key, value in document.items()}


def scripts(workflow: dict[str, Any]) -> Iterator[str]:
    for job in workflow["jobs"].values():
        yield from (step["run"] for step in job.get("steps", ()) if "run" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_well_formed(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["on"]
    for name, job in workflow["jobs"].items():
        assert ("uses" in job) != ("steps" in job and "runs-on" in job), name
        assert "uses" in job or "timeout-minutes" in job, name
        for needed in [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", []):
            assert needed in workflow["jobs"]
        for step in job.get("steps", ()):
            assert ("uses" in step) != ("run" in step)
    for script in scripts(workflow):
        assert "${{" not in script, "text of a caller must not become part of a script"


def test_our_ci_calls_the_reusable_workflow_with_inputs_it_has() -> None:
    inputs = load(ROOT / ".github/workflows/parity.yml")["on"]["workflow_call"]["inputs"]
    job = load(ROOT / ".github/workflows/ci.yml")["jobs"]["parity"]
    assert job["uses"] == "./.github/workflows/parity.yml"
    assert set(job["with"]) <= set(inputs)
    assert {name for name, data in inputs.items() if data.get("required")} <= set(job["with"])


def test_ci_md_lists_every_input_and_its_default() -> None:
    inputs = load(ROOT / ".github/workflows/parity.yml")["on"]["workflow_call"]["inputs"]
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| ([^|]*) \|", (ROOT / "docs/ci.md").read_text(encoding="utf-8"), re.M))
    defaults = {
        name: "required" if data.get("required") else f"`{data['default']}`" if data.get("default") else "none"
        for name, data in inputs.items()
    }
    assert rows == defaults


def test_exit_codes_md_has_every_code() -> None:
    text = (ROOT / "docs/exit_codes.md").read_text(encoding="utf-8")
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    assert rows == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    for code in (EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_STDOUT_CLOSED):
        assert str(code) in text
