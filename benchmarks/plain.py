"""The export that a user would do without this project: the module as it is, PyTorch's dynamo exporter, onnxsim.

For `mit` and `msra` the module is timm's own, for `msa` plain PyTorch with `scaled_dot_product_attention`, which the
exporter writes as MatMul and Softmax, and its windows as Reshape and Transpose.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import onnx
import onnxsim
import torch
from torch import nn

from benchmarks.arms import plain_path
from evit_deploy.bundle import Bundle
from evit_deploy.constants import DEFAULT_MAX_BATCH, DEFAULT_OPSET, INPUT_NAME, OUTPUT_NAME
from evit_deploy.models import load_model

EXAMPLE_BATCH = 2  # 0 and 1 would be baked into the graph


def write_plain_export(bundle: Bundle) -> Path:
    """Export the reference module with a bundle's weights; the batch is dynamic, as in the bundle."""
    module = load_model(bundle.spec, bundle.load_state_dict())
    path = plain_path(bundle.path)
    onnx.save(plain_export(module, bundle.spec.image_size), path)
    return path


def plain_export(module: nn.Module, image_size: int) -> onnx.ModelProto:
    """The graph of a module that takes images [B, 3, image_size, image_size], simplified."""
    batch = torch.export.Dim("batch", min=1, max=DEFAULT_MAX_BATCH)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.zeros(EXAMPLE_BATCH, 3, image_size, image_size),),
            dynamo=True,
            opset_version=DEFAULT_OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
        assert program is not None
        simplified, _ = onnxsim.simplify(program.model_proto)
    graph: onnx.ModelProto = simplified
    return graph
