"""Measuring a bundle: its weights in FP32 on the CPU, on images that are streamed in small batches."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from evit_deploy.bundle import Bundle
from evit_deploy.environment import tool_version
from evit_deploy.errors import InputDataError, UsageError
from evit_deploy.headroom.digest import weights_digest
from evit_deploy.headroom.limits import FP16
from evit_deploy.headroom.report import HeadroomReport, MeasuredImages
from evit_deploy.headroom.storage import prepare_storage, store_report
from evit_deploy.headroom.watch import Watch
from evit_deploy.images.sources import InputBatch, InputSource, open_inputs
from evit_deploy.models import load_model
from evit_deploy.models.fused import fused_model

DEFAULT_BATCH = 4
DEFAULT_MARGIN_BITS = 1.0  # a factor of two between what the images reached and the limit
FEW_IMAGES = 16
NORMALIZED_LIMIT = 20.0  # images normalized by any usual mean and std stay far below; pixel values do not
REPORT_EVERY_S = 2.0


def measure_headroom(
    bundle: Bundle,
    images: Path,
    *,
    batch: int = DEFAULT_BATCH,
    margin_bits: float = DEFAULT_MARGIN_BITS,
    limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> HeadroomReport:
    """Run every image through the fused model in FP32, and store how large its values became.

    Args:
        bundle, images, batch, margin_bits, limit, progress: see `evit_deploy.api.headroom`.
    """
    _check_options(batch, margin_bits, limit)
    report_progress = progress or (lambda text: None)
    spec = bundle.spec
    source = open_inputs(images, spec.image_size, bundle.preprocessing)
    prepare_storage(bundle)
    state_dict = bundle.load_state_dict()
    digest = weights_digest(state_dict)
    report_progress(f"measuring the images of {source.name}")
    watch = Watch(fused_model(load_model(spec, state_dict), spec))
    seen = _Seen(source.name)
    reported_at = time.monotonic()
    for part in _batches(source, batch, limit):
        seen.add(part)
        watch.measure(torch.from_numpy(part.images), part.labels)
        if time.monotonic() - reported_at >= REPORT_EVERY_S:
            reported_at = time.monotonic()
            report_progress(f"{seen.count} images measured")
    seen.check()
    rows = sorted(watch.rows(), key=lambda row: row.margin_bits(FP16))
    report = HeadroomReport(
        bundle=str(bundle.path),
        model=spec.to_json(),
        weights_sha256=digest,
        images=seen.record(),
        margin_bits=margin_bits,
        blocks=watch.blocks,
        rows=tuple(rows),
        notes=tuple(_notes(bundle, seen)),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"evit_deploy": tool_version(), "torch": torch.__version__},
    )
    store_report(report, bundle)
    return report


class _Seen:
    """The images that went through, as far as a report needs them."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self.of_one_colour = 0
        self.largest = 0.0
        self._digest = hashlib.sha256()

    def add(self, batch: InputBatch) -> None:
        for image in batch.images:
            self.count += 1
            self.of_one_colour += bool((np.ptp(image, axis=(1, 2)) == 0).all())
            self.largest = max(self.largest, float(np.abs(image).max()))
            self._digest.update(np.ascontiguousarray(image).tobytes())

    def check(self) -> None:
        """Refuse images that say nothing of real ones.

        Raises:
            InputDataError: every image has a single colour.
        """
        if self.of_one_colour == self.count:
            which = "the only image" if self.count == 1 else f"each of the {self.count} images"
            raise InputDataError(f"{which} in {self.source} is of one colour", hint="give images as the model will see")

    def record(self) -> MeasuredImages:
        return MeasuredImages(self.source, self.count, self._digest.hexdigest())


def _check_options(batch: int, margin_bits: float, limit: int | None) -> None:
    if batch < 1:
        raise UsageError(f"a batch of {batch} holds no image", hint="give 1 or more")
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} leaves no image", hint="give 1 or more")
    if not (math.isfinite(margin_bits) and margin_bits >= 0):
        raise UsageError(f"a margin of {margin_bits} bits is none", hint="give 0 or more, for example 1")


def _batches(source: InputSource, size: int, limit: int | None) -> Iterator[InputBatch]:
    """Batches of at most `size` images, `limit` images in all."""
    if limit is None:
        yield from source.batches(size)
        return
    full, rest = divmod(limit, size)
    batches = source.batches(size)
    yield from islice(batches, full)
    for last in islice(batches, 1 if rest else 0):
        yield InputBatch(last.images[:rest], None, last.labels[:rest])


def _notes(bundle: Bundle, seen: _Seen) -> Iterator[str]:
    if bundle.has_random_weights:
        yield "the weights are random: this says nothing of a trained model"
    if seen.count < FEW_IMAGES:
        yield f"only {seen.count} image{'s' if seen.count > 1 else ''}: give more, as varied as the model will see"
    if seen.of_one_colour:
        yield f"{seen.of_one_colour} of the {seen.count} images are of one colour"
    if seen.largest > NORMALIZED_LIMIT:
        yield f"the images reach {seen.largest:.3g}: are they preprocessed as the model expects?"
