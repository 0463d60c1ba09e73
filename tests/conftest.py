"""What several test files share: the trained digits model, its bundle, and a real process of the command line.

Training and exports happen once per run, when the first test asks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

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
DIGITS_EPOCHS = 8  # 98.9 % on the held-out split, in some ten seconds

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


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
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that examples/digits/train.py writes: digits.pt, heldout.npz, heldout/*.png."""
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, ROOT / "examples/digits/train.py", "--output", folder, "--epochs", str(DIGITS_EPOCHS)]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


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
def digits_bundle(digits: Path) -> Bundle:
    """The trained model, exported and verified; read it, and change only copies."""
    from evit_deploy import api

    return api.export(digits / "digits.pt", digits / "digits.evit").bundle


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Random weights of a published model as a bundle, exported once per name; read it, and change only copies."""
    from evit_deploy import api

    bundles: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in bundles:
            target = tmp_path_factory.mktemp("random") / f"{name}.evit"
            bundles[name] = api.export(None, target, random_weights=name).bundle
        return bundles[name]

    return get
