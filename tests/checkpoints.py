"""Checkpoint files in every published form, for tests.

The official names are written down here a second time, from the structure of the official modules and in the other
direction than `evit_deploy.checkpoint.key_formats`, so that each checks the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evit_deploy.checkpoint import Checkpoint, load_checkpoint
from evit_deploy.models import load_model
from evit_deploy.models.random_weights import random_state_dict, structured_noise
from evit_deploy.models.timm_import import import_timm
from evit_deploy.specs import ModelSpec, split_name

StateDict = dict[str, Tensor]

TOLERANCE = 1e-5  # RMS-relative, of the logits
CLASSES = 10
SMALL_MSA = ModelSpec(
    "msa",
    "custom",
    4,
    32,
    {"channels": (8, 16, 24), "depths": (1, 1, 2), "num_heads": 4, "pos_embed_size": (8, 8)},
)


def timm_model(name: str, state_dict: Mapping[str, Tensor], *, num_classes: int, image_size: int = 224) -> nn.Module:
    """timm's own model by its registered name, with the given weights: what our loading must reproduce."""
    timm = import_timm()
    family, variant = split_name(name)
    size = {"img_size": image_size} if family == "msra" else {}
    model = timm.create_model(f"efficientvit_{variant}", pretrained=False, num_classes=num_classes, **size)
    model.load_state_dict(state_dict, strict=True, assign=True)
    return model.eval()


def random_weights(name: str, *, num_classes: int = 10, image_size: int = 64, seed: int = 1) -> StateDict:
    """Random weights of a published model under canonical names; every tensor has a part in the logits."""
    return random_state_dict(ModelSpec.published(name, num_classes=num_classes, image_size=image_size), seed)


def size_of(name: str) -> int:
    """Pixels at which a family's attention is more than one token everywhere, and still cheap."""
    return 224 if name.startswith("msra") else 64


@cache
def small_weights(name: str) -> StateDict:
    """`random_weights` of 10 classes, made once; copy before changing."""
    return random_weights(name, num_classes=CLASSES, image_size=size_of(name))


def images(image_size: int, count: int = 2, seed: int = 7) -> Tensor:
    """[count, 3, image_size, image_size] float32 that differ at every scale."""
    return structured_noise(count, image_size, torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module, batch: Tensor) -> Tensor:
    """[B, num_classes] float32."""
    with torch.no_grad():
        return model(batch)


def rms_relative(candidate: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference; NaN where either is."""
    difference = (candidate.double() - reference.double()).square().mean().sqrt()
    return float(difference / reference.double().square().mean().sqrt())


def mit_names(state_dict: Mapping[str, Tensor]) -> StateDict:
    """timm's names of family `mit` as the classes of mit-han-lab/efficientvit would name them.

    EfficientViTBackbone: `input_stem` and `stages` are OpSequentials; EfficientViTLargeBackbone: the stem is
    `stages[0]`. ClsHead is an OpSequential of ConvLayer, pooling, LinearLayer, LinearLayer.
    """
    large = any(".spatial_conv." in key for key in state_dict)
    stem = ["stages", "0"] if large else ["input_stem"]
    head = {
        ("in_conv",): ("0",),
        ("classifier", "0"): ("2", "linear"),
        ("classifier", "1"): ("2", "norm"),
        ("classifier", "4"): ("3", "linear"),
    }
    named = {}
    for key, value in state_dict.items():
        part, *rest = key.split(".")
        if part == "stem":
            position = 0 if rest[0] == "in_conv" else int(rest[0].removeprefix("res")) + 1
            official = ["backbone", *stem, "op_list", str(position), *rest[1:]]
        elif part == "stages":
            stage, blocks, block, *inner = rest
            assert blocks == "blocks"
            official = ["backbone", "stages", str(int(stage) + int(large)), "op_list", block, *inner]
        else:
            taken = 1 if rest[0] == "in_conv" else 2
            official = ["head", "op_list", *head[tuple(rest[:taken])], *rest[taken:]]
        named[".".join(official)] = value
    return named


def microsoft_names(state_dict: Mapping[str, Tensor]) -> StateDict:
    """timm's names of family `msra` as the EfficientViT class of microsoft/Cream would name them.

    `patch_embed` is a Sequential of Conv2d_BN (`c`, `bn`) and ReLU. `blocks2` and `blocks3` begin with three entries
    that carry the downsampling: Sequential of residuals, PatchMerging, Sequential of residuals. The index tables are
    buffers there.
    """
    downsampling = {"res1": 0, "patchmerge": 1, "res2": 2}
    leaves = {"conv": "c", "linear": "l"}
    named = {}
    for key, value in state_dict.items():
        *path, owner, leaf = key.split(".")
        path = [*path, leaves.get(owner, owner), leaf]
        if path[0] == "patch_embed":
            path[1] = str(2 * (int(path[1].removeprefix("conv")) - 1))
        elif path[0] == "stages":
            stage = int(path[1])
            if path[2] == "downsample":
                path = [f"blocks{stage + 1}", str(downsampling[path[3]]), *path[4:]]
            else:
                shift = 3 if stage else 0
                path = [f"blocks{stage + 1}", str(int(path[3]) + shift), *path[4:]]
        named[".".join(path)] = value
        if leaf == "attention_biases":
            named[".".join([*path[:-1], "attention_bias_idxs"])] = _index_table(round(value.shape[1] ** 0.5))
    return named


def _index_table(resolution: int) -> Tensor:
    points = list(itertools.product(range(resolution), range(resolution)))
    offsets: dict[tuple[int, int], int] = {}
    indices = [offsets.setdefault((abs(p[0] - q[0]), abs(p[1] - q[1])), len(offsets)) for p in points for q in points]
    return torch.tensor(indices).view(len(points), len(points))


def reload(path: Path, **arguments: Any) -> tuple[Checkpoint, nn.Module]:
    """What `load_checkpoint` makes of a file, and the module with its weights."""
    checkpoint = load_checkpoint(path, **arguments)
    return checkpoint, load_model(checkpoint.spec, checkpoint.state_dict)


def set_attention_eps(model: nn.Module, eps: float) -> nn.Module:
    """The same module with another eps in every LiteMLA."""
    for module in model.modules():
        if type(module).__name__ == "LiteMLA":
            module.eps = eps  # type: ignore[assignment]
    return model


def official_names(name: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    """The authors' own names for a `mit` or `msra` state dict."""
    return mit_names(state_dict) if name.startswith("mit") else microsoft_names(state_dict)


def save_pt(path: Path, content: Any) -> Path:
    """`torch.save`, returning the path."""
    torch.save(content, path)
    return path


def save_safetensors(path: Path, state_dict: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A .safetensors file as timm's hub has them, returning the path."""
    save_file(dict(state_dict), path, metadata={"format": "pt", **(metadata or {})})
    return path
