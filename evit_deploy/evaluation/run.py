"""One pass over labelled images: each is decoded once, and the reference and every backend see the same pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from evit_deploy.bundle import Bundle
from evit_deploy.environment import package_version, package_versions, tool_version
from evit_deploy.errors import InputDataError, UsageError
from evit_deploy.evaluation.answers import MAX_K, top_classes
from evit_deploy.evaluation.candidates import REFERENCE, Candidate, choose_batch, find_candidates
from evit_deploy.evaluation.data import LabelledImages, LoadedImage, Unreadable, open_labelled
from evit_deploy.evaluation.report import EvaluatedData, EvaluationReport, EvaluationRow
from evit_deploy.evaluation.state import EvaluationState
from evit_deploy.evaluation.tally import (
    agreeing,
    answered,
    changed_answers,
    class_rows,
    correct_images,
    within_k,
)
from evit_deploy.images.decode import normalize
from evit_deploy.specs import Preprocessing

PROGRESS_LINES = 20  # at most, whatever the number of images


def run_evaluation(
    bundle: Bundle,
    data: Path,
    *,
    backends: Sequence[str],
    batch: int | None = None,
    limit: int | None = None,
    max_top1_drop: float | None = None,
    state: Path | None = None,
    threads: int | None = None,
    engine: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> EvaluationReport:
    """See `evit_deploy.api.evaluate`."""
    report = progress or (lambda text: None)
    _check_options(limit, max_top1_drop, threads)
    candidates, resolved = find_candidates(bundle, backends, threads, engine)
    size = choose_batch(bundle, resolved, batch)
    images = open_labelled(data, bundle.spec, bundle.preprocessing, bundle.class_names, limit)
    with ExitStack() as active:
        for candidate in candidates:
            report(f"loading {candidate.name}")
            active.enter_context(candidate.runner)
            candidate.check_input(bundle.spec.image_size, images.has_pixels)
        report(f"hashing {len(images)} images of {images.name}")
        digest = images.digest()
        versions = _versions()
        k = min(MAX_K, bundle.spec.num_classes)
        kept = active.enter_context(
            EvaluationState(
                state,
                {"bundle": bundle.manifest["manifest_sha256"], "data": digest, "versions": versions},
                [candidate.identity for candidate in candidates],
                len(images),
                k,
                bundle.spec.num_classes,
            )
        )
        _Pass(candidates, images, kept, bundle.preprocessing, size, report).run()
        read = _read_positions(images, kept)
        notes = _notes(bundle, images, kept, state, k, max_top1_drop, len(read))
        return EvaluationReport(
            bundle=str(bundle.path),
            onnx_sha256=bundle.onnx_sha256,
            model=bundle.spec,
            precision=bundle.manifest["onnx"]["precision"],
            class_names=None if bundle.class_names is None else tuple(bundle.class_names),
            data=EvaluatedData(
                str(data),
                images.kind,
                len(images),
                len(read),
                digest,
                tuple((images.image_name(position), reason) for position, reason in sorted(kept.unreadable.items())),
            ),
            k=k,
            max_top1_drop=max_top1_drop,
            rows=tuple(_row(candidate, images, kept, read, max_top1_drop) for candidate in candidates),
            classes=class_rows(
                {candidate.name: kept.answers[candidate.identity][read] for candidate in candidates},
                images.labels[read],
                bundle.class_names,
            ),
            notes=notes,
            versions=versions,
        )


class _Pass:
    """The loop over the images that somebody has not answered yet."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        images: LabelledImages,
        state: EvaluationState,
        preprocessing: Preprocessing,
        batch: int,
        progress: Callable[[str], None],
    ) -> None:
        self._candidates = candidates
        self._images = images
        self._state = state
        self._preprocessing = preprocessing
        self._batch = batch
        self._progress = progress
        self._shown = 0

    def run(self) -> None:
        """Ask every runner for every image; the state has the answers then."""
        pending = self._state.pending()
        positions: list[int] = []
        loaded: list[LoadedImage] = []
        for position, image in self._images.read(pending):
            if isinstance(image, Unreadable):
                self._state.add_unreadable(position, image.reason)
                continue
            positions.append(position)
            loaded.append(image)
            if len(loaded) == self._batch:
                self._answer(positions, loaded)
                positions, loaded = [], []
                self._show(position)
        if loaded:
            self._answer(positions, loaded)

    def _answer(self, positions: Sequence[int], loaded: Sequence[LoadedImage]) -> None:
        stacked = np.stack([image.array for image in loaded])
        pixels = stacked if self._images.has_pixels else None
        images = stacked if pixels is None else normalize(pixels, self._preprocessing)
        for candidate in self._candidates:
            if not self._state.needs(candidate.identity, positions):
                continue
            outputs = candidate.infer(images, pixels, self._batch)
            answers = self._state.answers[candidate.identity]
            top = top_classes(outputs, len(loaded), self._state.classes, answers.shape[1], candidate.name)
            self._state.add_answers(candidate.identity, positions, top)

    def _show(self, position: int) -> None:
        """A line now and then; runners go through the images side by side, so one position stands for all."""
        done = position + 1
        if (done * PROGRESS_LINES) // len(self._images) == self._shown:
            return
        self._shown = (done * PROGRESS_LINES) // len(self._images)
        parts = []
        for candidate in self._candidates:
            top = self._state.answers[candidate.identity][:done]
            asked = [row for row in range(done) if row not in self._state.unreadable]
            share = correct_images(top[asked], self._images.labels[asked]).mean()
            parts.append(f"{candidate.name} {100 * share:.2f} %")
        self._progress(f"{done} of {len(self._images)} images, top-1: {', '.join(parts)}")


def _row(
    candidate: Candidate, images: LabelledImages, state: EvaluationState, read: np.ndarray, allowed: float | None
) -> EvaluationRow:
    """The figures of one runner on the images that could be read."""
    labels = images.labels[read]
    top, reference = state.answers[candidate.identity][read], state.answers[REFERENCE][read]
    is_reference = candidate.name == REFERENCE
    correct = int(correct_images(top, labels).sum())
    lost = int(correct_images(reference, labels).sum()) - correct
    no_answer = int((~answered(top)).sum())
    failures = []
    if no_answer:
        failures.append(f"NaN or Inf for {no_answer} of {len(read)} images")
    if not is_reference and allowed is not None and 100 * lost > allowed * len(read) + 1e-9:
        failures.append(f"top-1 is {100 * lost / len(read):.2f} points below the reference, allowed are {allowed:g}")
    changed = () if is_reference else changed_answers(top, reference, labels, lambda i: images.image_name(int(read[i])))
    return EvaluationRow(
        backend=candidate.name,
        engine=candidate.engine,
        precision=candidate.runner.precision,
        correct=correct,
        top1=correct / len(read),
        topk=int(within_k(top, labels).sum()) / len(read),
        agreement=None if is_reference else int(agreeing(top, reference).sum()) / len(read),
        top1_drop_points=None if is_reference else 100 * lost / len(read),
        no_answer=no_answer,
        changed=changed,
        failures=tuple(failures),
        notes=candidate.runner.notes,
    )


def _read_positions(images: LabelledImages, state: EvaluationState) -> np.ndarray:
    """int64 positions of the images that could be read.

    Raises:
        InputDataError: none could.
    """
    read = np.array([position for position in range(len(images)) if position not in state.unreadable], np.int64)
    if not len(read):
        first = f"{images.image_name(0)}: {state.unreadable[0]}"
        raise InputDataError(
            f"none of the {len(images)} images of {images.name} can be read, first {first}",
            hint="give images that Pillow reads, of the size that the model takes",
        )
    return read


def _check_options(limit: int | None, max_top1_drop: float | None, threads: int | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} images leaves nothing to evaluate", hint="give 1 or more")
    if max_top1_drop is not None and not (math.isfinite(max_top1_drop) and 0 <= max_top1_drop <= 100):
        raise UsageError(
            f"a drop of {max_top1_drop} is none in percentage points", hint="give 0 to 100, for example 0.5"
        )
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot run anything", hint="give 1 or more")


def _notes(
    bundle: Bundle,
    images: LabelledImages,
    state: EvaluationState,
    path: Path | None,
    k: int,
    max_top1_drop: float | None,
    read: int,
) -> tuple[str, ...]:
    notes = list(images.notes)
    if bundle.has_random_weights:
        notes.append("the bundle has random weights: agreement says something, accuracy does not")
    if k < MAX_K:
        notes.append(f"the model has {k} classes: top-{k} stands where top-{MAX_K} would")
    if state.resumed:
        notes.append(f"continued from {path}: {state.resumed} of {len(images)} images were done")
    if max_top1_drop and 100 / read > max_top1_drop:
        notes.append(
            f"one of {read} images is {100 / read:.2g} points: a drop of {max_top1_drop:g} allows not one to be lost"
        )
    return tuple(notes)


def _versions() -> dict[str, str]:
    packages = {**package_versions(), "pillow": package_version("pillow")}
    return {"evit-deploy": tool_version(), **{name: text for name, text in packages.items() if text is not None}}
