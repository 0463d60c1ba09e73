"""The planted faults as a list: each can still be planted, and names tests that the fast tier has."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import __main__ as program
from tests.mutants.fault import Fault
from tests.mutants.faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    assert len(FAULTS) >= 80
    assert [name for name, count in Counter(fault.name for fault in FAULTS).items() if count > 1] == []


def test_each_can_be_planted() -> None:
    """What a fault changes stands exactly once in its file, and the file is another one then."""
    for fault in FAULTS:
        source = (ROOT / fault.file).read_text(encoding="utf-8")
        assert fault.apply(source) != source, fault.name


def test_each_is_a_program_still() -> None:
    """A fault that no test could import would be caught by anything."""
    for fault in FAULTS:
        if fault.file.endswith(".py"):
            compile(fault.apply((ROOT / fault.file).read_text(encoding="utf-8")), fault.file, "exec")


def test_the_tests_they_name_are_there() -> None:
    named = {test.partition("::")[0] for fault in FAULTS for test in fault.tests}
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_a_text_that_is_not_there_exactly_once() -> None:
    fault = Fault("made up", "x.py", "a", "b", ("tests/test_x.py",))
    assert fault.apply("a c") == "b c"
    for source in ("c", "a a"):
        with pytest.raises(ValueError, match=r"made up: x\.py has 'a'"):
            fault.apply(source)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working tree of one file and its tests, of which one is exhaustive."""
    (tmp_path / "x.py").write_text("ANSWER = 42\n", encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = exhaustive\npythonpath = .\n", encoding="utf-8")
    (tmp_path / "test_x.py").write_text(
        "import pytest\nfrom x import ANSWER\n\n"
        "def test_it_is_even():\n    assert ANSWER % 2 == 0\n\n"
        "def test_it_is_positive():\n    assert ANSWER > 0\n\n"
        "@pytest.mark.exhaustive\ndef test_it_is_right():\n    assert ANSWER == 42\n",
        encoding="utf-8",
    )
    return tmp_path


@pytest.mark.parametrize(
    ("wrong", "state", "test"),
    [
        ("ANSWER = 43", program.CAUGHT, "test_x.py::test_it_is_even"),
        ("ANSWER = -2", program.CAUGHT, "test_x.py::test_it_is_positive"),
        ("ANSWER = 44", program.SURVIVED, ""),
        ("ANSWR = 42", program.BROKEN, "pytest ended with 2"),
    ],
)
def test_a_verdict(wrong: str, state: str, test: str, tree: Path) -> None:
    """What only the exhaustive tier would catch survives, and what cannot be imported is not caught."""
    verdict = program.plant(Fault("planted", "x.py", "ANSWER = 42", wrong, ("test_x.py",)), tree)
    assert verdict.state == state
    assert verdict.caught_by.startswith(test)
    assert (tree / "x.py").read_text(encoding="utf-8") == "ANSWER = 42\n", "the fault is taken out again"


def test_a_word_that_no_fault_has_is_an_error() -> None:
    command = [sys.executable, "-m", "tests.mutants", "no such fault"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no fault's name or file contains any of: no such fault" in done.stderr
