"""The functions that make each backend's runner; they run where the runner does, so runtimes are imported here only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from evit_deploy.backends.backend import BackendContext
from evit_deploy.runners.base import Runner


def make_reference(context: BackendContext) -> Runner:
    """The parity reference: PyTorch FP32 on the CPU."""
    from evit_deploy.runners import reference_runner

    return reference_runner(context.bundle)


def make_torch_eager(context: BackendContext) -> Runner:
    """The reference module in PyTorch, called eagerly."""
    return _torch_runner(context, "eager", "torch-eager")


def make_torch_compile(context: BackendContext) -> Runner:
    """The reference module under torch.compile."""
    return _torch_runner(context, "compile", "torch-compile")


def make_torch_half(context: BackendContext) -> Runner:
    """The fused model on the CPU, weights and activations stored in the precision of the bundle's graph."""
    from evit_deploy.models import load_model
    from evit_deploy.models.fused import fused_model
    from evit_deploy.models.precision import in_precision
    from evit_deploy.runners import TorchRunner

    spec, facts = context.bundle.spec, context.bundle.manifest["onnx"]
    fused = fused_model(load_model(spec, context.bundle.load_state_dict()), spec)
    return TorchRunner(
        in_precision(fused, facts["precision"], facts.get("keep_fp32", ())),
        threads=context.threads,
        softmax=facts.get("with_softmax", False),
        name="torch-half",
        image_shape=spec.input_shape,
    )


def make_onnxruntime(context: BackendContext) -> Runner:
    """The bundle's ONNX file in ONNX Runtime."""
    from evit_deploy.runners import OnnxRuntimeRunner

    return OnnxRuntimeRunner(_graph(context), threads=context.threads, memory_pattern=context.measured)


def make_onnxruntime_cuda(context: BackendContext) -> Runner:
    """The bundle's ONNX file in ONNX Runtime's CUDA provider."""
    from evit_deploy.runners.ort import CUDA

    return _provider_runner(context, "onnxruntime-cuda", (CUDA,))


def make_onnxruntime_tensorrt(context: BackendContext) -> Runner:
    """The bundle's ONNX file in ONNX Runtime's TensorRT provider, in CUDA what that does not take."""
    from evit_deploy.runners.ort import CUDA, TENSORRT_PROVIDER

    return _provider_runner(context, "onnxruntime-tensorrt", (TENSORRT_PROVIDER, CUDA))


def make_openvino(context: BackendContext) -> Runner:
    """The bundle's ONNX file in OpenVINO, in its own precision."""
    from evit_deploy.runners.openvino import OpenVinoRunner

    return OpenVinoRunner(_graph(context), threads=context.threads)


def make_openvino_bf16(context: BackendContext) -> Runner:
    """An FP32 bundle's ONNX file in OpenVINO, computed in BF16."""
    from evit_deploy.runners.openvino import OpenVinoRunner

    return OpenVinoRunner(_graph(context), precision="bf16", threads=context.threads)


def make_openvino_mixed(context: BackendContext) -> Runner:
    """An FP32 bundle's ONNX file in OpenVINO, in BF16, with FP32 and INT8 weights where these help most."""
    from evit_deploy.runners.openvino import OpenVinoRunner

    return OpenVinoRunner(_graph(context), precision="mixed", threads=context.threads)


def make_torch_fused(context: BackendContext) -> Runner:
    """The fused model on a GPU, in the precision of the bundle's graph."""
    return _fused_runner(context, None)


def make_torch_fused_fp16(context: BackendContext) -> Runner:
    """The fused model on a GPU in FP16."""
    return _fused_runner(context, "fp16")


def make_torch_fused_bf16(context: BackendContext) -> Runner:
    """The fused model on a GPU in BF16."""
    return _fused_runner(context, "bf16")


def make_tensorrt(context: BackendContext) -> Runner:
    """One engine of the bundle in its TensorRT."""
    from evit_deploy.runners.tensorrt import engine_runner
    from evit_deploy.trt.record import open_engine

    assert context.engine is not None
    record = open_engine(context.engine, bundle=context.bundle, check_hash=not context.measured)
    return engine_runner(context.bundle, record)


def _graph(context: BackendContext) -> Path | bytes:
    """The ONNX file's path, or its bytes where they shall be those that the manifest vouches for."""
    return context.bundle.onnx_path if context.measured else context.bundle.read_onnx()


def _provider_runner(context: BackendContext, name: str, providers: tuple[str, ...]) -> Runner:
    from evit_deploy.runners import OnnxRuntimeRunner
    from evit_deploy.runners.ort import CPU

    return OnnxRuntimeRunner(_graph(context), threads=context.threads, name=name, providers=(*providers, CPU))


def _torch_runner(context: BackendContext, mode: Literal["eager", "compile"], name: str) -> Runner:
    from evit_deploy.models import load_model
    from evit_deploy.runners import TorchRunner

    module = load_model(context.bundle.spec, context.bundle.load_state_dict())
    return TorchRunner(module, threads=context.threads, mode=mode, name=name)


def _fused_runner(context: BackendContext, precision: Literal["fp16", "bf16"] | None) -> Runner:
    from evit_deploy.runners import fused_runner

    name = "torch-fused" if precision is None else f"torch-fused-{precision}"
    return fused_runner(context.bundle, precision=precision, name=name)
