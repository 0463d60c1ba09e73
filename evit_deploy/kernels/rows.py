"""One kernel for one architecture as a row: what tables and JSON documents show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from evit_kernels.aot import CompiledKernel, kernel_key

from evit_deploy.kernels.needed import NeededKernel

# What became of a kernel.
CACHED = "cached"  # it was in the cache
COMPILED = "compiled"  # and is in the cache now
ABSENT = "absent"  # not in the cache; not asked for, or there is no Triton to compile it
REFUSED = "refused"  # it compiles, and breaks a limit that every kernel keeps
FAILED = "failed"  # it does not compile


@dataclass(frozen=True)
class KernelRow:
    """One kernel; None stands for what is not known because nothing was compiled.

    Attributes:
        operator, dtype: of the launch.
        size, channels_last, model, image_size: see `NeededKernel`; None for one from a pack, which does not say.
        arch: compute capability times ten.
        state: CACHED, COMPILED, ABSENT, REFUSED or FAILED.
        reason: why it was refused or failed; "" otherwise.
        target, registers, spill_bytes, shared_bytes, threads, triton_version: see `evit_kernels.aot.CompiledKernel`.
        key: its name in the cache.
    """

    operator: str
    size: str | None
    channels_last: bool | None
    model: str | None
    image_size: int | None
    dtype: str
    arch: int
    state: str
    reason: str
    target: str | None
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    threads: int | None
    triton_version: str | None
    key: str

    def __str__(self) -> str:
        words = (self.operator, self.size, "channels_last" if self.channels_last else None, self.dtype)
        return " ".join([*(word for word in words if word), f"sm_{self.arch}"])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "reason": self.reason or None}


def needed_row(
    needed: NeededKernel, arch: int, state: str, kernel: CompiledKernel | None = None, reason: str = ""
) -> KernelRow:
    """The row of a kernel that a model needs, with the facts of the compiled one where there is one."""
    return KernelRow(
        operator=needed.launch.operator,
        size=needed.size,
        channels_last=needed.channels_last,
        model=needed.model,
        image_size=needed.image_size,
        dtype=needed.launch.dtype,
        arch=arch,
        state=state,
        reason=reason,
        key=kernel_key(needed.launch, arch),
        **_facts(kernel),
    )


def packed_row(kernel: CompiledKernel) -> KernelRow:
    """The row of a kernel that came from a pack into the cache."""
    return KernelRow(
        operator=kernel.operator,
        size=None,
        channels_last=None,
        model=None,
        image_size=None,
        dtype=kernel.dtype,
        arch=kernel.arch,
        state=CACHED,
        reason="",
        key=kernel.key,
        **_facts(kernel),
    )


def _facts(kernel: CompiledKernel | None) -> dict[str, Any]:
    names = ("target", "registers", "spill_bytes", "shared_bytes", "threads", "triton_version")
    return {name: getattr(kernel, name) if kernel else None for name in names}
