from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import evit_deploy
from evit_deploy import environment
from evit_deploy.environment import (
    Gpu,
    collect_environment,
    cpu_flags,
    cpu_model,
    find_gpus,
    package_version,
    package_versions,
    tool_version,
)

X86 = """processor\t: 0
model name\t: AMD EPYC 9B45
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 avx512_vnni

processor\t: 1
flags\t\t: fpu
"""
ARM = """processor\t: 0
Features\t: fp asimd asimdhp asimddp bf16
"""


@pytest.fixture(autouse=True)
def _fresh_gpus() -> Iterator[None]:
    find_gpus.cache_clear()
    yield
    find_gpus.cache_clear()


def fake_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_environment_is_json_with_the_facts_that_explain_a_measurement() -> None:
    facts = json.loads(json.dumps(collect_environment()))
    assert facts["evit_deploy"] == tool_version() == evit_deploy.__version__
    assert facts["python"].split(".")[0] == "3"
    assert 1 <= facts["cpu"]["usable_cores"] <= facts["cpu"]["logical_cores"] == os.cpu_count()
    assert facts["cpu"]["model"]
    assert facts["memory_bytes"] > 0
    assert facts["versions"]["torch"] == metadata.version("torch")


def test_nothing_is_imported() -> None:
    code = (
        "import sys; from evit_deploy.environment import collect_environment; collect_environment();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'onnxruntime', 'timm', 'numpy')))"
    )
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    done = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0


def test_versions_of_everything_asked_for() -> None:
    versions = package_versions()
    expected = {"torch", "onnx", "onnxruntime", "onnxsim", "timm", "onnxscript", "tensorrt", "tensorrt_rtx", "pycuda"}
    assert expected | {"triton", "openvino"} <= set(versions)
    assert package_version("no_such_package") is None


def test_version_under_another_distribution_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environment.DISTRIBUTIONS, "made_up", ("not-there", "pytest"))
    assert package_version("made_up") == pytest.__version__


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (X86, {"avx2", "avx512", "vnni", "bf16"}),
        (ARM, {"vnni", "bf16", "fp16"}),
        ("flags\t\t: fpu sse2 avx2", {"avx2"}),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512bw", {"avx2", "avx512"}),
        ("flags\t\t: fpu sse2 avx2 avx_vnni", {"avx2", "vnni"}),
        ("flags\t\t: fpu avx2 avx512f avx512_fp16 amx_tile", {"avx2", "avx512", "fp16", "amx"}),
        ("Features\t: fp asimd", set()),
        ("", set()),
    ],
    ids=["x86", "arm64", "haswell", "skylake", "alder-lake", "without-bf16", "old-arm64", "unknown"],
)
def test_cpu_flags(cpuinfo: str, expected: set[str]) -> None:
    assert {name for name, there in cpu_flags(cpuinfo).items() if there} == expected


def test_cpu_model() -> None:
    assert cpu_model(X86) == "AMD EPYC 9B45"
    assert cpu_model("")


def test_gpus_through_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, "echo 'NVIDIA H200, 580.65.06, 143771, 9.0'; echo 'NVIDIA T4, 580.65.06, [N/A], 7.5'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert find_gpus() == (
        Gpu("NVIDIA H200", "580.65.06", 143771 * 1024**2, "9.0"),
        Gpu("NVIDIA T4", "580.65.06", None, "7.5"),
    )


@pytest.mark.parametrize("script", ["echo 'no devices were found'; exit 6", "echo garbage", "exit 0"])
def test_nvidia_smi_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    fake_smi(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert environment._gpus_from_smi() == ()


@pytest.mark.parametrize("end", ["exit 1", "exit 9", "kill -9 $$"])
def test_the_rows_of_an_nvidia_smi_that_failed_are_no_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    row = "echo 'NVIDIA H200, 580.65.06, 143771, 9.0'"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake_smi(tmp_path, row)
    assert len(environment._gpus_from_smi()) == 1
    fake_smi(tmp_path, f"{row}; {end}")
    assert environment._gpus_from_smi() == ()


def test_gpus_through_proc(tmp_path: Path) -> None:
    folder = tmp_path / "0000:01:00.0"
    folder.mkdir()
    (folder / "information").write_text("Model: \t\t NVIDIA L4\nIRQ:   \t\t 16\n")
    assert environment._gpus_from_proc(tmp_path) == (Gpu("NVIDIA L4", None, None, None),)
    assert environment._gpus_from_proc(tmp_path / "nothing") == ()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC", "535.183.01"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (buildmeister)\n",
            "580.65.06",
        ),
        ("NVRM version: NVIDIA UNIX Kernel Module for aarch64  540.4.0  Release Build", "540.4.0"),
        ("", None),
        ("GCC version:  gcc version 13.2.0", None),
    ],
)
def test_driver_version_in_proc(text: str, version: str | None) -> None:
    assert environment.driver_in(text) == version
