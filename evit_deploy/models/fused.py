"""The model as it is exported: batch normalisation folded, attention modules replaced by the fused operators."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_deploy.models import operators
from evit_deploy.models.fold import fold_batchnorm
from evit_deploy.models.msa import MultiScaleAttention
from evit_deploy.specs import ModelSpec


def fused_model(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """A copy of a reference module with batch normalisation folded and every attention layer fused.

    Args:
        model: the module `load_model` returns.
        spec: what it is.

    Returns:
        A module with the same inputs, outputs and (to rounding) the same values; the argument is left as it is.
    """
    fused = fold_batchnorm(copy.deepcopy(model).eval())
    replace = {"msa": _fuse_msa, "mit": _fuse_mit, "msra": _fuse_msra}[spec.family]
    for parent in list(fused.modules()):
        for name, child in list(parent.named_children()):
            replacement = replace(child)
            if replacement is not None:
                setattr(parent, name, replacement.eval())
    return fused


class FusedMultiScaleAttention(nn.Module):
    """`MultiScaleAttention` through the operator, tokens [B, H, W, C] in and out."""

    def __init__(self, attention: MultiScaleAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        small, medium, queries, keys_values = self.attention.project(x)
        out = operators.multi_scale_attention(small, medium, queries, keys_values, self.attention.num_heads)
        return self.attention.fusion(out).view(x.shape)


class FusedLiteMLA(nn.Module):
    """timm's `LiteMLA` through the operator, map [B, C, H, W] in and out."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.dim: int = attention.dim
        self.eps: float = attention.eps
        self.qkv = attention.qkv
        self.aggreg = attention.aggreg
        self.proj = attention.proj

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        scales = torch.cat([qkv, *(aggregate(qkv) for aggregate in self.aggreg)], dim=1)
        return self.proj(operators.lite_mla(scales, self.dim, self.eps))


class FusedCascadedAttention(nn.Module):
    """timm's `LocalWindowAttention` with its cascade through the operator, map [B, C, H, W] in and out.

    The closing projection works on single positions, so it runs after the windows are put back together.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        attention = block.attn
        self.window: int = attention.resolution
        kernels = [head.conv.weight[:, 0] for head in attention.dws]
        widest = max(kernel.shape[-1] for kernel in kernels)
        padded = [F.pad(kernel, ((widest - kernel.shape[-1]) // 2,) * 4) for kernel in kernels]
        self.register_buffer("qkv_weight", torch.stack([head.conv.weight[:, :, 0, 0] for head in attention.qkvs]))
        self.register_buffer("qkv_bias", torch.stack([head.conv.bias for head in attention.qkvs]))
        self.register_buffer("query_weight", torch.stack(padded))
        self.register_buffer("query_bias", torch.stack([head.conv.bias for head in attention.dws]))
        self.register_buffer("attention_bias", attention.attention_biases[:, attention.attention_bias_idxs].contiguous())
        self.proj = attention.proj

    def forward(self, x: Tensor) -> Tensor:
        out = operators.cascaded_attention(
            x,
            self.qkv_weight,
            self.qkv_bias,
            self.query_weight,
            self.query_bias,
            self.attention_bias,
            self.window,
        )
        return self.proj(out)


def _fuse_msa(module: nn.Module) -> nn.Module | None:
    return FusedMultiScaleAttention(module) if isinstance(module, MultiScaleAttention) else None


def _fuse_mit(module: nn.Module) -> nn.Module | None:
    return FusedLiteMLA(module) if type(module).__name__ == "LiteMLA" else None


@torch.no_grad()
def _fuse_msra(module: nn.Module) -> nn.Module | None:
    return FusedCascadedAttention(module) if type(module).__name__ == "LocalWindowAttention" else None
