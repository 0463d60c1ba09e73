"""A machine with a data-centre GPU and TensorRT, as far as programs can tell that only build engines.

An `nvidia-smi` answers, `import tensorrt` gives the real bindings over a new simulation, and package metadata name it.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.conftest import process_environment
from tests.trtsim.setup import bindings_folder

GPU = "Simulated H100"
ARCH = 90

_FRONT_END = """\
import os

from tests.trtsim import core

core.start(os.environ["SIMULATED_TENSORRT"])

from tensorrt_bindings import *
from tensorrt_bindings import __version__
"""
_NVIDIA_SMI = f"""\
#!/bin/sh
echo "{GPU}, 580.65.06, 81559, {ARCH / 10}"
"""


def simulated_machine(folder: Path, version: str, kernel_cache: Path) -> dict[str, str]:
    """The environment of processes on that machine.

    Args:
        folder: empty.
        version: of TensorRT, one of `setup.VERSIONS`.
        kernel_cache: folder of compiled kernels.
    """
    site, programs = folder / "site", folder / "bin"
    _write(site / "tensorrt/__init__.py", _FRONT_END)
    _write(site / "tensorrt/plugin/__init__.py", "from tensorrt_bindings.plugin import *\n")
    metadata = f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {version}\n"
    _write(site / f"tensorrt-{version}.dist-info/METADATA", metadata)
    _write(programs / "nvidia-smi", _NVIDIA_SMI)
    (programs / "nvidia-smi").chmod(0o755)
    environment = process_environment(
        {
            "SIMULATED_TENSORRT": version,
            "EVIT_DEPLOY_KERNEL_CACHE": str(kernel_cache),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
    )
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(site), str(bindings_folder(version)), environment["PYTHONPATH"]])
    environment["PATH"] = os.pathsep.join([str(programs), environment["PATH"]])
    return environment


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
