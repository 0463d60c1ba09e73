"""Takes a trained EfficientViT checkpoint to a verified ONNX bundle: `export`, `build_trt`, `verify`, `bench`.

    import evit_deploy

    result = evit_deploy.export("m3.pt")
    print(evit_deploy.verify(result.bundle).exit_code)

Importing this package is cheap; PyTorch and ONNX Runtime are imported by the first verb that is used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# The subpackage of the same name binds `evit_deploy.bench` when it is first imported. Doing that here, once, and
# unbinding it again keeps the attribute free for the verb, whichever of the two is asked for first.
import evit_deploy.bench  # noqa: F401

if TYPE_CHECKING:
    from evit_deploy.api import bench, build_trt, export, verify
    from evit_deploy.bundle import Bundle
else:
    del bench

# ONNX Runtime's wheels collect telemetry unless this is set before the first import; a value of the user's stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["Bundle", "__version__", "bench", "build_trt", "export", "verify"]

_MODULE_OF = {
    "Bundle": "evit_deploy.bundle",
    "bench": "evit_deploy.api",
    "build_trt": "evit_deploy.api",
    "export": "evit_deploy.api",
    "verify": "evit_deploy.api",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
