"""`python -m tests.kernel_compiler fast|rest`: compiles kernels without the interpreter and prints what came out.

What is compiled, and how a test gets it, stands here; nothing at the top needs Triton.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from evit_kernels.launch import KernelLaunch
from evit_kernels.registry import OPERATORS

from evit_deploy.models.attention_calls import attention_calls
from evit_deploy.specs import ModelSpec
from tests.conftest import process_environment

# The layer of each operator whose tiles are the largest: of which model, and its place among the layers.
LARGEST = {
    "multi_scale_attention": ("msa-m5", -1),
    "projected_multi_scale_attention": ("msa-m5", 3),
    "lite_mla": ("mit-b2", 0),
    "cascaded_attention": ("msra-m5", 1),
}
# One architecture of each kind that Triton compiles differently for; every dtype.
TARGETS = (("fp16", 80), ("fp16", 90), ("fp16", 120), ("fp32", 89), ("bf16", 100))
CHANNELS_LAST_TARGET = ("fp16", 86)
# Of these, what the fast tier compiles: every operator, every dtype, every architecture.
FAST, REST = "fast", "rest"
FAST_CASES = {
    *(f"{operator}-fp16-80" for operator in LARGEST),
    "lite_mla-fp32-89",
    "lite_mla-fp16-90",
    "lite_mla-bf16-100",
    "lite_mla-fp16-120",
    "lite_mla-channels-last-fp16-86",
}
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PLANTED: dict[str, dict[str, Any]] = {
    "good": {"kernel": "good_kernel", "size": 128},
    "spills": {"kernel": "squares_kernel", "size": 128, "num_warps": 2},
    "much-shared-memory": {"kernel": "squares_kernel", "size": 128, "num_warps": 8, "num_stages": 4},
    "scratch": {"kernel": "scratch_kernel", "size": 64, "arch": 90},
    "reordered": {"kernel": "reordered_kernel", "size": 64},
    "broken": {"kernel": "broken_kernel", "size": 64},
}


def planted(kernel: str, size: int, num_warps: int = 4, num_stages: int = 1) -> KernelLaunch:
    """A launch of one of `tests.planted_kernels`."""
    return KernelLaunch(
        operator="planted",
        kernel=f"tests.planted_kernels:{kernel}",
        inputs=("p_x",),
        extras={"n_rows": 3},
        outputs=("p_out",),
        constants={"SIZE": size},
        dtype="fp16",
        programs_per_image=1,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def largest(operator: str, dtype: str, *, channels_last: bool = False) -> KernelLaunch:
    """The launch of the layer in LARGEST."""
    model, place = LARGEST[operator]
    first, *others = attention_calls(ModelSpec.published(model), TORCH_DTYPES[dtype])[place].arguments
    if channels_last:
        first = first.contiguous(memory_format=torch.channels_last)
    return OPERATORS[operator].launch_of(first, *others)


def cases() -> Iterator[tuple[str, KernelLaunch, int]]:
    """Name, launch and architecture of all that is compiled."""
    for operator in LARGEST:
        for dtype, arch in TARGETS:
            yield f"{operator}-{dtype}-{arch}", largest(operator, dtype), arch
    for operator in ("lite_mla", "cascaded_attention"):  # the other's maps are channels last in any case
        dtype, arch = CHANNELS_LAST_TARGET
        yield f"{operator}-channels-last-{dtype}-{arch}", largest(operator, dtype, channels_last=True), arch
    for name, options in PLANTED.items():
        arch = options.get("arch", 80)
        yield name, planted(**{key: value for key, value in options.items() if key != "arch"}), arch


def tier_of(name: str) -> str:
    """FAST or REST."""
    return FAST if name in FAST_CASES or name in PLANTED else REST


def compile_in_child(folder: Path, tier: str) -> dict[str, dict[str, Any]]:
    """What became of each case of a tier: {"launch", "kernel"} or {"launch", "error", "message"}.

    Args:
        folder: empty; for Triton's own cache, so that everything is really compiled.
        tier: FAST or REST.
    """
    command = [sys.executable, "-m", "tests.kernel_compiler", tier]
    environment = process_environment({"TRITON_CACHE_DIR": str(folder)})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return results


def main() -> None:
    from evit_kernels.aot import compile_kernel

    results: dict[str, dict[str, Any]] = {}
    for name, launch, arch in cases():
        if tier_of(name) != sys.argv[1]:
            continue
        results[name] = {"launch": asdict(launch)}
        try:
            results[name]["kernel"] = asdict(compile_kernel(launch, arch))
        except Exception as error:  # noqa: BLE001 - which one it is, is what the tests look at
            results[name] |= {"error": type(error).__name__, "message": str(error)}
            traceback.print_exc()
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
