"""`run_bench`: which backend is faster on this machine, by how much, and does it still compute the same?

Every backend runs in processes of its own, a few generations of them. Within a generation all processes are alive and
take turns, in shuffled order, so that each round measures every backend within a second or so of the others. What is
compared are the ratios within rounds; the spread between processes decides how sure they are. One backend, the
baseline, takes part twice: what two identical arms differ by (A/A) is what this measurement cannot resolve.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evit_deploy.backends import REFERENCE, Backend, deployable_backends, resolve_backends
from evit_deploy.bench.assemble import AA_SUFFIX, Subject, assemble_rows, overridden
from evit_deploy.bench.plan import Effort
from evit_deploy.bench.process import WorkerProcess, WorkerSettings
from evit_deploy.bench.report import BenchReport
from evit_deploy.bench.schedule import Schedule
from evit_deploy.bench.select import select_backends
from evit_deploy.bench.state import ArmState, Lost
from evit_deploy.bench.statistics import MIN_DIFFERENCE, MIN_PROCESSES, RESAMPLES, UNSTABLE_SPREAD
from evit_deploy.bench.workdir import working_folder
from evit_deploy.environment import collect_environment, usable_cores
from evit_deploy.errors import BundleError, UsageError, unknown_name_hint
from evit_deploy.images.sources import InputSource, RandomInputs, RepeatedInputs, open_inputs

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

DEFAULT_BATCHES = (1, 8, 64)
MAX_BUFFERS = 8
CHECKED_IMAGES = 64  # of the user's images, whatever the batch size: one image says little about the others
CHECKED_BYTES = 256 * 1024**2  # of these as FP32
BUFFER_TARGET_BYTES = 64 * 1024**2  # inputs rotate through more than a last-level cache where that is cheap
# What an INT8 graph saturates of images unlike those of its calibration is no fault.
UNCHECKED_ON_RANDOM = {"int8": "random images say nothing of an INT8 graph: give some like its own with --input"}
_THREAD_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY", "KMP_BLOCKTIME", "KMP_AFFINITY")


def run_bench(
    bundle: Bundle,
    *,
    batches: Sequence[int] | None = None,
    backends: Sequence[str | Backend] | None = None,
    engine: str | None = None,
    baseline: str | None = None,
    duration_s: float = 60.0,
    threads: int | None = None,
    inputs: Path | None = None,
    tolerance: float | None = None,
    select: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    already_elapsed_s: float = 0.0,
    effort: Effort | None = None,
    reference: Backend = REFERENCE,
) -> BenchReport:
    """Measure the backends of a bundle against each other.

    Args:
        bundle: opened; its hashes have been checked.
        batches: batch sizes, in any order; None stands for those of 1, 8 and 64 that the bundle takes.
        backends: names (see `backends.BACKENDS`), or backends of the caller's own; None stands for those measured by
            default.
        engine: what backend "tensorrt" runs, by name or path; None stands for the newest that fits this machine.
        baseline: the backend that ratios are against; None stands for the first that can run.
        duration_s: time budget of the whole call, starting processes and compilation included.
        threads: CPU threads of each backend; None stands for all usable cores.
        inputs: a .npy file, an image or a folder of images to run and compare on; None stands for seeded random ones.
        tolerance: RMS-relative error that a row may have; None stands for that of its precision.
        select: also name the fastest backend within `tolerance`; then a row fails only where it is over both limits.
        seed: of the inputs, the shuffling and the bootstrap.
        progress: called with one line per step.
        already_elapsed_s: part of the budget that was spent before the call.
        effort: how much to measure where the budget allows; None stands for the defaults.
        reference: whose outputs are the truth.

    Returns:
        A report with one row per backend and batch size, those that could not run among them.

    Raises:
        UsageError: a batch size the graph does not take, an unknown backend, a budget that is no positive number, a
            selection without a tolerance.
        InputDataError: `inputs` is not usable.
        BundleError: the bundle was replaced meanwhile, so that rows would mix two models.
    """
    started = time.monotonic() - already_elapsed_s
    if select and tolerance is None:
        raise UsageError("selecting a backend needs a tolerance", hint="for example --tolerance 1e-2")
    choose = None if tolerance is None else overridden(tolerance, only_widen=select)
    candidates = deployable_backends(bundle, engine) if select and backends is None else backends
    arms = resolve_backends(candidates, bundle, engine)
    sizes = check_batches(
        default_batches(bundle) if batches is None else batches,
        max_batch=bundle.max_batch,
        fixed_batch=fixed_batch(bundle),
    )
    threads = threads if threads is not None else usable_cores()
    _check_positive("duration_s", duration_s)
    _check_positive("threads", threads)
    states, base = make_states(arms, sizes, baseline, bundle)
    truth = ArmState(reference.name, reference)
    identity = _identities(bundle)
    given = None if inputs is None else open_inputs(inputs, bundle.spec.image_size, bundle.preprocessing)
    environment = {**collect_environment(), **_conditions(threads), "load_average_start": _load_average()}
    with working_folder() as workdir:
        settings = WorkerSettings(bundle.path.resolve(), workdir, threads)
        files = _input_files(bundle, given, seed, workdir)
        schedule = Schedule(
            states,
            truth,
            lambda arm, label: WorkerProcess(arm, settings, label),
            make_inputs=files,
            make_checks=files.checks,
            batches=sizes,
            duration_s=duration_s,
            started=started,
            seed=seed,
            progress=progress,
            effort=effort,
        )
        schedule.run()
        if _identities(bundle) != identity:
            raise BundleError(f"{bundle.path} was replaced during the benchmark", hint="run it again")
        unchecked = UNCHECKED_ON_RANDOM if given is None else {}
        subject = Subject(sizes, threads, bundle.onnx_sha256, seed, choose, unchecked)
        rows, aa = assemble_rows(states, truth, base, subject)
    selection = select_backends(states, rows, aa, tolerance, seed) if select and tolerance is not None else None
    environment["load_average_end"] = _load_average()
    for state in (truth, *states):
        environment["versions"] = {**environment["versions"], **state.versions}
    return BenchReport(
        bundle=bundle.path.name,
        model=bundle.spec.name,
        onnx_sha256=bundle.onnx_sha256,
        rows=rows,
        aa=aa,
        environment=environment,
        protocol={
            **_protocol(schedule, base, sizes, duration_s, seed, time.monotonic() - started),
            "transfers": describe_transfers(arms),
            "engines": {arm.name: Path(arm.engine).stem for arm in arms if arm.engine is not None},
            "inputs": f"random, seed {seed}" if given is None else given.name,
            "tolerance_rms_rel": tolerance,
        },
        selection=selection,
    )


def check_batches(batches: Sequence[int], *, max_batch: int | None, fixed_batch: int | None) -> list[int]:
    """The batch sizes, ascending.

    Raises:
        UsageError: none, one twice, one below 1, above `max_batch`, or other than `fixed_batch`.
    """
    allowed = f"this bundle takes 1 to {max_batch}" if max_batch is not None else "give numbers of at least 1"
    if fixed_batch is not None:
        allowed = f"this bundle's batch size is fixed to {fixed_batch}"
    if not batches:
        raise UsageError("no batch size to measure", hint=allowed)
    for batch in batches:
        wrong = isinstance(batch, bool) or not isinstance(batch, int) or batch < 1
        too_large = not wrong and max_batch is not None and batch > max_batch
        if wrong or too_large or (fixed_batch is not None and batch != fixed_batch):
            raise UsageError(f"batch size {batch!r} cannot be measured", hint=allowed)
        if list(batches).count(batch) > 1:
            raise UsageError(f"batch size {batch} is given twice", hint="name each batch size once")
    return sorted(batches)


def default_batches(bundle: Bundle) -> tuple[int, ...]:
    """The only batch size of a fixed graph, else 1, 8 and 64 as far as the bundle takes them."""
    fixed = fixed_batch(bundle)
    if fixed is not None:
        return (fixed,)
    return tuple(size for size in DEFAULT_BATCHES if bundle.max_batch is None or size <= bundle.max_batch)


def fixed_batch(bundle: Bundle) -> int | None:
    """The only batch size of a graph exported with one; None for a dynamic one."""
    batch = bundle.manifest["onnx"].get("batch")
    return batch if isinstance(batch, int) else None


def make_states(
    arms: Sequence[Backend], batches: Sequence[int], baseline: str | None, bundle: Bundle | None = None
) -> tuple[list[ArmState], ArmState]:
    """The states of all arms with the A/A copy of the baseline, and the baseline's.

    An arm that cannot run on this machine, cannot run this bundle, or does not take a batch size, is lost from the
    start. The baseline is the named arm, else the first one that can run.

    Raises:
        UsageError: `baseline` is not among the arms.
    """
    states = [ArmState(arm.name, arm) for arm in arms]
    for state in states:
        reason = state.arm.why_not(bundle)
        if reason is not None:
            state.give_up(batches, Lost("skipped", reason))
        for batch in batches:
            reason = state.arm.why_not_batch(batch)
            if reason is not None:
                state.give_up([batch], Lost("skipped", reason))
    by_name = {state.name: state for state in states}
    if baseline is not None and baseline not in by_name:
        raise UsageError(f"the baseline {baseline!r} is not measured", hint=unknown_name_hint(baseline, by_name))
    able = [state for state in states if state.takes(batches[0])]
    base = by_name[baseline] if baseline is not None else (able or states)[0]
    copy = ArmState(base.name + AA_SUFFIX, base.arm, lost=dict(base.lost))
    states.insert(states.index(base) + 1, copy)
    return states, base


class InputFiles:
    """Images as .npy files, each batch size written when it is first asked for.

    Args:
        source: of batches of any size.
        folder: where the files are written.
        pixels: also write the uint8 images, for graphs that preprocess by themselves; the source must have them.
        given: images of the user's, of which more are compared than a batch has.
    """

    def __init__(
        self, source: InputSource, folder: Path, *, pixels: bool = True, given: InputSource | None = None
    ) -> None:
        self._source = source
        self._folder = folder
        self._pixels = pixels
        self._given = given
        self._commands: dict[int, dict[str, Any]] = {}
        self._checks: dict[int, dict[str, Any] | None] = {}

    def __call__(self, batch: int) -> dict[str, Any]:
        """The arguments of a worker's `prepare` command for a batch size."""
        if batch not in self._commands:
            drawn = next(iter(self._source.batches(batch, pixels=self._pixels)))
            buffers = max(2, min(MAX_BUFFERS, BUFFER_TARGET_BYTES // drawn.images.nbytes))
            self._commands[batch] = {**self._write(str(batch), drawn.images, drawn.pixels), "buffers": buffers}
        return self._commands[batch]

    def checks(self, batch: int) -> dict[str, Any] | None:
        """The arguments of `check` for a batch size: the first of the given images, the last batch filled up with the
        first ones again; None where one batch has them all.
        """
        if batch not in self._checks:
            self._checks[batch] = self._more(batch)
        return self._checks[batch]

    def _more(self, batch: int) -> dict[str, Any] | None:
        if self._given is None:
            return None
        drawn = next(iter(self._given.batches(CHECKED_IMAGES, pixels=self._pixels)))
        count = min(len(drawn), max(1, CHECKED_BYTES // drawn.images[:1].nbytes))
        if count <= batch:
            return None
        calls = -(-count // batch)
        rows = np.resize(np.arange(count), calls * batch)
        pixels = None if drawn.pixels is None else drawn.pixels[rows]
        return {**self._write(f"-check{batch}", drawn.images[rows], pixels), "calls": calls}

    def _write(self, label: str, images: np.ndarray, pixels: np.ndarray | None) -> dict[str, str]:
        """The paths of the files by argument."""
        paths = {"images": self._folder / f"images{label}.npy"}
        np.save(paths["images"], np.ascontiguousarray(images, dtype=np.float32))
        if pixels is not None:
            paths["pixels"] = self._folder / f"pixels{label}.npy"
            np.save(paths["pixels"], pixels)
        return {key: str(path) for key, path in paths.items()}


def _input_files(bundle: Bundle, given: InputSource | None, seed: int, folder: Path) -> InputFiles:
    if given is None:
        return InputFiles(RandomInputs(bundle.spec.image_size, bundle.preprocessing, seed=seed), folder)
    preprocesses = bool(bundle.manifest["onnx"].get("with_preprocess", False))
    return InputFiles(RepeatedInputs(given), folder, pixels=preprocesses, given=given)


def describe_transfers(arms: Sequence[Backend]) -> str:
    """What is copied between host and device, of each arm where they differ."""
    by_text: dict[str, list[str]] = {}
    for arm in arms:
        by_text.setdefault(arm.transfers, []).append(arm.name)
    if len(by_text) == 1:
        return next(iter(by_text))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in by_text.items())


def _protocol(
    schedule: Schedule, base: ArmState, batches: Sequence[int], duration_s: float, seed: int, elapsed_s: float
) -> dict[str, Any]:
    idle_share = schedule.idle_cpu_s / schedule.idle_s if schedule.idle_s else 0.0
    return {
        "duration_s": duration_s,
        "elapsed_s": elapsed_s,
        "baseline": base.name,
        "batches": list(batches),
        "seed": seed,
        "processes": schedule.processes_done,
        "min_processes": MIN_PROCESSES,
        **asdict(schedule.effort),
        "order": "processes, first calls and rounds shuffled; batch sizes ascending within each process",
        "interleaving": "all processes of a generation alive, one measuring at a time",
        "latency": "one call of the runner, NumPy array in host memory to NumPy array in host memory",
        "throughput": "batch size / mean latency",
        "peak_memory": "peak resident set size of the backend's process up to and including this batch size: "
        "interpreter, libraries, weights, compilation and input buffers",
        "ratio": "geometric mean over processes of the median over rounds of baseline latency / latency",
        "interval": "95 %, bootstrap of processes and of rounds within them, widened for the number of processes",
        "bootstrap_resamples": RESAMPLES,
        "min_difference": MIN_DIFFERENCE,
        "unstable_spread": UNSTABLE_SPREAD,
        "idle_cpu_share": idle_share,
    }


def _conditions(threads: int) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command_line": list(sys.argv),
        "threads": threads,
        "thread_variables": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        "governor": _governor(),
    }


def _governor() -> str | None:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _load_average() -> list[float] | None:
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):
        return None


def _identities(bundle: Bundle) -> list[tuple[int, int, int, int] | None]:
    """What tells the bundle's two large files from their successors; None for one that is gone."""
    found: list[tuple[int, int, int, int] | None] = []
    for path in (bundle.onnx_path, bundle.weights_path):
        try:
            status = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} must be a positive number, got {value}")
