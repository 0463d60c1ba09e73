"""One tensor's figures, and whether the tensor fits a type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evit_deploy.headroom.limits import FLOAT_TYPES, FloatType

WEIGHT, BIAS, ACTIVATION, INNER = "weight", "bias", "activation", "inner"
STORED, IN_FP32 = "stored", "fp32"


@dataclass(frozen=True)
class TensorRow:
    """What a tensor's values were over all images.

    Attributes:
        block: the block it belongs to, or "head" for everything behind the last one.
        tensor: its name inside the block: the module's path, the operation where that does not say it, or the
            operator's name for an inner value.
        kind: "weight"; "bias", a weight that is only added; "activation"; "inner", a value inside a fused operator
            or a sum inside a reduction.
        operation: what computes it; "" for weights.
        storage: "stored", a low-precision export keeps it in the low type; "fp32", it keeps it in FP32.
        max_abs: largest magnitude.
        max_sum: largest sum of the magnitudes that one element is summed from, which bounds every partial sum in any
            order; None where nothing is summed.
        rms: root mean square of the values that are not zero.
        zeroed_share: by type's name, the share of the values that are not zero and would become zero.
        image: the image of the largest magnitude or sum; None for weights and constants.
    """

    block: str
    tensor: str
    kind: str
    operation: str
    storage: str
    max_abs: float
    max_sum: float | None
    rms: float
    zeroed_share: Mapping[str, float]
    image: str | None

    @property
    def name(self) -> str:
        return f"{self.block} {self.tensor}"

    @property
    def largest(self) -> float:
        """The magnitude that must fit: of the values and of what they are summed from."""
        return max(self.max_abs, self.max_sum or 0.0)

    def overflow_bits(self, kind: FloatType) -> float | None:
        """Bits between `largest` and the type's limit; None for a tensor of zeros."""
        return kind.overflow_bits(self.largest)

    def underflow_bits(self, kind: FloatType) -> float | None:
        """Bits between the RMS and the type's smallest normal value; None for a tensor of zeros and for a bias.

        What a bias loses is below the rounding of the sum that it is added into, whose own margin is measured.
        """
        return None if self.kind == BIAS else kind.underflow_bits(self.rms)

    def margin_bits(self, kind: FloatType) -> float:
        """The smaller of both margins; infinite for a tensor of zeros."""
        margins = (self.overflow_bits(kind), self.underflow_bits(kind))
        return min((margin for margin in margins if margin is not None), default=float("inf"))

    def to_json(self) -> dict[str, Any]:
        margins = {
            kind.name: {
                "overflow_bits": self.overflow_bits(kind),
                "underflow_bits": self.underflow_bits(kind),
                "zeroed_share": self.zeroed_share[kind.name],
            }
            for kind in FLOAT_TYPES
        }
        return {
            "block": self.block,
            "tensor": self.tensor,
            "kind": self.kind,
            "operation": self.operation,
            "storage": self.storage,
            "max_abs": self.max_abs,
            "max_sum": self.max_sum,
            "rms": self.rms,
            "image": self.image,
            **margins,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TensorRow:
        return TensorRow(
            block=data["block"],
            tensor=data["tensor"],
            kind=data["kind"],
            operation=data["operation"],
            storage=data["storage"],
            max_abs=data["max_abs"],
            max_sum=data["max_sum"],
            rms=data["rms"],
            zeroed_share={kind.name: data[kind.name]["zeroed_share"] for kind in FLOAT_TYPES},
            image=data["image"],
        )
