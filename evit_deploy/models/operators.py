"""The fused operators as the models call them: PyTorch operators, or nodes of domain `evit` while exporting to ONNX.

The names and attributes of the ONNX nodes are fixed here; `evit_deploy.onnx.functions` gives each a body.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from evit_kernels.cascaded_attention import cascaded_attention as _cascaded_attention
from evit_kernels.lite_mla import lite_mla as _lite_mla
from evit_kernels.multi_scale_attention import multi_scale_attention as _multi_scale_attention
from evit_kernels.projected_multi_scale_attention import (
    projected_multi_scale_attention as _projected_multi_scale_attention,
)
from torch import Tensor

from evit_deploy.constants import OPERATOR_DOMAIN

MULTI_SCALE_ATTENTION = "EvitMultiScaleAttention"
PROJECTED_MULTI_SCALE_ATTENTION = "EvitProjectedMultiScaleAttention"
LITE_MLA = "EvitLiteMLA"
CASCADED_ATTENTION = "EvitCascadedAttention"  # followed by the number of heads: a function's body has a fixed length

OPERATOR_VERSION = 1  # version of the domain's operator set, and of the TensorRT plugins of the same names
_PLUGIN_ATTRIBUTES = {"plugin_namespace": OPERATOR_DOMAIN, "plugin_version": str(OPERATOR_VERSION)}

SCORES_PER_BLOCK_BYTES = 4 * 1024**2  # a block's FP32 scores: small enough for a CPU's cache, and not many blocks

_OP_TYPE = re.compile(r"([A-Za-z]+?)(\d+)?")


def split_op_type(op_type: str) -> tuple[str, int | None]:
    """("EvitCascadedAttention", 4) for "EvitCascadedAttention4"; None without a number."""
    match = _OP_TYPE.fullmatch(op_type)
    if match is None:
        return op_type, None
    return match[1], None if match[2] is None else int(match[2])


def query_blocks(tokens: int, keys: int, heads: int) -> int:
    """Into how many equal blocks the queries are cut, so that a block's scores take about SCORES_PER_BLOCK_BYTES.

    Args:
        tokens: number of queries N; the answer divides it.
        keys: number of keys M.
        heads: number of heads.
    """
    wanted = max(1.0, tokens * heads * keys * 4 / SCORES_PER_BLOCK_BYTES)
    divisors = [blocks for blocks in range(1, tokens + 1) if tokens % blocks == 0]
    return min(divisors, key=lambda blocks: abs(math.log(blocks / wanted)))


def multi_scale_attention(
    qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int
) -> Tensor:
    """`evit_kernels.multi_scale_attention`, [B, H, W, 3C] twice, [B, H, W, C], [B, Hp, Wp, 2C] to [B, H*W, 3C]."""
    if not torch.onnx.is_in_onnx_export():
        return _multi_scale_attention(qkv_small, qkv_medium, q_large, kv_large, heads)
    return _multi_scale_node(MULTI_SCALE_ATTENTION, (qkv_small, qkv_medium, q_large, kv_large), q_large, heads)


def projected_multi_scale_attention(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """`evit_kernels.projected_multi_scale_attention`, [B, H, W, C], [B, Hp, Wp, 2C] and weights to [B, H*W, 3C]."""
    if not torch.onnx.is_in_onnx_export():
        return _projected_multi_scale_attention(x, kv_large, weight, bias, heads)
    return _multi_scale_node(PROJECTED_MULTI_SCALE_ATTENTION, (x, kv_large, weight, bias), x, heads)


def lite_mla(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    """`evit_kernels.lite_mla`, [B, h1*3*d, H, W] and [B, h2*3*d, H, W] to [B, (h1 + h2)*d, H, W]."""
    if not torch.onnx.is_in_onnx_export():
        return _lite_mla(qkv, aggregated, dim, eps)
    batch, channels3, height, width = qkv.shape
    return _node(
        LITE_MLA,
        (qkv, aggregated),
        {"dim": dim, "eps": eps, "height": height, "width": width},
        (batch, (channels3 + aggregated.shape[1]) // 3, height, width),
    )


def cascaded_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    attention_bias: Tensor,
    window: int,
    kernels: Sequence[int],
) -> Tensor:
    """`evit_kernels.cascaded_attention`, [B, C, H, W] to [B, C, H, W], none below zero.

    `kernels` has the edge of each head's kernel before it was padded with zeros, for a graph to leave the zeros out.
    """
    if not torch.onnx.is_in_onnx_export():
        return _cascaded_attention(x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias, window)
    heads, key_dim = query_weight.shape[:2]
    return _node(
        f"{CASCADED_ATTENTION}{heads}",
        (x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias),
        {"window": window, "key_dim": key_dim, "kernels": list(kernels), "height": x.shape[2], "width": x.shape[3]},
        tuple(x.shape),
    )


def _multi_scale_node(op_type: str, inputs: tuple[Tensor, ...], like: Tensor, heads: int) -> Tensor:
    """A node of one of the two operators of `msa`; `like` has the shape of the tokens, [B, H, W, C]."""
    batch, height, width, channels = like.shape
    tokens, keys = height * width, ((height + 1) // 2) * ((width + 1) // 2)
    return _node(
        op_type,
        inputs,
        {
            "heads": heads,
            "head_dim": channels // heads,
            "height": height,
            "width": width,
            "query_blocks": query_blocks(tokens, keys, heads),
        },
        (batch, tokens, 3 * channels),
    )


def _node(
    op_type: str, inputs: tuple[Tensor, ...], attributes: dict[str, int | float | list[int]], shape: tuple[int, ...]
) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{OPERATOR_DOMAIN}::{op_type}",
        inputs,
        {**attributes, **_PLUGIN_ATTRIBUTES},
        dtype=inputs[0].dtype,
        shape=shape,
        version=OPERATOR_VERSION,
    )
