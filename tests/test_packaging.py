"""The wheel holds the two packages, their data, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import evit_deploy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("evit_deploy", "kernels", "pyproject.toml", "README.md", "LICENSE", "cli.py", "tests", "benchmarks")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that neither old build output gets in nor new one stays."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif origin.exists():
            shutil.copy(origin, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        target,
        source,
        cwd=target,
    )
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", target, wheel, cwd=target)
    return target


def test_only_the_two_packages_are_installed(installed: Path) -> None:
    found = {path.name for path in installed.iterdir() if path.name not in ("bin", "__pycache__")}
    dist_info = f"evit_deploy-{evit_deploy.__version__}.dist-info"
    assert found == {"evit_deploy", "evit_kernels", dist_info}


def test_every_module_and_data_file_is_in_the_wheel(wheel: Path, source: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for base, package in ((source, "evit_deploy"), (source / "kernels", "evit_kernels")):
        for path in (base / package).rglob("*"):
            shipped = path.name in ("py.typed", "published.zip") or path.suffix == ".py" or path.parent.name == "data"
            if path.is_file() and shipped:
                expected.add(path.relative_to(base).as_posix())
    assert "evit_deploy/data/model_costs.json" in expected
    assert packed == expected


def test_the_license_is_in_the_wheel(wheel: Path) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_installed_package_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); import evit_deploy; print(evit_deploy.__file__)"
    assert run(sys.executable, "-I", "-c", code, cwd=tmp_path).startswith(str(installed))


def test_the_console_script_is_the_cli(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        text = archive.read(entry).decode()
    assert "evit-deploy = evit_deploy.cli:main" in text


def test_the_verb_bench_is_no_module(child_environment: dict[str, str]) -> None:
    """The subpackage `evit_deploy.bench` must not hide the function, in either order of import."""
    package, verb = "from evit_deploy.bench import report", "import evit_deploy; assert callable(evit_deploy.bench)"
    for order in ((package, verb), (verb, package, verb)):
        run(sys.executable, "-c", "\n".join(order), cwd=ROOT, env=child_environment)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import evit_deploy, sys; print(sorted({'torch', 'numpy', 'onnx', 'timm', 'typer'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="exprot"):
        _ = evit_deploy.exprot
    assert set(evit_deploy.__all__) <= set(dir(evit_deploy))


@pytest.fixture(scope="module")
def requirements() -> dict[str, str]:
    """Name to specifier of every direct dependency, the development tools among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    return {re.split(r"[<>=!~ ]", line, maxsplit=1)[0]: line for line in lines}


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))
    return dict(pins)  # type: ignore[arg-type]


def test_every_direct_dependency_is_pinned_within_its_range(
    requirements: dict[str, str], constraints: dict[str, str]
) -> None:
    from packaging.requirements import Requirement

    for name, line in requirements.items():
        assert name in constraints, f"constraints.txt does not pin {name}"
        assert Requirement(line).specifier.contains(constraints[name]), f"{line} excludes {constraints[name]}"
