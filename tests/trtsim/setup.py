"""`python tests/trtsim/setup.py`: TensorRT's Python bindings without TensorRT, for the contract tests.

For each version of VERSIONS, a folder in the virtual environment: the bindings' wheel from PyPI, unpacked; stub
libraries in place of TensorRT's; and the few lines of the package `tensorrt`. Needs pip and a C compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("10.16.1.11", "11.4.0.106")
FOLDER = Path(sys.prefix) / "tensorrt-bindings"
COMMAND = ".venv/bin/python tests/trtsim/setup.py"

_STUBS = Path(__file__).with_name("stubs.c")
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")  # the first has every symbol
_FRONT_END = {
    "tensorrt/__init__.py": """\
import ctypes
from pathlib import Path

for library in sorted((Path(__file__).parent.parent / "lib").iterdir()):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

from tensorrt_bindings import *
from tensorrt_bindings import __version__
""",
    "tensorrt/plugin/__init__.py": "from tensorrt_bindings.plugin import *\n",
}


def bindings_folder(version: str) -> Path:
    """What goes on PYTHONPATH for a version of VERSIONS.

    Raises:
        FileNotFoundError: it was not set up; the message has the command.
    """
    folder = FOLDER / version
    if not _is_complete(folder):
        raise FileNotFoundError(f"the bindings of TensorRT {version} are not set up in {folder}: run {COMMAND}")
    return folder


def library_paths(version: str) -> list[Path]:
    """The stub libraries; the first has the hooks."""
    return [bindings_folder(version) / "lib" / _library(name, version) for name in _LIBRARIES]


def main() -> None:
    missing = [version for version in VERSIONS if not _is_complete(FOLDER / version)]
    if missing and shutil.which(_compiler()) is None:
        sys.exit(f"no C compiler {_compiler()!r} for TensorRT's stub libraries: install gcc, or name one in CC")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for version in missing:
        _install(version)


def _install(version: str) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".new-") as staging:
        folder = Path(staging, version)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command.append("--disable-pip-version-check")
        _run([*command, "--dest", staging, f"tensorrt-cu13-bindings=={version}"])
        (wheel,) = Path(staging).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        for name, text in _FRONT_END.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        _compile_stubs(folder / "lib", version)
        (folder / "stamp").write_text(_stamp(version), encoding="utf-8")
        shutil.rmtree(FOLDER / version, ignore_errors=True)
        folder.rename(FOLDER / version)


def _compile_stubs(folder: Path, version: str) -> None:
    folder.mkdir()
    for library in _LIBRARIES:
        name = _library(library, version)
        source = _STUBS if library == _LIBRARIES[0] else Path(os.devnull)
        command = [_compiler(), "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        _run([*command, "-x", "c", str(source)])


def _run(command: list[str]) -> None:
    """Run a program; where it fails, end with one line of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "nothing")
        name = "pip" if "pip" in command else command[0]
        sys.exit(
            f"{name} ended with code {done.returncode}: {said}: see to it (network, disk, compiler) and run it again"
        )


def _compiler() -> str:
    return os.environ.get("CC", "cc")


def _library(name: str, version: str) -> str:
    return f"lib{name}.so.{version.partition('.')[0]}"


def _stamp(version: str) -> str:
    """Changes with everything that a folder is made from."""
    parts = (version, _STUBS.read_text(encoding="utf-8"), repr(sorted(_FRONT_END.items())), sys.version.split()[0])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _is_complete(folder: Path) -> bool:
    stamp = folder / "stamp"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == _stamp(folder.name)


if __name__ == "__main__":
    main()
