"""The least that `projected_multi_scale_attention` has to do.

Legend: B batch, N = H * W tokens, C channels.
"""

from __future__ import annotations

from torch import Tensor

from evit_kernels.multi_scale_attention.work import attention_pairs
from evit_kernels.projected_multi_scale_attention.naive import check_arguments
from evit_kernels.work import Work, tensor_bytes


def work_of(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Work:
    """Tokens, pooled keys and values and the weights in, one map out; 7 N C^2 multiply-adds more than the attention.

    Pairs of query and key count as in `multi_scale_attention`.

    Args:
        x, kv_large, weight, bias, heads: as the operator takes them; their values are not looked at.

    Raises:
        ValueError: arguments that the operator does not accept.
    """
    check_arguments(x, kv_large, weight, bias, heads)
    batch, height, width, channels = x.shape
    pairs = batch * attention_pairs(height, width)
    tokens = batch * height * width
    return Work(
        read_bytes=tensor_bytes(x, kv_large, weight, bias),
        written_bytes=tokens * 3 * channels * x.element_size(),
        matrix_flops=pairs * 4 * channels + tokens * 2 * 7 * channels**2,
        exponentials=pairs * heads,
    )
