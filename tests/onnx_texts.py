"""Small graphs written as ONNX text over one map, and what ONNX Runtime computes with them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnx import numpy_helper

WEIGHTS = {
    "weight": np.arange(6 * 4, dtype=np.float32).reshape(6, 4, 1, 1) / 7,
    "bias": np.arange(6, dtype=np.float32),
    "sizes": np.array([1, 3, 2]),
    "grouped": np.arange(12, dtype=np.float32).reshape(6, 2, 1, 1),
    "true": np.array(True),
    "depthwise": np.arange(4 * 9, dtype=np.float32).reshape(4, 1, 3, 3) / 11,
    "offsets": np.arange(4, dtype=np.float32),
}
PARTS = "float[2, ?, 3, 3] a, float[2, ?, 3, 3] b, float[2, ?, 3, 3] c"


def graph(body: str, outputs: str = PARTS) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g (float[2, 4, 3, 3] x) => ({outputs}) {{ {body} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in WEIGHTS.items())
    return model


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, feed)
    return results


def ops(model: onnx.ModelProto) -> list[str]:
    return sorted(node.op_type for node in model.graph.node)
