"""Figures of tensors, gathered batch by batch: what is kept does not grow with the number of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evit_deploy.errors import InputDataError
from evit_deploy.headroom.limits import FLOAT_TYPES
from evit_deploy.headroom.rows import TensorRow


@dataclass
class TensorStatistics:
    """The running figures of one tensor; see `TensorRow` for what they are."""

    block: str
    tensor: str
    kind: str
    operation: str
    storage: str
    max_abs: float = 0.0
    max_sum: float | None = None
    square_sum: float = 0.0
    nonzero: int = 0
    zeroed: dict[str, int] = field(default_factory=lambda: {kind.name: 0 for kind in FLOAT_TYPES})
    image: str | None = None

    def add(self, values: Tensor, sums: Tensor | None, images: Sequence[str]) -> None:
        """Take in more values.

        Args:
            values: any shape; the first dimension holds `len(images)` equal parts, unless it is a constant.
            sums: sums of magnitudes, the same parts.
            images: names of the images that the parts belong to; none for weights.

        Raises:
            InputDataError: a value or a sum is NaN or infinite in FP32 already.
        """
        magnitudes = values.detach().abs()
        largest, image = _largest(magnitudes, images)
        self._check(largest, image)
        before = max(self.max_abs, self.max_sum or 0.0)
        reached = largest
        if sums is not None:
            largest_sum, image_of_sum = _largest(sums.detach(), images)
            self._check(largest_sum, image_of_sum)
            self.max_sum = max(self.max_sum or 0.0, largest_sum)
            if largest_sum > reached:
                reached, image = largest_sum, image_of_sum
        if reached > before:
            self.image = image
        self.max_abs = max(self.max_abs, largest)
        if largest > 0:  # scaled, because the square of a large value does not fit FP32
            self.square_sum += (
                largest**2 * float((magnitudes / largest).square_().mean(dtype=torch.float64)) * values.numel()
            )
        nonzero = int(magnitudes.count_nonzero())
        self.nonzero += nonzero
        for kind in FLOAT_TYPES:  # counted as what stays: the sum of a mask would widen every entry to int64 first
            self.zeroed[kind.name] += nonzero - int((magnitudes > kind.zeroed_up_to).count_nonzero())

    def row(self) -> TensorRow:
        return TensorRow(
            block=self.block,
            tensor=self.tensor,
            kind=self.kind,
            operation=self.operation,
            storage=self.storage,
            max_abs=self.max_abs,
            max_sum=self.max_sum,
            rms=math.sqrt(self.square_sum / max(self.nonzero, 1)),
            zeroed_share={name: zeroed / max(self.nonzero, 1) for name, zeroed in self.zeroed.items()},
            image=self.image,
        )

    def _check(self, largest: float, image: str | None) -> None:
        if math.isfinite(largest):
            return
        what = "NaN" if math.isnan(largest) else "infinite"
        where = "" if image is None else f", image {image}"
        raise InputDataError(
            f"{self.block} {self.tensor} is {what} in FP32 already{where}",
            hint="no type carries it: check the weights with evit-deploy verify, and how the images are preprocessed",
        )


def _largest(magnitudes: Tensor, images: Sequence[str]) -> tuple[float, str | None]:
    """The largest entry (NaN if one is NaN) and the image that it belongs to."""
    if magnitudes.numel() == 0:
        return 0.0, None
    if not images or magnitudes.shape[0] % len(images):
        return float(magnitudes.max()), None
    per_image = magnitudes.reshape(len(images), -1).amax(dim=1)
    index = int(per_image.argmax())  # a NaN counts as the largest
    return float(per_image[index]), images[index]
