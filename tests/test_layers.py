"""Imports go one way; the order below is the one that docs/architecture.md draws."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
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


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def everywhere(path: Path) -> list[tuple[int, str]]:
    return list(imported(ast.walk(parsed(path))))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "evit_deploy").parts[0].removesuffix(".py")


def rank_of(part: str) -> int | None:
    """`checkpoint_file` stands where `checkpoint` does, unless the table has it."""
    return RANKS.get(part, RANKS.get(part.split("_")[0]))


def wrong_way(path: Path) -> Iterator[str]:
    """What a module imports that stands above it, or that it must not know."""
    part = part_of(path)
    rank = rank_of(part)
    if rank is None:
        yield f"{names(path)}: {part} belongs in a layer of this test and of docs/architecture.md"
        return
    for line, name in everywhere(path):
        target = name.split(".")[1] if name.startswith("evit_deploy.") else "__version__"
        if target == "__version__":
            continue
        target_rank = rank_of(target)
        where = f"{names(path)}:{line}"
        if target_rank is None:
            yield f"{where}: {target} is in no layer"
        elif target_rank > rank:
            yield f"{where}: {part} imports {target}, which stands above it"
        elif {part, target} in STRANGERS:
            yield f"{where}: {part} imports {target}"


def test_imports_go_one_way() -> None:
    assert len(PACKAGE) > 100
    assert [fault for path in PACKAGE for fault in wrong_way(path)] == []


def test_a_wrong_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three faults that `wrong_way` knows, planted."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, text in {
        "onnx": "def f():\n    from evit_deploy.trt import plan\n",
        "errors": "import evit_deploy.bundle\n",
        "nowhere": "",
        "bundle": "import evit_deploy.elsewhere\n",
    }.items():
        path = tmp_path / "evit_deploy" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        assert len(list(wrong_way(path))) == 1, name


def test_kernels_need_torch_and_triton_only() -> None:
    assert len(KERNELS) > 20
    found = [(names(path), *use) for path in KERNELS for use in everywhere(path)]
    assert [use for use in found if use[-1].split(".")[0] not in KERNEL_IMPORTS] == []


def test_some_modules_are_imported_in_one_place() -> None:
    """Typer has its own copy of Click, timm needs a remedy before its import, PyCUDA makes the context it finds."""
    places = {"click": None, "timm": "evit_deploy/models/timm_import.py", "pycuda": "evit_deploy/runners/cuda.py"}
    assert len(TREE) > 200
    for path in TREE:
        for line, name in everywhere(path):
            top = name.split(".")[0]
            if top in places and not (top == "timm" and path.is_relative_to(ROOT / "tests")):
                where = f"{names(path)}:{line}"
                assert names(path) == places[top], f"{where}: {top} is imported in {places[top] or 'no file'}"


def test_nothing_heavy_at_the_top() -> None:
    light = [p for p in PACKAGE if part_of(p) in {"cli", "errors", "constants", "specs", "__init__", "__main__"}]
    assert len(light) > 10
    uses = [(names(path), *use) for path in light for use in imported(parsed(path).body)]
    assert [use for use in uses if use[-1].split(".")[0] in HEAVY] == []
