"""What this project promises about speed and memory, measured: `python -m benchmarks` from the root of the checkout.

Each benchmark writes one JSON document to `benchmarks/results/`; `python -m benchmarks table` prints them as Markdown.
Nothing here is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("evit_kernels") is None:  # a checkout that is not installed, as in cli.py
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))
