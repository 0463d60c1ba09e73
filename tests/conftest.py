"""What several test files share: the trained digits model, its bundle, and a real process of the command line.

Training, exports and compiled kernels are made once per run, by the first process whose test asks; the others wait.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from filelock import FileLock

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

# Threads that wait by spinning slow each other down when several processes share the cores; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Without a GPU, Triton's interpreter runs the kernels in this process; read when triton is loaded. Child processes get
# the compiler back, see `process_environment`.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# A shell that is not interactive starts a command in the background with SIGINT ignored, and every child inherits that:
# the tests of Ctrl-C could then not send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
TRAINED_DIGITS = "EVIT_DEPLOY_TRAINED_DIGITS"  # names a folder of digits that are trained already
DIGITS_EPOCHS = 8  # 98.9 % on the held-out split, in some ten seconds

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Before the workers start: each has a core of its own, and so have the processes that it starts."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def process_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child process that imports this checkout."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path, **(extra or {})}


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """For `subprocess`: the environment of a Python process that imports this checkout, tracebacks off."""
    return process_environment({"EVIT_DEPLOY_DEBUG": ""})


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """Run `evit-deploy ARGUMENTS` as a process of its own; returns the code, stdout and stderr."""

    def run(
        *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "evit_deploy", *map(str, arguments)]
        environment = process_environment({"EVIT_DEPLOY_DEBUG": "", **(env or {})})
        return subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made by the first process of this run that asks; a test that failed to make it leaves nothing there."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            staged = path.with_name(f"making-{path.name}")
            shutil.rmtree(staged, ignore_errors=True)
            make(staged)
            staged.rename(path)
    return path


@pytest.fixture(scope="session")
def digits(shared_folder: Path) -> Path:
    """The folder that examples/digits/train.py writes: digits.pt, heldout.npz, heldout/*.png."""

    trained = os.environ.get(TRAINED_DIGITS)
    make = train_digits if trained is None else lambda folder: shutil.copytree(trained, folder)
    return made_once(shared_folder / "digits", make)


def train_digits(folder: Path) -> None:
    """Run the example as a user would."""
    command = [sys.executable, ROOT / "examples/digits/train.py", "--output", folder, "--epochs", str(DIGITS_EPOCHS)]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def digits_checkpoint(digits: Path) -> Path:
    """The trained checkpoint."""
    return digits / "digits.pt"


@pytest.fixture(scope="session")
def digits_heldout(digits: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [360, 32, 32, 3] that training has not seen, and their labels [360]."""
    with np.load(digits / "heldout.npz") as data:
        return data["images"], data["labels"]


@pytest.fixture(scope="session")
def digits_bundle(digits: Path, shared_folder: Path) -> Bundle:
    """The trained model, exported and verified; read it, and change only copies."""
    from evit_deploy import api
    from evit_deploy.bundle import Bundle

    return Bundle.open(made_once(shared_folder / "digits.evit", lambda path: api.export(digits / "digits.pt", path)))


@pytest.fixture(scope="session")
def random_bundle(shared_folder: Path) -> Callable[[str], Bundle]:
    """Random weights of a published model as a bundle, exported once per name; read it, and change only copies."""
    from evit_deploy import api
    from evit_deploy.bundle import Bundle

    def get(name: str) -> Bundle:
        path = shared_folder / f"{name}-random.evit"
        return Bundle.open(made_once(path, lambda staged: api.export(None, staged, random_weights=name)))

    return get


@pytest.fixture(scope="session")
def kernel_folder(shared_folder: Path) -> Path:
    """A cache of compiled kernels; several processes may fill it at once."""
    folder = shared_folder / "kernels"
    folder.mkdir(exist_ok=True)
    return folder
