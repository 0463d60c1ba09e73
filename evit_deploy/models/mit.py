"""Family `mit` (MIT Han Lab): timm's modules, with the eps values the weights were trained with.

timm fixes both eps in its classes and no checkpoint stores them: LiteMLA's is 1e-15 in MIT's repository and 1e-5 in
timm, the norms' is 1e-5 for the B models and 1e-7 for the L models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from evit_deploy.models.timm_import import import_timm
from evit_deploy.specs import ModelSpec


def is_large(variant: str, config: Mapping[str, Any]) -> bool:
    """Whether a model is of the L kind; a custom one says so in `config["large"]`."""
    return bool(config.get("large", variant.startswith("l")))


def build_mit(spec: ModelSpec) -> nn.Module:
    """timm's module of a `mit` spec, with random weights, in evaluation mode."""
    timm_mit = import_timm("timm.models.efficientvit_mit")
    config = spec.config
    model_class = timm_mit.EfficientVitLarge if is_large(spec.variant, config) else timm_mit.EfficientVit
    model: nn.Module = model_class(
        widths=tuple(config["widths"]),
        depths=tuple(config["depths"]),
        head_dim=config["head_dim"],
        head_widths=tuple(config["head_widths"]),
        num_classes=spec.num_classes,
    )
    for module in model.modules():
        if isinstance(module, timm_mit.LiteMLA):
            module.eps = config["attention_eps"]
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.eps = config["norm_eps"]
    return model.eval()
