"""The error of the network's output with one layer in INT8 and all others in FP32, for each layer in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx

from evit_deploy.onnx.quantize import Layer, quantize_graph
from evit_deploy.runners.ort import OnnxRuntimeRunner


def layer_errors(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    thresholds: Mapping[str, float],
    feeds: Sequence[np.ndarray],
    progress: Callable[[str], None],
    threads: int | None = None,
) -> list[float]:
    """RMS-relative error of the output over all images, one for each layer.

    Args:
        model: the FP32 graph.
        layers: those to quantize, one at a time.
        thresholds: by activation tensor; see `quantize_graph`.
        feeds: images as the graph takes them, in batches.
        progress: called with one line per layer.
        threads: of ONNX Runtime.
    """
    expected = _outputs(model, feeds, threads)

    def errors() -> Iterator[float]:
        for index, layer in enumerate(layers):
            progress(f"sensitivity: layer {index + 1} of {len(layers)}, {layer.node}")
            yield _rms_rel(_outputs(quantize_graph(model, [layer], thresholds), feeds, threads), expected)

    return list(errors())


def output_error(
    model: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Sequence[np.ndarray], threads: int | None = None
) -> float:
    """RMS-relative error of the whole quantized graph on the same images."""
    return _rms_rel(_outputs(quantized, feeds, threads), _outputs(model, feeds, threads))


def _outputs(model: onnx.ModelProto, feeds: Sequence[np.ndarray], threads: int | None) -> np.ndarray:
    """float64 [images, classes]"""
    with OnnxRuntimeRunner(model.SerializeToString(), threads=threads, memory_pattern=False) as runner:
        name, output = runner.inputs[0].name, runner.outputs[0].name
        return np.concatenate([runner.infer({name: feed})[output] for feed in feeds]).astype(np.float64)


def _rms_rel(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))
