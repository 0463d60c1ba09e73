"""`make` on machines that lack something: one line that says what to do, and the next `make` goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trtsim import setup

ROOT = Path(__file__).resolve().parent.parent
FILES = ("Makefile", "pyproject.toml", "constraints.txt", "evit_deploy/__init__.py", "tests/trtsim/stubs.c")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

# What `make test` leaves in the environment of the tests: its options, and that a make inside it is not the first.
OF_AN_OUTER_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PYTHON")

# A Python that lacks what a test says, through the environment.
STAND_IN = """#!/bin/bash
case "$*" in
  *version_info*) exit ${VERSION_CODE:-0} ;;
  -V) echo "Python 3.9.1" ;;
  "-m venv"*) [ "$HAS_VENV" = no ] && { echo "ensurepip is not available"; echo "and more"; exit 1; }
      mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip --version") [ "$HAS_VENV" != no ] ;;
  "-m pip install"*) [ "$HAS_NETWORK" = no ] || exit 0
      echo "WARNING: Retrying"; echo "ERROR: No matching distribution found for torch"; exit 1 ;;
  *) exit 0 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make setup` reads, with a stand-in for Python beside it."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests/trtsim/setup.py").write_text("", encoding="utf-8")
    python = tmp_path / "python"
    python.write_text(STAND_IN, encoding="utf-8")
    python.chmod(0o755)
    return tmp_path


def make(checkout: Path, *words: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code, and what was printed but for make's own last line."""
    inherited = {name: value for name, value in os.environ.items() if name not in OF_AN_OUTER_MAKE}
    done = subprocess.run(
        ["make", *words], cwd=checkout, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, [line for line in lines if not line.startswith("make: ***")]


def test_it_installs_once(checkout: Path) -> None:
    code, lines = make(checkout, "setup", "PYTHON=./python")
    assert code == 0
    assert lines == ["Installing into .venv (PyTorch is the bulk of it; some minutes the first time) ..."]
    assert make(checkout, "setup", "PYTHON=./python") == (0, ["make: Nothing to be done for 'setup'."])


@pytest.mark.parametrize("python", ["no-such-python", "/nowhere/python3", "/"], ids=str)
def test_a_python_that_is_not_there(python: str, checkout: Path) -> None:
    code, lines = make(checkout, "demo", f"PYTHON={python}")
    assert code == 2
    assert lines == [
        f"make: {python} not found: install Python 3.10 or later, or say where it is, "
        "for example: make demo PYTHON=/usr/bin/python3.11"
    ]
    assert not (checkout / ".venv").exists()


def test_a_program_that_is_no_python(checkout: Path) -> None:
    code, lines = make(checkout, "setup", "PYTHON=false")
    assert code == 2
    (line,) = lines
    assert line.startswith("make: false is no Python that runs (its words are in .setup.log): name another one")


def test_a_python_that_is_too_old(checkout: Path) -> None:
    code, lines = make(checkout, "setup", "PYTHON=./python", VERSION_CODE="3")
    assert code == 2
    (line,) = lines
    assert line.startswith("make: Python 3.9.1 is too old: Python 3.10 or later is needed")


def test_a_python_without_venv_and_then_with_it(checkout: Path) -> None:
    code, lines = make(checkout, "setup", "PYTHON=./python", HAS_VENV="no")
    assert code == 2
    (line,) = lines
    assert line.startswith("make: ./python cannot make a virtual environment: install its venv module")
    assert "python3-venv" in line
    assert make(checkout, "setup", "PYTHON=./python")[0] == 0


def test_a_network_that_ends_half_way_and_comes_back(checkout: Path) -> None:
    code, lines = make(checkout, "setup", "PYTHON=./python", HAS_NETWORK="no")
    assert code == 2
    _, line = lines
    assert line.startswith(
        "make: pip stopped, ERROR: No matching distribution found for torch: see to it (network, disk)"
    )
    assert "run make again" in line
    assert "WARNING: Retrying" in (checkout / ".setup.log").read_text(encoding="utf-8")
    assert make(checkout, "setup", "PYTHON=./python")[0] == 0


def test_the_demo_needs_nothing_of_the_tests(checkout: Path) -> None:
    """A machine without a C compiler can run it: only the tests' bindings are compiled."""
    assert not any("trtsim" in line for line in make(checkout, "-n", "demo")[1])
    assert any("trtsim/setup.py" in line for line in make(checkout, "-n", "test")[1])


class TestBindings:
    """The script that sets up TensorRT's bindings for the tests."""

    def test_no_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(setup, "FOLDER", tmp_path / "bindings")
        monkeypatch.setenv("CC", "no-such-compiler")
        with pytest.raises(SystemExit) as ended:
            setup.main()
        assert str(ended.value).startswith(
            "no C compiler 'no-such-compiler' for TensorRT's stub libraries: install gcc"
        )
        assert not (tmp_path / "bindings").exists()

    def test_no_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "pip-without-network"
        program.write_text("#!/bin/sh\necho 'WARNING: Retrying' >&2\necho 'ERROR: no route to host' >&2\nexit 1\n")
        program.chmod(0o755)
        monkeypatch.setattr(setup, "FOLDER", tmp_path / "bindings")
        monkeypatch.setattr(sys, "executable", str(program))
        with pytest.raises(SystemExit) as ended:
            setup.main()
        assert str(ended.value) == (
            "pip ended with code 1: ERROR: no route to host: see to it (network, disk, compiler) and run it again"
        )
        assert list((tmp_path / "bindings").iterdir()) == [], "nothing half done"

    def test_a_compiler_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "false")
        (tmp_path / "lib").mkdir()
        with pytest.raises(SystemExit) as ended:
            setup._compile_stubs(tmp_path / "lib" / "new", "10.16.1.11")
        assert str(ended.value).startswith("false ended with code 1: nothing: see to it")
