"""A built engine in TensorRT, or in TensorRT for RTX, behind the runner contract.

Everything that can be known of an engine without TensorRT is checked before TensorRT sees the file. Each batch size
gets an execution context, buffers at fixed addresses and a CUDA graph of its own: a context is not used for a second
shape while a graph of the first is kept. Never run on a GPU yet: calls, order and arguments are tested with a stand-in
for the device, and with the real bindings over a simulated core.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evit_deploy.environment import find_gpus
from evit_deploy.errors import BundleError, EvitDeployError, LimitError, MissingDependencyError, RunnerError
from evit_deploy.runners.base import NO_GPU, BuiltNotRunError, FeedDict, Runner, TensorSpec
from evit_deploy.runners.device import CaptureFailedError, Device, DeviceError, Event, Stream
from evit_deploy.runners.engine_plugins import EnginePlugins
from evit_deploy.runners.engine_slot import EngineSlot, describe_profiles, make_slot, profile_index
from evit_deploy.runners.feeds import check_feed, describe
from evit_deploy.runners.tensorrt_log import TensorRtLog
from evit_deploy.trt.flavors import Flavor, load_flavor
from evit_deploy.trt.record import EngineRecord, check_runnable, open_engine

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

MAX_BATCH_SIZES = 4  # contexts kept, each with the memory of the engine's largest batch; the oldest unused goes first

ARRAY_DTYPES = ("float32", "float16", "uint8", "int8", "int32", "int64", "bool")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one inference on the GPU's clock: copy in, compute, copy out."""

    h2d: float
    compute: float
    d2h: float


class TensorRtRunner(Runner):
    """One engine, arrays in host memory in and out.

    Args:
        record: the engine's.
        read_onnx: gives the ONNX file that the engine was built from; needed where the engine has plugins that are
            registered here (plugin form "jit").
        cuda_graph: capture the execution of each batch size when it is first asked for.
        name: the backend's name in tables.
        open_device: gives the GPU; the first one by default.

    Attributes:
        captured: whether the last inference was a replay of a CUDA graph.
        graph_fallback: why executions are not captured; empty while they are.
        last_timings_ms: of the last inference.
    """

    def __init__(
        self,
        record: EngineRecord,
        *,
        read_onnx: Callable[[], bytes] | None = None,
        cuda_graph: bool = True,
        name: str = "tensorrt",
        open_device: Callable[[], Device] | None = None,
    ) -> None:
        self.name = name
        self.precision = "unknown"
        self.captured = False
        self.graph_fallback = "" if cuda_graph else "not asked for"
        self.last_timings_ms: Timings | None = None
        self._record = record
        self._plugins = EnginePlugins(record, read_onnx)
        self._open_device = open_device or open_first_gpu
        self._inputs = _specs(record, "input")
        self._outputs = _specs(record, "output")
        self._on_deactivate = ExitStack()
        # TensorRT's objects are held here and in slots only: one kept alive by a traceback would outlive the device.
        self._device: Device | None = None
        self._flavor: Flavor | None = None
        self._log: TensorRtLog | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._stream: Stream | None = None
        self._aux_streams: list[Stream] = []
        self._events: tuple[Event, ...] = ()
        self._slots: OrderedDict[int, EngineSlot] = OrderedDict()

    def activate(self) -> None:
        """Check the engine, take the GPU and load it.

        Raises:
            BundleError: the engine was changed, or is for another TensorRT, GPU or plugin.
            BuiltNotRunError: nothing here can run it.
            RunnerError: TensorRT refuses it.
            LimitError: out of memory.
        """
        if self._engine is not None:
            return
        plan = self._read_engine()
        try:
            device = self._open_device()
            flavor = load_flavor(self._record.flavor)
        except MissingDependencyError as error:
            raise BuiltNotRunError(error.summary, hint=error.hint) from error
        check_runnable(self._record, flavor.name, flavor.version, device.arch, self._plugins.kernel_hash())
        self._flavor, self._device, self._log = flavor, device, TensorRtLog(flavor.trt, log)
        try:
            with device.current(), ExitStack() as undo:
                undo.callback(self._forget, "_device", "_flavor", "_log")
                self._load(undo, plan)
                self._on_deactivate = undo.pop_all()
        except (RuntimeError, MemoryError) as error:
            raise self._explain(error, "loading the engine failed") from error
        self.precision = self._record.precision

    def deactivate(self) -> None:
        if self._device is not None:
            with self._device.current():
                self._on_deactivate.close()

    def infer(self, feed: FeedDict) -> dict[str, np.ndarray]:
        if self._engine is None or self._device is None or self._stream is None:
            raise ValueError(f"{self.name} is not active: use it as `with runner:`")
        check_feed(feed, self.inputs, self.name)
        batch = self._batch_of(feed)
        self._check_batch(batch)
        try:
            with self._device.current():
                try:
                    return self._infer(batch, feed)
                except BaseException:
                    with suppress(DeviceError):  # what is under way must not lose its memory
                        self._stream.synchronize()
                    self._drop_slots()  # their memory may be what was missing, and after another error nobody knows
                    raise
        except (RuntimeError, MemoryError) as error:
            raise self._explain(error, f"inference failed with batch {batch}") from error

    @property
    def graph_precision(self) -> str:
        """The precision of the graph that the engine was built from; engines are strongly typed."""
        return self._record.precision

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def _infer(self, batch: int, feed: FeedDict) -> dict[str, np.ndarray]:
        assert self._device is not None
        assert self._stream is not None
        slot = self._slots.get(batch)
        if slot is None:
            slot = self._make_slot(batch, feed)
        self._slots.move_to_end(batch)
        device, stream = self._device, self._stream
        before, fed, computed, done = self._events
        slot.fill(feed)
        before.record(stream)
        slot.copy_in(device, stream)
        fed.record(stream)
        if slot.graph is not None:
            slot.graph.launch(stream)
        else:
            self._execute(slot)
        computed.record(stream)
        slot.copy_out(device, stream)
        done.record(stream)
        stream.synchronize()
        self.captured = slot.graph is not None
        self.last_timings_ms = Timings(fed.ms_since(before), computed.ms_since(fed), done.ms_since(computed))
        return slot.results()

    def _make_slot(self, batch: int, feed: FeedDict) -> EngineSlot:
        """Context, buffers and graph of a batch size, after one execution outside of any graph."""
        assert self._device is not None
        assert self._stream is not None
        while len(self._slots) >= MAX_BATCH_SIZES:
            _, oldest = self._slots.popitem(last=False)
            oldest.close()
        index = profile_index(self._record.batch_profiles, batch)
        assert index is not None
        slot = EngineSlot()
        self._slots[batch] = slot
        make_slot(slot, self._engine, self._device, self._stream, index, batch, self._inputs, self._outputs)
        if self._aux_streams:
            slot.context.set_aux_streams([stream.handle for stream in self._aux_streams])
        # The first execution of a shape may allocate, which a capture must not; what it runs on are real images.
        slot.fill(feed)
        slot.copy_in(self._device, self._stream)
        self._execute(slot)
        self._stream.synchronize()
        if not self.graph_fallback:
            try:
                slot.graph = self._device.capture(lambda: self._execute(slot), self._stream)
            except CaptureFailedError as error:
                self.graph_fallback = str(error)
                log.warning("%s: runs without a CUDA graph: %s", self.name, error)
        return slot

    def _execute(self, slot: EngineSlot) -> None:
        assert self._stream is not None
        started = slot.context.execute_async_v3(self._stream.handle)
        error = self._take_plugin_error()
        if error is not None:
            raise error
        if not started:
            raise RunnerError(f"{self.name}: TensorRT did not execute the engine{self._last_words()}")

    def _read_engine(self) -> bytes:
        record = open_engine(self._record.path)
        if record.engine_sha256 != self._record.engine_sha256:
            raise BundleError(f"{record.engine_path} was built again meanwhile", hint="run the command again")
        return record.engine_path.read_bytes()

    def _load(self, undo: ExitStack, plan: bytes) -> None:
        """Plugins, runtime, engine, streams and events, each given back by `undo`, the last one first."""
        assert self._flavor is not None
        assert self._device is not None
        assert self._log is not None
        self._plugins.register(undo, self._flavor, self._device, self._log.logger)
        trt = self._flavor.trt
        self._runtime = trt.Runtime(self._log.logger)
        undo.callback(self._forget, "_runtime")
        if self._record.options.get("version_compatible"):
            self._runtime.engine_host_code_allowed = True  # the engine brings the runtime of its own version
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        undo.callback(self._forget, "_engine")
        error = self._take_plugin_error()
        if error is not None:
            raise error
        if self._engine is None:
            raise self._refused("TensorRT did not load the engine")
        self._check_tensors()
        self._stream = self._device.make_stream()
        undo.callback(self._close_streams)
        if self._plugins.needed:  # PyCUDA launches on its own streams only
            for _ in range(self._engine.num_aux_streams):
                self._aux_streams.append(self._device.make_stream())
        undo.callback(self._close_events)
        for _ in range(4):
            self._events = (*self._events, self._device.make_event())
        undo.callback(self._drop_slots)

    def _check_tensors(self) -> None:
        """The engine's inputs and outputs against those of its record."""
        assert self._flavor is not None
        mode = self._flavor.trt.TensorIOMode
        modes = {mode.INPUT: "input", mode.OUTPUT: "output"}
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        found = sorted((modes[self._engine.get_tensor_mode(name)], name) for name in names)
        strange = [spec for spec in (*self._inputs, *self._outputs) if spec.dtype not in ARRAY_DTYPES]
        if strange:
            raise RunnerError(
                f"{self.name}: {describe(strange[0])} has a type that NumPy lacks",
                hint="export a graph whose inputs and outputs are float32 or float16",
            )
        expected = sorted((tensor["mode"], tensor["name"]) for tensor in self._record.io)
        if found != expected:
            listed = ", ".join(f"{kind} {name}" for kind, name in found)
            raise RunnerError(
                f"{self.name}: the engine has {listed}, and its JSON says otherwise",
                hint="build it again: evit-deploy build-trt --force",
            )

    def _batch_of(self, feed: FeedDict) -> int:
        sizes = {len(feed[spec.name]) for spec in self._inputs}
        if len(sizes) != 1:
            raise RunnerError(f"{self.name}: the inputs have different batch sizes, {sorted(sizes)}")
        return sizes.pop()

    def _check_batch(self, batch: int) -> None:
        profiles = self._record.batch_profiles
        if profile_index(profiles, batch) is None:
            raise RunnerError(
                f"{self.name}: batch {batch} is outside every profile of {self._record.name}, "
                f"{describe_profiles(profiles)}",
                hint=f"build an engine for it: evit-deploy build-trt --batch {batch}",
            )

    def _take_plugin_error(self) -> EvitDeployError | None:
        error = self._plugins.take_error()
        if error is None or isinstance(error, EvitDeployError):
            return error
        return self._explain(error, "a plugin failed")

    def _refused(self, what: str) -> EvitDeployError:
        text = f"{self.name}: {what}{self._last_words()}"
        if self._log is not None and self._log.out_of_memory:
            return LimitError(text, hint="free some GPU memory, or use a smaller batch")
        return RunnerError(text)

    def _explain(self, error: BaseException, what: str) -> EvitDeployError:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or (isinstance(error, DeviceError) and error.out_of_memory):
            return LimitError(f"{self.name}: {what}: out of memory", hint="use a smaller batch")
        return RunnerError(f"{self.name}: {what}: {text[:400]}{self._last_words()}")

    def _last_words(self) -> str:
        words = self._log.take_last() if self._log is not None else ""
        return f"; its last message: {words}" if words else ""

    def _drop_slots(self) -> None:
        with ExitStack() as every:
            while self._slots:
                _, slot = self._slots.popitem(last=False)
                every.callback(slot.close)

    def _close_streams(self) -> None:
        streams = [stream for stream in (self._stream, *self._aux_streams) if stream is not None]
        self._stream, self._aux_streams = None, []
        with ExitStack() as every:
            for stream in streams:
                every.callback(stream.close)

    def _close_events(self) -> None:
        events, self._events = self._events, ()
        with ExitStack() as every:
            for event in events:
                every.callback(event.close)

    def _forget(self, *names: str) -> None:
        for name in names:
            setattr(self, name, None)


def engine_runner(bundle: Bundle, record: EngineRecord, *, name: str = "tensorrt") -> TensorRtRunner:
    """An engine of a bundle; its plugins are found through the bundle's graph.

    Args:
        bundle: an opened bundle.
        record: of an engine that was built from it.
        name: the backend's name in tables.
    """
    return TensorRtRunner(record, read_onnx=bundle.read_onnx, name=name)


def open_first_gpu() -> Device:
    """The first GPU.

    Raises:
        MissingDependencyError: there is none, or what it takes to use one is missing.
    """
    if not find_gpus():
        raise MissingDependencyError(NO_GPU)
    from evit_deploy.runners.cuda import open_device

    return open_device()


def _specs(record: EngineRecord, mode: str) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(tensor["name"], tensor["dtype"], tuple(tensor["shape"]))
        for tensor in record.io
        if tensor["mode"] == mode
    )
