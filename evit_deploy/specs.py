"""What a model is, as data: families, variants, their hyperparameters, and the preprocessing they expect.

Everything here is plain data that goes into a bundle's manifest and comes back from it; nothing imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from evit_deploy.errors import UsageError, unknown_name_hint

FAMILIES = ("msa", "mit", "msra")

FAMILY_TITLES = {
    "msa": "EfficientViT, multi-scale softmax attention (3x3 windows, 7x7 windows, pooled global)",
    "mit": "EfficientViT (MIT Han Lab), multi-scale ReLU linear attention",
    "msra": "EfficientViT (Microsoft Cream), cascaded group attention",
}

# Hyperparameters of the published variants. msa: the design table (channels and depths of five stages).
# mit and msra: timm.models.efficientvit_mit / efficientvit_msra, which follow the authors' repositories.
_MSA: dict[str, dict[str, Any]] = {
    "m1": {"channels": (16, 32, 64, 128, 256), "depths": (1, 2, 2, 2, 1)},
    "m2": {"channels": (24, 48, 80, 160, 320), "depths": (1, 2, 3, 2, 1)},
    "m3": {"channels": (32, 64, 112, 224, 384), "depths": (2, 3, 4, 3, 2)},
    "m4": {"channels": (32, 64, 128, 256, 512), "depths": (2, 4, 5, 4, 2)},
    "m5": {"channels": (48, 96, 192, 384, 640), "depths": (3, 5, 6, 5, 3)},
}
_MIT: dict[str, dict[str, Any]] = {
    "b0": {"widths": (8, 16, 32, 64, 128), "depths": (1, 2, 2, 2, 2), "head_dim": 16, "head_widths": (1024, 1280)},
    "b1": {"widths": (16, 32, 64, 128, 256), "depths": (1, 2, 3, 3, 4), "head_dim": 16, "head_widths": (1536, 1600)},
    "b2": {"widths": (24, 48, 96, 192, 384), "depths": (1, 3, 4, 4, 6), "head_dim": 32, "head_widths": (2304, 2560)},
    "b3": {"widths": (32, 64, 128, 256, 512), "depths": (1, 4, 6, 6, 9), "head_dim": 32, "head_widths": (2304, 2560)},
    "l1": {"widths": (32, 64, 128, 256, 512), "depths": (1, 1, 1, 6, 6), "head_dim": 32, "head_widths": (3072, 3200)},
    "l2": {"widths": (32, 64, 128, 256, 512), "depths": (1, 2, 2, 8, 8), "head_dim": 32, "head_widths": (3072, 3200)},
    "l3": {"widths": (64, 128, 256, 512, 1024), "depths": (1, 2, 2, 8, 8), "head_dim": 32, "head_widths": (6144, 6400)},
}
_MSRA: dict[str, dict[str, Any]] = {
    "m0": {"embed_dim": (64, 128, 192), "depth": (1, 2, 3), "num_heads": (4, 4, 4), "kernels": (5, 5, 5, 5)},
    "m1": {"embed_dim": (128, 144, 192), "depth": (1, 2, 3), "num_heads": (2, 3, 3), "kernels": (7, 5, 3, 3)},
    "m2": {"embed_dim": (128, 192, 224), "depth": (1, 2, 3), "num_heads": (4, 3, 2), "kernels": (7, 5, 3, 3)},
    "m3": {"embed_dim": (128, 240, 320), "depth": (1, 2, 3), "num_heads": (4, 3, 4), "kernels": (5, 5, 5, 5)},
    "m4": {"embed_dim": (128, 256, 384), "depth": (1, 2, 3), "num_heads": (4, 4, 4), "kernels": (7, 5, 3, 3)},
    "m5": {"embed_dim": (192, 288, 384), "depth": (1, 3, 4), "num_heads": (3, 3, 4), "kernels": (7, 5, 3, 3)},
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "msa": {"num_heads": 8, "pos_embed_size": (56, 56)},
    # attention_eps: 1e-15 in MIT's repository, 1e-5 in timm; norm_eps: 1e-5 for B, 1e-7 for L.
    "mit": {"attention_eps": 1e-5, "norm_eps": 1e-5},
    "msra": {"key_dim": (16, 16, 16), "window_size": (7, 7, 7)},
}
_VARIANTS = {"msa": _MSA, "mit": _MIT, "msra": _MSRA}

CUSTOM_VARIANT = "custom"


def variant_config(family: str, variant: str) -> dict[str, Any]:
    """The hyperparameters of a published variant, complete with the family's defaults."""
    config = {**_FAMILY_DEFAULTS[family], **_VARIANTS[family][variant]}
    if family == "mit" and variant.startswith("l"):
        config["norm_eps"] = 1e-7
    return config


def variant_names(family: str | None = None) -> tuple[str, ...]:
    """Every published model as FAMILY-VARIANT, optionally of one family."""
    families = FAMILIES if family is None else (family,)
    return tuple(f"{f}-{v}" for f in families for v in _VARIANTS[f])


def split_name(name: str) -> tuple[str, str]:
    """("msa", "m3") for "msa-m3".

    Raises:
        UsageError: the name is not a published model; the message has the closest one.
    """
    if name not in variant_names():
        raise UsageError(f"unknown model {name!r}", hint=unknown_name_hint(name, variant_names()))
    family, variant = name.split("-", 1)
    return family, variant


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; H and W are the model's image size.

    mean and std are in units of pixel values scaled to 0..1, in RGB order.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_fraction: float = 0.95
    channel_order: str = "RGB"

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Preprocessing:
        return Preprocessing(
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation=data["interpolation"],
            crop_fraction=data["crop_fraction"],
            channel_order=data["channel_order"],
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def default_preprocessing(spec: ModelSpec) -> Preprocessing:
    """What the published weights of a family were evaluated with, where a checkpoint does not say.

    Source: the default configurations of timm's efficientvit_mit and efficientvit_msra.
    """
    if spec.family == "msra":
        return Preprocessing(crop_fraction=0.875)
    if spec.family == "mit" and (spec.variant.startswith("l") or spec.image_size > 224):
        return Preprocessing(crop_fraction=1.0)
    return Preprocessing()


@dataclass(frozen=True)
class ModelSpec:
    """One concrete model: enough to build its module, its input and its name.

    Attributes:
        family: "msa", "mit" or "msra".
        variant: "m3", "b1", ...; "custom" for channels and depths that no published variant has.
        num_classes: width of the logits.
        image_size: pixels of the square input.
        config: the family's hyperparameters, as `variant_config` returns them.
    """

    family: str
    variant: str
    num_classes: int
    image_size: int
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}-{self.variant}"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return (3, self.image_size, self.image_size)

    def to_json(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "variant": self.variant,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in self.config.items()},
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ModelSpec:
        return ModelSpec(
            family=data["family"],
            variant=data["variant"],
            num_classes=data["num_classes"],
            image_size=data["image_size"],
            config={k: tuple(v) if isinstance(v, list) else v for k, v in data["config"].items()},
        )

    @staticmethod
    def published(name: str, *, num_classes: int = 1000, image_size: int = 224) -> ModelSpec:
        """The spec of a published model by its FAMILY-VARIANT name."""
        family, variant = split_name(name)
        return ModelSpec(family, variant, num_classes, image_size, variant_config(family, variant))
