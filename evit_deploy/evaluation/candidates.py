"""The runners that an evaluation asks, under the names that its state and report know them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evit_deploy.backends import Backend, backend_runner, resolve_backends
from evit_deploy.bundle import Bundle
from evit_deploy.constants import DEFAULT_MAX_BATCH
from evit_deploy.errors import InputDataError, MissingDependencyError, RunnerError, UsageError
from evit_deploy.runners.base import Runner, TensorSpec
from evit_deploy.runners.feeds import describe
from evit_deploy.runners.reference import reference_runner

REFERENCE = "reference"
DEFAULT_BATCH = 8  # what CPUs run at full speed


@dataclass(frozen=True)
class Candidate:
    """One runner.

    Attributes:
        name: "reference", or the backend's.
        identity: the name, and of an engine its hash: what a state keeps answers under.
        engine: what backend "tensorrt" runs.
        runner: inactive at first.
        padded: whether every batch is filled up to the same size.
    """

    name: str
    identity: str
    engine: str | None
    runner: Runner
    padded: bool

    def infer(self, images: np.ndarray, pixels: np.ndarray | None, batch: int) -> dict[str, np.ndarray]:
        """The outputs for at most `batch` images, padding behind them.

        Args:
            images: float32 [n,3,S,S], preprocessed.
            pixels: uint8 [n,S,S,3] of the same images, or None where there are none.
            batch: what is run at once.
        """
        spec = self.runner.inputs[0]
        feed = images
        if spec.dtype == "uint8":
            assert pixels is not None
            feed = pixels
        elif spec.dtype == "float16":
            feed = images.astype(np.float16)
        if self.padded and len(feed) < batch:
            feed = np.concatenate([feed, np.repeat(feed[-1:], batch - len(feed), axis=0)])
        return self.runner.infer({spec.name: np.ascontiguousarray(feed)})

    def check_input(self, image_size: int, has_pixels: bool) -> None:
        """Refuse, once the runner is active, images that the model does not take.

        Raises:
            InputDataError: the model preprocesses by itself, and the images are preprocessed.
            RunnerError: its input is none for images of the model.
        """
        specs = self.runner.inputs
        shape: tuple[int, ...] = (3, image_size, image_size)
        if specs[0].dtype == "uint8":
            shape = (image_size, image_size, 3)
            if not has_pixels:
                raise InputDataError(
                    "the model preprocesses by itself and takes uint8 images, got preprocessed float32",
                    hint="give a folder of images, or uint8 [N,H,W,3]",
                )
        if len(specs) != 1 or specs[0].dtype not in ("float32", "float16", "uint8") or not _takes(specs[0], shape):
            found = "; ".join(describe(spec) for spec in specs)
            raise RunnerError(f"{self.name}: the model takes {found}", hint="export the bundle again")


def find_candidates(
    bundle: Bundle, backends: Sequence[str], threads: int | None, engine: str | None
) -> tuple[tuple[Candidate, ...], tuple[Backend, ...]]:
    """The reference and the runners of the backends, inactive, and the backends.

    Raises:
        UsageError: a backend is unknown, given twice, or does not run this bundle.
        MissingDependencyError: a backend cannot run on this machine.
        BundleError: the engine is missing, damaged, or of another bundle.
    """
    resolved = resolve_backends(backends, bundle, engine)
    softmax = bundle.manifest["onnx"].get("with_softmax", False)
    reference = reference_runner(bundle, softmax=softmax, threads=threads)
    found = [Candidate(REFERENCE, REFERENCE, None, reference, padded=False)]
    for backend in resolved:
        runner = backend_runner(bundle, backend.name, threads=threads, engine=engine)
        reason = backend.why_not()
        if reason is not None:
            raise MissingDependencyError(f"backend {backend.name} cannot run: {reason}", hint="evit-deploy doctor")
        name, digest = _engine_of(backend, bundle)
        identity = backend.name if digest is None else f"{backend.name} {digest}"
        found.append(Candidate(backend.name, identity, name, runner, padded=True))
    return tuple(found), resolved


def choose_batch(bundle: Bundle, backends: Sequence[Backend], asked: int | None) -> int:
    """The batch size that every backend takes: the one asked for, else the graph's own, 8, or the next that fits.

    Raises:
        UsageError: there is none, or the one asked for is too large for the bundle or a backend.
    """
    largest = bundle.max_batch or DEFAULT_MAX_BATCH
    fixed = bundle.manifest["onnx"].get("batch")

    def why_not(batch: int) -> str | None:
        if fixed is not None and batch != fixed:
            return f"the graph has a fixed batch of {fixed}"
        if batch > largest:
            return f"the bundle's largest batch is {largest}"
        return next((reason for backend in backends if (reason := backend.why_not_batch(batch))), None)

    if asked is not None:
        if asked < 1:
            raise UsageError(f"a batch has at least one image, got {asked}", hint="give 1 or more")
        reason = why_not(asked)
        if reason is not None:
            raise UsageError(f"batch {asked} cannot be run: {reason}", hint="leave --batch out, or give another one")
        return asked
    preferred = [fixed or min(DEFAULT_BATCH, largest), *range(min(DEFAULT_BATCH, largest), 0, -1)]
    preferred += range(DEFAULT_BATCH + 1, largest + 1)
    for batch in preferred:
        if why_not(batch) is None:
            return int(batch)
    raise UsageError(
        f"no batch size can be run by all of {', '.join(backend.name for backend in backends)}: "
        f"{why_not(preferred[0])}",
        hint="evaluate them one by one",
    )


def _takes(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return len(spec.shape) == 4 and all(
        got is None or got == want for got, want in zip(spec.shape[1:], shape, strict=True)
    )


def _engine_of(backend: Backend, bundle: Bundle) -> tuple[str | None, str | None]:
    """Name and SHA-256 of the engine that a backend runs."""
    if backend.engine is None:
        return None, None
    from evit_deploy.trt.record import open_engine

    record = open_engine(backend.engine, bundle=bundle, check_hash=False)  # its runner's factory checked it
    return record.name, record.engine_sha256
