"""The least that `multi_scale_attention` has to do.

Legend: B batch, H x W the map, C channels, h heads, N = H * W queries and M pooled keys of the global branch, t tokens
of a window that lie on the map.
"""

from __future__ import annotations

from torch import Tensor

from evit_kernels.multi_scale_attention.naive import MEDIUM_WINDOW, SMALL_WINDOW, check_arguments
from evit_kernels.work import Work, tensor_bytes


def work_of(qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int) -> Work:
    """Four maps in, one out; pairs of query and key that both lie on the map, and nothing for padded tokens.

    A pair costs 2C multiply-adds over all heads, for its scores and its share of the values, and h exponentials. The
    rescaling of an online softmax is not counted.

    Args:
        qkv_small, qkv_medium, q_large, kv_large, heads: as the operator takes them; their values are not looked at.

    Raises:
        ValueError: arguments that the operator does not accept.
    """
    check_arguments(qkv_small, qkv_medium, q_large, kv_large, heads)
    batch, height, width, channels = q_large.shape
    pairs = batch * attention_pairs(height, width)
    return Work(
        read_bytes=tensor_bytes(qkv_small, qkv_medium, q_large, kv_large),
        written_bytes=batch * height * width * 3 * channels * q_large.element_size(),
        matrix_flops=pairs * 4 * channels,
        exponentials=pairs * heads,
    )


def attention_pairs(height: int, width: int) -> int:
    """Pairs of query and key of one head and image, over the three branches."""
    pooled = ((height + 1) // 2) * ((width + 1) // 2)
    in_windows = (_pairs_in_windows(height, width, window) for window in (SMALL_WINDOW, MEDIUM_WINDOW))
    return sum(in_windows) + height * width * pooled


def _pairs_in_windows(height: int, width: int, window: int) -> int:
    """Sum of t^2 over the windows: a window is a span of rows by a span of columns, so the sum is a product."""
    return _squared_spans(height, window) * _squared_spans(width, window)


def _squared_spans(size: int, window: int) -> int:
    return size // window * window**2 + (size % window) ** 2
