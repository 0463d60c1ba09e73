"""The verbs as Python functions: `export`, `verify`, `bench`. The command line parses, calls these and prints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from evit_deploy.bench.measure import run_bench
from evit_deploy.bench.report import BenchReport
from evit_deploy.bundle import Bundle
from evit_deploy.constants import DEFAULT_MAX_BATCH, DEFAULT_OPSET, PROJECT_SEED
from evit_deploy.errors import UsageError
from evit_deploy.exporting import (
    ExportOptions,
    ExportResult,
    default_output,
    export_bundle,
    random_checkpoint,
    timed_checkpoint,
)
from evit_deploy.parity.report import VerifyReport
from evit_deploy.specs import Preprocessing
from evit_deploy.verifying import verify_bundle

PathLike = str | os.PathLike[str]

__all__ = ["BenchReport", "ExportResult", "VerifyReport", "bench", "export", "verify"]


def export(
    checkpoint: PathLike | None = None,
    output: PathLike | None = None,
    *,
    random_weights: str | None = None,
    seed: int = PROJECT_SEED,
    family: str | None = None,
    variant: str | None = None,
    image_size: int | None = None,
    weights: str | None = None,
    batch: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    opset: int = DEFAULT_OPSET,
    fused_operators: bool = True,
    simplify: bool = True,
    verify: bool = True,
    with_preprocess: bool = False,
    with_softmax: bool = False,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Write a verified bundle from a checkpoint.

    Args:
        checkpoint: a .pt, .pth or .safetensors file of any family and key format.
        output: the bundle's folder; `NAME.evit` in the current folder without it.
        random_weights: instead of a checkpoint, a published model's name, for example "msra-m0".
        seed: of random weights and of the images that are compared.
        family, variant, image_size, weights: override what the checkpoint shows; a contradiction is an error.
        batch: fixes the batch size; the batch is dynamic from 1 to `max_batch` without it.
        max_batch: the largest batch of a dynamic graph.
        opset: ONNX operator set version.
        fused_operators: one node of domain `evit` per attention layer; False writes standard operators only.
        simplify: run onnxsim and compare its result.
        verify: compare the graph with PyTorch before the bundle is moved in place.
        with_preprocess: the graph takes uint8 images [B, S, S, 3] and scales and normalises them.
        with_softmax: the graph returns probabilities.
        class_names: one per class; those of the checkpoint without it.
        preprocessing: overrides that of the checkpoint or family.
        force: replace an existing bundle.
        progress: called with one line per step.

    Raises:
        UsageError: arguments that contradict each other or name something unknown.
        CheckpointError: the checkpoint cannot be read, recognised or loaded.
        BundleError: the bundle exists (without `force`) or cannot be written.
        ExportError: PyTorch's exporter refused the model.
        ParityError: the graph does not match PyTorch; no bundle is written.
        MissingDependencyError: a package is missing, or ONNX Runtime could not run the graph; no bundle is written.
    """
    if (checkpoint is None) == (random_weights is None):
        raise UsageError("give either a checkpoint or random_weights", hint="for example export('m3.pt')")
    about_a_checkpoint = {"family": family, "variant": variant, "weights": weights}
    surplus = [name for name, value in about_a_checkpoint.items() if value is not None]
    if random_weights is not None and surplus:
        raise UsageError(
            f"{surplus[0]} is about a checkpoint, and random_weights has none", hint=f"leave {surplus[0]} out"
        )
    if (batch is not None and batch < 1) or max_batch < 1:
        raise UsageError(f"batch sizes start at 1, got {batch=} {max_batch=}", hint="give a positive batch size")
    report = progress or (lambda text: None)
    options = ExportOptions(batch, max_batch, opset, fused_operators, simplify, with_preprocess, with_softmax)
    if random_weights is not None:
        report(f"drawing random weights for {random_weights}")
        started = time.perf_counter()
        loaded = random_checkpoint(random_weights, seed, image_size)
        load_seconds = time.perf_counter() - started
    else:
        assert checkpoint is not None
        report(f"loading {checkpoint}")
        loaded, load_seconds = timed_checkpoint(
            Path(checkpoint), family=family, variant=variant, image_size=image_size, weights=weights
        )
    source = None if checkpoint is None else Path(checkpoint)
    return export_bundle(
        loaded,
        Path(output) if output is not None else default_output(source, loaded.spec),
        options,
        preprocessing=preprocessing,
        class_names=class_names,
        verify=verify,
        seed=seed,
        force=force,
        progress=report,
        load_seconds=load_seconds,
    )


def verify(
    bundle: Bundle | PathLike,
    *,
    batches: Sequence[int] | None = None,
    inputs: PathLike | None = None,
    tolerance: float | None = None,
    seed: int = PROJECT_SEED,
    backend: str = "onnxruntime",
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare a bundle's graph in a runtime with its weights in PyTorch FP32 on the CPU.

    Args:
        bundle: a bundle or its path.
        batches: batch sizes; the smallest, an odd one, 8 and the largest without it.
        inputs: a .npy file, an image or a folder of images, beside the seeded random inputs.
        tolerance: RMS-relative error allowed per row; the precision's own without it.
        seed: of random inputs and permutations.
        backend: the runtime.
        threads: CPU threads; the runtimes' own choice without it.
        progress: called with one line per step.

    Returns:
        The report; its `exit_code` is 0 for pass, 3 for fail, 4 for unverified.

    Raises:
        BundleError: the bundle is missing, damaged or changed.
        InputDataError: `inputs` is not usable.
        UsageError: a batch or backend the bundle does not take, or a number of threads below one.
    """
    return verify_bundle(
        bundle if isinstance(bundle, Bundle) else Bundle.open(bundle),
        batches=batches,
        inputs=None if inputs is None else Path(inputs),
        tolerance=tolerance,
        seed=seed,
        backend=backend,
        threads=threads,
        progress=progress,
    )


def bench(
    bundle: Bundle | PathLike,
    *,
    batches: Sequence[int] | None = None,
    backends: Sequence[str] | None = None,
    baseline: str | None = None,
    duration_s: float = 60.0,
    threads: int | None = None,
    seed: int = PROJECT_SEED,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure latency and parity of each backend, in one row, of the same ONNX file.

    Args:
        bundle: a bundle or its path.
        batches: batch sizes; those of 1, 8 and 64 that the bundle takes without it.
        backends: names; all known ones without it.
        baseline: the backend that ratios are against; the first that runs without it.
        duration_s: time budget of the whole call.
        threads: CPU threads of each backend; all usable cores without it.
        seed: of inputs, order and bootstrap.
        progress: called with one line per step.

    Returns:
        The report; its `exit_code` is 0, or 3, 4, 5 as docs/exit_codes.md says.

    Raises:
        BundleError: the bundle is missing, damaged or changed.
        UsageError: a batch or backend that does not exist.
    """
    started = time.monotonic()
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return run_bench(
        opened,
        batches=batches,
        backends=backends,
        baseline=baseline,
        duration_s=duration_s,
        threads=threads,
        seed=seed,
        progress=progress,
        already_elapsed_s=time.monotonic() - started,
    )
