"""The oracle: the family's own module in PyTorch FP32 on the CPU, from the bundle's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evit_deploy.constants import OUTPUT_NAME, SOFTMAX_OUTPUT_NAME
from evit_deploy.runners.pytorch import TorchRunner

if TYPE_CHECKING:
    from torch import nn

    from evit_deploy.bundle import Bundle

REFERENCE_NAME = "torch-fp32"


def reference_runner(bundle: Bundle, *, softmax: bool = False, threads: int | None = None) -> TorchRunner:
    """The reference of a bundle; its weights are read on activation.

    Args:
        bundle: an opened bundle.
        softmax: the graph ends in a softmax, so the reference does too, and its output is named `probabilities`.
        threads: intra-op threads; None leaves PyTorch's setting.
    """
    spec = bundle.spec

    def load() -> nn.Module:
        from evit_deploy.models import load_model

        return load_model(spec, bundle.load_state_dict())

    return TorchRunner(
        load,
        threads=threads,
        softmax=softmax,
        name=REFERENCE_NAME,
        output_name=SOFTMAX_OUTPUT_NAME if softmax else OUTPUT_NAME,
        image_shape=spec.input_shape,
    )
