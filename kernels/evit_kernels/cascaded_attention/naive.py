"""Definition of `cascaded_attention` in plain PyTorch: float64 is the reference, half types use FP32 inside.

Legend: B batch, H x W the map, C channels, h heads, D = C / h channels of a head, k key dim, w window, T = w * w
tokens of a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_kernels.checks import check_divides, check_tensor, computing_dtype


def cascaded_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
) -> Tensor:
    """Attention head by head inside windows, each head's input being its channels plus the previous head's output.

    Windows do not overlap; the map is padded with zeros on the right and at the bottom, and padded positions take part
    as tokens, as they do in the published model. Per head: a 1x1 convolution gives query, key (k channels each) and
    value (D channels); a depthwise convolution refines the query inside the window; then
    softmax(q^T k / sqrt(k) + bias) weighs the values. The next head gets the weighted values as they are, the result
    has them after the ReLU that the layer's closing projection begins with.

    Args:
        x: [B, C, H, W]
        qkv_weight: [h, 2k + D, D], the 1x1 convolutions with batch normalisation folded in.
        qkv_bias: [h, 2k + D]
        query_weight: [h, k, K, K], depthwise kernels, K odd; smaller kernels are zero-padded to K.
        query_bias: [h, k]
        attention_bias: [h, T, T], learned bias of query token and key token.
        window: edge w of the windows.

    Returns:
        [B, C, H, W], the heads' outputs side by side, none below zero.

    Raises:
        ValueError: shapes, dtypes or window that do not fit.
    """
    check_arguments(x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias, window)
    batch, channels, height, width = x.shape
    heads, key_dim, kernel = query_weight.shape[:3]
    head_channels = channels // heads
    given, dtype = x.dtype, computing_dtype(x)
    x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias = (
        tensor.to(dtype) for tensor in (x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias)
    )
    rows, columns = -(-height // window), -(-width // window)
    x = F.pad(x, (0, columns * window - width, 0, rows * window - height))
    x = x.view(batch, channels, rows, window, columns, window).permute(0, 2, 4, 1, 3, 5)
    parts = x.reshape(-1, channels, window, window).chunk(heads, dim=1)
    outputs: list[Tensor] = []
    for i in range(heads):
        part = parts[i] + outputs[-1] if outputs else parts[i]
        qkv = F.conv2d(part, qkv_weight[i, :, :, None, None], qkv_bias[i])
        q, k, v = qkv.split((key_dim, key_dim, head_channels), dim=1)
        q = F.conv2d(q, query_weight[i][:, None], query_bias[i], padding=kernel // 2, groups=key_dim)
        scores = (q.flatten(2).transpose(-1, -2) @ k.flatten(2)) * key_dim**-0.5 + attention_bias[i]  # [B', T, T]
        outputs.append((v.flatten(2) @ scores.softmax(dim=-1).transpose(-1, -2)).view_as(v))
    joined = F.relu(torch.cat(outputs, dim=1))
    out = joined.view(batch, rows, columns, channels, window, window).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(batch, channels, rows * window, columns * window)[:, :, :height, :width].contiguous().to(given)


def check_arguments(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
) -> None:
    """Raise ValueError for arguments that `cascaded_attention` does not accept."""
    check_tensor("x", x, (None, None, None, None))
    check_tensor("query_weight", query_weight, (None, None, None, None), like=x)
    heads, key_dim, kernel = query_weight.shape[:3]
    check_divides("heads", heads, "channels", x.shape[1])
    if window <= 0:
        raise ValueError(f"window must be positive, got {window=}")
    if kernel % 2 == 0:
        raise ValueError(f"the kernel of query_weight must be odd, got {tuple(query_weight.shape)}")
    head_channels = x.shape[1] // heads
    check_tensor("query_weight", query_weight, (heads, key_dim, kernel, kernel), like=x)
    check_tensor("query_bias", query_bias, (heads, key_dim), like=x)
    check_tensor("qkv_weight", qkv_weight, (heads, 2 * key_dim + head_channels, head_channels), like=x)
    check_tensor("qkv_bias", qkv_bias, (heads, 2 * key_dim + head_channels), like=x)
    check_tensor("attention_bias", attention_bias, (heads, window**2, window**2), like=x)
