"""`python -m tests.mutants [WORD ...]`: plant every fault, run its tests, and print what caught each.

Each fault is planted in a copy of the working tree; the working tree itself is only read. Its tests, as far as they are
in the fast tier, run until one fails. Exit code 0: every fault was caught; 1: one was not, or its tests could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.conftest import ROOT, TRAINED_DIGITS, train_digits
from tests.mutants.fault import Fault
from tests.mutants.faults import FAULTS

DIGITS = "digits"
CAUGHT, SURVIVED, BROKEN = "caught", "SURVIVED", "BROKEN"
_LEFT_OUT = (".git", ".venv", "__pycache__", "demo", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (?P<test>\S+(?: \S+)*?)(?: - .*)?$", re.MULTILINE)
_ALL_PASSED, _SOME_FAILED = 0, 1  # pytest's exit codes


@dataclass(frozen=True)
class Verdict:
    """What became of one fault.

        Attributes:
            fault: its name.
            file: where it was planted.
            state: DIGITS = "digits"
    CAUGHT, SURVIVED or BROKEN.
            caught_by: the test that failed first; the last lines of pytest's output where it is BROKEN.
            seconds: that its tests took.
    """

    fault: str
    file: str
    state: str
    caught_by: str
    seconds: float


def plant(fault: Fault, tree: Path) -> Verdict:
    """Run a fault's tests in a copy of the working tree that has the fault, and take it out again."""
    path = tree / fault.file
    source = path.read_text(encoding="utf-8")
    started = time.monotonic()
    path.write_text(fault.apply(source), encoding="utf-8")
    try:
        done = run_tests(fault, tree)
    finally:
        path.write_text(source, encoding="utf-8")
    seconds = round(time.monotonic() - started, 1)
    found = _FAILED.search(done.stdout)
    if done.returncode == _ALL_PASSED:
        return Verdict(fault.name, fault.file, SURVIVED, "", seconds)
    if done.returncode == _SOME_FAILED and found is not None:
        return Verdict(fault.name, fault.file, CAUGHT, found["test"], seconds)
    last_words = " | ".join((done.stdout + done.stderr).split("\n")[-6:])
    return Verdict(fault.name, fault.file, BROKEN, f"pytest ended with {done.returncode}: {last_words}", seconds)


def run_tests(fault: Fault, tree: Path) -> subprocess.CompletedProcess[str]:
    """The fast tier of a fault's tests, up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    command += ["-m", "not exhaustive", *(["-k", fault.select] if fault.select else []), *fault.tests]
    # Bytecode is told apart by the second and the size of its source: a fault may change neither.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    environment[TRAINED_DIGITS] = str(tree.parent / DIGITS)
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


@contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Path]]:
    """Copies of the working tree, to be taken and put back."""
    with tempfile.TemporaryDirectory(prefix="evit-mutants-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for i in range(count):
            tree = Path(folder, str(i))
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_LEFT_OUT))
            trees.put(tree)
        train_digits(Path(folder, DIGITS))  # of the right sources, once: training takes longer than most tests
        yield trees


def run_all(faults: Sequence[Fault], jobs: int) -> Iterator[Verdict]:
    """A verdict for each fault, in order."""
    with copies(jobs) as trees, ThreadPoolExecutor(jobs) as pool:

        def in_a_copy(fault: Fault) -> Verdict:
            tree = trees.get()
            try:
                return plant(fault, tree)
            finally:
                trees.put(tree)

        yield from pool.map(in_a_copy, faults)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only faults whose name or file contains one of these")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tests run side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the verdicts as JSON")
    options = parser.parse_args(argv)
    chosen = [f for f in FAULTS if not options.words or any(word in f.name or word in f.file for word in options.words)]
    if not chosen:
        print(f"no fault's name or file contains any of: {' '.join(options.words)}", file=sys.stderr)
        return 1
    verdicts = []
    for verdict in run_all(chosen, max(1, options.jobs)):
        verdicts.append(verdict)
        print(f"{verdict.state:<8}  {verdict.fault}\n          {verdict.caught_by or verdict.file}", flush=True)
    caught = sum(verdict.state == CAUGHT for verdict in verdicts)
    print(f"{caught} of {len(verdicts)} faults caught by the fast tier")
    if options.json is not None:
        options.json.write_text(
            json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n", encoding="utf-8"
        )
    return 0 if caught == len(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
