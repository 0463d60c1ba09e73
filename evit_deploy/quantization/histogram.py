"""The magnitudes of a tensor over any number of images, in constant memory, whatever their order.

The bins span [0, 2^e) with the smallest e that holds every value so far. A larger value merges neighbouring bins as
often as e grows. Scaling by powers of two is exact, so the result does not depend on where one batch ends and the next
begins, or on which came first.
"""

from __future__ import annotations

import math

import numpy as np

BINS = 4096  # the upper half is never empty, so that at least 2048 of them resolve the values
_MIN_EXPONENT = -100  # below it the factor of a float32 would overflow; such values are zeros to any layer


class Histogram:
    """Counts of |x|.

    Attributes:
        counts: int64 [BINS].
        highest: the largest magnitude.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.highest = 0.0
        self._exponent = _MIN_EXPONENT

    @property
    def bin_width(self) -> float:
        return math.ldexp(1.0, self._exponent) / BINS

    def add(self, values: np.ndarray) -> None:
        """Count the values of one array.

        Args:
            values: float32, any shape, finite.

        Raises:
            ValueError: NaN or infinity among them.
        """
        magnitudes = np.abs(values).ravel()
        highest = float(magnitudes.max(initial=0.0))
        if not math.isfinite(highest):
            raise ValueError("a value is not finite")
        self.highest = max(self.highest, highest)
        if highest > 0:
            self._grow(math.frexp(highest)[1])
        factor = np.float32(math.ldexp(BINS, -self._exponent))
        self.counts += np.bincount((magnitudes * factor).astype(np.int32), minlength=BINS)

    def _grow(self, exponent: int) -> None:
        steps = min(max(0, exponent - self._exponent), BINS.bit_length())
        for _ in range(steps):
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[BINS // 2 :] = 0
        self._exponent = max(self._exponent, exponent)
