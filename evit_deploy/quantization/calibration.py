"""Images through the FP32 graph: one histogram for each tensor that a layer works on, a few images at a time.

Nothing of an image is kept but counts, so that ten thousand need the memory of a hundred. The first few are kept for
`sensitivity`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from evit_deploy.errors import InputDataError
from evit_deploy.images.sources import InputBatch, InputSource
from evit_deploy.onnx.quantize import Layer, with_layer_inputs
from evit_deploy.quantization.histogram import Histogram
from evit_deploy.runners.ort import OnnxRuntimeRunner

CHUNK_IMAGES = 4  # all layers' inputs of one chunk are in memory at once
KEPT_IMAGES = 16  # for sensitivity
PROGRESS_IMAGES = 256  # at most so many between two lines of progress
FEW_IMAGES = 32  # below it the ranges say more about the images than about the model
_WANTED = "give some hundred images of the kind that the model will see"


@dataclass(frozen=True)
class Calibration:
    """What the images showed.

    Attributes:
        source: name of the images' source.
        images: how many there were.
        digest: SHA-256 of what the network was fed with.
        histograms: by name of the activation tensor.
        kept: the first images, as feeds of one batch each.
        highest: the largest magnitude among the fed pixels.
        notes: what a user should know about the images.
    """

    source: str
    images: int
    digest: str
    histograms: dict[str, Histogram]
    kept: tuple[np.ndarray, ...]
    highest: float
    notes: tuple[str, ...] = field(default=())


def calibrate(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    source: InputSource,
    progress: Callable[[str], None],
    threads: int | None = None,
) -> Calibration:
    """Run every image of a source once.

    Args:
        model: an FP32 graph with one input: images float32 [B, 3, S, S] or uint8 [B, S, S, 3].
        layers: of the graph.
        source: the images.
        progress: called with a line now and then.
        threads: of ONNX Runtime.

    Raises:
        InputDataError: no images, unreadable ones, constant ones, or such that the network gives NaN or infinity.
        RunnerError: ONNX Runtime cannot run the graph.
    """
    histograms = {layer.activation: Histogram() for layer in layers}
    users = {layer.activation: layer.node for layer in reversed(layers)}
    images = _Images(source.name)
    kept: list[np.ndarray] = []
    shown = 0
    with OnnxRuntimeRunner(
        with_layer_inputs(model, layers).SerializeToString(), threads=threads, memory_pattern=False
    ) as runner:
        spec = runner.inputs[0]
        fixed = spec.shape[0]
        for batch in source.batches(fixed or CHUNK_IMAGES, pixels=spec.dtype == "uint8"):
            fed = _feed(batch, spec.dtype)
            images.add(fed)
            feed = {spec.name: _filled(fed, fixed)}
            if sum(map(len, kept)) < KEPT_IMAGES:
                kept.append(feed[spec.name])
            found = {**feed, **runner.infer(feed)}
            for name, histogram in histograms.items():
                value = found[name] if fixed is None else _of_images(found[name], len(fed), fixed)
                try:
                    histogram.add(value)
                except ValueError as error:
                    raise InputDataError(
                        f"{source.name}: {users[name]} works on NaN or infinity for one of {', '.join(batch.labels)}",
                        hint="look at these images, and at the model with evit-deploy verify",
                    ) from error
            if images.count >= shown:
                progress(f"calibrating: {images.count} images")
                shown = images.count + min(images.count, PROGRESS_IMAGES)
    images.check()
    return Calibration(
        source.name, images.count, images.digest, histograms, tuple(kept), images.highest, tuple(images.notes())
    )


class _Images:
    """What is remembered of all images: how many, their hash, whether they differ."""

    def __init__(self, source: str) -> None:
        self.count = 0
        self.highest = 0.0
        self._source = source
        self._hash = hashlib.sha256()
        self._first: str | None = None
        self._all_equal = True
        self._constant = 0

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, fed: np.ndarray) -> None:
        self.highest = max(self.highest, float(np.abs(fed).max()))
        for image in fed:
            own = hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()
            self._first = self._first or own
            self._all_equal &= own == self._first
            plane_axes = (1, 2) if fed.dtype == np.float32 else (0, 1)
            self._constant += not np.ptp(image, axis=plane_axes).any()
            self._hash.update(own.encode())
            self.count += 1

    def check(self) -> None:
        if self.count == 0:
            raise InputDataError(f"{self._source} holds no images", hint=_WANTED)
        if self._constant == self.count:
            raise InputDataError(f"{self._source}: every one of {self.count} images is a single colour", hint=_WANTED)
        if self.count > 1 and self._all_equal:
            raise InputDataError(f"{self._source}: all {self.count} images are the same", hint=_WANTED)

    def notes(self) -> list[str]:
        found = []
        if self.count < FEW_IMAGES:
            found.append(f"calibrated on {self.count} images only: {_WANTED}")
        if self._constant:
            found.append(f"{self._constant} of {self.count} calibration images are a single colour")
        return found


def _feed(batch: InputBatch, dtype: str) -> np.ndarray:
    if dtype == "uint8":
        assert batch.pixels is not None
        return batch.pixels
    return batch.images


def _filled(fed: np.ndarray, fixed: int | None) -> np.ndarray:
    """Repeats of the last image up to the batch that a fixed graph takes."""
    if fixed is None or len(fed) == fixed:
        return fed
    return np.concatenate([fed, np.repeat(fed[-1:], fixed - len(fed), axis=0)])


def _of_images(value: np.ndarray, count: int, fixed: int) -> np.ndarray:
    """The part of a layer's input that belongs to the first images; rows of one image stand together."""
    return value[: len(value) * count // fixed]
