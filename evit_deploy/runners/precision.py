"""A module in another precision: the conversion, and what would be lost silently by it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from evit_deploy.errors import ExportError, RunnerError

if TYPE_CHECKING:
    import torch
    from torch import nn

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # our names to PyTorch's


def converted(module: nn.Module, precision: str, device: torch.device, keep_fp32: Collection[str] = ()) -> nn.Module:
    """A copy for inference in a precision on a device, its convolutions' weights in channels_last.

    Args:
        module: a fused module in FP32; left as it is.
        precision: one of PRECISIONS, of weights and activations.
        device: where the copy lives.
        keep_fp32: blocks that stay in FP32.

    Raises:
        RunnerError: a weight is infinite in that precision.
    """
    import torch

    from evit_deploy.models.precision import in_precision

    try:
        module = in_precision(module, precision, keep_fp32).requires_grad_(False).to(device)
    except ExportError as error:
        raise RunnerError(error.summary, hint="use bf16 or fp32") from error
    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):  # not the attention's parameters, which kernels want contiguous
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
    return module


def precision_of(module: nn.Module) -> str:
    """The precision that all floating-point tensors have, "mixed" where they differ, "unknown" for another one."""
    names = {dtype: precision for precision, dtype in PRECISIONS.items()}
    dtypes = {str(v.dtype).removeprefix("torch.") for v in module.state_dict().values() if v.is_floating_point()}
    return names.get(dtypes.pop(), "unknown") if len(dtypes) == 1 else "mixed"
