"""`multi_scale_attention` as a PyTorch operator, `torch.ops.evit.multi_scale_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from evit_kernels.availability import can_run, dtype_name, why_no_kernel
from evit_kernels.launch import DTYPE_NAMES, KernelLaunch
from evit_kernels.multi_scale_attention import naive as definition
from evit_kernels.multi_scale_attention.launch import launch_multi_scale_attention, why_no_launch


@torch.library.custom_op("evit::multi_scale_attention", mutates_args=())
def multi_scale_attention(
    qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int
) -> Tensor:
    """See `evit_kernels.multi_scale_attention.naive`; no gradient."""
    if q_large.is_cuda:
        definition.check_arguments(qkv_small, qkv_medium, q_large, kv_large, heads)
        if can_run_multi_scale_attention(q_large, heads):
            return _run(qkv_small, qkv_medium, q_large, kv_large, heads)
    return definition.multi_scale_attention(qkv_small, qkv_medium, q_large, kv_large, heads)


@multi_scale_attention.register_fake
def _fake(qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int) -> Tensor:
    definition.check_arguments(qkv_small, qkv_medium, q_large, kv_large, heads)
    batch, height, width, channels = q_large.shape
    return q_large.new_empty(batch, height * width, 3 * channels)


def can_run_multi_scale_attention(q_large: Tensor, heads: int, *, raise_error: bool = False) -> bool:
    """Whether the kernel takes these arguments; if not, one line in the log says why.

    Args:
        q_large: [B, H, W, C]
        heads: number of heads.
        raise_error: raise ValueError with the reason instead.
    """
    height, width, channels = q_large.shape[1:]
    reason = why_no_kernel(q_large) or why_no_launch(heads, channels // heads, height, width)
    return can_run("multi_scale_attention", reason, raise_error=raise_error)


def fused_multi_scale_attention(
    qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int
) -> Tensor:
    """`multi_scale_attention` by the kernel, in one launch; arguments, result and errors as in the definition.

    Maps that are not contiguous are copied first.
    """
    definition.check_arguments(qkv_small, qkv_medium, q_large, kv_large, heads)
    can_run_multi_scale_attention(q_large, heads, raise_error=True)
    return _run(qkv_small, qkv_medium, q_large, kv_large, heads)


def _run(qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int) -> Tensor:
    """The launch, with arguments that are checked."""
    batch, height, width, channels = q_large.shape
    out = q_large.new_empty(batch, height * width, 3 * channels)
    tensors = {
        "p_qkv_small": qkv_small.contiguous(),
        "p_qkv_medium": qkv_medium.contiguous(),
        "p_q_large": q_large.contiguous(),
        "p_kv_large": kv_large.contiguous(),
        "p_out": out,
    }
    launch_of(qkv_small, qkv_medium, q_large, kv_large, heads).run(tensors, batch)
    return out


def launch_of(qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int) -> KernelLaunch:
    """The launch that a call with these arguments is; their values are not looked at."""
    height, width, channels = q_large.shape[1:]
    return launch_multi_scale_attention(heads, channels // heads, height, width, DTYPE_NAMES[dtype_name(q_large)])
