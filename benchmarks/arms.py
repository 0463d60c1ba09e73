"""The arm that `evit_deploy.bench` does not have: the plain export in the same runtime with the same options.

Imported in every worker process, so nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path

from evit_deploy.backends import Backend, BackendContext
from evit_deploy.runners.base import Runner

PLAIN_SUFFIX = ".plain.onnx"


def plain_path(bundle_path: Path) -> Path:
    """Where the plain export of a bundle's model lies: beside the bundle."""
    return bundle_path.with_suffix(PLAIN_SUFFIX)


def make_plain_onnx(context: BackendContext) -> Runner:
    """The plain export in ONNX Runtime."""
    from evit_deploy.runners import OnnxRuntimeRunner

    return OnnxRuntimeRunner(plain_path(context.bundle.path), threads=context.threads, name=PLAIN_ONNX.name)


PLAIN_ONNX = Backend(
    "plain-onnx",
    "ONNX Runtime, the plain export of the same module",
    f"{__name__}:make_plain_onnx",
    ("onnxruntime",),
)
