"""The first block at which an ONNX graph departs from the reference: where a parity failure comes from."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from evit_deploy.bundle import Bundle
from evit_deploy.images.sources import InputBatch
from evit_deploy.models import load_model
from evit_deploy.models.blocks import block_outputs
from evit_deploy.onnx.blocks import BLOCK_PREFIX, marked_block_names, with_block_outputs
from evit_deploy.parity.gate import Tolerance
from evit_deploy.runners.ort import OnnxRuntimeRunner


def first_bad_block(bundle: Bundle, batch: InputBatch, tolerance: Tolerance, *, threads: int | None = None) -> str:
    """Compare block by block, in ONNX Runtime, and say in words where the difference begins.

    Args:
        bundle: opened; its graph names the blocks' tensors.
        batch: images to run, with their pixels where the graph takes pixels.
        tolerance: a block whose worst row's RMS-relative error is above `rms_rel`, or not finite, is bad.
        threads: of ONNX Runtime.

    Returns:
        One sentence: the first bad block and its error, or that every block agrees and the fault lies behind them.

    Raises:
        RunnerError: the graph does not run.
    """
    model = onnx.load_model_from_string(bundle.read_onnx())
    blocks = marked_block_names(model.graph)
    if not blocks:
        return "not found: the graph names no blocks"
    reference = block_outputs(load_model(bundle.spec, bundle.load_state_dict()), torch.from_numpy(batch.images))
    extended = with_block_outputs(model, blocks).SerializeToString()
    with OnnxRuntimeRunner(extended, threads=threads) as runner:
        spec = runner.inputs[0]
        feed = batch.pixels if spec.dtype == "uint8" and batch.pixels is not None else batch.images
        outputs = runner.infer({spec.name: feed})
    compared = [name for name in reference if name in blocks]
    for name in compared:
        error = _worst_rms_rel(reference[name].numpy(), outputs[BLOCK_PREFIX + name])
        if not error <= tolerance.rms_rel:
            before = "the first of the model" if name == compared[0] else "the blocks before it agree"
            return f"{name}: rms_rel {error:.1e}, {before}"
    return f"every block up to {blocks[-1]} agrees: the fault lies behind it, or in the runtime's batching"


def _worst_rms_rel(expected: np.ndarray, got: np.ndarray) -> float:
    """The largest row's RMS-relative error, NaN if any row's is; infinite where the shapes differ."""
    if expected.shape != got.shape:
        return float("inf")
    rows = len(expected)
    difference = (got.astype(np.float64) - expected).reshape(rows, -1)
    scale = np.sqrt(np.mean(expected.astype(np.float64).reshape(rows, -1) ** 2, axis=1))
    return float(np.max(np.sqrt(np.mean(difference**2, axis=1)) / np.maximum(scale, np.finfo(np.float64).tiny)))
