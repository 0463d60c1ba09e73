"""Reading and adapting PTX text: the entry's parameters, and what ptxas says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)")
_TARGET = re.compile(r"^\.target\s+(?P<target>sm_\w+)", re.MULTILINE)
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")

MAX_REGISTERS = 255  # of a thread, on every architecture here


@dataclass(frozen=True)
class Assembled:
    """What ptxas reports of one entry.

    Attributes:
        registers: 32-bit registers of a thread.
        spill_bytes: spilled bytes of a thread, stored and loaded.
    """

    registers: int
    spill_bytes: int


def entry_parameters(ptx: str) -> tuple[str, tuple[str, ...]]:
    """Name of the one entry, and the declaration of each of its parameters.

    Raises:
        ValueError: not exactly one entry.
    """
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise ValueError(f"expected PTX with one entry, found {len(entries)}")
    parameters = (parameter.strip() for parameter in entries[0]["parameters"].split(","))
    return entries[0]["name"], tuple(parameter for parameter in parameters if parameter)


def ptx_target(ptx: str) -> str:
    """The target of the text, for example "sm_90a".

    Raises:
        ValueError: there is none.
    """
    return _target(ptx)["target"]


def _target(ptx: str) -> re.Match[str]:
    found = _TARGET.search(ptx)
    if found is None:
        raise ValueError("the PTX names no target")
    return found


def with_target(ptx: str, target: str) -> str:
    """The text for another target, for example "sm_89".

    Raises:
        ValueError: it names no target.
    """
    found = _target(ptx)
    return f"{ptx[: found.start('target')]}{target}{ptx[found.end('target') :]}"


def strip_scratch_parameters(ptx: str, count: int) -> str:
    """The text with its entry cut down to the first `count` parameters.

    Triton since 3.4 appends pointers to scratch memory (global, since 3.6 also for profiling) that nobody else who
    launches the kernel would pass. A kernel that does not use them is the same without.

    Args:
        ptx: text with one entry.
        count: parameters the entry shall keep.

    Raises:
        ValueError: the entry has fewer parameters, one too many is no pointer, or the kernel uses it.
    """
    name, parameters = entry_parameters(ptx)
    if len(parameters) < count:
        raise ValueError(f"{name}: expected at least {count} parameters, found {len(parameters)}")
    for parameter in parameters[count:]:
        variable = parameter.split()[-1]
        if ".u64" not in parameter and ".b64" not in parameter:
            raise ValueError(f"{name}: the surplus parameter is no pointer: {parameter}")
        if len(re.findall(rf"\b{re.escape(variable)}\b", ptx)) > 1:
            raise ValueError(f"{name}: the kernel uses its scratch memory ({variable}), which only Triton passes")
    entry = _ENTRY.search(ptx)
    assert entry is not None
    kept = ",\n".join(f"\t{parameter}" for parameter in parameters[:count])
    return f"{ptx[: entry.start('parameters')]}\n{kept}\n{ptx[entry.end('parameters') :]}"


def with_all_registers(ptx: str) -> str:
    """The text with `.maxnreg 255` on its entry: ptxas may then use every register instead of aiming at occupancy."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("expected PTX with one entry, found none")
    return f"{ptx[: entry.end()]}\n.maxnreg {MAX_REGISTERS}{ptx[entry.end() :]}"


def assemble(ptx: str, ptxas: str) -> Assembled:
    """Assemble PTX for the target it names, and read ptxas's account of it.

    Args:
        ptx: text with one entry.
        ptxas: path of the assembler.

    Raises:
        ValueError: ptxas refuses the text; the message has its first words.
        OSError: ptxas cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx, encoding="utf-8")
        command = [ptxas, "-v", f"--gpu-name={ptx_target(ptx)}", "kernel.ptx", "-o", "kernel.cubin"]  # errors quote it
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    registers, spills = _REGISTERS.search(report), _SPILLS.search(report)
    if done.returncode != 0 or registers is None or spills is None:
        raise ValueError(f"ptxas failed with code {done.returncode}: {' '.join(report.split())[:400]}")
    return Assembled(int(registers[1]), int(spills[1]) + int(spills[2]))
