"""What this machine can and cannot do with evit-deploy: one row per part, what its lack costs, how to get it.

Installed is not the same as working, so every package that is there is also imported, in a process of its own: a
library that crashes the interpreter is a row, not the end of the report.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import evit_deploy
from evit_deploy.environment import (
    RTX_LIBRARIES,
    collect_environment,
    driver_version,
    find_gpus,
    first_version,
    python_command,
)

DOCTOR_SCHEMA = "evit-deploy/doctor"
DOCTOR_SCHEMA_VERSION = 1

OK, WARNING, MISSING = "ok", "warning", "missing"

COMFORTABLE_MEMORY_BYTES = 3 * 1024**3  # export and verify of the largest M3 stay below this
MIN_PYTHON = (3, 10)
_IMPORT_TIMEOUT_S = 180  # the first import of torch from a cold network disk takes a minute

# What a torchvision built for another torch says when it is imported; the models' own code never calls its operators.
TORCHVISION_TRAP = "torchvision::nms does not exist"


@dataclass(frozen=True)
class Part:
    """One package: why it is there, and what happens without it.

    Attributes:
        requirement: the version specifier of the project's own dependencies, "" for any version.
        required: without it the main job (export, verify, bench) does not work.
        install: the argument of pip install.
    """

    name: str
    requirement: str
    required: bool
    needed_for: str
    without_it: str
    install: str


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Attributes:
        found: what is there: a version, a device, a quantity; None when there is nothing.
        status: "ok", "warning" (works, with the loss that `without_it` names) or "missing".
        required: a missing part stops the main job.
        without_it: what the lack or the warning costs; "" when all is well.
        how_to_get: what to do; "" when all is well.
    """

    name: str
    found: str | None
    needed_for: str
    status: str
    required: bool
    without_it: str = ""
    how_to_get: str = ""


RTX, PYCUDA, CUDA_BINDINGS = "tensorrt_rtx", "pycuda", "cuda.bindings"

PARTS: tuple[Part, ...] = (
    Part("torch", ">=2.8", True, "checkpoints, the reference, export", "nothing works", "'torch>=2.8'"),
    Part("timm", ">=1.0.20", True, "families mit and msra", "only family msa works", "'timm>=1.0.20'"),
    Part("torchvision", "", False, "timm imports it", "timm cannot be imported: only family msa works", "torchvision"),
    Part(
        "safetensors",
        ">=0.4.3",
        True,
        "the weights in a bundle",
        "no bundle is read or written",
        "'safetensors>=0.4.3'",
    ),
    Part("onnx", ">=1.19", True, "export, inspect", "no export", "'onnx>=1.19'"),
    Part("onnxscript", ">=0.5", True, "PyTorch's ONNX exporter", "no export", "'onnxscript>=0.5'"),
    Part("onnxsim", ">=0.4.36", True, "simplifying the exported graph", "no export", "'onnxsim>=0.4.36'"),
    Part(
        "onnxruntime", ">=1.23", True, "verify and bench", "a bundle cannot be verified or run", "'onnxruntime>=1.23'"
    ),
    Part(
        "openvino",
        ">=2025.0",
        False,
        "backends openvino, openvino-bf16 and openvino-mixed",
        "bundles run in ONNX Runtime, and in BF16 nowhere on the CPU",
        "'openvino>=2025.0'",
    ),
    Part(
        "triton",
        ">=3.6",
        False,
        "kernels compile",
        "no kernel is compiled here; kernels unpack takes them from a pack",
        "'triton>=3.6'",
    ),
    Part(
        "tensorrt",
        ">=10.16",
        False,
        "engines for data-centre GPUs and workstations",
        "no engine of flavor tensorrt is built or run here",
        "tensorrt-cu13==11.4.0.106",
    ),
    Part(
        RTX,
        "",
        False,
        "engines for RTX GPUs, built on any machine",
        "no engine of flavor rtx is built or run here",
        "tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116",
    ),
    Part(PYCUDA, ">=2024.1", False, "running engines", "engines are built and not run here", "pycuda"),
    Part(
        CUDA_BINDINGS,
        "",
        False,
        "CUDA graphs of engines",
        "engines run without CUDA graphs",
        "cuda-bindings",
    ),
)


def run_checks(*, try_imports: bool = True) -> list[Check]:
    """Look at Python, the CPU, memory, GPUs and every package.

    Args:
        try_imports: also import each installed package in a process of its own, which takes seconds; otherwise an
            installed package counts as working.
    """
    environment = collect_environment()
    versions: dict[str, str | None] = environment["versions"]
    installed = [part.name for part in PARTS if versions[part.name] is not None]
    failures = import_failures(installed) if try_imports else {}
    parts = {part.name: check_part(part, versions[part.name], failures.get(part.name)) for part in PARTS}
    parts[RTX] = check_rtx_libraries(parts[RTX], first_version(RTX_LIBRARIES))
    gpu = _check_gpu()
    return [
        _check_python(environment["python"]),
        _check_cpu(environment["cpu"]),
        _check_memory(environment["memory_bytes"]),
        gpu,
        _check_driver(driver_version()),
        *parts.values(),
        check_building(parts, gpu),
        check_running(parts, gpu),
    ]


def doctor_report(*, try_imports: bool = True) -> dict[str, Any]:
    """The checks as one JSON document; its verdict is "ok" unless a required part is missing."""
    rows = run_checks(try_imports=try_imports)
    return {
        "schema": DOCTOR_SCHEMA,
        "schema_version": DOCTOR_SCHEMA_VERSION,
        "verdict": MISSING if missing_required(rows) else OK,
        "rows": [asdict(row) for row in rows],
        "environment": collect_environment(),
    }


def missing_required(rows: Iterable[Check]) -> list[str]:
    """Names of the parts without which the main job does not work."""
    return [row.name for row in rows if row.required and row.status == MISSING]


def check_part(part: Part, version: str | None, failure: str | None) -> Check:
    """The row of one package.

    Args:
        version: what is installed, None for nothing.
        failure: the first line of what its import raised, None when it works or was not tried.
    """
    install = f"{python_command()} {part.install}"
    if version is None:
        return Check(part.name, None, part.needed_for, MISSING, part.required, part.without_it, install)
    if failure is not None and TORCHVISION_TRAP in failure:
        return Check(
            part.name,
            f"{version}, built for another torch",
            part.needed_for,
            WARNING,
            part.required,
            "its operators cannot be used; the models never call them, and are loaded without them",
            "install torch and torchvision from the same index, in one command",
        )
    if failure is not None:
        found = f"{version}, cannot be imported: {failure}"
        return Check(part.name, found, part.needed_for, MISSING, part.required, part.without_it, _mend(part, install))
    if part.requirement and _release(version) < _release(part.requirement.removeprefix(">=")):
        found = f"{version}, and {part.requirement} is needed"
        return Check(part.name, found, part.needed_for, WARNING, part.required, "untried with this version", install)
    return Check(part.name, version, part.needed_for, OK, part.required)


def check_rtx_libraries(row: Check, libraries: str | None) -> Check:
    """The row of TensorRT for RTX, whose bindings and libraries are two packages.

    Args:
        row: of the bindings.
        libraries: version of the libraries, None for nothing.
    """
    if row.found is None or row.status == MISSING:
        return row
    if libraries is None:
        found = f"{row.found}, libraries from elsewhere"
        return replace(row, found=found, status=WARNING, without_it="untried with other libraries than its own")
    if _release(libraries) != _release(row.found):
        found = f"{row.found}, and libraries {libraries}"
        return replace(row, found=found, status=WARNING, without_it="untried with libraries of another version")
    return row


def check_building(parts: Mapping[str, Check], gpu: Check) -> Check:
    """Which engines can be built here.

    Args:
        parts: rows of the packages by name.
        gpu: the GPU's row.
    """
    flavors = []
    if parts["tensorrt"].status != MISSING and gpu.found is not None:
        flavors.append("flavor tensorrt, for the GPU here")
    if parts[RTX].status != MISSING:
        flavors.append("flavor rtx, for any RTX GPU")
    if flavors:
        return Check("builds engines", "; ".join(flavors), "build-trt", OK, False)
    cost = "no engine is built here"
    if parts["tensorrt"].status != MISSING:
        cost = "no engine is built here: flavor tensorrt needs a GPU, and flavor rtx is not installed"
    return Check("builds engines", None, "build-trt", MISSING, False, cost, parts[RTX].how_to_get)


def check_running(parts: Mapping[str, Check], gpu: Check) -> Check:
    """Which engines can be run here, as far as installed packages tell; see `check_building`."""
    needed_for = "verify --engine, bench --backend tensorrt"
    flavors = [name for name, part in (("tensorrt", "tensorrt"), ("rtx", RTX)) if parts[part].status != MISSING]
    lacks = []
    if gpu.found is None:
        lacks.append("no GPU")
    if not flavors:
        lacks.append("no TensorRT")
    if parts[PYCUDA].status == MISSING:
        lacks.append("no PyCUDA" if parts[PYCUDA].found is None else "PyCUDA cannot be imported")
    if lacks:
        cost = f"engines are built, not run: {', '.join(lacks)}"
        return Check("runs engines", None, needed_for, MISSING, False, cost, "see the rows above")
    found = f"flavor {' and '.join(flavors)}; never tried on a GPU by this version"
    if parts[CUDA_BINDINGS].status == MISSING:
        hint = parts[CUDA_BINDINGS].how_to_get
        return Check("runs engines", found, needed_for, WARNING, False, "without CUDA graphs", hint)
    return Check("runs engines", found, needed_for, OK, False)


def import_failures(names: Iterable[str]) -> dict[str, str]:
    """Import packages in another process, and tell of those that fail: name to the first line of the reason."""
    waiting = list(names)
    failures: dict[str, str] = {}
    while waiting:
        answers, end = _try_imports(waiting)
        failures.update({name: reason for name, reason in answers.items() if reason is not None})
        waiting = [name for name in waiting if name not in answers]
        if waiting:  # the process ended early: the first that did not answer ended it
            failures[waiting.pop(0)] = end
    return failures


# Answers go to a copy of stdout; what a package prints while it is imported goes to stderr.
_TRY_IMPORTS = """
import importlib, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for name in sys.argv[1:]:
    try:
        if name == "timm":
            from evit_deploy.models.timm_import import import_timm
            import_timm()
        elif name == "tensorrt_rtx":
            importlib.import_module("tensorrt_rtx_bindings")
        elif name == "pycuda":
            importlib.import_module("pycuda.driver")
        elif name == "cuda.bindings":
            importlib.import_module("cuda.bindings.runtime")
        else:
            importlib.import_module(name)
        reason = None
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
    print(json.dumps([name, reason]), file=answers, flush=True)
os._exit(0)
"""


def _try_imports(names: list[str]) -> tuple[dict[str, str | None], str]:
    package_root = str(Path(evit_deploy.__file__).resolve().parent.parent)
    path = os.pathsep.join([package_root, *(entry for entry in sys.path if entry)])
    command = [sys.executable, "-c", _TRY_IMPORTS, *names]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_IMPORT_TIMEOUT_S,
            check=False,
            cwd=package_root,  # not the user's folder, where a file may have a package's name
            env={**os.environ, "PYTHONPATH": path},
        )
        output, end = done.stdout, f"its import ends the process with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"its import takes longer than {_IMPORT_TIMEOUT_S} s"
    return dict(json.loads(line) for line in output.decode().splitlines()), end


def _mend(part: Part, install: str) -> str:
    if part.name == PYCUDA and not find_gpus():
        return "an NVIDIA GPU and its driver; pycuda itself is installed"
    return f"mend that import, or {install} --force-reinstall"


def _check_python(version: str) -> Check:
    needed = ".".join(map(str, MIN_PYTHON))
    if _release(version) >= MIN_PYTHON:
        return Check("python", version, "everything", OK, True)
    return Check("python", version, "everything", MISSING, True, "nothing works", f"Python {needed} or later")


def _check_cpu(cpu: Mapping[str, Any]) -> Check:
    flags = [name for name, there in cpu["isa"].items() if there]
    found = (
        f"{cpu['model']}, {cpu['usable_cores']} of {cpu['logical_cores']} cores, {' '.join(flags) or 'no vector flags'}"
    )
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if is_x86 and not cpu["isa"]["avx2"]:
        cost = "without AVX2 the runtimes fall back to slow kernels"
        return Check("cpu", found, "the reference, verify, bench", WARNING, True, cost, "another machine")
    return Check("cpu", found, "the reference, verify, bench", OK, True)


def _check_memory(memory_bytes: int | None) -> Check:
    if memory_bytes is None:
        return Check("memory", None, "export and verify", WARNING, True, "its size is unknown here", "")
    found = f"{memory_bytes / 1024**3:.1f} GiB"
    if memory_bytes >= COMFORTABLE_MEMORY_BYTES:
        return Check("memory", found, "export and verify", OK, True)
    cost = "large models may not fit while they are exported and verified"
    return Check("memory", found, "export and verify", WARNING, True, cost, "3 GiB or more, or a smaller model")


def _check_driver(version: str | None) -> Check:
    needed_for = "everything on a GPU"
    if version is not None:
        return Check("driver", version, needed_for, OK, False)
    cost = "no GPU can be used"
    return Check("driver", None, needed_for, MISSING, False, cost, "NVIDIA's driver, 580 or later for CUDA 13")


def _check_gpu() -> Check:
    needed_for = "running engines and kernels"
    gpus = find_gpus()
    if not gpus:
        cost = "engines are built and not run; export, verify and bench run on the CPU"
        return Check("gpu", None, needed_for, MISSING, False, cost, "an NVIDIA GPU with its driver (nvidia-smi works)")
    described = (
        ", ".join(
            text
            for text in (
                gpu.name,
                f"{gpu.memory_bytes / 1024**3:.0f} GiB" if gpu.memory_bytes else None,
                f"compute capability {gpu.compute_capability}" if gpu.compute_capability else None,
                f"driver {gpu.driver_version}" if gpu.driver_version else None,
            )
            if text
        )
        for gpu in gpus
    )
    return Check("gpu", "; ".join(described), needed_for, OK, False)


def _release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) for "2.13.0+cpu"."""
    numbers = []
    for piece in version.split("+")[0].split("."):
        digits = piece[: len(piece) - len(piece.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != piece:
            break
    return tuple(numbers)
