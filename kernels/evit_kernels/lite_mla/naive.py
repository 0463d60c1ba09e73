"""Definition of `lite_mla` in plain PyTorch, for any floating dtype; float64 is the reference.

Legend: B batch, H x W the map, N = H * W tokens, h heads over all scales, d head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_kernels.checks import check_divides, check_tensor


def lite_mla(qkv: Tensor, dim: int, eps: float) -> Tensor:
    """ReLU linear attention over every head of a packed, channel-first map.

    Per head, with q and k after ReLU: out = (v k^T) q / ((sum over tokens of k)^T q + eps). Where N <= d the same sums
    are taken in the order v (k^T q), which is smaller.

    Args:
        qkv: [B, h*3*d, H, W]; the channels of each head are query, key, value.
        dim: head dim d.
        eps: added to the denominator; must be representable in the dtype.

    Returns:
        [B, h*d, H, W]

    Raises:
        ValueError: shapes, dtype, dim or eps that do not fit.
    """
    check_arguments(qkv, dim, eps)
    batch, channels3, height, width = qkv.shape
    x = qkv.reshape(batch, channels3 // (3 * dim), 3 * dim, height * width)
    q, k, v = F.relu(x[:, :, :dim]), F.relu(x[:, :, dim : 2 * dim]), x[:, :, 2 * dim :]
    if height * width > dim:
        numerator = (v @ k.transpose(-1, -2)) @ q  # [B, h, d, d] @ [B, h, d, N]
        denominator = k.sum(dim=-1, keepdim=True).transpose(-1, -2) @ q  # [B, h, 1, N]
    else:
        weights = k.transpose(-1, -2) @ q  # [B, h, N, N], keys by queries
        numerator = v @ weights
        denominator = weights.sum(dim=-2, keepdim=True)
    return (numerator / (denominator + eps)).reshape(batch, channels3 // 3, height, width)


def check_arguments(qkv: Tensor, dim: int, eps: float) -> None:
    """Raise ValueError for arguments that `lite_mla` does not accept."""
    check_tensor("qkv", qkv, (None, None, None, None))
    check_divides("3 * dim", 3 * dim, "channels", qkv.shape[1])
    if not 0 < torch.tensor(eps, dtype=torch.float64).to(qkv.dtype).item() < math.inf:
        raise ValueError(f"eps must be above zero and finite in {qkv.dtype}, got {eps=}")
