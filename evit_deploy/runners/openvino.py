"""OpenVINO on the CPU behind the runner contract, with the precision it computes in always named and read back.

Left to itself, OpenVINO runs an FP32 graph in BF16 on CPUs that have it; here FP32 is FP32, and BF16 on a CPU without
it is an error. FP16 is never asked for: on a CPU that has it, OpenVINO then computes in FP16 also what a graph keeps in
FP32, sums and attention, which leave FP16's range. An FP16 graph is computed in FP32, with a note.

It is fastest on fixed shapes, so each batch size is compiled when it is first asked for, and it is faster where the
cores need not wait for each other after each layer, so a batch is divided among as many streams as divide it and the
threads evenly. `openvino_graph` has what is done to a graph before.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evit_deploy.environment import python_command, usable_cores
from evit_deploy.errors import LimitError, MissingDependencyError, RunnerError
from evit_deploy.runners.base import FeedDict, Runner, TensorSpec
from evit_deploy.runners.feeds import check_feed
from evit_deploy.runners.onnx_graph import count_quantized_layers, load_model, precision_of

if TYPE_CHECKING:
    import openvino

Precision = Literal["bf16", "mixed"]
MAX_BATCH_SIZES = 4  # compiled models kept, each with its own copy of the weights; the one not used for longest goes

WIDENED_NOTE = "OpenVINO would compute the FP16 graph's FP32 parts in FP16, which overflow: all is computed in FP32"

_BF16_NOTE = "OpenVINO computes every layer in BF16, the attention too; products accumulate in FP32"
_DEVICE = "CPU"
MIXED = "mixed"  # BF16 but for what openvino_mixed names; the tolerance of BF16 applies
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_HINT_NAMES = {"f32": "float32", "bf16": "bfloat16"}  # as compiled models tell them
_EXECUTED = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}
_WEIGHTED_LAYERS = frozenset({"Convolution", "Deconvolution", "FullyConnected"})  # MatMul has none: attention
_MAX_ERROR_CHARS = 400
_NOISE = re.compile(
    r"Exception from src/\S+|Check '.*' failed at src/\S+|FrontEnd API failed with \w+:|To facilitate the conversion .*"
)
_TYPES = ("FP32", "BF16", "FP16", "INT8")  # among what a device says of itself


@dataclass(frozen=True)
class _Compiled:
    """The graph compiled for one batch size; None stands for any."""

    model: openvino.CompiledModel
    requests: tuple[openvino.InferRequest, ...]  # one for each stream, each with an equal part of the rows


class OpenVinoRunner(Runner):
    """One ONNX graph in OpenVINO's CPU device.

    Args:
        model: path of the .onnx file, or its bytes.
        precision: to compute an FP32 graph in, "mixed" for BF16 and FP32; None stands for the graph's own.
        threads: of all streams together; None stands for all usable cores.
        name: the backend's name in tables; None stands for "openvino", with the precision behind it where one is named.

    Attributes:
        graph_precision: the precision whose tolerance applies: the one asked for, else the graph's.
        executed: after activation, how many layers with weights run in which of OpenVINO's types.
        notes: what OpenVINO was given instead of the graph, and computes in instead of what it asks for.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        precision: Precision | None = None,
        threads: int | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or ("openvino" if precision is None else f"openvino-{precision}")
        self.precision = "unknown"
        self.graph_precision = "unknown"
        self.executed: dict[str, int] = {}
        self._model = model
        self._asked_precision = precision
        self._threads = threads
        self._core: openvino.Core | None = None
        self._network: openvino.Model | None = None
        self._inputs: tuple[TensorSpec, ...] = ()
        self._outputs: tuple[TensorSpec, ...] = ()
        self._config: dict[str, Any] = {}
        self._fixed_batch: int | None = None
        self._compiled: OrderedDict[int, _Compiled] = OrderedDict()
        self._last_arrays: list[Any] | None = None  # names, types and shapes in the last call
        self._last_requests: tuple[openvino.InferRequest, ...] = ()

    def activate(self) -> None:
        if self._network is not None:
            return
        import_openvino()
        from evit_deploy.runners.openvino_graph import fold_sums, prepare_graph
        from evit_deploy.runners.openvino_mixed import MIXED_NOTE, keep_in_fp32
        from evit_deploy.runners.openvino_products import (
            INT8_WEIGHTS_NOTE,
            compress_large_products,
            convolve_large_products,
            convolve_last_product,
        )

        graph = load_model(self._model, self.name, weights=True)
        own = precision_of(graph.graph)
        if self._asked_precision is not None and own != "fp32":
            raise RunnerError(f"{self.name} runs FP32 graphs, and this one is {own}", hint="name backend openvino")
        notes: list[str] = []
        core = shared_core()
        mixed = self._asked_precision == MIXED
        wanted = "bf16" if mixed else self._asked_precision or own
        hint = self._choose_hint(core, wanted, notes)
        graph, remarks = prepare_graph(graph)
        notes += remarks
        if hint == _HINTS["fp32"] or mixed:  # BF16 would round the changed weights
            fold_sums(graph.graph)
        types = {"bf16", "f32"}  # that mixed layers may have
        if mixed:
            notes.append(MIXED_NOTE)
            convolve_last_product(graph.graph)
            if compress_large_products(graph.graph):
                types.add("i8")  # as OpenVINO names products of BF16 with weights in INT8
                notes.append(INT8_WEIGHTS_NOTE)
        elif hint == _HINTS["bf16"]:
            notes.append(_BF16_NOTE)
        if hint == _HINTS["bf16"]:
            convolve_large_products(graph.graph)
        quantized = count_quantized_layers(graph.graph) if own == "int8" else 0
        self._core, self._config = core, self._configuration(hint)
        self._fixed_batch = _fixed_batch(graph.graph)
        try:
            network = core.read_model(graph.SerializeToString())
        except Exception as error:  # OpenVINO raises RuntimeError and classes of its own without a public base
            raise RunnerError(f"{self.name}: the graph cannot be loaded: {_one_line(error)}") from error
        del graph
        self._network = keep_in_fp32(core, network, self.name) if mixed else network
        # Slow to read off, so once and not in each call.
        self._inputs = tuple(_tensor_spec(port) for port in self._network.inputs)
        self._outputs = tuple(_tensor_spec(port) for port in self._network.outputs)
        try:
            compiled = self._compile(self._fixed_batch or 1).model
        except BaseException:
            self.deactivate()
            raise
        self.executed = executed_types(compiled)
        if mixed and not {"bf16", "f32"} <= self.executed.keys() <= types:
            self.deactivate()
            raise RunnerError(
                f"{self.name}: asked for BF16 and FP32, OpenVINO takes {', '.join(self.executed)}",
                hint="name another backend, or try another version of OpenVINO",
            )
        self.precision = _computed_precision(self.executed, quantized)
        self.graph_precision = wanted
        self.notes = tuple(notes)

    def deactivate(self) -> None:
        self._compiled.clear()
        self._last_arrays, self._last_requests = None, ()
        self._network = None
        self._core = None

    def infer(self, feed: FeedDict) -> dict[str, np.ndarray]:
        requests = self._requests(feed)
        try:
            results = _infer(requests, feed, len(self._outputs))
        except Exception as error:  # see `activate`
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in feed.items())
            raise self._explain(error, f"inference failed with {shapes}") from error
        return {spec.name: value for spec, value in zip(self._outputs, results, strict=True)}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        self._active_network()
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        self._active_network()
        return self._outputs

    def _requests(self, feed: FeedDict) -> tuple[openvino.InferRequest, ...]:
        """Those for arrays like these, found and checked only where the call before had others."""
        arrays = [isinstance(array, np.ndarray) and (name, array.dtype, array.shape) for name, array in feed.items()]
        if arrays != self._last_arrays:
            check_feed(feed, self.inputs, self.name)
            self._last_requests = self._compile(len(next(iter(feed.values())))).requests
            self._last_arrays = arrays
        return self._last_requests

    def _active_network(self) -> openvino.Model:
        if self._network is None:
            raise ValueError(f"{self.name} is not active: use it as `with runner:`")
        return self._network

    def _choose_hint(self, core: openvino.Core, precision: str, notes: list[str]) -> str:
        """What OpenVINO is told to compute in; an INT8 graph says itself where it is INT8."""
        able = core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in able:
            found = ", ".join(name for name in _TYPES if name in able)
            raise MissingDependencyError(
                f"{self.name}: this CPU has no BF16, OpenVINO finds {found}",
                hint="a CPU with avx512_bf16 or amx_bf16 is needed, or an FP32 bundle",
            )
        if precision == "fp16":
            notes.append(WIDENED_NOTE)
        return _HINTS.get(precision, _HINTS["fp32"])  # FP16 and INT8: FP32 where the graph does not say INT8

    def _configuration(self, hint: str) -> dict[str, Any]:
        return {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._threads or usable_cores(),
        }

    def _compile(self, batch: int) -> _Compiled:
        """The graph compiled for a batch size, kept for the next call."""
        network = self._active_network()
        if batch not in self._compiled:
            assert self._core is not None
            while len(self._compiled) >= MAX_BATCH_SIZES:
                self._compiled.popitem(last=False)
            streams = 1 if self._fixed_batch else math.gcd(batch, self._config["INFERENCE_NUM_THREADS"])
            try:
                if self._fixed_batch is None:
                    network = network.clone()
                    network.reshape({port.any_name: _with_batch(port, batch // streams) for port in network.inputs})
                compiled = self._core.compile_model(network, _DEVICE, self._config | {"NUM_STREAMS": str(streams)})
            except Exception as error:  # see `activate`
                raise self._explain(error, f"the graph cannot be compiled for batch {batch}") from error
            self._check_hint(compiled)
            self._compiled[batch] = _Compiled(compiled, tuple(compiled.create_infer_request() for _ in range(streams)))
        self._compiled.move_to_end(batch)
        return self._compiled[batch]

    def _check_hint(self, compiled: openvino.CompiledModel) -> None:
        asked = self._config["INFERENCE_PRECISION_HINT"]
        taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if taken not in (asked, _HINT_NAMES[asked]):
            raise RunnerError(f"{self.name}: asked for {asked}, OpenVINO takes {taken}", hint="name another backend")

    def _explain(self, error: Exception, what: str) -> RunnerError | LimitError:
        text = _one_line(error)
        kind = LimitError if "bad_alloc" in text or "allocate" in text else RunnerError
        return kind(f"{self.name}: {what}: {text}")


def _infer(requests: tuple[openvino.InferRequest, ...], feed: FeedDict, outputs: int) -> list[np.ndarray]:
    """The graph's outputs in its order, from as many rows by each request; none runs on when this returns or raises."""
    alone = len(requests) == 1
    started = []
    read = []  # kept until no request runs any more
    try:
        for index, request in enumerate(requests):
            read.append(_shareable(feed if alone else _part(feed, index, len(requests))))
            _start(request, read[-1])
            started.append(request)
        for request in started:
            request.wait()
    except BaseException:
        _stop(started)
        raise
    if alone:
        return [requests[0].get_output_tensor(index).data.copy() for index in range(outputs)]
    return [np.concatenate([one.get_output_tensor(index).data for one in requests]) for index in range(outputs)]


def _part(feed: FeedDict, index: int, parts: int) -> FeedDict:
    """One of equal parts of the rows."""
    rows = len(next(iter(feed.values()))) // parts
    return {name: array[index * rows : (index + 1) * rows] for name, array in feed.items()}


def _shareable(feed: FeedDict) -> FeedDict:
    """The arrays, or copies of those that OpenVINO would not read where they are."""
    return {
        name: array if array.flags.carray else np.require(array, requirements=["C", "A", "W"])
        for name, array in feed.items()
    }


def _start(request: openvino.InferRequest, feed: FeedDict) -> None:
    """Let it run on the arrays, as tensors: a dictionary takes OpenVINO longer to read. It keeps no array alive."""
    from openvino import Tensor

    for name, array in feed.items():
        request.set_tensor(name, Tensor(array, shared_memory=True))
    request.start_async()


def _stop(requests: list[openvino.InferRequest]) -> None:
    """Wait for all of them, whatever becomes of any: they read the caller's arrays."""
    for request in requests:
        with suppress(Exception):
            request.wait()


def import_openvino() -> Any:
    """The package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        hint = f"{python_command()} openvino"
        raise MissingDependencyError("OpenVINO is not installed", hint=hint) from error
    return openvino


@cache
def shared_core() -> Any:
    """The process's one `openvino.Core`.

    A core that loads the CPU plugin gives the thread a signal stack (the CPU's AMX may need a larger one) and frees it
    when it goes. With two of them, the thread can be left on a freed one: the next Ctrl-C then ends in a crash.
    """
    return import_openvino().Core()


def executed_types(compiled: openvino.CompiledModel) -> dict[str, int]:
    """How many layers with weights run in which of OpenVINO's types, "bf16" for example.

    The products of the attention do not count: INT8 graphs have them in FP32, and of `msra` there are more than layers.
    """
    types: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if facts["layerType"].value in _WEIGHTED_LAYERS:
            types[facts["runtimePrecision"].value] += 1
    return dict(types)


def _computed_precision(executed: Mapping[str, int], quantized: int) -> str:
    """Our name of what a graph is computed in; i8 and u8, layers with signed and unsigned inputs, are one.

    Args:
        executed: how many layers with weights run in which of OpenVINO's types.
        quantized: how many of the graph's layers are to run in INT8. Where at least half of these do, the graph is
            INT8, however many layers it keeps in FP32; any other graph is what most of its layers are.
    """
    counts: Counter[str] = Counter()
    for kind, layers in executed.items():
        counts[_EXECUTED.get(kind, "unknown")] += layers
    if quantized and 2 * counts["int8"] >= quantized:
        return "int8"
    return max(counts, key=counts.__getitem__, default="unknown")


def _with_batch(port: Any, batch: int) -> Any:
    shape = port.get_partial_shape()
    shape[0] = batch
    return shape


def _tensor_spec(port: Any) -> TensorSpec:
    shape = tuple(None if dim.is_dynamic else int(dim.get_length()) for dim in port.get_partial_shape())
    return TensorSpec(port.any_name, np.dtype(port.get_element_type().to_dtype()).name, shape)


def _fixed_batch(graph: Any) -> int | None:
    dims = graph.input[0].type.tensor_type.shape.dim
    return int(dims[0].dim_value) if len(dims) and dims[0].HasField("dim_value") else None


def _one_line(error: BaseException) -> str:
    """OpenVINO's message without the places in its source and the links to its manual, on one line."""
    text = " ".join(_NOISE.sub(" ", str(error)).split())
    return text[:_MAX_ERROR_CHARS] or type(error).__name__
