"""Takes a trained EfficientViT checkpoint to a verified ONNX bundle: the verbs as functions.

    import evit_deploy

    result = evit_deploy.export("m3.pt")
    print(evit_deploy.verify(result.bundle).exit_code)

Importing this package is cheap; PyTorch and ONNX Runtime are imported by the first verb that is used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# The subpackages of the same names bind `evit_deploy.bench` and `evit_deploy.headroom` when they are first imported.
# Doing that here, once, and unbinding them again keeps the attributes free for the verbs, whichever is asked for first.
import evit_deploy.bench
import evit_deploy.headroom  # noqa: F401

if TYPE_CHECKING:
    from evit_deploy.api import bench, build_trt, evaluate, export, headroom, quantize, verify
    from evit_deploy.bundle import Bundle
else:
    del bench, headroom

# ONNX Runtime's wheels collect telemetry unless this is set before the first import; a value of the user's stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
_VERBS = ("bench", "build_trt", "evaluate", "export", "headroom", "quantize", "verify")
__all__ = ["Bundle", "__version__", "bench", "build_trt", "evaluate", "export", "headroom", "quantize", "verify"]

_MODULE_OF = {"Bundle": "evit_deploy.bundle", **dict.fromkeys(_VERBS, "evit_deploy.api")}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
