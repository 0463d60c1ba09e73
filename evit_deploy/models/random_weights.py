"""Seeded random weights that give every tensor a part in the logits, for `export --random-weights` and for tests.

A module's own initialisation would not do: `msra` starts with BatchNorm weights of zero, which switch whole branches
off, and biases of zero hide a lost bias. Here every tensor is drawn, and one forward pass over a few synthetic images
sets the BatchNorm statistics, which keeps activations of order one at any depth.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_deploy.models import build_model
from evit_deploy.specs import ModelSpec

_CALIBRATION_IMAGES = 8
_BRANCH_GAIN = 0.4  # of what a residual branch adds, so that a sum of dozens stays of order one
_QUERY_GAIN = 0.05  # keeps `msra` softmax soft: a saturated one is chaotic, FP32 and FP64 then part for loud images
_QUERIES = re.compile(r"\.dws\.\d+\.bn\.weight$")
_BRANCH_ENDS = re.compile(
    r"(project|fusion|proj\.norm|proj\.1\.bn|pw2\.bn|dw[01]\.m\.bn|local_module\.main\.point_conv\.norm"
    r"|(stem\.res\d+|blocks\.[1-9]\d*)\.main\.(point_conv|conv2)\.norm)\.weight$"
)


def random_state_dict(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Weights for a spec, the same for the same seed and build of torch; the global generator is left alone.

    Returns:
        canonical keys, float32 (BatchNorm counters int64).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = build_model(spec)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(_random_tensor(name, value.shape, generator))
        _set_batch_statistics(model, structured_noise(_CALIBRATION_IMAGES, spec.image_size, generator))
    return {name: value.detach() for name, value in model.state_dict().items()}


def structured_noise(count: int, image_size: int, generator: torch.Generator) -> Tensor:
    """Noise at several scales, [count, 3, image_size, image_size] of about unit variance.

    White noise would not do: its pooled features are the same for every image.
    """
    images = torch.randn(count, 3, image_size, image_size, generator=generator)
    for cells in (1, 2, 4, 8, 16):
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        images += F.interpolate(coarse, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return images / math.sqrt(4.0)


def _random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    leaf = name.rpartition(".")[2]
    noise = torch.randn(shape, generator=generator)
    if leaf == "running_var":
        return 1.0 + 0.1 * noise.abs()
    gain = _BRANCH_GAIN if _BRANCH_ENDS.search(name) else _QUERY_GAIN if _QUERIES.search(name) else 1.0
    if leaf == "weight" and len(shape) == 1:  # BatchNorm and LayerNorm
        return gain * (1.0 + 0.1 * noise)
    if leaf == "weight":
        return gain * noise / math.sqrt(math.prod(shape[1:]))
    if leaf in ("attention_biases", "pos_embed"):
        return 0.5 * noise
    return 0.1 * noise


def _set_batch_statistics(model: nn.Module, images: Tensor) -> None:
    """One forward pass in which every BatchNorm takes its statistics from what reaches it."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of what is seen
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
