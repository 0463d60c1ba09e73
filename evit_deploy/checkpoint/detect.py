"""What the shapes of a state dict say about the model: hyperparameters, variant, classes, image size.

Works on canonical names. What no weight shows (eps, the heads of family `msa`) is the caller's to add.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from evit_deploy.constants import MAX_IMAGE_SIZE_PX
from evit_deploy.models.msra import PATCH_SIZE_PX, attention_windows
from evit_deploy.specs import CUSTOM_VARIANT, split_name, variant_config, variant_names

Shapes = Mapping[str, tuple[int, ...]]

DEFAULT_IMAGE_SIZE_PX = 224
_MSA_STEM_STRIDE = 4

CLASSIFIER_WEIGHT = {"msa": "head.weight", "mit": "head.classifier.4.weight", "msra": "head.linear.weight"}


def read_config(family: str, shapes: Shapes) -> dict[str, Any]:
    """The hyperparameters that a family's weights show, in the form of `variant_config`.

    Raises:
        KeyError: a tensor that would show one is missing; its argument is the canonical name.
        ValueError: a tensor has another number of dimensions; the message has its name.
    """
    if family == "msa":
        return _read_msa(shapes)
    return _read_mit(shapes) if family == "mit" else _read_msra(shapes)


def read_num_classes(family: str, shapes: Shapes) -> int:
    """The width of the logits; raises like `read_config`."""
    return _size(shapes, CLASSIFIER_WEIGHT[family], rank=2)


def match_variant(family: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The published variant with these hyperparameters and its whole config, or "custom" and the given config."""
    for name in variant_names(family):
        variant = split_name(name)[1]
        published = variant_config(family, variant)
        same_kind = bool(config.get("large", False)) == variant.startswith("l")
        if same_kind and all(_agrees(key, config[key], published[key]) for key in published if key in config):
            return variant, {**published, **{k: v for k, v in config.items() if k not in ("kernels", "large")}}
    return CUSTOM_VARIANT, dict(config)


def possible_image_sizes(observed_windows: tuple[int, ...], window_size: tuple[int, ...]) -> list[int]:
    """Image sizes in pixels whose `msra` attention windows are the observed ones."""
    sizes = range(PATCH_SIZE_PX, MAX_IMAGE_SIZE_PX + 1, PATCH_SIZE_PX)
    return [size for size in sizes if attention_windows(size, window_size) == observed_windows]


def observed_windows(shapes: Shapes) -> tuple[int, ...]:
    """Side of the attention window of each `msra` stage, from its attention biases."""
    return tuple(
        _side(shapes, f"stages.{stage}.blocks.0.mixer.m.attn.attention_biases") for stage in _children(shapes, "stages")
    )


def pos_embed_image_size(config: Mapping[str, Any]) -> int | None:
    """The image size in pixels an `msa` position embedding was learned at; None when its grid is not square."""
    height, width = config["pos_embed_size"]
    return height * _MSA_STEM_STRIDE if height == width else None


def _read_msa(shapes: Shapes) -> dict[str, Any]:
    _, first, grid_height, grid_width = _shape(shapes, "pos_embed", rank=4)
    stages = list(_children(shapes, "stages"))
    widths = [first, *(_size(shapes, f"stages.{i}.transition.weight", rank=4) for i in stages[1:])]
    return {
        "channels": tuple(widths),
        "depths": tuple(sum(1 for _ in _children(shapes, f"stages.{i}.blocks")) for i in stages),
        "pos_embed_size": (grid_height, grid_width),
    }


def _read_mit(shapes: Shapes) -> dict[str, Any]:
    stages = list(_children(shapes, "stages"))
    large = any(key.startswith("stages.0.blocks.0.main.spatial_conv.") for key in shapes)
    first_attention = len(stages) - 1 if large else 2  # index of the first stage with attention
    depths = [sum(1 for key in _children_named(shapes, "stem", "res"))]
    for i in stages:
        blocks = sum(1 for _ in _children(shapes, f"stages.{i}.blocks"))
        depths.append(blocks - 1 if large or i >= first_attention else blocks)
    aggregation = f"stages.{stages[-1] if stages else 0}.blocks.1.context_module.main.aggreg.0.1.weight"
    config: dict[str, Any] = {
        "widths": (
            _size(shapes, "stem.in_conv.conv.weight", rank=4),
            *(_size(shapes, f"stages.{i}.blocks.0.main.point_conv.conv.weight", rank=4) for i in stages),
        ),
        "depths": tuple(depths),
        "head_dim": _shape(shapes, aggregation, rank=4)[1],  # a convolution in groups of one head's q, k or v
        "head_widths": (
            _size(shapes, "head.in_conv.conv.weight", rank=4),
            _size(shapes, "head.classifier.0.weight", rank=2),
        ),
    }
    return {**config, "large": True} if large else config


def _read_msra(shapes: Shapes) -> dict[str, Any]:
    stages = list(_children(shapes, "stages"))
    heads: list[int] = []
    key_dims: list[int] = []
    kernels: tuple[int, ...] = ()
    for i in stages:
        attention = f"stages.{i}.blocks.0.mixer.m.attn"
        heads.append(_shape(shapes, f"{attention}.attention_biases", rank=2)[0])
        key_dims.append(_size(shapes, f"{attention}.dws.0.conv.weight", rank=4))
        sides = tuple(_shape(shapes, f"{attention}.dws.{h}.conv.weight", rank=4)[3] for h in range(heads[-1]))
        kernels = max(kernels, sides, key=len)
    windows = observed_windows(shapes)
    return {
        "embed_dim": tuple(_size(shapes, f"stages.{i}.blocks.0.dw0.m.conv.weight", rank=4) for i in stages),
        "depth": tuple(sum(1 for _ in _children(shapes, f"stages.{i}.blocks")) for i in stages),
        "num_heads": tuple(heads),
        "kernels": kernels,
        "key_dim": tuple(key_dims),
        "window_size": (max(7, *windows),) * len(windows) if windows else (),
    }


def _agrees(key: str, found: Any, published: Any) -> bool:
    if key == "kernels":  # one per head; a variant may list more than its widest stage has heads
        return bool(found == published[: len(found)])
    if key == "pos_embed_size":
        return True
    return bool(found == published)


def _children(shapes: Shapes, prefix: str) -> Iterator[int]:
    """0, 1, 2, ... for the numbered children of a module that are there without a gap."""
    yield from _children_named(shapes, prefix, "")


def _children_named(shapes: Shapes, prefix: str, child: str) -> Iterator[int]:
    pattern = re.compile(rf"{re.escape(prefix)}\.{child}(\d{{1,4}})\.")
    numbers = {int(match.group(1)) for match in map(pattern.match, shapes) if match}
    number = 0
    while number in numbers:
        yield number
        number += 1


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = shapes[name]
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"{name} has shape {list(shape)}, expected {rank} dimensions")
    return shape


def _size(shapes: Shapes, name: str, rank: int) -> int:
    return _shape(shapes, name, rank)[0]


def _side(shapes: Shapes, name: str) -> int:
    area = _shape(shapes, name, rank=2)[1]
    side = round(area**0.5)
    if side * side != area:
        raise ValueError(f"{name} has {area} columns, expected a square number")
    return side
