"""What an operator has to do at the least: bytes, floating-point operations, exponentials; and the time they need.

Each operator counts its own in `OPERATOR/work.py`. The counts are of the definition, not of a kernel: no padding to
tiles, nothing read twice, nothing kept between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

MEMORY = "memory"
MATRIX = "matrix"
EXPONENTIALS = "exponentials"


class Floor(NamedTuple):
    """A time that no kernel can beat under the given ceilings.

    Attributes:
        seconds: the largest of the terms.
        bound: which it is: MEMORY, MATRIX or EXPONENTIALS.
    """

    seconds: float
    bound: str


@dataclass(frozen=True)
class Work:
    """The least that one call of an operator has to do.

    Attributes:
        read_bytes: every input once.
        written_bytes: every output once.
        matrix_flops: of matrix products, 2 per multiply-add.
        exponentials: of softmax.
        other_flops: what matrix units do not do and is worth counting: depthwise convolutions, denominators. Scaling,
            maxima, sums and divisions of a softmax are not counted.
    """

    read_bytes: int
    written_bytes: int
    matrix_flops: int
    exponentials: int = 0
    other_flops: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.written_bytes

    @property
    def flops_per_byte(self) -> float:
        """Arithmetic intensity of the matrix products."""
        return self.matrix_flops / self.bytes

    def floor_s(self, bandwidth: float, matrix_flops_per_s: float, exponentials_per_s: float) -> Floor:
        """The least time in seconds, if memory, matrix units and exponentials work side by side and at their best.

        `other_flops` and the time of a launch are left out.

        Args:
            bandwidth: bytes per second from and to memory.
            matrix_flops_per_s: floating-point operations per second of the matrix units.
            exponentials_per_s: of the special function units.

        Raises:
            ValueError: a ceiling that is not above zero.
        """
        ceilings = {MEMORY: bandwidth, MATRIX: matrix_flops_per_s, EXPONENTIALS: exponentials_per_s}
        for name, ceiling in ceilings.items():
            if not ceiling > 0:
                raise ValueError(f"the ceiling of {name} must be above zero, got {ceiling}")
        amounts = {MEMORY: self.bytes, MATRIX: self.matrix_flops, EXPONENTIALS: self.exponentials}
        terms_s = {name: amounts[name] / ceilings[name] for name in ceilings}
        bound = max(terms_s, key=lambda name: terms_s[name])
        return Floor(terms_s[bound], bound)


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes of the tensors' elements; they may be on the meta device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
