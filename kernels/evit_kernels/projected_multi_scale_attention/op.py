"""`projected_multi_scale_attention` as a PyTorch operator, `torch.ops.evit.projected_multi_scale_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from evit_kernels.availability import can_run, dtype_name, why_no_kernel
from evit_kernels.launch import DTYPE_NAMES, KernelLaunch
from evit_kernels.projected_multi_scale_attention import naive as definition
from evit_kernels.projected_multi_scale_attention.launch import launch_projected_multi_scale_attention, why_no_launch


@torch.library.custom_op("evit::projected_multi_scale_attention", mutates_args=())
def projected_multi_scale_attention(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """See `evit_kernels.projected_multi_scale_attention.naive`; no gradient."""
    if x.is_cuda:
        definition.check_arguments(x, kv_large, weight, bias, heads)
        if can_run_projected_multi_scale_attention(x, heads):
            return _run(x, kv_large, weight, bias, heads)
    return definition.projected_multi_scale_attention(x, kv_large, weight, bias, heads)


@projected_multi_scale_attention.register_fake
def _fake(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    definition.check_arguments(x, kv_large, weight, bias, heads)
    batch, height, width, channels = x.shape
    return x.new_empty(batch, height * width, 3 * channels)


def can_run_projected_multi_scale_attention(x: Tensor, heads: int, *, raise_error: bool = False) -> bool:
    """Whether the kernel takes these arguments; if not, one line in the log says why.

    Args:
        x: [B, H, W, C]
        heads: number of heads.
        raise_error: raise ValueError with the reason instead.
    """
    height, width, channels = x.shape[1:]
    reason = why_no_kernel(x) or why_no_launch(heads, channels // heads, height, width)
    return can_run("projected_multi_scale_attention", reason, raise_error=raise_error)


def fused_projected_multi_scale_attention(
    x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int
) -> Tensor:
    """`projected_multi_scale_attention` by the kernel, in one launch; arguments, result and errors as defined.

    Tensors that are not contiguous are copied first.
    """
    definition.check_arguments(x, kv_large, weight, bias, heads)
    can_run_projected_multi_scale_attention(x, heads, raise_error=True)
    return _run(x, kv_large, weight, bias, heads)


def _run(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """The launch, with arguments that are checked."""
    batch, height, width, channels = x.shape
    out = x.new_empty(batch, height * width, 3 * channels)
    tensors = {
        "p_x": x.contiguous(),
        "p_kv_large": kv_large.contiguous(),
        "p_weight": weight.contiguous(),
        "p_bias": bias.contiguous(),
        "p_out": out,
    }
    launch_of(x, kv_large, weight, bias, heads).run(tensors, batch)
    return out


def launch_of(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> KernelLaunch:
    """The launch that a call with these arguments is; their values are not looked at."""
    height, width, channels = x.shape[1:]
    dtype = DTYPE_NAMES[dtype_name(x)]
    return launch_projected_multi_scale_attention(heads, channels // heads, height, width, dtype)
