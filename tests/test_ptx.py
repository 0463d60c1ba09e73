"""Reading and adapting PTX: made-up texts for every refusal, and what Triton really writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from evit_kernels.ptx import (
    MAX_REGISTERS,
    assemble,
    entry_parameters,
    ptx_target,
    strip_scratch_parameters,
    with_all_registers,
    with_target,
)

from tests.conftest import process_environment

POINTER = ".param .u64 .ptr .global .align 1 "
NUMBER = ".param .u32 "
HEAD = ".version 8.7\n.target sm_80\n.address_size 64\n\n\t// .globl\tk\n.visible .entry k("


def ptx_of(*kinds: str, body: str = "") -> str:
    """A module with the entry `k`, whose parameters are of these kinds."""
    parameters = ",\n".join(f"\t{kind}k_param_{i}" for i, kind in enumerate(kinds))
    return f"{HEAD}\n{parameters}\n)\n.reqntid 128\n{{\n\t.reg .b64 %rd<2>;\n{body}\tret;\n}}\n"


def load_of(parameter: int) -> str:
    return f"\tld.param.b64 %rd1, [k_param_{parameter}];\n"


# Parameters


def test_the_parameters_of_an_entry() -> None:
    name, parameters = entry_parameters(ptx_of(POINTER, NUMBER))
    assert name == "k"
    assert parameters == (f"{POINTER}k_param_0", f"{NUMBER}k_param_1")
    assert entry_parameters(".visible .entry f()") == ("f", ())


@pytest.mark.parametrize("text", ["", ".visible .func k()", ptx_of(POINTER) * 2], ids=["empty", "function", "two"])
def test_not_exactly_one_entry(text: str) -> None:
    with pytest.raises(ValueError, match=r"one entry, found [02]"):
        entry_parameters(text)
    with pytest.raises(ValueError, match=r"one entry, found [02]"):
        strip_scratch_parameters(text, 1)


def test_the_target() -> None:
    assert ptx_target(ptx_of(POINTER)) == "sm_80"
    assert ptx_target(".target sm_90a, texmode_independent") == "sm_90a"
    with pytest.raises(ValueError, match="no target"):
        ptx_target("// .target sm_80")


def test_another_target() -> None:
    text = f"// made for sm_80\n{ptx_of(POINTER)}"
    changed = with_target(text, "sm_89")
    assert changed == text.replace(".target sm_80", ".target sm_89")
    assert changed.startswith("// made for sm_80\n")
    with pytest.raises(ValueError, match="names no target"):
        with_target("// .target sm_80", "sm_89")


# Scratch


@pytest.mark.parametrize("surplus", [0, 1, 2])
def test_exactly_the_surplus_is_removed(surplus: int) -> None:
    kinds = (POINTER, NUMBER, POINTER)
    text = ptx_of(*kinds, *[POINTER] * surplus, body=load_of(0) + load_of(2))
    stripped = strip_scratch_parameters(text, 3)
    assert entry_parameters(stripped) == entry_parameters(ptx_of(*kinds))
    assert stripped.split() == ptx_of(*kinds, body=load_of(0) + load_of(2)).split()
    assert strip_scratch_parameters(stripped, 3) == stripped
    assert stripped.split(")\n.reqntid")[1] == text.split(")\n.reqntid")[1], "the body is as it was"


@pytest.mark.parametrize("used", [2, 3])
def test_scratch_that_is_used_is_refused(used: int) -> None:
    with pytest.raises(ValueError, match=rf"k: the kernel uses its scratch memory \(k_param_{used}\)"):
        strip_scratch_parameters(ptx_of(POINTER, POINTER, POINTER, POINTER, body=load_of(used)), 2)


def test_a_parameter_whose_name_begins_alike_is_another() -> None:
    text = ptx_of(*[POINTER] * 12, body=load_of(1))
    assert len(entry_parameters(strip_scratch_parameters(text, 10))[1]) == 10  # k_param_10 and k_param_11 are unused
    text = ptx_of(POINTER, POINTER, body="\tmov.b64 %rd1, k_param_10;\n")
    assert len(entry_parameters(strip_scratch_parameters(text, 1))[1]) == 1


@pytest.mark.parametrize("kind", [NUMBER, ".param .f32 ", ".param .align 64 .b8 "], ids=["u32", "f32", "struct"])
def test_a_surplus_that_is_no_pointer_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="k: the surplus parameter is no pointer"):
        strip_scratch_parameters(ptx_of(POINTER, kind), 1)


def test_too_few_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="k: expected at least 3 parameters, found 2"):
        strip_scratch_parameters(ptx_of(POINTER, NUMBER), 3)


# What Triton writes, and what its ptxas says of it

COMPILE = """
import json, sys
from unittest import mock
from evit_kernels import aot
from tests.kernel_compiler import planted
seen = []
def strip(ptx, count):
    seen.append(ptx)
    return aot_strip(ptx, count)
aot_strip = aot.strip_scratch_parameters
with mock.patch.object(aot, "strip_scratch_parameters", strip):
    kernel = aot.compile_kernel(planted("good_kernel", 128), 80)
sys.stdout.write(json.dumps({"raw": seen[0], "stripped": kernel.ptx, "registers": kernel.registers}))
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A kernel (x, n, out) as Triton wrote it, and stripped; from a process without the interpreter."""
    pytest.importorskip("triton", reason="Triton is needed to compile kernels")  # published for Linux only
    environment = process_environment({"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))})
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    texts: dict[str, str] = json.loads(done.stdout)
    return texts


@pytest.fixture(scope="module")
def ptxas() -> str:
    spec = find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("Triton brings the assembler, and is not installed")
    return str(Path(spec.submodule_search_locations[0], "backends/nvidia/bin/ptxas"))


def test_triton_s_own_parameters_are_removed_and_nothing_else(real: dict[str, str]) -> None:
    name, before = entry_parameters(real["raw"])
    assert len(before) > 3, "Triton appends no parameters any more: is the stripping still needed?"
    assert entry_parameters(real["stripped"]) == (name, before[:3])
    assert [".u64" in before[0], ".u32" in before[1], ".u64" in before[2]] == [True] * 3
    without_entry = [re.sub(r"\.entry\s+\w+\s*\([^)]*\)", "", real[text]).strip() for text in ("raw", "stripped")]
    assert without_entry[0] == without_entry[1]


def test_ptxas_takes_it_before_and_after_with_the_same_result(real: dict[str, str], ptxas: str) -> None:
    assert assemble(real["raw"], ptxas) == assemble(real["stripped"], ptxas)
    assert assemble(real["stripped"], ptxas).registers == real["registers"]
    assert assemble(real["stripped"], ptxas).spill_bytes == 0


def test_all_registers_may_be_asked_for(real: dict[str, str], ptxas: str) -> None:
    text = with_all_registers(real["stripped"])
    assert f".maxnreg {MAX_REGISTERS}" in text
    assert entry_parameters(text) == entry_parameters(real["stripped"])
    assert assemble(text, ptxas).spill_bytes == 0
    with pytest.raises(ValueError, match="found none"):
        with_all_registers(".target sm_80")


def test_what_ptxas_refuses_is_an_error_with_its_words(ptxas: str) -> None:
    with pytest.raises(ValueError, match=r"ptxas failed with code \d+: .*no_such_instruction") as caught:
        assemble(ptx_of(POINTER, body="\tno_such_instruction %rd1;\n"), ptxas)
    assert "/kernel.ptx" not in str(caught.value), "a path of this machine"


def test_an_assembler_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="ptxas"):
        assemble(ptx_of(POINTER), str(tmp_path / "ptxas"))
