"""Backends behind one contract (`base.Runner`); importing this package imports no runtime."""

from __future__ import annotations

from evit_deploy.runners.base import BuiltNotRunError, FeedDict, Runner, TensorSpec
from evit_deploy.runners.ort import OnnxRuntimeRunner
from evit_deploy.runners.pytorch import TorchRunner
from evit_deploy.runners.reference import reference_runner
from evit_deploy.runners.torch_fused import TorchFusedRunner, fused_runner

__all__ = [
    "BuiltNotRunError",
    "FeedDict",
    "OnnxRuntimeRunner",
    "Runner",
    "TensorSpec",
    "TorchFusedRunner",
    "TorchRunner",
    "fused_runner",
    "reference_runner",
]
