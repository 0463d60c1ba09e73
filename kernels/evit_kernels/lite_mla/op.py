"""`lite_mla` as a PyTorch operator, `torch.ops.evit.lite_mla`."""

from __future__ import annotations

import torch
from torch import Tensor

from evit_kernels.lite_mla import naive as definition


@torch.library.custom_op("evit::lite_mla", mutates_args=())
def lite_mla(qkv: Tensor, dim: int, eps: float) -> Tensor:
    """See `evit_kernels.lite_mla.naive`; no gradient."""
    return definition.lite_mla(qkv, dim, eps)


@lite_mla.register_fake
def _fake(qkv: Tensor, dim: int, eps: float) -> Tensor:
    batch, channels3, height, width = qkv.shape
    return qkv.new_empty(batch, channels3 // 3, height, width)
