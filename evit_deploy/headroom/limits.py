"""The floating types that a model can be deployed in, and how far a magnitude is from their limits."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FloatType:
    """The range of a floating type.

    Attributes:
        name: as `--precision` calls it.
        largest: the largest finite value.
        smallest_normal: below it a value has fewer significant bits.
        smallest: the smallest subnormal; up to half of it rounds to zero.
    """

    name: str
    largest: float
    smallest_normal: float
    smallest: float

    @property
    def zeroed_up_to(self) -> float:
        """The largest magnitude that rounds to zero (a tie goes to even, which zero is)."""
        return self.smallest / 2

    def overflow_bits(self, magnitude: float) -> float | None:
        """log2(largest / magnitude): below zero it does not fit; None for zero, which always does."""
        return math.log2(self.largest) - math.log2(magnitude) if magnitude > 0 else None

    def underflow_bits(self, rms: float) -> float | None:
        """log2(rms / smallest_normal): below zero the typical value is subnormal; None where all are zero."""
        return math.log2(rms) - math.log2(self.smallest_normal) if rms > 0 else None


FP16 = FloatType("fp16", 65504.0, 2.0**-14, 2.0**-24)
BF16 = FloatType("bf16", (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133)
FLOAT_TYPES = (FP16, BF16)
