"""ONNX Runtime behind the runner contract.

`graph_precision` is what the graph says; `precision` is what the kernels compute in. They differ: the CPU provider has
few half-precision kernels, wraps the rest in casts and so hides the overflow that real half precision would show.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evit_deploy.errors import LimitError, MissingDependencyError, RunnerError
from evit_deploy.runners.base import FeedDict, Runner, TensorSpec
from evit_deploy.runners.feeds import check_feed
from evit_deploy.runners.onnx_graph import PRECISIONS, load_model, precision_of, type_names
from evit_deploy.runners.widened import widened

if TYPE_CHECKING:
    import onnxruntime

_NUMPY_NAMES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
_WEIGHTED_OPERATORS = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose"})
CPU, CUDA, TENSORRT_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_UNPROVEN = "this version never ran this provider on a GPU: its results are checked, its options are not proven"
# TensorRT computes in what is allowed to it; TF32 is no FP32.
_ALLOWED_TYPES = {"fp16": "trt_fp16_enable", "bf16": "trt_bf16_enable", "int8": "trt_int8_enable"}
_LOG_SEVERITY_FATAL = 4  # errors come back as exceptions; ONNX Runtime would print them a second time
_OUT_OF_MEMORY = re.compile(r"bad_alloc|failed to allocate|allocate memory|out of memory", re.IGNORECASE)


class OnnxRuntimeRunner(Runner):
    """One ONNX graph in one ONNX Runtime session.

    Args:
        model: path of the .onnx file, or its bytes.
        threads: intra-op threads; None leaves the choice to ONNX Runtime.
        name: the backend's name in tables.
        providers: execution providers in order of preference; a missing one is an error, never a silent fallback.
        graph_optimization: False runs the graph as it was written.
        memory_pattern: False keeps ONNX Runtime from allocating, at the second run of a batch size, one block for all
            of its tensors beside what the first run left: half the memory where batch sizes change.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        threads: int | None = None,
        name: str = "onnxruntime",
        providers: Sequence[str] = (CPU,),
        graph_optimization: bool = True,
        memory_pattern: bool = True,
    ) -> None:
        self.name = name
        self.precision = "unknown"
        self.graph_precision = "unknown"
        self._model = model
        self._loaded = model
        self._threads = threads
        self._providers = tuple(providers)
        self._graph_optimization = graph_optimization
        self._memory_pattern = memory_pattern
        self._session: onnxruntime.InferenceSession | None = None

    def activate(self) -> None:
        if self._session is not None:
            return
        runtime = _import_onnxruntime()
        absent = [p for p in self._providers if p not in runtime.get_available_providers()]
        if absent:
            raise MissingDependencyError(
                f"{self.name}: this ONNX Runtime has no {absent[0]}",
                hint=f"it has {', '.join(runtime.get_available_providers())}",
            )
        self.graph_precision = self._read_graph_precision()
        self._loaded = self._model
        if self.graph_precision == "bf16" and self._providers == (CPU,):  # it has no BF16 convolution
            self._loaded = widened(load_model(self._model, self.name, weights=True)).SerializeToString()
        session = self._open_session(runtime, self._options(runtime))
        if session.get_providers()[: len(self._providers)] != list(self._providers):
            raise RunnerError(
                f"{self.name}: asked for {', '.join(self._providers)}, got {', '.join(session.get_providers())}",
                hint="a provider failed to start; its libraries are probably missing",
            )
        self.precision = self._read_executed_precision(runtime)
        self.notes = () if self._providers == (CPU,) else (_UNPROVEN,)
        self._session = session

    def deactivate(self) -> None:
        self._session = None

    def infer(self, feed: FeedDict) -> dict[str, np.ndarray]:
        session = self._active_session()
        check_feed(feed, self.inputs, self.name)
        names = [output.name for output in session.get_outputs()]
        try:
            values = session.run(names, dict(feed))
        except Exception as error:  # ONNX Runtime raises a dozen classes without a public base
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in feed.items())
            kind = LimitError if _OUT_OF_MEMORY.search(str(error)) else RunnerError
            raise kind(f"{self.name}: inference failed with {shapes}: {_one_line(error)}") from error
        return dict(zip(names, values, strict=True))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_tensor_spec(value) for value in self._active_session().get_inputs())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_tensor_spec(value) for value in self._active_session().get_outputs())

    def _active_session(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise ValueError(f"{self.name} is not active: use it as `with runner:`")
        return self._session

    def _options(self, runtime: Any) -> onnxruntime.SessionOptions:
        options = runtime.SessionOptions()
        options.log_severity_level = _LOG_SEVERITY_FATAL
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = self._memory_pattern
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        level = runtime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if self._graph_optimization else level.ORT_DISABLE_ALL
        return options

    def _open_session(self, runtime: Any, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        source = self._loaded if isinstance(self._loaded, bytes) else str(self._loaded)
        try:
            return runtime.InferenceSession(
                source,
                options,
                providers=list(self._providers),
                provider_options=[provider_options(provider, self.graph_precision) for provider in self._providers],
            )
        except Exception as error:  # ONNX Runtime raises a dozen classes without a public base
            raise RunnerError(f"{self.name}: the graph cannot be loaded: {_one_line(error)}") from error

    def _read_graph_precision(self) -> str:
        """The precision of the weights, or int8 where the graph quantizes; "unknown" without the onnx package."""
        try:
            return precision_of(load_model(self._model, self.name, weights=False).graph)
        except ImportError:
            return "unknown"

    def _read_executed_precision(self, runtime: Any) -> str:
        """What the kernels compute in, read from the graph ONNX Runtime made of ours; only half precision needs it.

        TensorRT's part of a graph cannot be read: there it is what TensorRT was allowed.
        """
        if self.graph_precision not in ("fp16", "bf16") or TENSORRT_PROVIDER in self._providers:
            return self.graph_precision
        import onnx

        with tempfile.TemporaryDirectory(prefix="evit-deploy-") as folder:
            optimized = Path(folder) / "optimized.onnx"
            options = self._options(runtime)
            options.optimized_model_filepath = str(optimized)
            self._open_session(runtime, options)
            graph = onnx.load(str(optimized)).graph
        weights = {w.name: w.data_type for w in graph.initializer}
        # A cast in front of a weighted operator means that its kernel runs in the cast's target type.
        produced = {
            output: next((a.i for a in node.attribute if a.name == "to"), 0)
            for node in graph.node
            if node.op_type == "Cast"
            for output in node.output
        }
        types: Counter[str] = Counter()
        for node in graph.node:
            if node.op_type in _WEIGHTED_OPERATORS:
                known = [produced.get(name) or weights.get(name) for name in node.input]
                types.update(type_names(k for k in known if k)[:1])
        return PRECISIONS.get(types.most_common(1)[0][0], "unknown") if types else self.graph_precision


def provider_options(provider: str, precision: str) -> dict[str, str]:
    """What an execution provider is told, so that it computes in the graph's precision.

    Args:
        provider: its name in ONNX Runtime.
        precision: of the graph.
    """
    if provider == CUDA:
        return {"use_tf32": "0"}
    if provider == TENSORRT_PROVIDER and precision in _ALLOWED_TYPES:
        return {_ALLOWED_TYPES[precision]: "1"}
    return {}


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("ONNX Runtime is not installed", hint="pip install onnxruntime") from error
    return onnxruntime


def _tensor_spec(value: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else None for dim in value.shape)
    return TensorSpec(value.name, _NUMPY_NAMES.get(value.type, value.type), shape)


def _one_line(error: BaseException) -> str:
    """The runtime's message without its prefix and source location, on one line; node names stay."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"\S+/onnxruntime/core/\S+ ", "", text)
