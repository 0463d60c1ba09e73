"""The model as it is exported: batch normalisation folded, attention modules replaced by the fused operators."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from evit_kernels.projected_multi_scale_attention.launch import projections_pay
from torch import Tensor, nn

from evit_deploy.models import operators
from evit_deploy.models.fold import fold_batchnorm
from evit_deploy.models.msa import Block, EfficientViTMSA, MultiScaleAttention, pool_tokens
from evit_deploy.specs import ModelSpec


def fused_model(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """A copy of a reference module with batch normalisation folded and every attention layer fused.

    Args:
        model: the module `load_model` returns.
        spec: what it is.

    Returns:
        A module with the same inputs, outputs and (to rounding) the same values; the argument is left as it is.
    """
    # timm's `msra` keeps the biases it gathered in a forward pass; such tensors with a history cannot be deep-copied.
    caches = (module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache"))
    emptied: dict[int, Any] = {id(cache): {} for cache in caches}
    fused = fold_batchnorm(copy.deepcopy(model, emptied).eval())
    if isinstance(fused, EfficientViTMSA):
        fused.fix_image_size(spec.image_size)
    replace = {"msa": _fuse_msa, "mit": _fuse_mit, "msra": _fuse_msra}[spec.family]
    for parent in list(fused.modules()):
        for name, child in list(parent.named_children()):
            replacement = replace(child)
            if replacement is not None:
                setattr(parent, name, replacement)
    return fused.eval()


class FusedMultiScaleAttention(nn.Module):
    """`MultiScaleAttention` through an operator, tokens [B, H, W, C] in and out.

    Where it pays, the operator takes the tokens and projects them itself.
    """

    weight: Tensor  # [7C, C], rows of both windows' queries, keys and values, then of the global branch's queries
    bias: Tensor
    kv_weight: Tensor
    kv_bias: Tensor

    def __init__(self, attention: MultiScaleAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        linears, dim = (attention.small, attention.medium, attention.large), attention.dim
        weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
        self.register_buffer("weight", weight[: 7 * dim].detach().clone())
        self.register_buffer("bias", bias[: 7 * dim].detach().clone())
        self.register_buffer("kv_weight", weight[7 * dim :].detach().clone())
        self.register_buffer("kv_bias", bias[7 * dim :].detach().clone())
        self.fusion = attention.fusion

    def forward(self, x: Tensor) -> Tensor:
        height, width, dim = x.shape[1:]
        keys_values = F.linear(pool_tokens(x), self.kv_weight, self.kv_bias)
        if projections_pay(self.heads, dim // self.heads, height, width):
            out = operators.projected_multi_scale_attention(x, keys_values, self.weight, self.bias, self.heads)
        else:
            rows = (slice(3 * dim), slice(3 * dim, 6 * dim), slice(6 * dim, None))
            small, medium, queries = (F.linear(x, self.weight[part], self.bias[part]) for part in rows)
            out = operators.multi_scale_attention(small, medium, queries, keys_values, self.heads)
        fused: Tensor = self.fusion(out)
        return fused.view(x.shape)


class FusedBlock(nn.Module):
    """A block of `msa` with its feed-forward channel-first: a map [B, C, H, W] in and out.

    The Linears become 1x1 convolutions, so that the map changes its layout twice at C channels instead of four times,
    twice of them at 2C. `norm2` stays where the tokens are channel-last.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.local = block.local
        self.norm1 = block.norm1
        self.attn = FusedMultiScaleAttention(block.attn)
        self.norm2 = block.norm2
        self.expand = _as_convolution(block.ffn.expand)
        self.depthwise = block.ffn.depthwise
        self.project = _as_convolution(block.ffn.project)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.local(x).permute(0, 2, 3, 1)
        tokens = tokens + self.attn(self.norm1(tokens))
        hidden = self.expand(self.norm2(tokens).permute(0, 3, 1, 2))
        return tokens.permute(0, 3, 1, 2) + self.project(F.gelu(self.depthwise(hidden)))


class FusedLiteMLA(nn.Module):
    """timm's `LiteMLA` through the operator, map [B, C, H, W] in and out."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.dim: int = attention.dim
        self.eps: float = attention.eps
        self.qkv = attention.qkv
        self.aggreg = attention.aggreg
        self.proj = attention.proj

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        scales = [aggregate(qkv) for aggregate in self.aggreg]
        aggregated = scales[0] if len(scales) == 1 else torch.cat(scales, dim=1)
        return self.proj(operators.lite_mla(qkv, aggregated, self.dim, self.eps))


class FusedCascadedAttention(nn.Module):
    """timm's `LocalWindowAttention` with its cascade through the operator, map [B, C, H, W] in and out.

    The closing projection works on single positions, so it runs after the windows are put back together; the ReLU that
    it begins with is the operator's last step.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor
    attention_bias: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention = block.attn
        self.window: int = attention.resolution
        kernels = [head.conv.weight[:, 0] for head in attention.dws]
        self.kernels = tuple(kernel.shape[-1] for kernel in kernels)
        widest = max(self.kernels)
        padded = [F.pad(kernel, ((widest - kernel.shape[-1]) // 2,) * 4) for kernel in kernels]
        self.register_buffer("qkv_weight", torch.stack([head.conv.weight[:, :, 0, 0] for head in attention.qkvs]))
        self.register_buffer("qkv_bias", torch.stack([head.conv.bias for head in attention.qkvs]))
        self.register_buffer("query_weight", torch.stack(padded))
        self.register_buffer("query_bias", torch.stack([head.conv.bias for head in attention.dws]))
        self.register_buffer(
            "attention_bias", attention.attention_biases[:, attention.attention_bias_idxs].contiguous()
        )
        relu, self.proj = attention.proj
        assert isinstance(relu, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        out = operators.cascaded_attention(
            x,
            self.qkv_weight,
            self.qkv_bias,
            self.query_weight,
            self.query_bias,
            self.attention_bias,
            self.window,
            self.kernels,
        )
        projected: Tensor = self.proj(out)
        return projected


def _as_convolution(linear: nn.Linear) -> nn.Conv2d:
    convolution = nn.Conv2d(linear.in_features, linear.out_features, 1)
    convolution.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], requires_grad=False)
    convolution.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return convolution


def _fuse_msa(module: nn.Module) -> nn.Module | None:
    return FusedBlock(module) if isinstance(module, Block) else None


def _fuse_mit(module: nn.Module) -> nn.Module | None:
    return FusedLiteMLA(module) if type(module).__name__ == "LiteMLA" else None


@torch.no_grad()
def _fuse_msra(module: nn.Module) -> nn.Module | None:
    return FusedCascadedAttention(module) if type(module).__name__ == "LocalWindowAttention" else None
