"""`multi_scale_attention` as a PyTorch operator, `torch.ops.evit.multi_scale_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from evit_kernels.multi_scale_attention import naive as definition


@torch.library.custom_op("evit::multi_scale_attention", mutates_args=())
def multi_scale_attention(
    qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int
) -> Tensor:
    """See `evit_kernels.multi_scale_attention.naive`; no gradient."""
    return definition.multi_scale_attention(qkv_small, qkv_medium, q_large, kv_large, heads)


@multi_scale_attention.register_fake
def _fake(qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int) -> Tensor:
    definition.check_arguments(qkv_small, qkv_medium, q_large, kv_large, heads)
    batch, height, width, channels = q_large.shape
    return q_large.new_empty(batch, height * width, 3 * channels)
