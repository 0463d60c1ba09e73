"""The least that `lite_mla` has to do.

Legend: B batch, N = H * W tokens, h heads of both maps, d head dim.
"""

from __future__ import annotations

from torch import Tensor

from evit_kernels.lite_mla.naive import check_arguments
from evit_kernels.work import Work, tensor_bytes


def work_of(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Work:
    """Two maps in, one out, and the smaller of the two orders of the products.

    Linear, (v k^T) q: 2 N d^2 multiply-adds a head. Quadratic, v (k^T q), where N <= d: 2 N^2 d. The denominator is no
    matrix product: sums of the keys and their product with each query, or sums of the weights.

    Args:
        qkv, aggregated, dim, eps: as the operator takes them; their values are not looked at.

    Raises:
        ValueError: arguments that the operator does not accept.
    """
    check_arguments(qkv, aggregated, dim, eps)
    batch, _, height, width = qkv.shape
    channels3 = qkv.shape[1] + aggregated.shape[1]
    tokens = height * width
    heads = batch * (channels3 // (3 * dim))
    linear = tokens > dim
    return Work(
        read_bytes=tensor_bytes(qkv, aggregated),
        written_bytes=batch * (channels3 // 3) * tokens * qkv.element_size(),
        matrix_flops=heads * 4 * tokens * dim * min(dim, tokens),
        other_flops=heads * (3 * tokens * dim if linear else tokens**2),
    )
