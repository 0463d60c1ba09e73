"""Bindings of TensorRT for tests of the runner: an engine that adds up each image, over a `FakeDevice`.

Every call is written down among the device's. A fault is planted by its name: "deserialize", "context", "profile",
"shape", "address", "infer", "infer raises", "output", "execute", "execute in a capture", "tensors".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from math import prod
from typing import Any

import numpy as np

from evit_deploy.trt.flavors import Flavor
from tests.fake_device import FakeDevice

VERSION = "11.4.0.106"
PLAN = b"the plan of an engine"


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class FakeTrt:
    """The module.

    Args:
        device: what engines run on.
        io: the record's.
        profiles: (min, opt, max) of each.
        faults: names of what fails.
        message: what TensorRT says of a fault.
        aux_streams: how many an engine asks for.
        on_execute: called in every execution, as our plugins are; what it returns is raised.
        compute: images and number of classes to logits; adds up each image without it.
    """

    ILogger = ILogger
    TensorIOMode = TensorIOMode

    def __init__(
        self,
        device: FakeDevice,
        io: list[dict[str, Any]],
        profiles: list[tuple[int, int, int]],
        *,
        faults: Collection[str] = (),
        message: str = "something is wrong",
        aux_streams: int = 0,
        on_execute: Callable[[], BaseException | None] = lambda: None,
        compute: Callable[[np.ndarray, int], np.ndarray] | None = None,
    ) -> None:
        self.device, self.io, self.profiles = device, io, profiles
        self.faults, self.message, self.aux_streams, self.on_execute = set(faults), message, aux_streams, on_execute
        self.compute = compute or add_up
        self.alive: list[str] = []

    def Runtime(self, logger: ILogger) -> FakeRuntime:
        return FakeRuntime(self, logger)

    def flavor(self, name: str = "rtx") -> Flavor:
        return Flavor(name, self, VERSION)


def add_up(images: np.ndarray, classes: int) -> np.ndarray:
    """Output class k of an image: k plus the sum of its elements."""
    logits: np.ndarray = images.reshape(len(images), -1).sum(axis=1, keepdims=True) + np.arange(classes)
    return logits


class _Counted:
    """An object of TensorRT's: it goes with its last reference, inside of the device's context."""

    kind = ""

    def __init__(self, trt: FakeTrt) -> None:
        self.trt = trt
        trt.device.call(self.kind)
        trt.alive.append(self.kind)

    def __del__(self) -> None:
        self.trt.device.calls.append(f"free {self.kind}" if self.trt.device.depth else f"LATE free {self.kind}")
        self.trt.alive.remove(self.kind)


class FakeRuntime(_Counted):
    kind = "runtime"

    def __init__(self, trt: FakeTrt, logger: ILogger) -> None:
        super().__init__(trt)
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
        self.trt.device.call("deserialize", f"host code {self.engine_host_code_allowed}")
        assert plan == PLAN
        self.logger.log(Severity.WARNING, "a warning")
        if "deserialize" in self.trt.faults:
            self.logger.log(Severity.ERROR, self.trt.message)
            return None
        return FakeEngine(self.trt, self)


class FakeEngine(_Counted):
    kind = "engine"

    def __init__(self, trt: FakeTrt, runtime: FakeRuntime) -> None:
        super().__init__(trt)
        self.runtime = runtime
        self.num_io_tensors = len(trt.io)
        self.num_aux_streams = trt.aux_streams

    def get_tensor_name(self, index: int) -> str:
        name: str = self.trt.io[index]["name"]
        return name + "_2" if "tensors" in self.trt.faults else name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        mode = next(tensor["mode"] for tensor in self.trt.io if name.startswith(tensor["name"]))
        return TensorIOMode.INPUT if mode == "input" else TensorIOMode.OUTPUT

    def create_execution_context(self) -> FakeContext | None:
        if "context" in self.trt.faults:
            return None
        return FakeContext(self.trt, self)


class FakeContext(_Counted):
    kind = "context"

    def __init__(self, trt: FakeTrt, engine: FakeEngine) -> None:
        super().__init__(trt)
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.aux_streams: list[int] = []

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.trt.device.call("profile", f"{index} on {stream:#x}")
        self.profile = index
        return "profile" not in self.trt.faults

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.trt.device.call("shape", f"{name}{list(shape)}")
        assert self.profile is not None
        smallest, _, largest = self.trt.profiles[self.profile]
        self.shapes[name] = shape
        return smallest <= shape[0] <= largest and "shape" not in self.trt.faults

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.trt.device.call("address", f"{name} {address:#x}")
        self.addresses[name] = address
        return "address" not in self.trt.faults

    def set_aux_streams(self, streams: list[int]) -> None:
        self.aux_streams = list(streams)
        self.trt.device.call("aux_streams", ",".join(f"{stream:#x}" for stream in streams))

    def infer_shapes(self) -> list[str]:
        self.trt.device.call("infer_shapes")
        if "infer raises" in self.trt.faults:
            del self  # a method of the real bindings has no frame that would keep the context alive
            raise RuntimeError("shape inference failed")
        missing = [tensor["name"] for tensor in self._tensors("input") if tensor["name"] not in self.shapes]
        return ["input"] if "infer" in self.trt.faults else missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self.shapes.values()))[0]
        tensor = next(tensor for tensor in self.trt.io if tensor["name"] == name)
        shape = tuple(batch if dim is None else dim for dim in tensor["shape"])
        return (batch, 1, *shape[1:]) if "output" in self.trt.faults else shape

    def execute_async_v3(self, stream: int) -> bool:
        device = self.trt.device
        device.call("execute", f"on {stream:#x}")
        error = self.trt.on_execute()
        if error is not None:
            del self
            raise error
        in_capture = device.captured_work is not None
        if "execute" in self.trt.faults or ("execute in a capture" in self.trt.faults and in_capture):
            self.engine.runtime.logger.log(Severity.ERROR, self.trt.message)
            return False
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        device.do(lambda: self._compute(addresses, shapes))
        return True

    def _compute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        memory = self.trt.device.memory
        (source,), (target,) = self._tensors("input"), self._tensors("output")
        images = memory[addresses[source["name"]]].view(source["dtype"]).reshape(shapes[source["name"]])
        classes = prod(target["shape"][1:])
        logits = self.trt.compute(images, classes)
        memory[addresses[target["name"]]].view(target["dtype"])[:] = logits.reshape(-1)

    def _tensors(self, mode: str) -> list[dict[str, Any]]:
        return [tensor for tensor in self.trt.io if tensor["mode"] == mode]
