"""`evit-deploy kernels` and what stands behind it: which kernels models need, and each state a kernel can have.

Real compilations run in child processes, where Triton is a compiler and not an interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from evit_kernels import cache
from evit_kernels.aot import ARCHES, CompiledKernel, KernelRefusedError, kernel_key
from evit_kernels.launch import KernelLaunch

from evit_deploy.errors import EvitDeployError, UsageError
from evit_deploy.kernels import (
    CACHED,
    COMPILED,
    DTYPES,
    FAILED,
    REFUSED,
    NeededKernel,
    compile_kernels,
    compiling,
    list_kernels,
    needed_kernels,
)
from evit_deploy.models.attention_calls import attention_calls
from evit_deploy.specs import ModelSpec
from tests.conftest import process_environment
from tests.in_process import Outcome, cli
from tests.made_up_kernels import TRITON, kernel_of, replace_compiler
from tests.tiers import tiered
from tests.tiny_bundle import TINY_SPEC, write_tiny

if TYPE_CHECKING:
    from conftest import RunCli


def specs(*names: str, image_size: int = 224) -> list[ModelSpec]:
    return [ModelSpec.published(name, image_size=image_size) for name in names]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, empty."""
    monkeypatch.setenv("EVIT_DEPLOY_KERNEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[KernelLaunch, int], CompiledKernel]:
    """A stand-in for Triton in this process: FP32 is refused, and sm_86 does not compile."""

    def compile_kernel(launch: KernelLaunch, arch: int) -> CompiledKernel:
        if launch.dtype == "fp32":
            raise KernelRefusedError(f"{launch.operator} for sm_{arch} in fp32: spills 8 bytes\na thread")
        if arch == 86:
            raise ValueError("ptxas failed with code 255: out of\nluck")
        return kernel_of(launch, arch)

    replace_compiler(monkeypatch, compile_kernel)
    monkeypatch.setattr(cache, "installed_triton", lambda: TRITON)
    monkeypatch.setattr(compiling, "interpreting", lambda: False)
    return compile_kernel


# Which kernels models need

SMALLEST = ("msa-m1", "mit-b0", "msra-m0")


@pytest.mark.parametrize(
    "model", tiered(["msa-m1", "mit-b0", "msra-m0", "msa-m2", "mit-b3", "msra-m1"], SMALLEST.__contains__)
)
def test_the_kernels_of_a_model_are_those_of_its_calls(model: str) -> None:
    needed = needed_kernels(specs(model))
    (spec,) = specs(model)
    calls = [call for dtype in DTYPES.values() for call in attention_calls(spec, dtype)]
    calls += [call for dtype in DTYPES.values() for call in attention_calls(spec, dtype, channels_last=True)]
    for arch in ARCHES:
        keys = [kernel_key(kernel.launch, arch) for kernel in needed]
        assert len(set(keys)) == len(keys), "a kernel stands twice"
        assert set(keys) == {kernel_key(call.launch, arch) for call in calls}
    assert {kernel.model for kernel in needed} == {model}


def test_models_share_kernels() -> None:
    """The first that needs a kernel is the one that is named."""
    alone, both = needed_kernels(specs("mit-b2")), needed_kernels(specs("mit-b2", "mit-b3", "mit-b0"))
    assert both[: len(alone)] == alone
    assert {kernel.model for kernel in both[len(alone) :]} == {"mit-b0"}, "mit-b3 has the heads of mit-b2"


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("msa-m1", ["56x56 8x2", "28x28 8x4", "14x14 8x8", "7x7 8x16", "7x7 8x32"]),
        ("msra-m0", ["14x14 4x16 w7 k5", "7x7 4x32 w7 k5", "4x4 4x48 w4 k5"]),
    ],
)
def test_sizes_are_those_of_the_layers(model: str, sizes: list[str]) -> None:
    needed = needed_kernels(specs(model), ["fp16"])
    assert [kernel.size for kernel in needed if not kernel.channels_last] == sizes


def test_a_size_without_a_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> list[Any]:
        raise ValueError("lite_mla: too large")

    monkeypatch.setattr("evit_deploy.kernels.needed.attention_calls", refuse)
    with pytest.raises(EvitDeployError, match="mit-b0 at 224 px has a layer without a kernel, lite_mla: too large"):
        needed_kernels(specs("mit-b0"))


# States


@pytest.fixture(scope="module")
def needed() -> list[NeededKernel]:
    """Some of each dtype: FP32, FP16, BF16."""
    return needed_kernels(specs("mit-b0"))


@pytest.mark.usefixtures("compiler")
def test_one_kernel_that_cannot_be_had_does_not_keep_the_others_away(folder: Path, needed: list[NeededKernel]) -> None:
    lines: list[str] = []
    rows = compile_kernels(needed, (80, 86, 90), progress=lines.append)
    assert [(row.dtype, row.arch) for row in rows] == [(k.launch.dtype, a) for k in needed for a in (80, 86, 90)]
    for row in rows:
        expected = REFUSED if row.dtype == "fp32" else FAILED if row.arch == 86 else COMPILED
        assert row.state == expected
        assert (row.registers is None) is (expected != COMPILED)
    reasons = {row.reason for row in rows}
    assert "ValueError: ptxas failed with code 255: out of luck" in reasons
    assert "lite_mla for sm_80 in fp32: spills 8 bytes a thread" in reasons
    assert "" in reasons
    assert len(lines) == len(rows)
    assert len(list(folder.iterdir())) == sum(row.state == COMPILED for row in rows)
    again = compile_kernels(needed, (80, 86, 90))
    assert [row.state for row in again] == [CACHED if row.state == COMPILED else row.state for row in rows]
    assert [row.key for row in again] == [row.key for row in rows]


def test_listing_compiles_nothing(folder: Path, needed: list[NeededKernel], compiler: Any) -> None:
    assert {row.state for row in list_kernels(needed, ARCHES)} == {"absent"}
    assert not folder.exists()
    cache.store(compiler(needed[-1].launch, 90))
    states = {(row.dtype, row.arch): row.state for row in list_kernels(needed[-1:], ARCHES)}
    assert [key for key, state in states.items() if state == "cached"] == [(needed[-1].launch.dtype, 90)]


def test_a_full_disk_is_an_error_and_not_a_state(
    folder: Path, needed: list[NeededKernel], compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        compile_kernels(needed, (80,))


def test_the_interpreter_compiles_nothing(needed: list[NeededKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="TRITON_INTERPRET"):
        compile_kernels(needed, (80,))


def test_no_usable_folder_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIT_DEPLOY_KERNEL_CACHE", "relative")
    outcome = cli("kernels", "list", "--model", "mit-b0")
    assert outcome.code == 2
    assert "EVIT_DEPLOY_KERNEL_CACHE must be an absolute path" in outcome.error


# Exit codes


def run(*arguments: str | Path) -> Outcome:
    return cli("kernels", *arguments, "--model", "mit-b0", "--arch", "80,90")


@pytest.mark.usefixtures("folder", "compiler")
@pytest.mark.parametrize("command", [["compile"], ["pack"]], ids=["compile", "pack"])
def test_a_refused_kernel_is_a_limit(command: list[str], tmp_path: Path) -> None:
    output = ["-o", tmp_path / "k.zip"] if command == ["pack"] else []
    outcome = run(*command, *output, "--json")
    assert outcome.code == 5
    document = json.loads(outcome.out)
    refused = [row["state"] for row in document["rows"] if row["dtype"] == "fp32"]
    assert refused == ["refused"] * (len(document["rows"]) // 3)
    assert document["pack"] is None
    assert not (tmp_path / "k.zip").exists()
    (line,) = [line for line in outcome.err.splitlines() if "error:" in line]
    assert f"{len(refused)} of {len(document['rows'])} kernels" in line
    assert "  lite_mla for sm_80 in fp32: spills 8 bytes a thread" in outcome.err.splitlines()


@pytest.mark.usefixtures("folder", "compiler")
def test_a_kernel_that_does_not_compile_is_a_failure() -> None:
    outcome = cli("kernels", "compile", "--model", "mit-b0", "--arch", "86,90", "--dtype", "fp16,bf16")
    assert outcome.code == 1
    assert outcome.out == ""
    assert re.search(r"error: (\d+) of \d+ kernels cannot be compiled: ", outcome.err)
    assert "  lite_mla 14x14 8x16 fp16 sm_86: ValueError: ptxas failed with code 255: out of luck" in outcome.err


@pytest.mark.usefixtures("folder")
def test_without_triton_what_is_not_in_the_cache_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache, "installed_triton", lambda: None)
    monkeypatch.setattr(compiling, "interpreting", lambda: False)
    commands: list[list[str | Path]] = [["compile"], ["pack", "-o", tmp_path / "k.zip"]]
    for command in commands:
        outcome = run(*command)
        assert outcome.code == 4
        assert re.search(r"^(\d+) kernels: \1 absent; cache ", outcome.out, re.M)
        assert "evit-deploy[kernels]" in outcome.error
    assert list(tmp_path.iterdir()) == []
    assert run("list").code == 0


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [("missing.zip", None, "does not exist"), ("text.zip", b"text", "is no kernel pack")],
    ids=["missing", "no-pack"],
)
def test_what_is_no_pack(name: str, data: bytes | None, words: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    outcome = cli("kernels", "unpack", tmp_path / name)
    assert outcome.code == 1
    assert words in outcome.error
    assert outcome.out == ""


def test_no_subcommand_shows_the_help_and_is_a_usage_error() -> None:
    outcome = cli("kernels")
    assert outcome.code == 2
    assert all(f"  {name} " in outcome.out for name in ("list", "compile", "pack", "unpack"))


# The whole way, with the real compiler

MODEL = ("--model", "mit-b0")
MATRIX = [(dtype, arch) for dtype in ("fp16", "bf16") for arch in (80, 87)]


@pytest.fixture(scope="module")
def made(run_cli: RunCli, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, Any]]:
    """A folder, the environment with a cache in it, and the document of the compilation that filled it."""
    pytest.importorskip("triton", reason="Triton is needed to compile kernels")  # published for Linux only
    place = tmp_path_factory.mktemp("kernels")
    env = {"EVIT_DEPLOY_KERNEL_CACHE": str(place / "cache"), "TRITON_CACHE_DIR": str(place / "triton")}
    options = ("--dtype", "fp16,bf16", "--arch", "80,87", "--json")
    done = run_cli("kernels", "compile", *MODEL, *options, cwd=place, env=env)
    assert done.returncode == 0, done.stderr
    return place, env, json.loads(done.stdout)


def test_compiled_kernels_come_in_order_with_all_facts(made: tuple[Path, dict[str, str], dict[str, Any]]) -> None:
    place, _, document = made
    needed = needed_kernels(specs("mit-b0"), ["fp16", "bf16"])
    expected = [kernel_key(kernel.launch, arch) for kernel in needed for arch in (80, 87)]
    assert [row["key"] for row in document["rows"]] == expected
    assert {(row["dtype"], row["arch"]) for row in document["rows"]} == set(MATRIX)
    for row in document["rows"]:
        assert row["state"] == "compiled"
        assert row["spill_bytes"] == 0
        assert 0 < row["registers"] <= 255
        assert row["target"] == {80: "sm_80", 87: "sm_87", 120: "sm_120a"}[row["arch"]]
    assert {path.name for path in (place / "cache").iterdir()} == {f"{key}.json" for key in expected}


@pytest.mark.exhaustive
def test_from_the_compiler_to_a_machine_without_triton(
    made: tuple[Path, dict[str, str], dict[str, Any]], run_cli: RunCli, subtests: pytest.Subtests
) -> None:
    place, env, document = made
    chosen = (*MODEL, "--arch", "87", "--dtype", "fp16")
    keys = [row["key"] for row in document["rows"] if (row["arch"], row["dtype"]) == (87, "fp16")]
    with subtests.test("pack, which compiles what is damaged and nothing else"):
        damaged = place / "cache" / f"{keys[0]}.json"
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-100])
        done = run_cli("kernels", "pack", *chosen, "--json", cwd=place, env=env)
        assert done.returncode == 0, done.stderr
        states = {row["key"]: row["state"] for row in json.loads(done.stdout)["rows"]}
        assert states == {key: "compiled" if key == keys[0] else "cached" for key in keys}
        assert damaged.read_bytes() == whole, "the same source gives the same PTX"
        assert json.loads(done.stdout)["pack"]["kernels"] == len(keys)
    without = {**env, "EVIT_DEPLOY_KERNEL_CACHE": str(place / "other cache")}
    with subtests.test("without Triton: unpack"):
        done = without_triton("unpack", "evit-kernels.zip", "--json", cwd=place, env=without)
        assert done.returncode == 0, done.stderr
        unpacked = json.loads(done.stdout)
        assert {row["key"] for row in unpacked["rows"]} == set(keys)
        assert unpacked["triton"] is None
    with subtests.test("without Triton: nothing is missing"):
        done = without_triton("compile", *chosen, "--json", cwd=place, env=without)
        assert done.returncode == 0, done.stderr
        assert {row["key"]: row["state"] for row in json.loads(done.stdout)["rows"]} == dict.fromkeys(keys, "cached")
    with subtests.test("nothing else was written"):
        assert {path.name for path in place.iterdir()} == {"cache", "other cache", "triton", "evit-kernels.zip"}


def without_triton(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`evit-deploy kernels` where `import triton` fails as that of an absent package does."""
    code = "import sys; sys.modules['triton'] = None; from evit_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "kernels", *arguments]
    return subprocess.run(command, cwd=cwd, env=process_environment(env), capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("folder")
def test_a_bundle_s_kernels_are_those_of_its_model(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny.evit")
    outcome = cli("kernels", "list", bundle.path, "--arch", "sm_90", "--dtype", "fp32", "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["rows"]
    calls = attention_calls(TINY_SPEC, torch.float32)
    assert [row["key"] for row in rows] == list(dict.fromkeys(kernel_key(call.launch, 90) for call in calls))
    assert {(row["model"], row["image_size"]) for row in rows} == {("msa-custom", 32)}


@pytest.mark.usefixtures("folder")
def test_a_damaged_bundle_is_an_error(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny.evit")
    bundle.onnx_path.write_bytes(b"")
    outcome = cli("kernels", "list", bundle.path)
    assert outcome.code == 1
    assert "model.onnx" in outcome.error


@pytest.mark.usefixtures("folder")
def test_the_image_size_is_that_of_the_models() -> None:
    outcome = cli("kernels", "list", "--model", "msa-m1", "--image-size", "64", "--dtype", "fp16", "--json")
    rows = json.loads(outcome.out)["rows"]
    assert {row["image_size"] for row in rows} == {64}
    assert rows[0]["size"] == "16x16 8x2"
