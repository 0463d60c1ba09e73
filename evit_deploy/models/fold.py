"""Folding batch normalisation into its neighbours, computed in float64."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


@torch.no_grad()
def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold, in place, every BatchNorm that follows a convolution or precedes a Linear in evaluation mode.

    A module counts as following another if it is its next sibling, dropout and identities aside; every family here
    runs such siblings in order. A BatchNorm without running statistics stays: it normalises by the batch.

    Returns:
        The same module; each folded BatchNorm has become an Identity.
    """
    for parent in model.modules():
        children = [(name, child) for name, child in parent.named_children() if not _is_neutral(child)]
        for (first_name, first), (second_name, second) in pairwise(children):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d) and second.track_running_stats:
                scale, shift = _scale_and_shift(second)
                bias = 0 if first.bias is None else first.bias.double()
                first.bias = _parameter(bias * scale + shift, first.weight)
                first.weight = _parameter(first.weight.double() * scale[:, None, None, None], first.weight)
                setattr(parent, second_name, nn.Identity())
            elif isinstance(first, nn.BatchNorm1d) and isinstance(second, nn.Linear) and first.track_running_stats:
                scale, shift = _scale_and_shift(first)
                bias = 0 if second.bias is None else second.bias.double()
                second.bias = _parameter(second.weight.double() @ shift + bias, second.weight)
                second.weight = _parameter(second.weight.double() * scale, second.weight)
                setattr(parent, first_name, nn.Identity())
    return model


def _is_neutral(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity | nn.Dropout)


def _scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BatchNorm in evaluation mode as x * scale + shift, float64, one entry per channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    return scale, shift


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)
