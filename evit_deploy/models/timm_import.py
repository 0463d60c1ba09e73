"""The one place that imports timm.

timm imports torchvision, and a torchvision built for another torch fails at import because its compiled operators are
not registered. timm's EfficientViT code never calls them, so declaring the two that torchvision's Python code refers to
is enough to make the import work.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import torch

from evit_deploy.errors import MissingDependencyError

log = logging.getLogger(__name__)

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library takes its schemas back when it is collected


def import_timm(module: str = "timm") -> ModuleType:
    """timm, or one of its modules such as "timm.models.efficientvit_mit".

    Raises:
        MissingDependencyError: timm is not installed, or its import fails for another reason than the one above.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(error) from error
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise _missing(error) from error
    log.info(
        "torchvision does not fit this torch (%s): declaring its operators' schemas to import timm", torch.__version__
    )
    _declare_torchvision_schemas()
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise _missing(error) from error


def _declare_torchvision_schemas() -> None:
    if _declared:
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)


def _missing(error: Exception) -> MissingDependencyError:
    if isinstance(error, ModuleNotFoundError) and error.name == "timm":
        return MissingDependencyError(
            "timm is not installed; the models of families mit and msra come from it",
            hint="pip install 'timm>=1.0.20'",
        )
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return MissingDependencyError(
        f"timm cannot be imported: {first_line}",
        hint="install a torchvision that fits this torch, and timm>=1.0.20",
    )
