"""A plugin's layer as TensorRT holds one, and a launcher that only keeps what it is asked; nothing runs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from evit_kernels import cache
from evit_kernels.aot import CompiledKernel
from evit_kernels.launch import KernelLaunch

from evit_deploy.trt import plugin_v3
from evit_deploy.trt.description import PluginOperator
from evit_deploy.trt.operators import PLUGIN_OPERATORS
from evit_deploy.trt.plugin_context import PluginContext
from tests.made_up_kernels import kernel_of
from tests.plugin_graphs import CASES

ARCHES = (89, 120)
STREAM = 2**40 + 7
TRT_DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


@dataclass
class StandIn:
    """A launcher that keeps what it is asked."""

    arch: int = 89
    loaded: list[CompiledKernel] = field(default_factory=list)
    launches: list[tuple[Any, int, list[int], int]] = field(default_factory=list)
    failure: Exception | None = None

    def load(self, kernel: CompiledKernel) -> str:
        if self.failure:
            raise self.failure
        self.loaded.append(kernel)
        return f"handle of {kernel.key}"

    def launch(self, handle: Any, grid: int, arguments: Sequence[int], stream: int) -> None:
        if self.failure:
            raise self.failure
        self.launches.append((handle, grid, list(arguments), stream))


class Layer:
    """A layer as TensorRT holds one: its plugin, and what TensorRT says of its tensors."""

    def __init__(
        self, trt: Any, op_type: str, dtype: str = "fp16", operator: PluginOperator | None = None, **changes: Any
    ) -> None:
        self.trt, self.case, self.dtype = trt, CASES[op_type], dtype
        self.log: list[str] = []
        self.context = PluginContext(ARCHES, log=self.log.append)
        self.operator = operator or PLUGIN_OPERATORS[op_type]
        self.creator = plugin_v3.make_creator(trt, self.operator, self.context)
        self.attributes = {**self.case.attributes, **changes}
        self.kept: list[Any] = []  # what the bindings point at

    def node_fields(self) -> Any:
        """As the parser makes them of a node: arrays of 32 bits, single numbers included."""
        kinds = {float: (np.float32, self.trt.PluginFieldType.FLOAT32)}
        made = []
        for name, value in self.attributes.items():
            if value is not None:
                dtype, kind = kinds.get(type(value), (np.int32, self.trt.PluginFieldType.INT32))
                made.append(self.trt.PluginField(name, np.array(value, dtype).reshape(-1), kind))
        self.kept.append(made)
        return self.trt.PluginFieldCollection(made)

    def create(self) -> Any:
        return self.creator.create_plugin(self.case.op_type, self.node_fields(), self.trt.TensorRTPhase.BUILD)

    def restore(self, serialized: Any) -> Any:
        return self.creator.create_plugin(self.case.op_type, serialized, self.trt.TensorRTPhase.RUNTIME)

    def descs(self, batch: int, **changes: Any) -> tuple[list[Any], list[Any]]:
        """Of inputs and outputs; `changes` are those of `self.desc` for the last input."""
        shapes = self.case.shapes(batch)
        inputs = [self.desc(shape) for shape in shapes[:-1]]
        return [*inputs, self.desc(shapes[-1], **changes)], [self.desc((batch, *self.case.output))]

    def desc(self, shape: Sequence[int], dtype: str | None = None, format: str = "LINEAR") -> Any:
        desc = self.trt.PluginTensorDesc()
        desc.dims = self.trt.Dims(tuple(shape))
        desc.type = getattr(self.trt.DataType, TRT_DTYPES.get(dtype or self.dtype, dtype or self.dtype))
        desc.format = getattr(self.trt.TensorFormat, format)
        return desc

    def dynamic(self, descs: Sequence[Any], max_batch: int = 8) -> list[Any]:
        made = []
        for desc in descs:
            dynamic, shape = self.trt.DynamicPluginTensorDesc(), tuple(desc.dims)
            dynamic.desc = desc
            dynamic.min = dynamic.opt = self.trt.Dims((1, *shape[1:]))
            dynamic.max = self.trt.Dims((max_batch, *shape[1:]))
            made.append(dynamic)
        return made

    def configured(self) -> Any:
        """A plugin at the end of a build."""
        made = self.create()
        inputs, outputs = self.descs(-1)
        made.configure_plugin(self.dynamic(inputs), self.dynamic(outputs))
        return made

    def serialized(self) -> Any:
        """What a build puts into the engine."""
        self.kept.append(self.configured())
        return self.kept[-1].get_fields_to_serialize()

    def store_kernels(self, arch: int = 89) -> None:
        for launch in self.launches():
            cache.store(kernel_of(launch, arch))

    def launches(self) -> tuple[KernelLaunch, ...]:
        attributes = self.operator.read_attributes(self.case.attributes)
        return self.operator.launches(attributes, self.case.shapes(), self.dtype)

    def running(self, batch: int = 1) -> tuple[Any, StandIn]:
        """A plugin in an execution context, made from what a build serialized; and its launcher."""
        serialized = self.serialized()
        launcher = StandIn()
        self.context.renew(self.context.arches, launcher, self.log.append)
        made = self.restore(serialized).attach_to_context(None)
        made.on_shape_change(*self.descs(batch))
        return made, launcher

    def enqueue(self, made: Any, batch: int, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        made.enqueue(*self.descs(batch), list(inputs), list(outputs), 0, STREAM)
