"""Family `msa` in plain PyTorch: 3x3-window, 7x7-window and pooled global softmax attention, fused by a Linear.

This is the model as its users train and run it; attention goes through `scaled_dot_product_attention`. The fused
operator replaces `MultiScaleAttention` for export (`evit_deploy.models.fused`), with the same weights.

Legend: B batch, H x W the map, C channels, h heads, d = C / h head dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_deploy.specs import ModelSpec

STEM_STRIDE = 4
SMALL_WINDOW = 3
MEDIUM_WINDOW = 7
LOCAL_EXPANSION = 4
FFN_EXPANSION = 2
LAST_STRIDED_TRANSITION = 3  # stages run at strides 4, 8, 16, 32, 32: the fifth keeps the map


def transition_stride(stage: int) -> int:
    """Stride of the 3x3 convolution that leads into stage 1, 2, ... (stage 0 follows the stem)."""
    return 2 if stage <= LAST_STRIDED_TRANSITION else 1


class InvertedResidual(nn.Module):
    """x + project(gelu(depthwise(gelu(expand(x))))) over a map [B, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim * LOCAL_EXPANSION
        self.expand = nn.Conv2d(dim, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.gelu(self.depthwise(F.gelu(self.expand(x)))))


class FeedForward(nn.Module):
    """Linear to 2C, 3x3 depthwise convolution, GELU, Linear back, over tokens [B, H, W, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim * FFN_EXPANSION
        self.expand = nn.Linear(dim, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x).permute(0, 3, 1, 2))
        return self.project(F.gelu(x).permute(0, 2, 3, 1))


def window_attention(qkv: Tensor, num_heads: int, window: int) -> Tensor:
    """Attention inside non-overlapping windows; the map is padded right and bottom, padded keys are masked out.

    Args:
        qkv: [B, H, W, 3C], query, key and value of each token side by side.

    Returns:
        [B, H, W, C]
    """
    batch, height, width, channels = qkv.shape
    head_dim = channels // 3 // num_heads
    pad_bottom, pad_right = -height % window, -width % window
    rows, columns = (height + pad_bottom) // window, (width + pad_right) // window
    tokens = window * window
    x = F.pad(qkv, (0, 0, 0, pad_right, 0, pad_bottom))
    x = x.view(batch, rows, window, columns, window, 3, num_heads, head_dim)
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch * rows * columns, num_heads, tokens, head_dim)
    mask = None
    if pad_bottom or pad_right:
        inside = F.pad(torch.ones(height, width, dtype=torch.bool, device=qkv.device), (0, pad_right, 0, pad_bottom))
        inside = inside.view(rows, window, columns, window).permute(0, 2, 1, 3).reshape(-1, 1, 1, tokens)
        mask = torch.zeros(inside.shape, dtype=qkv.dtype, device=qkv.device).masked_fill(~inside, float("-inf"))
        mask = mask.repeat(batch, 1, 1, 1)
    x = F.scaled_dot_product_attention(x[0], x[1], x[2], attn_mask=mask)
    x = x.view(batch, rows, columns, num_heads, window, window, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(batch, rows * window, columns * window, num_heads * head_dim)
    return x[:, :height, :width]


def pool_tokens(x: Tensor) -> Tensor:
    """2x2 average pooling of a token map, [B, H, W, C] to [B, ceil(H/2), ceil(W/2), C]; padding is not counted."""
    x = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True, count_include_pad=False)
    return x.permute(0, 2, 3, 1)


class MultiScaleAttention(nn.Module):
    """Three attentions over tokens [B, H, W, C] and their fusion.

    `small` and `medium` project to query, key and value inside windows. `large` projects every token to a query, and
    the pooled map to keys and values.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.small = nn.Linear(dim, 3 * dim)
        self.medium = nn.Linear(dim, 3 * dim)
        self.large = nn.Linear(dim, 3 * dim)
        self.fusion = nn.Linear(3 * dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The operator's inputs: [B, H, W, 3C] twice, queries [B, H, W, C], pooled keys and values [B, Hp, Wp, 2C]."""
        weight, bias, dim = self.large.weight, self.large.bias, self.dim
        queries = F.linear(x, weight[:dim], bias[:dim])
        keys_values = F.linear(pool_tokens(x), weight[dim:], bias[dim:])
        return self.small(x), self.medium(x), queries, keys_values

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        small, medium, queries, keys_values = self.project(x)
        heads, head_dim = self.num_heads, dim // self.num_heads
        q = queries.view(batch, height * width, heads, head_dim).transpose(1, 2)
        k, v = keys_values.view(batch, -1, 2, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        large = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height, width, dim)
        branches = (
            window_attention(small, heads, SMALL_WINDOW),
            window_attention(medium, heads, MEDIUM_WINDOW),
            large,
        )
        return self.fusion(torch.cat(branches, dim=-1))


class Block(nn.Module):
    """Inverted residual, then attention and feed-forward with pre-normalisation; map [B, C, H, W] in and out."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.local = InvertedResidual(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = MultiScaleAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x).permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.ffn(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """An optional 3x3 convolution that changes channels (and stride), then blocks; map [B, C, H, W] in and out."""

    def __init__(self, in_channels: int | None, dim: int, depth: int, num_heads: int, stride: int) -> None:
        super().__init__()
        self.transition = nn.Identity() if in_channels is None else nn.Conv2d(in_channels, dim, 3, stride, padding=1)
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.transition(x))


class EfficientViTMSA(nn.Module):
    """The whole classifier: images [B, 3, S, S] to logits [B, num_classes].

    Args:
        channels, depths: one entry per stage.
        num_heads: heads of every attention; must divide every channel count.
        pos_embed_size: grid (Gh, Gw) of the learned position embedding; resized bicubically to the stem's map.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: int = 8,
        num_classes: int = 1000,
        pos_embed_size: tuple[int, int] = (56, 56),
    ) -> None:
        super().__init__()
        if len(channels) != len(depths) or not channels:
            raise ValueError(f"channels and depths must have one entry per stage, got {channels=} {depths=}")
        if num_heads < 1 or any(c < 1 or c % num_heads for c in channels):
            raise ValueError(f"num_heads must divide every channel count, got {channels=} {num_heads=}")
        first = channels[0]
        if first % 2:
            raise ValueError(f"the first channel count must be even, half of it is the stem's, got {channels=}")
        self.stem = nn.Sequential(
            nn.Conv2d(3, first // 2, 3, 2, padding=1),
            nn.BatchNorm2d(first // 2),
            nn.GELU(),
            nn.Conv2d(first // 2, first, 3, 2, padding=1),
            nn.BatchNorm2d(first),
        )
        self.pos_embed = nn.Parameter(torch.empty(1, first, *pos_embed_size))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.stages = nn.Sequential(
            Stage(None, first, depths[0], num_heads, 1),
            *(
                Stage(previous, dim, depths[i], num_heads, transition_stride(i))
                for i, (previous, dim) in enumerate(pairwise(channels), start=1)
            ),
        )
        self.norm = nn.LayerNorm(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes)

    def position_embedding(self, height: int, width: int) -> Tensor:
        """The embedding at the stem's map size, [1, C, height, width]."""
        if self.pos_embed.shape[-2:] == (height, width):
            return self.pos_embed
        return F.interpolate(self.pos_embed, size=(height, width), mode="bicubic", align_corners=False)

    @torch.no_grad()
    def fix_image_size(self, image_size: int) -> None:
        """Resize the position embedding once and for all, for square images of `image_size` pixels."""
        side = -(-image_size // STEM_STRIDE)
        self.pos_embed = nn.Parameter(self.position_embedding(side, side).clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.position_embedding(x.shape[2], x.shape[3])
        x = self.stages(x)
        return self.head(self.norm(x.mean((2, 3))))


def build_msa(spec: ModelSpec) -> EfficientViTMSA:
    """The module of an `msa` spec, with random weights, in evaluation mode."""
    config = spec.config
    model = EfficientViTMSA(
        channels=tuple(config["channels"]),
        depths=tuple(config["depths"]),
        num_heads=config["num_heads"],
        num_classes=spec.num_classes,
        pos_embed_size=tuple(config["pos_embed_size"]),
    )
    return model.eval()
