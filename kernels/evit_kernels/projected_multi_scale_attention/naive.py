"""Definition of `projected_multi_scale_attention` in plain PyTorch: float64 is the reference, half types use FP32.

Legend: B batch, H x W the map, C channels, h heads, Hp = ceil(H / 2), Wp = ceil(W / 2).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from evit_kernels.checks import check_divides, check_tensor, computing_dtype
from evit_kernels.multi_scale_attention.naive import multi_scale_attention


def projected_multi_scale_attention(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """`multi_scale_attention` from the tokens: what each token alone is projected to, and the three branches.

    Args:
        x: [B, H, W, C], tokens.
        kv_large: [B, Hp, Wp, 2C], keys and values of the global branch, projected from the 2x2-pooled map.
        weight: [7C, C], rows for query, key and value of the 3x3 windows, of the 7x7 windows, and the global query.
        bias: [7C]
        heads: number of heads h; divides C.

    Returns:
        [B, H*W, 3C]: the branches' outputs in the order small, medium, large.

    Raises:
        ValueError: shapes, dtypes or heads that do not fit.
    """
    check_arguments(x, kv_large, weight, bias, heads)
    channels, dtype = x.shape[-1], computing_dtype(x)
    sizes = (3 * channels, 3 * channels, channels)
    parts = zip(weight.to(dtype).split(sizes), bias.to(dtype).split(sizes), strict=True)
    small, medium, queries = (F.linear(x.to(dtype), rows, constants) for rows, constants in parts)
    return multi_scale_attention(small, medium, queries, kv_large.to(dtype), heads).to(x.dtype)


def check_arguments(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> None:
    """Raise ValueError for arguments that `projected_multi_scale_attention` does not accept."""
    check_tensor("x", x, (None, None, None, None))
    batch, height, width, channels = x.shape
    check_divides("heads", heads, "channels", channels)
    check_tensor("kv_large", kv_large, (batch, (height + 1) // 2, (width + 1) // 2, 2 * channels), like=x)
    check_tensor("weight", weight, (7 * channels, channels), like=x)
    check_tensor("bias", bias, (7 * channels,), like=x)
