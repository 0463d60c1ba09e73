"""`cascaded_attention` as a PyTorch operator, `torch.ops.evit.cascaded_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from evit_kernels.availability import can_run, dtype_name, memory_format_of, why_no_kernel
from evit_kernels.cascaded_attention import naive as definition
from evit_kernels.cascaded_attention.launch import launch_cascaded_attention, why_no_launch
from evit_kernels.launch import DTYPE_NAMES, KernelLaunch


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
    """See `evit_kernels.cascaded_attention.naive`; no gradient. The output has the memory format of `x`."""
    parameters = (qkv_weight, qkv_bias, query_weight, query_bias, attention_bias)
    return definition.cascaded_attention(x, *parameters, window).contiguous(memory_format=memory_format_of(x))


@cascaded_attention.register_kernel("cuda")
def _cuda(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
) -> Tensor:
    parameters = (qkv_weight, qkv_bias, query_weight, query_bias, attention_bias)
    definition.check_arguments(x, *parameters, window)
    if can_run_cascaded_attention(x, query_weight, window):
        return fused_cascaded_attention(x, *parameters, window)
    return definition.cascaded_attention(x, *parameters, window).contiguous(memory_format=memory_format_of(x))


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
    return torch.empty_like(x, memory_format=memory_format_of(x))


def can_run_cascaded_attention(x: Tensor, query_weight: Tensor, window: int, *, raise_error: bool = False) -> bool:
    """Whether the kernel takes these arguments; if not, one line in the log says why.

    Args:
        x: [B, C, H, W]
        query_weight: [h, k, K, K]
        window: edge of the windows.
        raise_error: raise ValueError with the reason instead.
    """
    heads, key_dim = query_weight.shape[:2]
    channels, height, width = x.shape[1:]
    reason = why_no_kernel(x) or why_no_launch(heads, key_dim, channels // heads, window, height, width)
    return can_run("cascaded_attention", reason, raise_error=raise_error)


def fused_cascaded_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
) -> Tensor:
    """`cascaded_attention` by the kernel, in one launch; arguments, result and errors as in the definition.

    A map that is neither contiguous nor channels_last is copied first, and so are parameters that are not contiguous.
    """
    definition.check_arguments(x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias, window)
    can_run_cascaded_attention(x, query_weight, window, raise_error=True)
    memory_format = memory_format_of(x)
    out = torch.empty_like(x, memory_format=memory_format)
    tensors = {
        "p_x": x.contiguous(memory_format=memory_format),
        "p_qkv_weight": qkv_weight.contiguous(),
        "p_qkv_bias": qkv_bias.contiguous(),
        "p_query_weight": query_weight.contiguous(),
        "p_query_bias": query_bias.contiguous(),
        "p_attention_bias": attention_bias.contiguous(),
        "p_out": out,
    }
    parameters = (qkv_weight, qkv_bias, query_weight, query_bias, attention_bias)
    launch_of(x, *parameters, window).run(tensors, x.shape[0])
    return out


def launch_of(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
) -> KernelLaunch:
    """The launch that a call with these arguments is; their values are not looked at."""
    heads, key_dim, kernel = query_weight.shape[:3]
    channels, height, width = x.shape[1:]
    return launch_cascaded_attention(
        heads,
        key_dim,
        channels // heads,
        kernel,
        window,
        height,
        width,
        DTYPE_NAMES[dtype_name(x)],
        memory_format_of(x) == torch.channels_last,
    )
