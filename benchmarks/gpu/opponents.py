"""What else computes the same on a GPU: SDPA's backends, flex_attention, torch.compile, timm's own code.

Each takes the operator's arguments and returns its result, so that partition into windows, padding and reversal are
part of its time. Head dims that a backend does not take are padded with zeros, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from evit_kernels.multi_scale_attention.naive import MEDIUM_WINDOW, SMALL_WINDOW
from evit_kernels.registry import OPERATORS
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [batch, heads, tokens, dim] three times to one
Arm = Callable[..., Tensor]

SDPA_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
FUSED_DIM_MULTIPLE = 8  # head dims that SDPA's fused backends take
FLEX_MIN_DIM = 16


def opponents_of(operator: str, *, compiled: bool = True) -> dict[str, Callable[[], Arm]]:
    """Makers of every opponent by name, the cheapest to make first; making one may start a compiler later."""
    definition = OPERATORS[operator].definition
    makers: dict[str, Callable[[], Arm]] = {"eager-definition": lambda: definition}
    if operator == "multi_scale_attention":
        for name in SDPA_BACKENDS:
            makers[f"sdpa-{name}"] = partial(_sdpa_arm, name)
    if operator == "projected_multi_scale_attention":
        makers["unprojected-kernel"] = lambda: project_before_the_kernel
        for name in SDPA_BACKENDS:
            makers[f"sdpa-{name}"] = partial(_projected_arm, partial(_sdpa_arm, name))
    if operator == "lite_mla":
        makers["eager-timm"] = lambda: timm_lite_mla
    if compiled:
        makers["compile-definition"] = lambda: compile_function(definition)
        if operator == "lite_mla":
            makers["compile-timm"] = lambda: compile_function(timm_lite_mla)
        if operator == "multi_scale_attention":
            makers["flex"] = FlexMultiScaleAttention
        if operator == "projected_multi_scale_attention":
            makers["flex"] = partial(_projected_arm, FlexMultiScaleAttention)
    return makers


def compile_function(function: Arm) -> Arm:
    """torch.compile for one shape; everything compiled before is forgotten, or a limit of recompilations is reached."""
    torch.compiler.reset()
    compiled: Arm = torch.compile(function, dynamic=False)
    return compiled


def timm_lite_mla(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    """The attention of timm's LiteMLA, in FP32 whatever it is given.

    Source: timm.models.efficientvit_mit.LiteMLA.forward, from the scales' concatenation to the projection.
    """
    batch, _, height, width = qkv.shape
    scales = torch.cat([qkv, aggregated], dim=1)
    q, k, v = scales.reshape(batch, -1, 3 * dim, height * width).transpose(-1, -2).chunk(3, dim=-1)
    q, k, v = F.relu(q).float(), F.relu(k).float(), F.pad(v, (0, 1), mode="constant", value=1.0).float()
    out = q @ (k.transpose(-1, -2) @ v)
    out = (out[..., :-1] / (out[..., -1:] + eps)).to(qkv.dtype)
    return out.transpose(-1, -2).reshape(batch, -1, height, width)


def sdpa_multi_scale_attention(
    qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int, *, attend: Attend
) -> Tensor:
    """`multi_scale_attention` with an attention of dense [batch, heads, tokens, dim] tensors."""
    batch, height, width, channels = q_large.shape
    dim = channels // heads
    queries = q_large.reshape(batch, height * width, heads, dim).transpose(1, 2)
    keys, values = kv_large.reshape(batch, -1, 2, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
    large = attend(queries, keys, values).transpose(1, 2).reshape(batch, height * width, channels)
    small = window_attention(qkv_small, heads, SMALL_WINDOW, attend)
    medium = window_attention(qkv_medium, heads, MEDIUM_WINDOW, attend)
    return torch.cat((small, medium, large), dim=-1)


def window_attention(qkv: Tensor, heads: int, window: int, attend: Attend) -> Tensor:
    """Attention in windows, [B, H, W, 3C] to [B, H*W, C].

    Windows that the map's edge cuts are smaller and have calls of their own: a mask would keep flash attention out.
    """
    batch, height, width, channels3 = qkv.shape
    channels = channels3 // 3
    out = qkv.new_empty(batch, height, width, channels)
    for top, bottom, tall in _spans(height, window):
        for left, right, wide in _spans(width, window):
            rows, columns = (bottom - top) // tall, (right - left) // wide
            part = qkv[:, top:bottom, left:right].reshape(batch, rows, tall, columns, wide, 3, heads, -1)
            part = part.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(
                3, batch * rows * columns, heads, tall * wide, channels // heads
            )
            result = attend(*part.unbind(0)).reshape(batch, rows, columns, heads, tall, wide, -1)
            result = result.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, bottom - top, right - left, channels)
            out[:, top:bottom, left:right] = result
    return out.view(batch, height * width, channels)


def _spans(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, edge of the windows between): the whole windows, then what is left."""
    whole = length - length % window
    if whole:
        yield 0, whole, window
    if whole < length:
        yield whole, length, length - whole


def project_before_the_kernel(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Three Linears, then our operator that takes their results: what the projections inside are to beat."""
    return OPERATORS["multi_scale_attention"].call(*_projections(x, weight, bias), kv_large, heads)


def _projected_arm(make: Callable[[], Arm]) -> Arm:
    attention = make()

    def arm(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
        return attention(*_projections(x, weight, bias), kv_large, heads)

    return arm


def _projections(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    sizes = (3 * x.shape[-1], 3 * x.shape[-1], x.shape[-1])
    parts = zip(weight.split(sizes), bias.split(sizes), strict=True)
    return tuple(F.linear(x, rows, constants) for rows, constants in parts)


def _sdpa_arm(backend: str) -> Arm:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, SDPA_BACKENDS[backend])
    multiple = 1 if backend == "math" else FUSED_DIM_MULTIPLE

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dim = q.shape[-1]
        q, k, v = (F.pad(x, (0, -dim % multiple)) if dim % multiple else x for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=dim**-0.5)[..., :dim]

    def arm(*arguments: Any) -> Tensor:
        with sdpa_kernel([chosen]):
            return sdpa_multi_scale_attention(*arguments, attend=attend)

    return arm


class FlexMultiScaleAttention:
    """`multi_scale_attention` with compiled flex_attention: windows as block masks over tokens in window order."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        self._flex = torch.compile(flex_attention, dynamic=False)
        self._masks: dict[tuple[int, int, int], Any] = {}

    def __call__(self, qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int) -> Tensor:
        batch, height, width, channels = q_large.shape
        queries = q_large.reshape(batch, height * width, heads, channels // heads).transpose(1, 2)
        keys, values = kv_large.reshape(batch, -1, 2, heads, channels // heads).permute(2, 0, 3, 1, 4).unbind(0)
        large = self._attend(queries, keys, values, None).transpose(1, 2).reshape(batch, height * width, channels)
        small = self._windows(qkv_small, heads, SMALL_WINDOW)
        medium = self._windows(qkv_medium, heads, MEDIUM_WINDOW)
        return torch.cat((small, medium, large), dim=-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        dim = q.shape[-1]
        lacking = max(0, FLEX_MIN_DIM - dim)
        q, k, v = (F.pad(x, (0, lacking)) if lacking else x for x in (q, k, v))
        result: Any = self._flex(q, k, v, block_mask=mask, scale=dim**-0.5)
        return result[..., :dim]

    def _windows(self, qkv: Tensor, heads: int, window: int) -> Tensor:
        batch, height, width, channels3 = qkv.shape
        rows, columns, channels = -(-height // window), -(-width // window), channels3 // 3
        x = F.pad(qkv, (0, 0, 0, columns * window - width, 0, rows * window - height))
        x = x.view(batch, rows, window, columns, window, 3, heads, -1)
        q, k, v = x.permute(5, 0, 6, 1, 3, 2, 4, 7).reshape(3, batch, heads, -1, channels // heads).unbind(0)
        out = self._attend(q, k, v, self._mask(height, width, window, qkv.device))
        out = out.view(batch, heads, rows, columns, window, window, -1).permute(0, 2, 4, 3, 5, 1, 6)
        out = out.reshape(batch, rows * window, columns * window, channels)
        return out[:, :height, :width].reshape(batch, height * width, channels)

    def _mask(self, height: int, width: int, window: int, device: torch.device) -> Any:
        """Made once per size, outside of any measurement."""
        from torch.nn.attention.flex_attention import create_block_mask

        if (height, width, window) not in self._masks:
            rows, columns, tokens = -(-height // window), -(-width // window), window**2
            y = torch.arange(rows * window, device=device) < height
            x = torch.arange(columns * window, device=device) < width
            inside = (y[:, None] & x).view(rows, window, columns, window).permute(0, 2, 1, 3).reshape(-1)

            def same_window(b: Any, h: Any, q: Any, k: Any) -> Any:
                # A padded query sees its window's padding: a row without any key has no softmax.
                return (q // tokens == k // tokens) & (inside[k] | ~inside[q])

            count = rows * columns * tokens
            self._masks[height, width, window] = create_block_mask(
                same_window, None, None, count, count, device=str(device)
            )
        return self._masks[height, width, window]
