"""The verbs as Python functions, `export`, `build_trt`, `verify`, `bench`: the command line calls them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from evit_deploy.bench.measure import run_bench
from evit_deploy.bench.report import BenchReport
from evit_deploy.building import build_bundle_engine
from evit_deploy.bundle import Bundle
from evit_deploy.constants import DEFAULT_MAX_BATCH, PROJECT_SEED
from evit_deploy.errors import UsageError
from evit_deploy.evaluation import EvaluationReport, run_evaluation
from evit_deploy.exporting import (
    ExportOptions,
    ExportResult,
    default_output,
    export_bundle,
    random_checkpoint,
    timed_checkpoint,
)
from evit_deploy.exporting_precision import PrecisionOptions, opset_for
from evit_deploy.headroom.measure import DEFAULT_BATCH as HEADROOM_BATCH
from evit_deploy.headroom.measure import DEFAULT_MARGIN_BITS, measure_headroom
from evit_deploy.headroom.report import HeadroomReport
from evit_deploy.parity.report import VerifyReport
from evit_deploy.quantization.report import QuantizeResult
from evit_deploy.quantizing import DEFAULT_METHOD, QuantizeOptions, quantize_bundle
from evit_deploy.quantizing import default_output as default_quantized_output
from evit_deploy.specs import Preprocessing
from evit_deploy.trt import BuildOptions, BuildResult
from evit_deploy.trt.profiles import parse_profiles
from evit_deploy.verifying import verify_bundle

PathLike = str | os.PathLike[str]

__all__ = [
    "BenchReport",
    "BuildResult",
    "EvaluationReport",
    "ExportResult",
    "HeadroomReport",
    "QuantizeResult",
    "VerifyReport",
    "bench",
    "build_trt",
    "evaluate",
    "export",
    "headroom",
    "quantize",
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
    opset: int | None = None,
    precision: str = "fp32",
    io: str = "fp32",
    keep_fp32: Sequence[str] = (),
    headroom: PathLike | None = None,
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
        checkpoint: a .pt, .pth or .safetensors file of any family and key format, or a bundle, for its weights.
        output: the bundle's folder; without it `NAME.evit`, or `NAME-fp16.evit` and so on, in the current folder.
        random_weights: instead of a checkpoint, a published model's name, for example "msra-m0".
        seed: of random weights and of the images that are compared.
        family, variant, image_size, weights: override what the checkpoint shows; a contradiction is an error.
        batch: fixes the batch size; the batch is dynamic from 1 to `max_batch` without it.
        max_batch: the largest batch of a dynamic graph.
        opset: ONNX operator set version; the default of the precision without it.
        precision: "fp32", "fp16" or "bf16", of weights and activations; the attention, layer norms' statistics and
            sums compute in FP32.
        io: "fp32", or "fp16" for images and output of an FP16 graph.
        keep_fp32: blocks that stay in FP32, by name; ("auto",) for those that a headroom report names.
        headroom: that report's file, or the bundle it was measured on; without it that of the bundle `checkpoint`.
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
    options = ExportOptions(
        batch,
        max_batch,
        opset_for(opset, precision),
        fused_operators,
        simplify,
        with_preprocess,
        with_softmax,
        PrecisionOptions(precision, io, tuple(keep_fp32), None if headroom is None else Path(headroom)),
    )
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
        Path(output) if output is not None else default_output(source, loaded.spec, precision),
        options,
        preprocessing=preprocessing,
        class_names=class_names,
        verify=verify,
        seed=seed,
        force=force,
        progress=report,
        load_seconds=load_seconds,
        source=source,
    )


def quantize(
    bundle: Bundle | PathLike,
    images: PathLike,
    output: PathLike | None = None,
    *,
    method: str = DEFAULT_METHOD,
    exclude: Sequence[str] = (),
    include_first_last: bool = False,
    verify: bool = True,
    seed: int = PROJECT_SEED,
    force: bool = False,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> QuantizeResult:
    """Write an INT8 bundle from an FP32 one: Q/DQ pairs in front of convolutions and matrix products.

    Args:
        bundle: an FP32 bundle or its path.
        images: a folder of images (those of sub-folders in turn) or a .npy file, like those the model will see.
        output: the new bundle's folder; `NAME-int8.evit` in the current folder without it.
        method: how a range is chosen from the images: "entropy", "percentile" or "minmax".
        exclude: layers, blocks or stages that stay in FP32, by name.
        include_first_last: quantize the first and the last layer too.
        verify: compare the graph with PyTorch before the bundle is moved in place.
        seed: of the random images that are compared beside the calibration images.
        force: replace an existing bundle.
        threads: CPU threads; the runtimes' own choice without it.
        progress: called with one line per step.

    Raises:
        UsageError: the bundle is not FP32, a name means no layer, or nothing would be quantized.
        InputDataError: the images are unreadable, constant, of a wrong size, or give NaN or infinity.
        BundleError: the bundle is missing, damaged or changed, or the new one exists (without `force`) or cannot be
            written.
        ExportError: ONNX Runtime's quantizer refused the graph.
        ParityError: the graph is too far from PyTorch; no bundle is written.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return quantize_bundle(
        opened,
        Path(images),
        Path(output) if output is not None else default_quantized_output(opened.path),
        QuantizeOptions(method, tuple(exclude), include_first_last),
        verify=verify,
        seed=seed,
        force=force,
        threads=threads,
        progress=progress or (lambda text: None),
    )


def headroom(
    bundle: Bundle | PathLike,
    images: PathLike,
    *,
    batch: int = HEADROOM_BATCH,
    margin_bits: float = DEFAULT_MARGIN_BITS,
    limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> HeadroomReport:
    """Measure on real images, in FP32, how far every value stays from the limits of FP16 and BF16.

    The report is also written to `reports/headroom.json` in the bundle, where an export finds it.

    Args:
        bundle: a bundle or its path.
        images: a folder of images (those of sub-folders in turn), an image or a .npy file, like those the model will
            see.
        batch: images at a time.
        margin_bits: the margin that a stored tensor must keep to both limits to count as safe.
        limit: use only so many images.
        progress: called with one line now and then.

    Raises:
        BundleError: the bundle is missing, damaged, changed, or cannot be written.
        InputDataError: the images are unreadable, of one colour or of a wrong size, or the FP32 model itself gives NaN
            or infinity.
        UsageError: a batch, margin or limit that is none.
    """
    return measure_headroom(
        bundle if isinstance(bundle, Bundle) else Bundle.open(bundle),
        Path(images),
        batch=batch,
        margin_bits=margin_bits,
        limit=limit,
        progress=progress,
    )


def build_trt(
    bundle: Bundle | PathLike,
    *,
    flavor: str = "auto",
    batch: Sequence[str] = (),
    targets: Sequence[str] = (),
    plugin: str = "auto",
    require_plugin: bool = False,
    require_headroom: bool = False,
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
        require_headroom: an FP16 bundle whose headroom was not measured, or does not suffice, is an error.
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
        require_headroom=require_headroom,
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
    return build_bundle_engine(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), options, progress)


def verify(
    bundle: Bundle | PathLike,
    *,
    batches: Sequence[int] | None = None,
    inputs: PathLike | None = None,
    tolerance: float | None = None,
    seed: int = PROJECT_SEED,
    backend: str | None = None,
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
        backend: the runtime; without it ONNX Runtime, and for FP16 and BF16 graphs also PyTorch with everything stored
            in that precision ("torch-half"), because ONNX Runtime computes wider on a CPU and sees no overflow.
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


def evaluate(
    bundle: Bundle | PathLike,
    data: PathLike,
    *,
    backends: Sequence[str] = ("onnxruntime",),
    batch: int | None = None,
    limit: int | None = None,
    max_top1_drop: float | None = None,
    state: PathLike | None = None,
    engine: PathLike | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> EvaluationReport:
    """Measure accuracy on labelled images, of the bundle's weights in PyTorch FP32 and of backends.

    Args:
        bundle: a bundle or its path.
        data: a folder with one sub-folder of images a class, or an .npz of `images` (uint8 [N,H,W,3], or float32
            [N,3,S,S] preprocessed) and `labels` (int [N]).
        backends: names.
        batch: images at a time; 8, or what the graph and the engine take, without it.
        limit: use only so many images, spread evenly over the data.
        max_top1_drop: percentage points of top-1 that a backend may lose against the reference; without it none fails
            for that.
        state: a file to keep answers in as they come; an evaluation of the same bundle and data goes on from it.
        engine: the one that backend "tensorrt" runs, its name in the bundle or its path.
        threads: CPU threads of each runtime; its own choice without it.
        progress: called with one line now and then.

    Returns:
        The report; its `exit_code` is 0, 3 if a backend lost too much or gave NaN, 1 if images could not be read.

    Raises:
        BundleError: the bundle or the engine is missing, damaged or changed.
        InputDataError: no data, labels that do not fit the model, no readable image, or a state of another evaluation.
        UsageError: a backend, batch, limit or drop that is none, or a state that another process writes.
        MissingDependencyError: a backend cannot run here.
    """
    return run_evaluation(
        bundle if isinstance(bundle, Bundle) else Bundle.open(bundle),
        Path(data),
        backends=backends,
        batch=batch,
        limit=limit,
        max_top1_drop=max_top1_drop,
        state=None if state is None else Path(state),
        engine=None if engine is None else os.fspath(engine),
        threads=threads,
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
    inputs: PathLike | None = None,
    tolerance: float | None = None,
    select: bool = False,
    seed: int = PROJECT_SEED,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure latency and parity of each backend, in one row, of the same ONNX file.

    Args:
        bundle: a bundle or its path.
        batches: batch sizes; those of 1, 8 and 64 that the bundle takes without it.
        backends: names; without it those that run on a CPU, and those that need a GPU where there is one; to select
            from, every one that can run the exported model here.
        engine: the one that backend "tensorrt" runs, its name in the bundle or its path; the newest that fits this
            machine without it.
        baseline: the backend that ratios are against; the first that runs without it.
        duration_s: time budget of the whole call.
        threads: CPU threads of each backend; all usable cores without it.
        inputs: a .npy file, an image or a folder of images to run and compare on; seeded random images without it,
            on which an INT8 graph is not judged.
        tolerance: RMS-relative error that a row may have; its precision's own without it.
        select: name the fastest backend within `tolerance`, for each batch size.
        seed: of inputs, order and bootstrap.
        progress: called with one line per step.

    Returns:
        The report; its `exit_code` is 0, or 3, 4, 5 as docs/exit_codes.md says.

    Raises:
        BundleError: the bundle is missing, damaged or changed.
        InputDataError: `inputs` is not usable.
        UsageError: a batch or backend that does not exist, or a selection without a tolerance.
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
        inputs=None if inputs is None else Path(inputs),
        tolerance=tolerance,
        select=select,
        seed=seed,
        progress=progress,
        already_elapsed_s=time.monotonic() - started,
    )
