"""`python -m tests.trtsim.names MODULE`: which names that our code uses the bindings have; a JSON list on stdin.

The names are read off the source: what follows a variable or attribute that holds a module of the bindings, and what
follows one that holds an object of theirs, where HOLDERS says which.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.trtsim.setup import bindings_folder

ROOT = Path(__file__).resolve().parent.parent.parent
RTX = "rtx"
MODULES = {"trt": "", "_trt": "", "trtp": "plugin"}  # what holds a module, and its place below the bindings

# File to what holds an object in it, and the object's class.
HOLDERS: dict[str, dict[str, str]] = {
    "evit_deploy/trt/builder.py": {
        "builder": "Builder",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "network": "INetworkDefinition",
        "tensor": "ITensor",
        "cache": "ITimingCache",
    },
    "evit_deploy/trt/network.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "layer": "ILayer",
    },
    "evit_deploy/trt/layers.py": {"engine": "ICudaEngine", "inspector": "EngineInspector"},
    "evit_deploy/trt/plugin.py": {"registry": "IPluginRegistry"},
    "evit_deploy/trt/plugin_v3.py": {"exprBuilder": "IExprBuilder", "_builder": "IExprBuilder"},
    "evit_deploy/runners/tensorrt.py": {
        "_runtime": "Runtime",
        "_engine": "ICudaEngine",
        "context": "IExecutionContext",
        "mode": "TensorIOMode",
    },
    "evit_deploy/runners/tensorrt_log.py": {"severity": "ILogger.Severity"},
    "evit_deploy/runners/engine_slot.py": {"engine": "ICudaEngine", "context": "IExecutionContext"},
}


def sources() -> list[Path]:
    """Every file of ours that may use the bindings."""
    runners = ROOT / "evit_deploy/runners"
    return [*sorted((ROOT / "evit_deploy/trt").glob("*.py")), *sorted(runners.glob("*.py"))]


def names_in(text: str, holders: dict[str, str]) -> set[str]:
    """Dotted names below the bindings that a source uses, "Logger.Severity" for example."""
    found = set()
    for chain in _chains(ast.parse(text)):
        for i, part in enumerate(chain[:-1]):
            place = MODULES.get(part, holders.get(part))
            # A call may stand before the holder, not after it: what a call returns is another object.
            if place is not None and "()" not in chain[i:]:
                found.add(".".join(filter(None, [place, *chain[i + 1 :]])))
                break
    return found


def used_names() -> dict[str, set[str]]:
    """File to the names it uses."""
    found = {}
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        found[name] = names_in(path.read_text(encoding="utf-8"), HOLDERS.get(name, {}))
    return found


def missing_names(flavor: str, names: set[str]) -> list[str]:
    """Those that the bindings lack.

    Args:
        flavor: a version of `setup.VERSIONS`, or RTX.
        names: dotted.
    """
    from tests.conftest import process_environment  # with PyTorch behind it, which the child does without

    environment = process_environment()
    if flavor != RTX:
        environment["PYTHONPATH"] = os.pathsep.join([str(bindings_folder(flavor)), environment["PYTHONPATH"]])
    module = "tensorrt_rtx_bindings" if flavor == RTX else "tensorrt"
    command = [sys.executable, "-m", "tests.trtsim.names", module]
    done = subprocess.run(
        command, input=json.dumps(sorted(names)), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    missing: list[str] = json.loads(done.stdout.splitlines()[-1])  # the bindings write a warning before it
    return missing


def _chains(tree: ast.AST) -> Iterator[list[str]]:
    """["self", "_flavor", "trt", "Runtime"] for each chain of attributes; a call or an index in it is "()"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield _chain(node)


def _chain(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else ["()"]


def _has(module: Any, name: str) -> bool:
    marker = object()
    return functools.reduce(lambda thing, part: getattr(thing, part, marker), name.split("."), module) is not marker


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    names = json.load(sys.stdin)
    if any(name.startswith("plugin.") for name in names):
        importlib.import_module(f"{sys.argv[1]}.plugin")
    print(json.dumps([name for name in names if not _has(module, name)]))


if __name__ == "__main__":
    main()
