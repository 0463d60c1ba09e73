"""Graphs in FP16 and BF16 with weights and sizes that break a plain conversion, in the runtimes of this machine."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
import torch

from evit_deploy.environment import cpu_isa
from evit_deploy.models.precision import in_precision
from evit_deploy.onnx.export import export_graph
from evit_deploy.runners import OnnxRuntimeRunner
from evit_deploy.runners.base import Runner
from evit_deploy.runners.openvino import OpenVinoRunner, shared_core
from evit_deploy.runners.openvino_graph import prepare_graph
from tests.small_exports import error, large_image_mit
from tests.tiers import tiered

needs_fp16 = pytest.mark.skipif(
    "FP16" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="OpenVINO does not compute in FP16 on this CPU",
)
RUNNERS: dict[str, type[OnnxRuntimeRunner] | type[OpenVinoRunner]] = {
    "onnxruntime": OnnxRuntimeRunner,
    "openvino": OpenVinoRunner,
}
# The RMS-relative error to FP32 that was measured is at most 2.1e-3 and 1.3e-2.
TOLERANCE = {"fp16": 5e-3, "bf16": 3e-2}


@cache
def large_image_model(side: int, precision: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A small `mit` whose sums over the tokens leave FP16: the graph, an image, and its FP32 logits."""
    spec, fused, image = large_image_mit(side)
    with torch.inference_mode():
        wanted = fused(torch.from_numpy(image)).numpy()
    opset = 22 if precision == "bf16" else 20
    graph = export_graph(in_precision(fused, precision), spec, opset=opset, max_batch=1, precision=precision)
    data: bytes = graph.SerializeToString()
    return data, image, wanted


@pytest.mark.parametrize("side", tiered([512, 1024], (512).__eq__))
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("backend", RUNNERS)
def test_sums_over_a_large_image(backend: str, precision: str, side: int) -> None:
    if (backend, precision) == ("openvino", "bf16") and not cpu_isa()["bf16"]:
        pytest.skip("this CPU has no BF16")
    graph, image, wanted = large_image_model(side, precision)
    runner: Runner = RUNNERS[backend](graph, threads=1)
    with runner:
        logits = runner.infer({"input": image})["logits"]
    assert error(logits, wanted) < TOLERANCE[precision]


@needs_fp16
@pytest.mark.parametrize("side", [512, 1024])
def test_openvino_asked_for_fp16_would_break(side: int) -> None:
    """Why it is not: it computes in FP16 what the graph has in FP32."""
    graph, image, _ = large_image_model(side, "fp16")
    prepared, _ = prepare_graph(onnx.load_model_from_string(graph))
    network = shared_core().read_model(prepared.SerializeToString())
    compiled = shared_core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f16"})
    (logits,) = compiled(image).values()
    assert not np.isfinite(logits).all()
