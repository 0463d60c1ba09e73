"""Builds with a stand-in for TensorRT's process, and the program that runs one where it can be stopped at every step.

    python -m tests.trt_builds BUNDLE [--mode MODE] [--batch N] [--force] [--pause] [--fsize N] [--unprivileged]

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

from evit_deploy.bundle import Bundle
from evit_deploy.errors import EvitDeployError
from evit_deploy.trt import BuildOptions, BuildResult, build_engine
from evit_deploy.trt.flavors import load_flavor
from evit_deploy.trt.profiles import BatchProfile
from tests.fake_trt_child import command
from tests.tiny_bundle import NOBODY_UID


def fake_build(
    target: Path, mode: str = "quiet", progress: Callable[[str], None] | None = None, **options: Any
) -> BuildResult:
    """An engine of a tiny bundle; its graph is no ONNX, so that the plugin is off."""
    return build_engine(
        Bundle.open(target),
        BuildOptions(**{"flavor": "rtx", "plugin": "off", **options}),
        progress,
        command=command(mode),
    )


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--mode", default="quiet")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--fsize", type=int)
    for flag in ("--force", "--pause", "--unprivileged"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()

    def step(name: str) -> None:
        if options.pause:
            print(name, flush=True)
            sys.stdin.readline()

    def pausing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def paused(*arguments: Any, **keywords: Any) -> Any:
            step(f"before {name}")
            return function(*arguments, **keywords)

        return paused

    for name in ("rename", "replace", "mkdir"):
        setattr(os, name, pausing(name, getattr(os, name)))
    if options.fsize is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.fsize, options.fsize))
    load_flavor("rtx")  # before the change of user: a Python under /root is closed to the other one
    if options.unprivileged and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY_UID)
        os.setuid(NOBODY_UID)
    profile = BatchProfile(1, options.batch, options.batch)
    try:
        fake_build(options.bundle, options.mode, step, profiles=(profile,), force=options.force)
    except EvitDeployError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
