"""`lite_mla` as a PyTorch operator, `torch.ops.evit.lite_mla`."""

from __future__ import annotations

import torch
from torch import Tensor

from evit_kernels.availability import can_run, dtype_name, memory_format_of, why_no_kernel
from evit_kernels.launch import DTYPE_NAMES, KernelLaunch
from evit_kernels.lite_mla import naive as definition
from evit_kernels.lite_mla.launch import launch_lite_mla, why_no_launch


@torch.library.custom_op("evit::lite_mla", mutates_args=())
def lite_mla(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    """See `evit_kernels.lite_mla.naive`; no gradient. The output has the memory format of `qkv`."""
    if qkv.is_cuda:
        definition.check_arguments(qkv, aggregated, dim, eps)
        if can_run_lite_mla(qkv, aggregated, dim):
            return _run(qkv, aggregated, dim, eps)
    return definition.lite_mla(qkv, aggregated, dim, eps).contiguous(memory_format=memory_format_of(qkv))


@lite_mla.register_fake
def _fake(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    definition.check_arguments(qkv, aggregated, dim, eps)
    batch, channels3, height, width = qkv.shape
    out = qkv.new_empty(batch, (channels3 + aggregated.shape[1]) // 3, height, width)
    return out.contiguous(memory_format=memory_format_of(qkv))


def can_run_lite_mla(qkv: Tensor, aggregated: Tensor, dim: int, *, raise_error: bool = False) -> bool:
    """Whether the kernel takes these arguments; if not, one line in the log says why.

    Args:
        qkv: [B, h1*3*d, H, W]
        aggregated: [B, h2*3*d, H, W]
        dim: head dim d.
        raise_error: raise ValueError with the reason instead.
    """
    height, width = qkv.shape[2:]
    heads = max(qkv.shape[1], aggregated.shape[1]) // (3 * dim)
    reason = why_no_kernel(qkv) or why_no_launch(heads, dim, height, width)
    return can_run("lite_mla", reason, raise_error=raise_error)


def fused_lite_mla(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    """`lite_mla` by the kernel, in one launch; arguments, result and errors as in the definition.

    A map that is neither contiguous nor channels_last is copied first, and so is a second map that does not lie as the
    first.
    """
    definition.check_arguments(qkv, aggregated, dim, eps)
    can_run_lite_mla(qkv, aggregated, dim, raise_error=True)
    return _run(qkv, aggregated, dim, eps)


def _run(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    """The launch, with arguments that are checked."""
    batch, channels3, height, width = qkv.shape
    memory_format = memory_format_of(qkv)
    shape = (batch, (channels3 + aggregated.shape[1]) // 3, height, width)
    out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device, memory_format=memory_format)
    tensors = {
        "p_qkv": qkv.contiguous(memory_format=memory_format),
        "p_aggregated": aggregated.contiguous(memory_format=memory_format),
        "p_out": out,
    }
    launch_of(qkv, aggregated, dim, eps).run(tensors, batch)
    return out


def launch_of(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> KernelLaunch:
    """The launch that a call with these arguments is; their values are not looked at."""
    channels3, height, width = qkv.shape[1:]
    dtype = DTYPE_NAMES[dtype_name(qkv)]
    channels_last = memory_format_of(qkv) == torch.channels_last
    heads, aggregated_heads = (channels // (3 * dim) for channels in (channels3, aggregated.shape[1]))
    return launch_lite_mla(heads, aggregated_heads, dim, height, width, eps, dtype, channels_last)
