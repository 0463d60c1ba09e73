"""The fused operators written out, image by image, so that what they sum inside can be measured.

Each function computes what its operator's definition does (`evit_kernels/*/naive.py`), and reports every value on the
way: those that a low-precision graph stores in the low type, and those that it keeps in FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from evit_kernels.multi_scale_attention.naive import MEDIUM_WINDOW, SMALL_WINDOW
from torch import Tensor

from evit_deploy.headroom.rows import IN_FP32, STORED
from evit_deploy.models.operators import query_blocks


class Report(Protocol):
    """Called with each inner value of one image."""

    def __call__(self, name: str, values: Tensor, *, sums: Tensor | None = None, storage: str = IN_FP32) -> None: ...


def lite_mla(report: Report, qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    """One image of `lite_mla`: [h1*3*d, H, W] and [h2*3*d, H, W] to [(h1 + h2)*d, H, W]."""
    height, width = qkv.shape[1:]
    x = torch.cat([qkv, aggregated]).reshape(-1, 3 * dim, height * width)
    q, k, v = F.relu(x[:, :dim]), F.relu(x[:, dim : 2 * dim]), x[:, 2 * dim :]
    _report_qkv(report, "", q, k, v)
    if height * width > dim:
        context = _product(report, "context", v, k.transpose(-1, -2))  # [h, d, d], summed over the tokens
        k_sum = k.sum(dim=-1, keepdim=True)  # [h, d, 1]
        report("k_sum", k_sum, sums=k_sum)
        numerator = _product(report, "numerator", context, q)  # [h, d, N]
        denominator = k_sum.transpose(-1, -2) @ q  # [h, 1, N]
    else:
        weights = _product(report, "scores", k.transpose(-1, -2), q)  # [h, N, N], keys by queries
        numerator = _product(report, "numerator", v, weights)  # summed over the tokens
        denominator = weights.sum(dim=-2, keepdim=True)
    report("denominator", denominator + eps)
    return (numerator / (denominator + eps)).reshape(-1, height, width)


def multi_scale_attention(
    report: Report, qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int
) -> Tensor:
    """One image of `multi_scale_attention`: [H, W, 3C] twice, [H, W, C], [Hp, Wp, 2C] to [H*W, 3C]."""
    branches = (
        _window_attention(report, "small.", qkv_small, heads, SMALL_WINDOW),
        _window_attention(report, "medium.", qkv_medium, heads, MEDIUM_WINDOW),
        _global_attention(report, "large.", q_large, kv_large, heads),
    )
    return torch.cat(branches, dim=-1)


def projected_multi_scale_attention(
    report: Report, x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int
) -> Tensor:
    """One image of `projected_multi_scale_attention`: [H, W, C], [Hp, Wp, 2C] and weights to [H*W, 3C]."""
    channels = x.shape[-1]
    small, medium, queries = F.linear(x, weight, bias).split((3 * channels, 3 * channels, channels), dim=-1)
    return multi_scale_attention(report, small, medium, queries, kv_large, heads)


def cascaded_attention(
    report: Report,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
) -> Tensor:
    """One image of `cascaded_attention`: [C, H, W] to [C, H, W], none below zero."""
    channels, height, width = x.shape
    heads, key_dim, kernel = query_weight.shape[:3]
    head_channels = channels // heads
    rows, columns = -(-height // window), -(-width // window)
    x = F.pad(x, (0, columns * window - width, 0, rows * window - height))
    x = x.view(channels, rows, window, columns, window).permute(1, 3, 0, 2, 4)
    parts = x.reshape(-1, channels, window, window).chunk(heads, dim=1)
    outputs: list[Tensor] = []
    for i in range(heads):
        name = f"head{i}."
        part = parts[i]
        if outputs:
            part = part + outputs[-1]
            report(f"{name}input", part, storage=STORED)
        qkv = F.conv2d(part, qkv_weight[i, :, :, None, None], qkv_bias[i])
        q, k, v = qkv.split((key_dim, key_dim, head_channels), dim=1)
        _report_qkv(report, name, q, k, v)
        q = F.conv2d(q, query_weight[i][:, None], query_bias[i], padding=kernel // 2, groups=key_dim)
        report(f"{name}refined_q", q, storage=STORED)
        scores = _product(report, f"{name}scores", q.flatten(2).transpose(-1, -2), k.flatten(2))  # [windows, T, T]
        scores = scores * key_dim**-0.5 + attention_bias[i]
        weights = _softmax(report, name, scores)
        out = _product(report, f"{name}numerator", weights, v.flatten(2).transpose(-1, -2))  # [windows, T, D]
        outputs.append(out.transpose(-1, -2).reshape(v.shape))
        report(f"{name}output", outputs[-1], storage=STORED)
    joined = F.relu(torch.cat(outputs, dim=1)).view(rows, columns, channels, window, window)
    out = joined.permute(2, 0, 3, 1, 4).reshape(channels, rows * window, columns * window)
    return out[:, :height, :width].contiguous()


# How many leading arguments are maps with a batch; the others are weights and numbers.
OPERATORS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "lite_mla": (lite_mla, 2),
    "multi_scale_attention": (multi_scale_attention, 4),
    "projected_multi_scale_attention": (projected_multi_scale_attention, 2),
    "cascaded_attention": (cascaded_attention, 1),
}


def run_operator(name: str, report_of: Callable[[int], Report], arguments: tuple[Any, ...]) -> Tensor:
    """A fused operator's result for a batch, computed image by image.

    Args:
        name: as in `evit_kernels.registry.OPERATORS`.
        report_of: the report for the image of a given index.
        arguments: of the operator's call.
    """
    function, maps = OPERATORS[name]
    batch = arguments[0].shape[0]
    results = [function(report_of(i), *(map[i] for map in arguments[:maps]), *arguments[maps:]) for i in range(batch)]
    return torch.stack(results)


def _report_qkv(report: Report, prefix: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, values in (("q", q), ("k", k), ("v", v)):
        report(f"{prefix}{name}", values, storage=STORED)


def _product(report: Report, name: str, a: Tensor, b: Tensor) -> Tensor:
    """a @ b, reported with the sums of the magnitudes."""
    product = a @ b
    report(name, product, sums=a.abs() @ b.abs())
    return product


def _softmax(report: Report, prefix: str, scores: Tensor) -> Tensor:
    """Softmax over the last dimension; the denominator is the sum of exp(score - largest score)."""
    weights = scores.softmax(dim=-1)
    report(f"{prefix}denominator", 1 / weights.amax(dim=-1))
    return weights


def _attend(report: Report, prefix: str, q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, [..., N, d] and [..., M, d] twice to [..., N, d]; `masked` is true for no keys."""
    scores = _product(report, f"{prefix}scores", q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if masked is not None:
        scores = scores.masked_fill(masked, float("-inf"))
    return _product(report, f"{prefix}numerator", _softmax(report, prefix, scores), v)


def _window_attention(report: Report, prefix: str, qkv: Tensor, heads: int, window: int) -> Tensor:
    """[H, W, 3C] to [H*W, C]."""
    height, width, channels3 = qkv.shape
    dim = channels3 // 3 // heads
    _report_qkv(report, prefix, *qkv.chunk(3, dim=-1))
    rows, columns = -(-height // window), -(-width // window)
    padding = (0, columns * window - width, 0, rows * window - height)
    outside = F.pad(torch.zeros(height, width, dtype=torch.bool), padding, value=True)
    outside = outside.view(rows, window, columns, window).permute(0, 2, 1, 3).reshape(rows, columns, 1, 1, window**2)
    x = F.pad(qkv, (0, 0, *padding)).view(rows, window, columns, window, 3, heads, dim)
    q, k, v = x.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows, columns, heads, window**2, dim).unbind(0)
    out = _attend(report, prefix, q, k, v, outside).view(rows, columns, heads, window, window, dim)
    out = out.permute(0, 3, 1, 4, 2, 5).reshape(rows * window, columns * window, heads * dim)
    return out[:height, :width].reshape(height * width, heads * dim)


def _global_attention(report: Report, prefix: str, queries: Tensor, keys_values: Tensor, heads: int) -> Tensor:
    """[H, W, C] and [Hp, Wp, 2C] to [H*W, C], some queries at a time: the scores of all would be large."""
    height, width, channels = queries.shape
    q = queries.reshape(height * width, heads, channels // heads).transpose(0, 1)  # [h, N, d]
    k, v = keys_values.reshape(-1, 2, heads, channels // heads).permute(1, 2, 0, 3).unbind(0)  # [h, M, d]
    _report_qkv(report, prefix, q, k, v)
    blocks = query_blocks(q.shape[1], k.shape[1], heads)
    out = torch.cat([_attend(report, prefix, part, k, v, None) for part in q.chunk(blocks, dim=1)], dim=1)
    return out.transpose(0, 1).reshape(height * width, channels)
