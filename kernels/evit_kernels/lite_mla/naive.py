"""Definition of `lite_mla` in plain PyTorch: float64 is the reference, half types use FP32 inside.

Legend: B batch, H x W the map, N = H * W tokens, h1 and h2 heads of the two maps, d head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_kernels.checks import check_divides, check_tensor, computing_dtype


def lite_mla(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    """ReLU linear attention over every head of two packed, channel-first maps.

    Per head, with q and k after ReLU: out = (v k^T) q / ((sum over tokens of k)^T q + eps). Where N <= d the same sums
    are taken in the order v (k^T q), which is smaller.

    Args:
        qkv: [B, h1*3*d, H, W]; the channels of each head are query, key, value.
        aggregated: [B, h2*3*d, H, W], the further scales' heads.
        dim: head dim d.
        eps: added to the denominator; must not vanish in the type that is computed in.

    Returns:
        [B, (h1 + h2)*d, H, W], the heads of `qkv`, then those of `aggregated`.

    Raises:
        ValueError: shapes, dtype, dim or eps that do not fit.
    """
    check_arguments(qkv, aggregated, dim, eps)
    batch, _, height, width = qkv.shape
    x = torch.cat([qkv, aggregated], dim=1).to(computing_dtype(qkv)).reshape(batch, -1, 3 * dim, height * width)
    q, k, v = F.relu(x[:, :, :dim]), F.relu(x[:, :, dim : 2 * dim]), x[:, :, 2 * dim :]
    if height * width > dim:
        numerator = (v @ k.transpose(-1, -2)) @ q  # [B, h, d, d] @ [B, h, d, N]
        denominator = k.sum(dim=-1, keepdim=True).transpose(-1, -2) @ q  # [B, h, 1, N]
    else:
        weights = k.transpose(-1, -2) @ q  # [B, h, N, N], keys by queries
        numerator = v @ weights
        denominator = weights.sum(dim=-2, keepdim=True)
    return (numerator / (denominator + eps)).reshape(batch, -1, height, width).to(qkv.dtype)


def check_arguments(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> None:
    """Raise ValueError for arguments that `lite_mla` does not accept."""
    check_tensor("qkv", qkv, (None, None, None, None))
    batch, channels, height, width = qkv.shape
    check_divides("3 * dim", 3 * dim, "channels", channels)
    check_tensor("aggregated", aggregated, (batch, None, height, width), like=qkv)
    check_divides("3 * dim", 3 * dim, "channels of aggregated", aggregated.shape[1])
    dtype = computing_dtype(qkv)
    if not 0 < torch.tensor(eps, dtype=torch.float64).to(dtype).item() < math.inf:
        raise ValueError(f"eps must be above zero and finite in {dtype}, got {eps=}")
