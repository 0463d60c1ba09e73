"""Definition of `multi_scale_attention` in plain PyTorch: float64 is the reference, half types use FP32 inside.

Legend: B batch, H x W the map, C channels, h heads, d = C / h head dim, Hp = ceil(H / 2), Wp = ceil(W / 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_kernels.checks import check_divides, check_tensor, computing_dtype

SMALL_WINDOW = 3
MEDIUM_WINDOW = 7


def multi_scale_attention(
    qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int
) -> Tensor:
    """Attention in 3x3 windows, in 7x7 windows and over pooled keys, side by side.

    Each branch computes softmax(q k^T / sqrt(d)) v per head. Windows do not overlap; the map is padded on the right
    and at the bottom, and padded keys are masked out.

    Args:
        qkv_small: [B, H, W, 3C], query, key and value of the 3x3-window branch.
        qkv_medium: [B, H, W, 3C], the same for the 7x7-window branch.
        q_large: [B, H, W, C], queries of the global branch.
        kv_large: [B, Hp, Wp, 2C], keys and values of the global branch, projected from the 2x2-pooled map.
        heads: number of heads h; divides C.

    Returns:
        [B, H*W, 3C]: the branches' outputs in the order small, medium, large.

    Raises:
        ValueError: shapes, dtypes or heads that do not fit.
    """
    check_arguments(qkv_small, qkv_medium, q_large, kv_large, heads)
    dtype = computing_dtype(q_large)
    branches = (
        _window_attention(qkv_small.to(dtype), heads, SMALL_WINDOW),
        _window_attention(qkv_medium.to(dtype), heads, MEDIUM_WINDOW),
        _global_attention(q_large.to(dtype), kv_large.to(dtype), heads),
    )
    return torch.cat(branches, dim=-1).to(q_large.dtype)


def check_arguments(qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int) -> None:
    """Raise ValueError for arguments that `multi_scale_attention` does not accept."""
    check_tensor("q_large", q_large, (None, None, None, None))
    batch, height, width, channels = q_large.shape
    check_divides("heads", heads, "channels", channels)
    check_tensor("qkv_small", qkv_small, (batch, height, width, 3 * channels), like=q_large)
    check_tensor("qkv_medium", qkv_medium, (batch, height, width, 3 * channels), like=q_large)
    check_tensor("kv_large", kv_large, (batch, (height + 1) // 2, (width + 1) // 2, 2 * channels), like=q_large)


def _window_attention(qkv: Tensor, heads: int, window: int) -> Tensor:
    batch, height, width, channels3 = qkv.shape
    dim = channels3 // 3 // heads
    rows, columns = -(-height // window), -(-width // window)
    padding = (0, columns * window - width, 0, rows * window - height)
    inside = F.pad(torch.ones(height, width, dtype=torch.bool, device=qkv.device), padding)
    inside = inside.view(rows, window, columns, window).permute(0, 2, 1, 3).reshape(rows, columns, 1, 1, window**2)
    x = F.pad(qkv, (0, 0, *padding)).view(batch, rows, window, columns, window, 3, heads, dim)
    q, k, v = x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch, rows, columns, heads, window**2, dim).unbind(0)
    scores = (q @ k.transpose(-1, -2)) * dim**-0.5  # [B, rows, columns, h, window^2, window^2]
    weights = scores.masked_fill(~inside, float("-inf")).softmax(dim=-1)
    out = (weights @ v).view(batch, rows, columns, heads, window, window, dim).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, rows * window, columns * window, heads * dim)
    return out[:, :height, :width].reshape(batch, height * width, heads * dim)


def _global_attention(queries: Tensor, keys_values: Tensor, heads: int) -> Tensor:
    batch, height, width, channels = queries.shape
    dim = channels // heads
    q = queries.reshape(batch, height * width, heads, dim).transpose(1, 2)
    k, v = keys_values.reshape(batch, -1, 2, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q @ k.transpose(-1, -2)) * dim**-0.5).softmax(dim=-1)  # [B, h, H*W, Hp*Wp]
    return (weights @ v).transpose(1, 2).reshape(batch, height * width, channels)
