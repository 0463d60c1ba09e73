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
    if x.is_cuda:
        definition.check_arguments(x, *parameters, window)
        if can_run_cascaded_attention(x, query_weight, window):
            return _run(launch_of(x, *parameters, window), x, parameters)
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
    parameters = (qkv_weight, qkv_bias, query_weight, query_bias, attention_bias)
    definition.check_arguments(x, *parameters, window)
    can_run_cascaded_attention(x, query_weight, window, raise_error=True)
    return _run(launch_of(x, *parameters, window), x, parameters)


def _run(launch: KernelLaunch, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    """The launch, with arguments that are checked; the parameters in the operator's order."""
    memory_format = memory_format_of(x)
    out = torch.empty_like(x, memory_format=memory_format)
    inputs = (x.contiguous(memory_format=memory_format), *(parameter.contiguous() for parameter in parameters))
    launch.run({**dict(zip(launch.inputs, inputs, strict=True)), "p_out": out}, x.shape[0])
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
