"""`cascaded_attention` as a PyTorch operator, `torch.ops.evit.cascaded_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from evit_kernels.cascaded_attention import naive as definition


@torch.library.custom_op("evit::cascaded_attention", mutates_args=())
def cascaded_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
) -> Tensor:
    """See `evit_kernels.cascaded_attention.naive`; no gradient."""
    return definition.cascaded_attention(x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias, window)


@cascaded_attention.register_fake
def _fake(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
) -> Tensor:
    definition.check_arguments(x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias, window)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
