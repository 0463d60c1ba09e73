"""Imports go one way; the order below is the one that docs/architecture.md draws."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    {"errors", "constants", "specs"},
    {"environment"},
    {
        "bundle",
        "checkpoint",
        "images",
        "models",
    },
    {"cost", "headroom", "kernels", "onnx", "trt"},
    {"runners"},
    {"backends"},
    {"evaluation", "parity"},
    {"quantization"},
    {"bench"},
    {"building", "doctor", "exporting", "inspection", "quantizing", "verifying"},
    {"api"},
    {"cli"},
    {"__init__", "__main__"},
)
RANKS = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
STRANGERS = ({"onnx", "trt"}, {"onnx", "runners"})  # no imports among them, whatever their layers
HEAVY = {"numpy", "onnx", "onnxruntime", "onnxscript", "onnxsim", "pycuda", "tensorrt", "timm", "torch", "triton"}
KERNEL_IMPORTS = {*sys.stdlib_module_names, "evit_kernels", "torch", "triton"}

PACKAGE = sorted((ROOT / "evit_deploy").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
TREE = sorted(
    {*PACKAGE, *KERNELS, ROOT / "cli.py", *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")}
)


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import; `from evit_deploy import api` counts as evit_deploy.api."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            if node.module == "evit_deploy":
                yield from ((node.lineno, f"evit_deploy.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def everywhere(path: Path) -> list[tuple[int, str]]:
    return list(imported(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "evit_deploy").parts[0].removesuffix(".py")


def rank_of(part: str) -> int | None:
    """`checkpoint_file` stands where `checkpoint` does, unless the table has it."""
    return RANKS.get(part, RANKS.get(part.split("_")[0]))


@pytest.mark.parametrize("path", PACKAGE, ids=names)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    rank = rank_of(part)
    assert rank is not None, f"{part} belongs in a layer of this test and of docs/architecture.md"
    for line, name in everywhere(path):
        target = name.split(".")[1] if name.startswith("evit_deploy.") else "__version__"
        if target == "__version__":
            continue
        target_rank = rank_of(target)
        assert target_rank is not None, f"line {line}: {target} is in no layer"
        assert target_rank <= rank, f"line {line}: {part} imports {target}, which stands above it"
        assert {part, target} not in STRANGERS, f"line {line}: {part} imports {target}"


@pytest.mark.parametrize("path", KERNELS, ids=names)
def test_kernels_need_torch_and_triton_only(path: Path) -> None:
    surplus = [(line, name) for line, name in everywhere(path) if name.split(".")[0] not in KERNEL_IMPORTS]
    assert not surplus


@pytest.mark.parametrize("path", TREE, ids=names)
def test_some_modules_are_imported_in_one_place(path: Path) -> None:
    """Typer has its own copy of Click, timm needs a remedy before its import, PyCUDA makes the context it finds."""
    places = {"click": None, "timm": "evit_deploy/models/timm_import.py", "pycuda": "evit_deploy/runners/cuda.py"}
    for line, name in everywhere(path):
        top = name.split(".")[0]
        if top in places and not (top == "timm" and path.is_relative_to(ROOT / "tests")):
            assert names(path) == places[top], f"line {line}: {top} is imported in {places[top] or 'no file'}"


@pytest.mark.parametrize(
    "path",
    [p for p in PACKAGE if part_of(p) in {"cli", "errors", "constants", "specs", "__init__", "__main__"}],
    ids=names,
)
def test_nothing_heavy_at_the_top(path: Path) -> None:
    top_level = ast.parse(path.read_text(encoding="utf-8")).body
    assert not [(line, name) for line, name in imported(top_level) if name.split(".")[0] in HEAVY]
