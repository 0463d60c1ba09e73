"""The verbs as Python functions, `export`, `build_trt`, `verify`, `bench`: the command line calls them."""

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
from evit_deploy.trt import BuildOptions, BuildResult, build_engine
from evit_deploy.trt.profiles import parse_profiles
from evit_deploy.verifying import verify_bundle

PathLike = str | os.PathLike[str]

__all__ = [
    "BenchReport",
    "BuildResult",
    "ExportResult",
    "VerifyReport",
    "bench",
    "build_trt",
    "export",
    "verify",
]


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


def build_trt(
    bundle: Bundle | PathLike,
    *,
    flavor: str = "auto",
    batch: Sequence[str] = (),
    targets: Sequence[str] = (),
    plugin: str = "auto",
    require_plugin: bool = False,
    force: bool = False,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    timing_cache: bool = True,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    refit: bool = False,
    strip_weights: bool = False,
    trt_progress: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BuildResult:
    """Build a TensorRT engine into a bundle, or find the one that is there.

    No engine has run on a GPU yet; flavor "rtx" builds without one.

    Args:
        bundle: a bundle or its path.
        flavor: "tensorrt", "rtx", or "auto": the first where it imports and a GPU answers, else the second.
        batch: profiles as "MIN:OPT:MAX" or "N"; 1:8:MAX of the bundle without any.
        targets: GPUs as "sm89" (flavor rtx); the flavor's own choice without any.
        plugin: "aot" (kernels inside the engine, flavor tensorrt), "jit" (a class that is registered where the engine
            runs), "auto" (the flavor's form, if it can be had) or "off".
        require_plugin: an engine without the plugin is an error.
        force: build although an engine with the same key is there.
        workspace_bytes: the most that a layer may use; TensorRT's own limit without it.
        optimization_level: 0 to 5; TensorRT's own without it.
        timing_cache: keep timings for later builds (flavor tensorrt).
        version_compatible, hardware_compatible, refit, strip_weights: as TensorRT names them (flavor tensorrt).
        trt_progress: report TensorRT's own steps.
        progress: called with one line per step.

    Returns:
        The engine's record, whether it was reused, and notes.

    Raises:
        BundleError: the bundle is missing, damaged or changed, somebody else builds there, or it cannot be written.
        UsageError: options that contradict each other, the flavor or the model.
        MissingDependencyError: TensorRT is not installed or too old, or there is no GPU for flavor "tensorrt".
        EngineError: TensorRT refused the graph, failed, crashed or was killed; the bundle is as it was.
    """
    options = BuildOptions(
        flavor=flavor,
        profiles=parse_profiles(batch),
        targets=tuple(targets),
        plugin=plugin,
        require_plugin=require_plugin,
        force=force,
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refit=refit,
        strip_weights=strip_weights,
        trt_progress=trt_progress,
    )
    return build_engine(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), options, progress)


def verify(
    bundle: Bundle | PathLike,
    *,
    batches: Sequence[int] | None = None,
    inputs: PathLike | None = None,
    tolerance: float | None = None,
    seed: int = PROJECT_SEED,
    backend: str = "onnxruntime",
    threads: int | None = None,
    engine: PathLike | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare a bundle's graph in a runtime, or one of its engines, with its weights in PyTorch FP32 on the CPU.

    Args:
        bundle: a bundle or its path.
        batches: batch sizes; the smallest, an odd one, 8 and the largest without it, of an engine those of its
            profiles.
        inputs: a .npy file, an image or a folder of images, beside the seeded random inputs.
        tolerance: RMS-relative error allowed per row; the precision's own without it.
        seed: of random inputs and permutations.
        backend: the runtime.
        threads: CPU threads; the runtimes' own choice without it.
        engine: compare this TensorRT engine instead of the graph: its name in the bundle, or its path.
        progress: called with one line per step.

    Returns:
        The report; its `exit_code` is 0 for pass, 3 for fail, 4 for unverified, as where no GPU can run the engine.

    Raises:
        BundleError: the bundle or the engine is missing, damaged, changed, or does not fit the other or this machine.
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
        engine=None if engine is None else os.fspath(engine),
        progress=progress,
    )


def bench(
    bundle: Bundle | PathLike,
    *,
    batches: Sequence[int] | None = None,
    backends: Sequence[str] | None = None,
    engine: PathLike | None = None,
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
        backends: names; without it those that run on a CPU, and those that need a GPU where there is one.
        engine: the one that backend "tensorrt" runs, its name in the bundle or its path; the newest that fits this
            machine without it.
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
        engine=None if engine is None else os.fspath(engine),
        baseline=baseline,
        duration_s=duration_s,
        threads=threads,
        seed=seed,
        progress=progress,
        already_elapsed_s=time.monotonic() - started,
    )
