"""FP32 that is FP32 while a model runs: no TF32 on a GPU, no BF16 on a CPU. The process's settings are put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Products and convolutions of FP32 tensors are computed in FP32 inside.

    PyTorch has two interfaces for this since 2.9 and refuses to be asked through the old one what was said through the
    new one; then the new one is used.
    """
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    try:
        matmul, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        precisions = cuda.matmul.fp32_precision, cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        cuda.matmul.fp32_precision = cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        try:
            yield
        finally:
            cuda.matmul.fp32_precision, cudnn.conv.fp32_precision = precisions  # type: ignore[attr-defined]
        return
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = convolutions
