"""Kernels compiled ahead of time, in a process that has no interpreter: the real ones, and faults that are refused.

A representative part of what `make kernels` compiles: each operator's largest tiles for every kind of architecture.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from evit_kernels import aot
from evit_kernels.aot import ARCHES, alike, compile_kernel, kernel_key, least, older
from evit_kernels.launch import MAX_SHARED_BYTES
from evit_kernels.ptx import MAX_REGISTERS, entry_parameters

from tests.kernel_compiler import FAST, LARGEST, PLANTED, REST, TARGETS, compile_in_child, largest, planted, tier_of
from tests.tiers import tiered

pytest.importorskip("triton", reason="Triton is needed to compile kernels")  # published for Linux only

ROOT = Path(__file__).resolve().parent.parent
REAL = [f"{operator}-{dtype}-{arch}" for operator in LARGEST for dtype, arch in TARGETS]
REAL += ["lite_mla-channels-last-fp16-86", "cascaded_attention-channels-last-fp16-86"]
TARGET_NAMES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}


SHARED_PTX = [(operator, dtype) for operator in LARGEST for dtype in ("fp16", "fp32")]
SHARED_PTX_SCRIPT = """
import sys
from evit_kernels import aot
from tests.kernel_compiler import largest
launch = largest(*sys.argv[1:])
ours = aot.compile_ptx(launch, 80).ptx
aot._SAME_PTX_AS.clear()
for arch in (86, 87, 89, 120):
    alone = aot.compile_ptx(launch, arch).ptx
    print(arch, "same" if alone == aot.with_target(ours, f"sm_{arch}") else "other")
"""
REAL_BY_TIER = tiered(REAL, lambda name: tier_of(name) == FAST)


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, dict[str, Any]]]:
    """All results of a tier."""
    return cache(lambda tier: compile_in_child(tmp_path_factory.mktemp("triton"), tier))


@pytest.fixture
def results(
    request: pytest.FixtureRequest, results_of: Callable[[str], dict[str, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Those of the tier that the test is in."""
    return results_of(REST if request.node.get_closest_marker("exhaustive") else FAST)


@pytest.mark.parametrize("tier", tiered((FAST, REST), FAST.__eq__))
def test_every_case_was_compiled_or_refused(tier: str, results: dict[str, dict[str, Any]]) -> None:
    assert results.keys() == {name for name in (*REAL, *PLANTED) if tier_of(name) == tier}


@pytest.mark.parametrize("name", REAL_BY_TIER)
def test_ptxas_takes_a_kernel_within_the_limits(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert "kernel" in results[name], results[name]["message"]
    kernel, launch = results[name]["kernel"], results[name]["launch"]
    assert 0 < kernel["registers"] <= MAX_REGISTERS
    assert kernel["spill_bytes"] == 0
    assert kernel["shared_bytes"] <= MAX_SHARED_BYTES
    assert kernel["threads"] == 32 * launch["num_warps"]
    assert kernel["target"] == TARGET_NAMES[kernel["arch"]]
    assert (kernel["operator"], kernel["dtype"]) == (launch["operator"], launch["dtype"])


@pytest.mark.parametrize("name", [*REAL_BY_TIER, "good"])
def test_the_entry_takes_inputs_extras_and_outputs(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert "kernel" in results[name], results[name]["message"]
    kernel, launch = results[name]["kernel"], results[name]["launch"]
    assert kernel["parameters"] == [*launch["inputs"], *launch["extras"], *launch["outputs"]]
    entry, parameters = entry_parameters(kernel["ptx"])
    assert entry == kernel["entry"] == launch["kernel"].partition(":")[2]
    pointers = [".u64" in parameter and ".ptr" in parameter for parameter in parameters]
    numbers = [".u32" in parameter for parameter in parameters]
    is_extra = [name in launch["extras"] for name in kernel["parameters"]]
    assert numbers == is_extra
    assert pointers == [not extra for extra in is_extra]


@pytest.mark.parametrize("name", [*REAL_BY_TIER, "good"])
def test_the_ptx_says_nothing_of_the_machine_it_was_made_on(name: str, results: dict[str, dict[str, Any]]) -> None:
    """Line information would: paths of sources, so that the same key had another PTX elsewhere."""
    ptx = results[name]["kernel"]["ptx"]
    assert str(ROOT) not in ptx
    assert sys.prefix not in ptx
    assert ".file" not in ptx


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spills", "planted for sm_80 in fp16: spills"),
        ("much-shared-memory", f"of shared memory, allowed {MAX_SHARED_BYTES}"),
        ("scratch", "planted for sm_90: scratch_kernel: the kernel uses its scratch memory"),
        ("reordered", "p_out, n_rows, p_x"),
    ],
)
def test_a_planted_fault_is_refused(name: str, words: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[name].get("error") == "KernelRefusedError", results[name]
    assert words in results[name]["message"]


def test_a_kernel_that_does_not_compile_is_an_error(results: dict[str, dict[str, Any]]) -> None:
    assert results["broken"]["error"] == "CompilationError"


def test_without_the_fault_it_is_not_refused(results: dict[str, dict[str, Any]]) -> None:
    assert results["good"]["kernel"]["spill_bytes"] == 0


def test_an_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="unknown architecture 75, known: 80, 86"):
        compile_kernel(planted("good_kernel", 128), 75)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("operator", "dtype"), SHARED_PTX)
def test_architectures_that_share_ptx_are_those_that_triton_compiles_alike(
    operator: str, dtype: str, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """Our PTX for sm_86, sm_87 and sm_89 is that for sm_80 under another name; here Triton compiles each by itself."""
    command = [sys.executable, "-c", SHARED_PTX_SCRIPT, operator, dtype]
    environment = {**child_environment, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["86", "same", "87", "same", "89", "same", "120", "other"]


def test_what_runs_on_what() -> None:
    assert alike(ARCHES) == [(80, 86, 87, 89), (90,), (100,), (120,)]
    assert [older(arch) for arch in (80, 89, 90, 120)] == [(), (87, 86, 80), (89, 87, 86, 80), (89, 87, 86, 80)]
    assert [least(arches) for arches in ((80, 86, 89, 120), (89,), (120, 86), (120,), (90, 100))] == [
        (80,),
        (80,),
        (80,),
        (120,),
        (90, 100),
    ]


# Keys


def test_a_key_depends_on_what_the_ptx_depends_on() -> None:
    launch = planted("good_kernel", 128)
    variants = [
        launch,
        replace(launch, kernel="tests.planted_kernels:reordered_kernel"),
        replace(launch, kernel="evit_kernels.lite_mla.triton_fwd:good_kernel"),
        replace(launch, inputs=("p_y",)),
        replace(launch, constants={"SIZE": 64}),
        replace(launch, constants={"SIZE": "128"}),
        replace(launch, dtype="fp32"),
        replace(launch, num_warps=8),
        replace(launch, num_stages=2),
    ]
    keys = {kernel_key(variant, arch) for variant in variants for arch in ARCHES}
    assert len(keys) == len(variants) * len(ARCHES)


def test_a_key_does_not_depend_on_what_is_passed_at_run_time() -> None:
    launch = planted("good_kernel", 128)
    assert kernel_key(replace(launch, extras={"n_rows": 5}, programs_per_image=9), 80) == kernel_key(launch, 80)
    assert kernel_key(replace(launch, constants=dict(launch.constants)), 80) == kernel_key(launch, 80)


def test_a_changed_source_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels_of_a_test.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    launch = replace(planted("good_kernel", 128), kernel="kernels_of_a_test:good_kernel")
    keys = []
    for text in ("SCALE = 2\n", "SCALE = 3\n", "SCALE = 2\n"):
        source.write_text(text)
        aot._source_hash.cache_clear()
        aot._siblings.cache_clear()
        keys.append(kernel_key(launch, 80))
    assert keys[0] == keys[2] != keys[1]
    assert "kernels_of_a_test" not in sys.modules, "a key needs the source, not the module"


def test_a_change_of_what_a_kernel_imports_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, source_hash = "evit_kernels.multi_scale_attention.triton_tiles", aot._source_hash
    launches = {operator: largest(operator, "fp16") for operator in LARGEST}
    before = {operator: kernel_key(launch, 80) for operator, launch in launches.items()}
    monkeypatch.setattr(aot, "_source_hash", lambda name: "changed" if name == tiles else source_hash(name))
    changed = [operator for operator, launch in launches.items() if kernel_key(launch, 80) != before[operator]]
    assert changed == ["multi_scale_attention", "projected_multi_scale_attention"]


@pytest.mark.parametrize("module", ["evit_kernels.aot", "evit_kernels.ptx"])
def test_a_change_of_how_kernels_are_compiled_changes_the_key(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, source_hash = kernel_key(planted("good_kernel", 128), 80), aot._source_hash
    monkeypatch.setattr(aot, "_source_hash", lambda name: "changed" if name == module else source_hash(name))
    assert kernel_key(planted("good_kernel", 128), 80) != before


def test_a_key_of_a_source_that_is_not_there() -> None:
    with pytest.raises(ImportError, match="no_such_module"):
        kernel_key(replace(planted("good_kernel", 128), kernel="no_such_module:kernel"), 80)
