"""A bundle of a few hundred bytes for tests, and the program that writes it in a process of its own.

    python -m tests.tiny_bundle TARGET --seed 1 [--force] [--pause] [--no-exchange] [--fsize N] [--unprivileged]

With --pause it prints each step and waits for a line on stdin before it goes on. It ends with exit code 0, or with 1
and the error's line on stderr.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from evit_deploy.bundle import Bundle, atomic
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.errors import EvitDeployError
from evit_deploy.specs import ModelSpec, Preprocessing

TINY_SPEC = ModelSpec(
    "msa",
    "custom",
    num_classes=3,
    image_size=32,
    config={"channels": (8, 16), "depths": (1, 1), "num_heads": 2, "pos_embed_size": (8, 8)},
)
NOBODY_UID = 65534


def tiny_manifest(seed: int = 0, **changes: Any) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "model": TINY_SPEC.to_json(),
        "preprocessing": Preprocessing().to_json(),
        "class_names": None,
        "origin": {"random_weights": True, "seed": seed},
        "onnx": {"opset": 20, "precision": "fp32", "dynamic_batch": True, "batch": None, "max_batch": 64},
        "verification": {"verdict": "skipped"},
        "versions": {},
    }
    return {**manifest, **changes}


def onnx_bytes(seed: int) -> bytes:
    return b"\x08\x0a" + bytes([seed % 256]) * 400_000


def fill(writer: BundleWriter, seed: int, step: Callable[[str], None] = lambda name: None) -> None:
    """Write the two files in pieces."""
    step("body started")
    data = onnx_bytes(seed)
    with open(writer.path / "model.onnx", "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        step("half of model.onnx written")
        file.write(data[len(data) // 2 :])
    step("model.onnx written")
    save_file({"head.bias": np.full(50, seed, np.float32)}, writer.path / "weights.safetensors")
    step("weights written")


def write_tiny(target: Path, seed: int = 0, *, force: bool = False, **changes: Any) -> Bundle:
    with BundleWriter(target, force=force) as writer:
        fill(writer, seed)
        return writer.commit(tiny_manifest(seed, **changes))


def seed_of(bundle: Bundle) -> int:
    seed: int = bundle.manifest["origin"]["seed"]
    return seed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--fsize", type=int)
    for flag in ("--force", "--pause", "--no-exchange", "--unprivileged"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()

    def step(name: str) -> None:
        if options.pause:
            print(name, flush=True)
            sys.stdin.readline()

    if options.no_exchange:
        atomic.exchange = lambda first, second: False
    if options.fsize is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.fsize, options.fsize))
    if options.unprivileged and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY_UID)
        os.setuid(NOBODY_UID)
    try:
        for index in range(options.repeat):
            with BundleWriter(options.target, force=options.force, progress=step) as writer:
                fill(writer, options.seed + index, step)
                writer.commit(tiny_manifest(options.seed + index))
    except EvitDeployError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
