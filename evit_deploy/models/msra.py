"""Family `msra` (Microsoft Cream): timm's module, and the tables its weights share with the image size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evit_deploy.models.timm_import import import_timm
from evit_deploy.specs import ModelSpec

PATCH_SIZE_PX = 16


def build_msra(spec: ModelSpec) -> nn.Module:
    """timm's module of an `msra` spec, with random weights, in evaluation mode."""
    timm_msra = import_timm("timm.models.efficientvit_msra")
    config = spec.config
    model: nn.Module = timm_msra.EfficientVitMsra(
        img_size=spec.image_size,
        num_classes=spec.num_classes,
        embed_dim=tuple(config["embed_dim"]),
        key_dim=tuple(config["key_dim"]),
        depth=tuple(config["depth"]),
        num_heads=tuple(config["num_heads"]),
        window_size=tuple(config["window_size"]),
        kernels=tuple(config["kernels"]),
    )
    return model.eval()


def stage_resolutions(image_size: int, stages: int) -> tuple[int, ...]:
    """Side of the feature map of each stage: patches of 16 pixels, then halved (rounded up) per stage."""
    resolution = image_size // PATCH_SIZE_PX
    resolutions = [resolution]
    for _ in range(stages - 1):
        resolution = (resolution - 1) // 2 + 1
        resolutions.append(resolution)
    return tuple(resolutions)


def attention_windows(image_size: int, window_size: tuple[int, ...]) -> tuple[int, ...]:
    """Side of the attention window of each stage; a map smaller than the window is one window."""
    return tuple(
        min(window, side)
        for window, side in zip(window_size, stage_resolutions(image_size, len(window_size)), strict=True)
    )


def bias_indices(window: int) -> Tensor:
    """[N, N] int64 with N = window**2: which attention bias each pair of tokens uses.

    The bias depends on the absolute row and column distance; distances are numbered row by row.
    """
    side = torch.arange(window)
    distance = (side[:, None] - side[None, :]).abs()
    rows, columns = distance[:, None, :, None], distance[None, :, None, :]
    return (rows * window + columns).reshape(window**2, window**2)


def resize_attention_biases(biases: Tensor, window: int) -> Tensor:
    """Attention biases [heads, old**2] for another window, [heads, window**2], with timm's own interpolation."""
    timm_layers = import_timm("timm.layers")
    resized: Tensor = timm_layers.resize_rel_pos_bias_table_levit(biases.T, (window**2, biases.shape[0]))
    return resized.T.contiguous()
