"""How `evit-deploy` is started here: its installed command, else the launcher of the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def evit_deploy_command() -> tuple[list[str], str]:
    """The words that start it, Python first, and how a person would type them."""
    installed = Path(sys.executable).parent / "evit-deploy"
    if installed.is_file():
        return [sys.executable, str(installed)], "evit-deploy"
    return [sys.executable, str(ROOT / "cli.py")], "python cli.py"
