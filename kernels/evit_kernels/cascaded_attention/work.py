"""The least that `cascaded_attention` has to do.

Legend: B batch, H x W the map, C channels, h heads, D = C / h channels of a head, k key dim, K edge of the depthwise
kernels, w window, T = w * w tokens of a window.
"""

from __future__ import annotations

from torch import Tensor

from evit_kernels.cascaded_attention.naive import check_arguments
from evit_kernels.work import Work, tensor_bytes


def work_of(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
) -> Work:
    """The map in and out, and every parameter once for the whole batch, in the shape in which the operator takes it.

    So the learned bias counts h T^2 elements, though only h T of them differ, and a kernel that was padded with zeros
    counts as wide as it is stored. Padded tokens of a window take part, so that each window counts T tokens. Taps of
    the depthwise convolution that fall outside the window do not count; those inside are `other_flops`.

    Args:
        x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias, window: as the operator takes them; their
            values are not looked at.

    Raises:
        ValueError: arguments that the operator does not accept.
    """
    parameters = (qkv_weight, qkv_bias, query_weight, query_bias, attention_bias)
    check_arguments(x, *parameters, window)
    batch, channels, height, width = x.shape
    heads, key_dim, kernel = query_weight.shape[:3]
    head_channels = channels // heads
    windows = batch * -(-height // window) * -(-width // window)
    tokens = window**2
    projections = tokens * (2 * key_dim + head_channels) * head_channels
    products = tokens**2 * (key_dim + head_channels)
    return Work(
        read_bytes=tensor_bytes(x, *parameters),
        written_bytes=tensor_bytes(x),
        matrix_flops=2 * windows * heads * (projections + products),
        exponentials=windows * heads * tokens**2,
        other_flops=2 * windows * heads * key_dim * _taps_inside(kernel, window) ** 2,
    )


def _taps_inside(kernel: int, window: int) -> int:
    """Pairs of an output and a tap along one edge whose source lies in the window."""
    radius = kernel // 2
    return sum(max(0, window - abs(offset)) for offset in range(-radius, radius + 1))
