"""Runs evit-deploy from a checkout that is not installed: python cli.py export m3.pt"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent / "kernels"))

from evit_deploy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
