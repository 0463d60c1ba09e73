"""Whether a kernel can be used for a tensor on this machine, and saying so once where it cannot."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from evit_kernels.launch import DTYPE_NAMES

_log = logging.getLogger(__name__)


def why_no_kernel(x: Tensor) -> str | None:
    """The reason why no kernel can run on the tensor's device and dtype, or None."""
    if dtype_name(x) not in DTYPE_NAMES:
        return f"kernels exist for float32, float16 and bfloat16, got {x.dtype=}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if x.device.type != "cuda" and not interpreting():
        return f"kernels run on CUDA devices, got {x.device=}"
    return None


def can_run(operator: str, reason: str | None, *, raise_error: bool) -> bool:
    """True without a reason; else False after one line in the log for each reason, or ValueError."""
    if reason is not None and raise_error:
        raise ValueError(f"{operator}: {reason}")
    if reason is not None:
        _explain_once(operator, reason)
    return reason is None


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter in this process, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on"}


def dtype_name(x: Tensor) -> str:
    """PyTorch's name of the dtype, for example "float16"."""
    return str(x.dtype).removeprefix("torch.")


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last where a map [B, C, H, W] lies so and is not contiguous as well; else contiguous_format."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


@cache
def _explain_once(operator: str, reason: str) -> None:
    _log.warning("%s runs as plain PyTorch: %s", operator, reason)
