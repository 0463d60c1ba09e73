"""Trained models, one of each family: what examples/digits/train.py writes, once per workspace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.program import ROOT
from benchmarks.settings import Settings
from benchmarks.workspace import Workspace
from evit_deploy.errors import EvitDeployError

DIGITS = "digits"  # the example as it is, a small `msa`
TRAINED = (DIGITS, "mit-b1", "msra-m3")
PROTOCOL = (
    f"examples/digits/train.py; of {DIGITS}, a small msa, at 32 px, of published architectures, --model, at 64 px"
)
QUICK_EPOCHS = 8


def trained_models(settings: Settings, names: tuple[str, ...] = TRAINED) -> tuple[str, ...]:
    """Those of some names that are chosen; the quickest where none is, or where it is to be quick."""
    chosen = names if settings.models is None and not settings.quick else settings.models or ()
    return tuple(name for name in names if name in chosen) or (DIGITS,)


def train_digits(model: str, settings: Settings, workspace: Workspace) -> Path:
    """The folder with checkpoint and images of one of TRAINED.

    Raises:
        EvitDeployError: training failed.
    """
    folder = workspace.folder / f"trained-{model}"
    if folder.exists():
        return folder
    workspace.progress(f"{model}: training")
    command = [sys.executable, str(ROOT / "examples/digits/train.py"), "--output", str(folder)]
    if model != DIGITS:
        command += ["--model", model]
    if settings.quick:
        command += ["--epochs", str(QUICK_EPOCHS)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EvitDeployError(f"training {model} on the digits failed", details=done.stderr.splitlines()[-5:])
    return folder
