"""Verifying a bundle: its graph in a runtime against its weights in PyTorch FP32, and where a failure begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evit_deploy.backends import BACKENDS, TORCH_HALF, VERIFY, backend_runner
from evit_deploy.bundle import Bundle
from evit_deploy.constants import DEFAULT_MAX_BATCH, PROJECT_SEED
from evit_deploy.errors import BundleError, EvitDeployError, RunnerError, UsageError, unknown_name_hint
from evit_deploy.images.sources import InputSource, RandomInputs, RepeatedInputs, open_inputs
from evit_deploy.parity.gate import tolerance_for
from evit_deploy.parity.report import VerifyReport, merged
from evit_deploy.parity.verify import verify_runner
from evit_deploy.runners.base import Runner
from evit_deploy.runners.onnx_graph import load_model, precision_of
from evit_deploy.runners.reference import reference_runner

if TYPE_CHECKING:
    from evit_deploy.trt.record import EngineRecord

ONNXRUNTIME = "onnxruntime"
HALF = ("fp16", "bf16")
_HALF_BATCHES = (1, 3)  # PyTorch's half precision on a CPU is slow
_LOCALIZE_BATCH = 4


def verify_bundle(
    bundle: Bundle,
    *,
    batches: Sequence[int] | None = None,
    inputs: Path | None = None,
    tolerance: float | None = None,
    seed: int = PROJECT_SEED,
    backend: str | None = None,
    threads: int | None = None,
    engine: str | None = None,
    candidate: Runner | None = None,
    progress: Callable[[str], None] | None = None,
    subject: str | None = None,
) -> VerifyReport:
    """Compare a bundle's graph, or an engine built from it, with its reference; name a graph's first bad block.

    Args:
        bundle: opened with its hashes checked.
        batches, inputs, tolerance, seed, backend, threads, engine: see `evit_deploy.api.verify`.
        candidate: a runner to compare instead of the backend's own.
        progress: called with one line per step.
        subject: what the report calls the bundle; its path without it.
    """
    if backend is not None and backend not in VERIFY:
        raise UsageError(f"unknown backend {backend!r}", hint=unknown_name_hint(backend, VERIFY))
    facts = bundle.manifest["onnx"]
    max_batch = bundle.max_batch or DEFAULT_MAX_BATCH
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot run anything", hint="give 1 or more")
    over = [size for size in batches or () if size > max_batch]
    if over and facts.get("batch") is None:  # of a fixed batch, verify_runner tells
        raise UsageError(
            f"batch {over[0]} is above the bundle's largest, {max_batch}", hint="export again with a larger --max-batch"
        )
    _check_precision(bundle)
    sources = _sources(bundle, inputs, seed)
    about = {"bundle": subject or str(bundle.path), "onnx_sha256": bundle.onnx_sha256}
    if engine is not None:
        record, candidate, batches = _engine_candidate(bundle, engine, batches)
        about |= {"engine": record.name, "engine_sha256": record.engine_sha256}

    def compared(name: str, runner: Runner, sizes: Sequence[int] | None) -> VerifyReport:
        own_precision = None if engine is not None else BACKENDS[name].precision
        precision = own_precision or facts["precision"]
        return verify_runner(
            reference_runner(bundle, softmax=facts.get("with_softmax", False), threads=threads),
            runner,
            inputs=sources,
            batches=sizes,
            max_batch=max_batch,
            precision=precision,
            tolerance=tolerance_for(precision, rms_rel=tolerance),
            seed=seed,
            subject=about,
            progress=progress,
        )

    name = backend or ONNXRUNTIME
    report = compared(name, candidate or backend_runner(bundle, name, threads=threads), batches)
    if backend is None and candidate is None and facts["precision"] in HALF:
        sizes = batches or [size for size in _HALF_BATCHES if size <= max_batch]
        fixed = facts.get("batch")
        half = backend_runner(bundle, TORCH_HALF, threads=threads)
        report = merged(report, compared(TORCH_HALF, half, sizes if fixed is None else [fixed]))
    if report.verdict != "fail" or engine is not None:  # the blocks that would be looked at are the graph's
        return report
    return dataclasses.replace(report, first_bad_block=_localize(bundle, report, sources[0], threads, progress))


def _check_precision(bundle: Bundle) -> None:
    """Hold the graph's weights to the precision in the manifest, which decides the tolerance.

    Raises:
        BundleError: they are of another precision.
    """
    facts = bundle.manifest["onnx"]
    promised = facts["precision"]
    try:
        found = precision_of(load_model(bundle.read_onnx(), str(bundle.onnx_path), weights=False).graph)
    except RunnerError:  # the runtime will say the same
        return
    if found not in (promised, "unknown") and not (found == "fp32" and facts.get("keep_fp32")):
        raise BundleError(
            f"the graph of {bundle.path} is {found}, its manifest says {promised}", hint="export the bundle again"
        )


def _sources(bundle: Bundle, inputs: Path | None, seed: int) -> list[InputSource]:
    """Random images, and the given ones behind them; an INT8 graph is compared on the given ones alone.

    Its ranges were chosen for images of one kind: what they saturate of random ones is no fault.
    """
    given = None if inputs is None else open_inputs(inputs, bundle.spec.image_size, bundle.preprocessing)
    if bundle.manifest["onnx"]["precision"] == "int8":
        if given is None:
            raise UsageError(
                "an INT8 graph can be compared only on images like those that it was calibrated on",
                hint="give some with --input",
            )
        return [RepeatedInputs(given), given]
    random: InputSource = RandomInputs(bundle.spec.image_size, bundle.preprocessing, seed=seed)
    return [random] if given is None else [random, given]


def _engine_candidate(
    bundle: Bundle, engine: str, batches: Sequence[int] | None
) -> tuple[EngineRecord, Runner, Sequence[int]]:
    """The engine's JSON, its runner, and the batch sizes to compare it at: the given ones, checked, or its own."""
    from evit_deploy.runners.engines import batches_of, check_batches
    from evit_deploy.runners.tensorrt import engine_runner
    from evit_deploy.trt.record import open_engine

    record = open_engine(engine, bundle=bundle)
    check_batches(record, batches or ())
    return record, engine_runner(bundle, record), batches or batches_of(record)


def _localize(
    bundle: Bundle,
    report: VerifyReport,
    source: InputSource,
    threads: int | None,
    progress: Callable[[str], None] | None,
) -> str:
    from evit_deploy.parity.localize import first_bad_block

    if progress is not None:
        progress("looking for the first bad block")
    size = bundle.manifest["onnx"].get("batch") or min(_LOCALIZE_BATCH, bundle.max_batch or _LOCALIZE_BATCH)
    batch = next(iter(source.batches(size, pixels=bundle.manifest["onnx"].get("with_preprocess", False))))
    try:
        return first_bad_block(bundle, batch, report.tolerance, threads=threads)
    except EvitDeployError as error:
        return f"not found: {error.summary}"
