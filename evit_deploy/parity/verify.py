"""Run a candidate against the reference on every input, batch size and order, and report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from evit_deploy.constants import DEFAULT_MAX_BATCH, PROJECT_SEED
from evit_deploy.environment import package_versions, tool_version
from evit_deploy.errors import EvitDeployError, LimitError, MissingDependencyError, RunnerError, UsageError
from evit_deploy.images.sources import InputBatch, InputSource, RandomInputs
from evit_deploy.parity.compare import Comparison, Spread
from evit_deploy.parity.gate import Tolerance, tolerance_for
from evit_deploy.parity.report import VerifyReport
from evit_deploy.runners.base import BuiltNotRunError, Runner, TensorSpec
from evit_deploy.runners.feeds import describe
from evit_deploy.specs import Preprocessing

ODD_BATCH = 3
OPTIMAL_BATCH = 8
REFERENCE_CHUNK_ROWS = 8  # the reference's rows are independent; in small chunks its memory is too
_CANNOT_RUN = (RunnerError, MissingDependencyError, LimitError)


def default_batches(max_batch: int = DEFAULT_MAX_BATCH) -> tuple[int, ...]:
    """The smallest, an odd, the optimal and the largest batch."""
    return tuple(sorted({size for size in (1, ODD_BATCH, OPTIMAL_BATCH, max_batch) if size <= max_batch}))


def verify_runner(
    reference: Runner,
    candidate: Runner,
    *,
    inputs: Sequence[InputSource] | None = None,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    batches: Sequence[int] | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    precision: str | None = None,
    tolerance: Tolerance | None = None,
    seed: int = PROJECT_SEED,
    subject: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare a candidate with the reference; both are activated here and released at the end.

    Args:
        reference: takes float32 [N,3,H,W]; any batch size.
        candidate: takes float images [N,3,H,W] or uint8 [N,H,W,3] in its one input.
        inputs: where images come from; None stands for seeded random ones.
        image_size: pixels; needed only where neither runner declares its input's height.
        preprocessing: the model's, for random pixels.
        batches: batch sizes for generated inputs; None stands for `default_batches(max_batch)`, or for the one
            batch size of a fixed graph.
        max_batch: the largest batch size the candidate is built for.
        precision: row of the tolerance table; None reads it from the candidate's graph.
        tolerance: overrides the table.
        seed: of random inputs and permutations.
        subject: what is verified, copied into the report.
        progress: called with one line per batch.

    Returns:
        A report whose verdict is "pass" only if at least one row was compared and everything agreed.

    Raises:
        UsageError: a batch size that the graph does not take, or an unknown precision.
        InputDataError: an image of a source is unreadable.
        EvitDeployError: the reference itself cannot run.
    """
    if reference is candidate:
        raise ValueError("reference and candidate are the same runner")
    if seed < 0:
        raise UsageError(f"a seed is not negative, got {seed}", hint="give 0 or a positive number")
    run = _Run(reference, candidate, seed, progress or (lambda text: None))
    with ExitStack() as active:
        active.enter_context(reference)
        try:
            active.enter_context(candidate)
        except _CANNOT_RUN as error:
            run.activation_error = error
        run.tolerance = tolerance or tolerance_for(precision or _graph_precision(candidate, run.activation_error))
        fixed = None if run.activation_error else _fixed_batch(candidate)
        sizes = _batch_sizes(batches, max_batch, fixed)
        if inputs is None:
            inputs = (RandomInputs(image_size or _image_size(reference, candidate, run), preprocessing, seed=seed),)
        for source in inputs:
            run.compare_source(source, sizes, fixed)
        return VerifyReport(
            reference=reference.name,
            candidate=candidate.name,
            precision=precision or _graph_precision(candidate, run.activation_error),
            executed_precision=candidate.precision,
            tolerance=run.tolerance,
            seed=seed,
            rows=tuple(
                comparison.row(run.tolerance, spread.value, candidate_ran=run.candidate_ran)
                for comparison, spread in run.comparisons
            ),
            failures=tuple(run.failures()),
            notes=tuple(run.notes()),
            versions=_versions(),
            subject=subject or {},
        )


class _Run:
    """The state of one verification."""

    def __init__(self, reference: Runner, candidate: Runner, seed: int, progress: Callable[[str], None]) -> None:
        self.reference = reference
        self.candidate = candidate
        self.tolerance = tolerance_for("fp32")
        self.activation_error: EvitDeployError | None = None
        self.candidate_ran = False
        self.comparisons: list[tuple[Comparison, Spread]] = []
        self._spreads: list[tuple[str, str, Spread]] = []
        self._generator = np.random.default_rng(seed)
        self._progress = progress

    def compare_source(self, source: InputSource, sizes: Sequence[int], fixed: int | None) -> None:
        """Every batch of one source; a source of given images runs at one size, a generated one at each."""
        if not source.generated and sizes:
            sizes = [fixed or max((size for size in sizes if size <= OPTIMAL_BATCH), default=min(sizes))]
        spreads: dict[str, Spread] = {}
        for size in sizes:
            self._progress(f"{source.name}: batch {size}")
            if self.activation_error is not None:
                self._record_error(self._new(source, size, False, "-", Spread()), self.activation_error)
                return
            self._compare_batches(source, size, fixed, spreads)
        self._spreads += [(source.name, output, spread) for output, spread in spreads.items()]

    def failures(self) -> Iterator[str]:
        """Findings that belong to no single row."""
        if not any(comparison.said_anything for comparison, _ in self.comparisons):
            yield "nothing was compared"
        for source, output, spread in self._spreads:
            fault = spread.fault(self.tolerance)
            if fault:
                yield f"{output!r} on {source}: {fault}"

    def notes(self) -> Iterator[str]:
        measured = [spread for _, _, spread in self._spreads]
        if measured and all(spread.value is None for spread in measured):
            yield "all compared images are the same: whether the output depends on the image was not seen"
        graph = getattr(self.candidate, "graph_precision", self.candidate.precision)
        if self.activation_error is None and graph != self.candidate.precision:
            yield (
                f"the graph is {graph}, but {self.candidate.name} computed in {self.candidate.precision}: "
                f"overflow and rounding of real {graph} hardware were not seen"
            )
        yield from self.candidate.notes

    def _compare_batches(self, source: InputSource, size: int, fixed: int | None, spreads: dict[str, Spread]) -> None:
        found: dict[tuple[str, bool], Comparison] = {}

        def comparison(output: str, permuted: bool) -> Comparison:
            if (output, permuted) not in found:
                spread = spreads.setdefault(output, Spread())
                found[output, permuted] = self._new(source, size, permuted, output, spread)
            return found[output, permuted]

        specs = self.candidate.inputs
        for index, batch in enumerate(source.batches(size, pixels=[spec.dtype for spec in specs] == ["uint8"])):
            expected = self._infer_reference(batch.images)
            unfit = _input_fault(specs, batch)
            if unfit:
                for output in expected:
                    comparison(output, False).faults.append(unfit)
                continue
            for output, value in expected.items():
                spreads.setdefault(output, Spread()).add(batch.images, value)
            plain: dict[str, np.ndarray] | None = None
            for permuted in (False, True):
                if permuted and (len(batch) < 2 or (index > 0 and not source.generated)):
                    continue
                order = self._permutation(len(batch)) if permuted else np.arange(len(batch))
                try:
                    got = self._infer_candidate(batch, order, fixed)
                except _CANNOT_RUN as error:
                    for output in expected:
                        self._record_error(comparison(output, permuted), error)
                    continue
                names = _name_fault(list(expected), list(got))
                for output, value in expected.items():
                    target = comparison(output, permuted)
                    if names:
                        target.faults.append(names)
                    if output in got:
                        earlier = plain.get(output) if permuted and plain else None
                        target.add(value, got[output], batch.labels, self.tolerance, earlier)
                plain = plain or got

    def _new(self, source: InputSource, size: int, permuted: bool, output: str, spread: Spread) -> Comparison:
        pair = f"{self.reference.name} -> {self.candidate.name}"
        comparison = Comparison(pair, source.name, size, permuted, output)
        self.comparisons.append((comparison, spread))
        return comparison

    def _infer_reference(self, images: np.ndarray) -> dict[str, np.ndarray]:
        name = self.reference.inputs[0].name
        starts = range(0, len(images), REFERENCE_CHUNK_ROWS)
        parts = [self.reference.infer({name: images[start : start + REFERENCE_CHUNK_ROWS]}) for start in starts]
        return {output: np.concatenate([part[output] for part in parts]) for output in parts[0]}

    def _infer_candidate(self, batch: InputBatch, order: np.ndarray, fixed: int | None) -> dict[str, np.ndarray]:
        """The candidate's outputs for the batch fed in `order`, put back into the batch's own order."""
        spec, rows = self.candidate.inputs[0], len(batch)
        if spec.dtype == "uint8":
            assert batch.pixels is not None, f"{batch.labels[0]}: a source asked for pixels gave none"
            feed = batch.pixels[order]
        else:
            feed = batch.images[order]
            if spec.dtype == "float16":
                feed = feed.astype(np.float16)
        if fixed is not None and rows < fixed:
            feed = np.concatenate([feed, np.repeat(feed[-1:], fixed - rows, axis=0)])
        outputs = self.candidate.infer({spec.name: np.ascontiguousarray(feed)})
        self.candidate_ran = True
        return {name: _restore(value, order, len(feed)) for name, value in outputs.items()}

    def _record_error(self, comparison: Comparison, error: EvitDeployError) -> None:
        text = f"{error.summary} ({error.hint})" if error.hint else error.summary
        comparison.error = text if isinstance(error, BuiltNotRunError) else f"could not run: {text}"
        comparison.error_is_missing = isinstance(error, (MissingDependencyError, LimitError))

    def _permutation(self, rows: int) -> np.ndarray:
        """A random order that is no rotation, for a rotation keeps every row's neighbours."""
        if rows == 2:
            return np.array([1, 0])
        while True:
            order = self._generator.permutation(rows)
            if len(np.unique((order - np.arange(rows)) % rows)) > 1:
                return order


def _restore(value: np.ndarray, order: np.ndarray, fed: int) -> np.ndarray:
    """Undo `order` and drop padding; an array that does not hold one entry per fed row is left for the shape check."""
    if value.ndim == 0 or len(value) != fed:
        return value
    restored = np.empty((len(order), *value.shape[1:]), dtype=value.dtype)
    restored[order] = value[: len(order)]
    return restored


def _input_fault(specs: Sequence[TensorSpec], batch: InputBatch) -> str:
    """Why the model does not take these images, or an empty string."""
    if len(specs) != 1:
        return f"the model has {len(specs)} inputs ({', '.join(spec.name for spec in specs)}), expected one"
    spec = specs[0]
    if spec.dtype not in ("float32", "float16", "bfloat16", "uint8"):
        return f"input {spec.name!r} has dtype {spec.dtype}, expected float32, float16, bfloat16 or uint8"
    images = batch.images if batch.pixels is None or spec.dtype != "uint8" else batch.pixels
    expected = images.shape[1:]
    fits = len(spec.shape) == images.ndim and all(
        got is None or got == want for got, want in zip(spec.shape[1:], expected, strict=True)
    )
    return "" if fits else f"shape of the input differs: the model takes {describe(spec)}, expected {list(expected)}"


def _fixed_batch(candidate: Runner) -> int | None:
    specs = candidate.inputs
    return specs[0].shape[0] if specs and specs[0].shape else None


def _name_fault(expected: Sequence[str], got: Sequence[str]) -> str:
    missing = [name for name in expected if name not in got]
    surplus = [name for name in got if name not in expected]
    if missing:
        return f"output {missing[0]!r} is missing; the model has: {', '.join(got) or 'no outputs'}"
    if surplus:
        return f"surplus output {surplus[0]!r}; expected only: {', '.join(expected)}"
    return ""


def _batch_sizes(batches: Sequence[int] | None, max_batch: int, fixed: int | None) -> list[int]:
    if batches is None:
        return [fixed] if fixed is not None else list(default_batches(max_batch))
    sizes = list(dict.fromkeys(int(size) for size in batches))
    if any(size < 1 for size in sizes):
        raise UsageError(f"a batch has at least one image, got {min(sizes)}", hint="give positive batch sizes")
    if fixed is not None and any(size != fixed for size in sizes):
        raise UsageError(
            f"the graph has a fixed batch of {fixed}, got {', '.join(map(str, sizes))}",
            hint=f"give batch {fixed}, or export with a dynamic batch",
        )
    return sizes


def _image_size(reference: Runner, candidate: Runner, run: _Run) -> int:
    shapes = [reference.inputs[0].shape]  # first: a graph of another size must fail, not set the size
    if run.activation_error is None:
        shapes.append(candidate.inputs[0].shape)
    sizes = [shape[2] for shape in shapes if len(shape) == 4 and shape[2] is not None]
    if not sizes:
        raise ValueError("neither runner declares the height of its input: give image_size")
    return sizes[0]


def _graph_precision(candidate: Runner, activation_error: EvitDeployError | None) -> str:
    """The precision whose tolerance applies; a candidate that cannot run is compared with nothing."""
    if activation_error is not None:
        return "fp32"
    return str(getattr(candidate, "graph_precision", candidate.precision))


def _versions() -> dict[str, str]:
    packages = {name: version for name, version in package_versions().items() if version is not None}
    return {"evit-deploy": tool_version(), "python": platform.python_version(), **packages}
