"""A module in another precision: the conversion, and what would be lost silently by it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from evit_deploy.errors import RunnerError

if TYPE_CHECKING:
    import torch
    from torch import nn

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # our names to PyTorch's


def converted(module: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """A copy for inference in a precision on a device, its convolutions' weights in channels_last.

    Args:
        module: a fused module in FP32; left as it is.
        precision: one of PRECISIONS, of weights and activations.
        device: where the copy lives.

    Raises:
        RunnerError: the attention's eps is zero or a weight infinite in that precision.
    """
    import torch

    dtype: torch.dtype = getattr(torch, PRECISIONS[precision])
    _check_eps(module, precision, dtype)
    module = copy.deepcopy(module).eval().requires_grad_(False).to(device=device, dtype=dtype)
    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):  # not the attention's parameters, which kernels want contiguous
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RunnerError(f"{name} is not finite in {precision}", hint="use bf16 or fp32")
    return module


def precision_of(module: nn.Module) -> str:
    """The precision that all floating-point tensors have, "mixed" where they differ, "unknown" for another one."""
    names = {dtype: precision for precision, dtype in PRECISIONS.items()}
    dtypes = {str(v.dtype).removeprefix("torch.") for v in module.state_dict().values() if v.is_floating_point()}
    return names.get(dtypes.pop(), "unknown") if len(dtypes) == 1 else "mixed"


def _check_eps(module: nn.Module, precision: str, dtype: torch.dtype) -> None:
    """Linear attention divides by a sum plus eps: where eps is lost, rows of zeros become NaN."""
    import torch

    from evit_deploy.models.fused import FusedLiteMLA

    for part in module.modules():
        if isinstance(part, FusedLiteMLA) and not torch.tensor(part.eps, dtype=torch.float64).to(dtype).item() > 0:
            raise RunnerError(
                f"the attention's eps of {part.eps:g} is zero in {precision}",
                hint="use bf16 or fp32, or a model whose attention_eps is at least 1e-7",
            )
