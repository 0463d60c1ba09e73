"""Small models and graphs for tests of runners and of the parity gate: 3x16x16 images, 10 classes."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

IMAGE_SIZE = 16
CLASSES = 10


class SmallNet(nn.Module):
    """A convolution, a pooling and a classifier; different images give clearly different logits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8 * 3 * 3, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = nn.functional.avg_pool2d(self.conv(images).relu(), 2, ceil_mode=False)
        logits: torch.Tensor = self.head(features.flatten(1))
        return logits


def small_graph(
    seed: int = 0,
    *,
    batch: int | str = "batch",
    dtype: type[np.floating] = np.float32,
    output: str = "logits",
    softmax: bool = False,
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> bytes:
    """`SmallNet` as an ONNX file, written operator by operator.

    Args:
        seed: of the weights.
        batch: a number fixes the batch.
        dtype: of weights, input and output.
        output: name of the result.
        softmax: end in a softmax.
        pixels: (mean, std); the input is then uint8 [N,H,W,3], normalized in the graph.
    """
    weights = {name: value.detach().numpy().astype(dtype) for name, value in SmallNet(seed).named_parameters()}
    nodes, source = [], "input"
    if pixels is not None:
        mean, std = (np.array(values, dtype=dtype) for values in pixels)
        weights |= {"scale": (1 / (255 * std)).astype(dtype), "shift": (mean / std).astype(dtype)}
        nodes += [
            helper.make_node(
                "Cast", ["input"], ["cast"], name="cast", to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            ),
            helper.make_node("Mul", ["cast", "scale"], ["scaled"], name="scale"),
            helper.make_node("Sub", ["scaled", "shift"], ["normalized"], name="normalize"),
            helper.make_node("Transpose", ["normalized"], ["planes"], name="to_planes", perm=[0, 3, 1, 2]),
        ]
        source = "planes"
    logits = "scores" if softmax else output
    nodes += [
        helper.make_node("Conv", [source, "conv.weight", "conv.bias"], ["c"], name="stem", strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("AveragePool", ["r"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], [logits], name="head", transB=1),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", [logits], [output], name="softmax", axis=-1))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shape = [batch, IMAGE_SIZE, IMAGE_SIZE, 3] if pixels else [batch, 3, IMAGE_SIZE, IMAGE_SIZE]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.UINT8 if pixels else kind, shape)],
        [helper.make_tensor_value_info(output, kind, [batch, CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return save(graph)


def save(graph: onnx.GraphProto) -> bytes:
    """The bytes of an ONNX file of opset 20."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def random_images(rows: int, seed: int = 0) -> np.ndarray:
    """float32 [rows,3,16,16]."""
    shape = (rows, 3, IMAGE_SIZE, IMAGE_SIZE)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
