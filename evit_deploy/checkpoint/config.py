"""What a checkpoint file says about itself beside its weights: a dictionary `config` that names a family.

In a .pt file it stands beside the state dict; in a .safetensors file it is JSON in the metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evit_deploy.checkpoint.file import CheckpointFile, parse_json_metadata
from evit_deploy.constants import MAX_IMAGE_SIZE_PX, MIN_IMAGE_SIZE_PX
from evit_deploy.errors import CheckpointError
from evit_deploy.specs import FAMILIES, INTERPOLATIONS, Preprocessing

CONFIG_KEY = "config"
_SIZES = {"num_heads": (1, 4096), "image_size": (MIN_IMAGE_SIZE_PX, MAX_IMAGE_SIZE_PX)}


@dataclass(frozen=True)
class FileConfig:
    """What no weight shows; None stands for what the file does not say."""

    family: str | None = None
    num_heads: int | None = None
    image_size: int | None = None
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None


def read_config(file: CheckpointFile) -> FileConfig:
    """The file's `config`; one without a family is some training script's and is left alone.

    Raises:
        CheckpointError: a value in it is not what it must be.
    """
    if file.file_format == "safetensors":
        config = parse_json_metadata(file.path, file.metadata, CONFIG_KEY)
    else:
        config = file.content.get(CONFIG_KEY)
    if not isinstance(config, dict) or config.get("family") not in FAMILIES:
        return FileConfig()
    name = file.path.name
    for key, (low, high) in _SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise CheckpointError(f"{name} has config[{key!r}] = {value!r}, expected an integer from {low} to {high}")
    class_names = config.get("class_names")
    if class_names is not None and not (
        isinstance(class_names, list | tuple) and all(isinstance(item, str) for item in class_names)
    ):
        raise CheckpointError(f"{name} has config['class_names'] that is no list of strings")
    return FileConfig(
        family=config["family"],
        num_heads=config.get("num_heads"),
        image_size=config.get("image_size"),
        class_names=None if class_names is None else tuple(class_names),
        preprocessing=_read_preprocessing(name, config),
    )


def _read_preprocessing(name: str, config: Mapping[str, Any]) -> Preprocessing | None:
    """From `mean` and `std` (both or neither), and `interpolation` and `crop_fraction` where given."""
    if config.get("mean") is None and config.get("std") is None:
        return None
    mean, std = (_triple(name, config, key) for key in ("mean", "std"))
    if min(std) <= 0:
        raise CheckpointError(f"{name} has config['std'] = {config['std']!r}, expected numbers above zero")
    default = Preprocessing()
    interpolation = config.get("interpolation", default.interpolation)
    if interpolation not in INTERPOLATIONS:
        raise CheckpointError(
            f"{name} has config['interpolation'] = {interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}"
        )
    crop = config.get("crop_fraction", default.crop_fraction)
    if not isinstance(crop, int | float) or not 0 < crop <= 1:
        raise CheckpointError(f"{name} has config['crop_fraction'] = {crop!r}, expected a number above 0, at most 1")
    return Preprocessing(mean, std, interpolation, float(crop))


def _triple(name: str, config: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    values = config.get(key)
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    ):
        raise CheckpointError(
            f"{name} has config[{key!r}] = {values!r}, expected three numbers",
            hint="config needs mean and std together, for pixels scaled to 0..1",
        )
    red, green, blue = map(float, values)
    return red, green, blue
