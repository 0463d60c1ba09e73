"""The plugins as IPluginV3: one Python class for every operator, for TensorRT for RTX and for `tensorrt --plugin jit`.

TensorRT calls the class while it builds and, in the process that runs the engine, for every inference: `enqueue` then
launches the kernel on TensorRT's stream, with everything looked up before, so that a CUDA graph can capture it.

The bindings ignore what `configure_plugin`, `on_shape_change` and `enqueue` return: raising is how they fail. Every
method that can fail does so inside `PluginContext.reporting`, because of the words only the bindings would print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evit_kernels.launch import KernelLaunch

from evit_deploy.errors import EvitDeployError
from evit_deploy.trt.description import PluginOperator
from evit_deploy.trt.operators import PLUGIN_NAMESPACE, PLUGIN_VERSION
from evit_deploy.trt.plugin_context import Launcher, PluginContext
from evit_deploy.trt.plugin_fields import (
    attribute_field,
    integer_field,
    numbers,
    numbers_of_shapes,
    shapes_from,
    text,
    text_field,
)
from evit_deploy.trt.plugin_kernels import compiled_kernel, hash_of_launches

# What an engine holds of a plugin beside the node's attributes.
KERNEL_HASH, KERNEL_ARCHES, INPUT_SHAPES, DTYPE = "kernel_hash", "kernel_arches", "input_shapes", "dtype"

_BASES = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime")


def make_creator(trt: Any, operator: PluginOperator, context: PluginContext) -> Any:
    """A plugin creator for the registry of the given bindings; keep it as long as the process lives.

    Args:
        trt: the imported bindings.
        operator: what the plugin is made from.
        context: shared with the other plugins.
    """
    creator_class = type("EvitPluginCreator", (_Creator, trt.IPluginCreatorV3One), {})
    return creator_class(trt, operator, context)


@dataclass(frozen=True)
class _Sizes:
    """What TensorRT told a plugin of its inputs, and the launches that follow.

    Attributes:
        shapes: of the inputs, batch -1.
        dtype: "fp32", "fp16" or "bf16".
        launches: one for each tactic.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    launches: tuple[KernelLaunch, ...]


@dataclass(frozen=True)
class _Ready:
    """All that `enqueue` needs; whichever launcher is registered later, this plugin keeps its own."""

    launcher: Launcher
    handle: Any
    programs_per_image: int
    extras: tuple[int, ...]


class _Creator:
    """Makes plugins of one operator from a node's attributes, or from what an engine holds."""

    def __init__(self, trt: Any, operator: PluginOperator, context: PluginContext) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self._trt, self._operator, self._context = trt, operator, context
        self.name = operator.op_type
        self.plugin_namespace = PLUGIN_NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        self._plugin_class = type("EvitPlugin", (_Plugin, *(getattr(trt, base) for base in _BASES)), {})
        fields = [attribute_field(trt, operator, name, ()) for name in operator.attributes]
        self._fields = (fields, trt.PluginFieldCollection(fields))  # the bindings point at both and keep none
        self.field_names = self._fields[1]

    def create_plugin(self, name: str, fc: Any, phase: Any) -> Any:
        """A plugin; TensorRT says of a failure only that there was one."""
        with self._context.reporting(f"{name}: create_plugin"):
            fields = {field.name: field for field in fc}
            attributes = self._operator.read_attributes(
                {key: numbers(fields[key]) for key in self._operator.attributes if key in fields}
            )
            plugin = self._plugin_class(self._trt, self._operator, attributes, self._context)
            if phase == self._trt.TensorRTPhase.RUNTIME:
                plugin.restore(fields)
            return plugin


class _Plugin:
    """One layer. Clones share everything but what TensorRT tells each of its sizes."""

    def __init__(self, trt: Any, operator: PluginOperator, attributes: dict[str, Any], context: PluginContext) -> None:
        for base in _BASES:
            getattr(trt, base).__init__(self)
        self.plugin_name = operator.op_type
        self.plugin_namespace = PLUGIN_NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        self.num_outputs = 1
        self._trt, self._operator, self._attributes, self._context = trt, operator, attributes, context
        self._dtypes = {trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}
        self._sizes: _Sizes | None = None
        self._ready: _Ready | None = None
        self._tactic = 0
        self._fields: Any = None

    # IPluginV3 and IPluginV3OneCore

    def get_capability_interface(self, type: Any) -> Any:
        return self

    def clone(self) -> Any:
        copy = type(self)(self._trt, self._operator, self._attributes, self._context)
        copy.__dict__.update(self.__dict__)
        return copy

    # IPluginV3OneBuild

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        return [input_types[0]]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], exprBuilder: Any) -> list[Any]:
        with self._reporting("get_output_shapes"):
            shapes = [[_Dimension(self._trt, exprBuilder, expr) for expr in shape] for shape in inputs]
            output = self._operator.output_shape(shapes)
            result = self._trt.DimsExprs(len(output))
            for i, dimension in enumerate(output):
                result[i] = dimension.expr
            return [result]

    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        first, this = in_out[0].desc, in_out[pos].desc
        return this.format == self._trt.TensorFormat.LINEAR and this.type in self._dtypes and this.type == first.type

    def configure_plugin(self, inp: Sequence[Any], out: Sequence[Any]) -> None:
        with self._reporting("configure_plugin"):
            sizes = self._configure([tensor.desc for tensor in inp])
            self._operator.check_batch(sizes.launches, inp[0].max[0])

    def get_valid_tactics(self) -> list[int]:
        count = len(self._sizes.launches) if self._sizes else 0
        return list(range(1, count + 1)) if count > 1 else []  # TensorRT's own tactic, 0, stands for the first

    # IPluginV3OneRuntime

    def get_fields_to_serialize(self) -> Any:
        with self._reporting("get_fields_to_serialize"):
            if self._sizes is None:
                raise EvitDeployError(f"{self._name} was never told its sizes and cannot be kept in an engine")
            fields = [attribute_field(self._trt, self._operator, key, value) for key, value in self._attributes.items()]
            fields += [
                text_field(self._trt, KERNEL_HASH, hash_of_launches(self._sizes.launches, self._context.arches)),
                text_field(self._trt, DTYPE, self._sizes.dtype),
                integer_field(self._trt, KERNEL_ARCHES, self._context.arches),
                integer_field(self._trt, INPUT_SHAPES, numbers_of_shapes(self._sizes.shapes)),
            ]
            self._fields = (fields, self._trt.PluginFieldCollection(fields))  # the bindings keep neither
            return self._fields[1]

    def restore(self, fields: Mapping[str, Any]) -> None:
        """Take the sizes from an engine, and refuse one whose kernels are not those of this version.

        Raises:
            EvitDeployError: another version of the kernels, or something else than a plugin's fields.
        """
        missing = [name for name in (KERNEL_HASH, KERNEL_ARCHES, INPUT_SHAPES, DTYPE) if name not in fields]
        if missing:
            raise EvitDeployError(f"the engine's {self._name} lacks {missing[0]}", hint="build the engine again")
        shapes = shapes_from(numbers(fields[INPUT_SHAPES]))
        dtype, expected = text(fields[DTYPE]), text(fields[KERNEL_HASH])
        launches = self._operator.launches(self._attributes, shapes, dtype)
        found = hash_of_launches(launches, [int(arch) for arch in numbers(fields[KERNEL_ARCHES])])
        if found != expected:
            raise EvitDeployError(
                f"the engine's {self._name} was built with the kernels {expected[:8]}, this version has {found[:8]}",
                hint="build the engine again with this version",
            )
        self._sizes = _Sizes(shapes, dtype, launches)

    def attach_to_context(self, resource_context: Any) -> Any:
        with self._reporting("attach_to_context"):
            copy = self.clone()
            copy._get_ready()
            return copy

    def set_tactic(self, tactic: int) -> None:
        self._tactic = max(tactic - 1, 0)
        self._ready = None

    def on_shape_change(self, inp: Sequence[Any], out: Sequence[Any]) -> None:
        with self._reporting("on_shape_change"):
            self._configure(inp)
            self._get_ready()

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        try:  # no context manager: this runs for every layer of every inference that is not a CUDA graph
            ready = self._ready
            if ready is None:
                raise EvitDeployError(
                    f"{self._name} cannot run in this process, which only builds engines",
                    hint="open the engine with evit-deploy, or register the plugins with a launcher",
                )
            grid = input_desc[0].dims[0] * ready.programs_per_image
            ready.launcher.launch(ready.handle, grid, (*inputs, *ready.extras, *outputs), stream)
        except Exception as error:
            self._context.report(f"{self._name}: enqueue", error)
            raise

    @property
    def _name(self) -> str:
        return self._operator.op_type

    def _reporting(self, method: str) -> Any:
        return self._context.reporting(f"{self._name}: {method}")

    def _configure(self, descs: Sequence[Any]) -> _Sizes:
        """Sizes and launches of inputs; the ones from before where nothing but the batch is new."""
        shapes = tuple(
            (-1, *tuple(desc.dims)[1:]) if i < self._operator.maps else tuple(desc.dims) for i, desc in enumerate(descs)
        )
        batches = {desc.dims[0] for desc in descs[: self._operator.maps]}
        if len(batches) != 1:
            raise ValueError(f"{self._name} takes inputs of one batch, got {', '.join(map(str, sorted(batches)))}")
        dtypes = {self._dtypes.get(desc.type, str(desc.type)) for desc in descs}
        if len(dtypes) != 1 or not dtypes <= set(self._dtypes.values()):
            raise ValueError(f"{self._name} takes inputs of one type, fp32, fp16 or bf16, got {', '.join(dtypes)}")
        (dtype,) = dtypes
        if self._sizes is None or (self._sizes.shapes, self._sizes.dtype) != (shapes, dtype):
            self._sizes = _Sizes(shapes, dtype, self._operator.launches(self._attributes, shapes, dtype))
            self._ready = None
        return self._sizes

    def _get_ready(self) -> None:
        """Look up everything that `enqueue` needs, where there is a launcher and it is not done yet."""
        launcher = self._context.launcher
        if self._ready is not None or launcher is None or self._sizes is None:
            return
        launch = self._sizes.launches[self._tactic]
        handle = self._context.handle(compiled_kernel(launch, launcher.arch))
        self._ready = _Ready(launcher, handle, launch.programs_per_image, tuple(launch.extras.values()))


class _Dimension:
    """A dimension as TensorRT's expression builder has it, with the arithmetic that shape rules are written in."""

    def __init__(self, trt: Any, builder: Any, expr: Any) -> None:
        self._trt, self._builder, self.expr = trt, builder, expr

    def __add__(self, other: _Dimension | int) -> _Dimension:
        return self._apply("SUM", other)

    def __mul__(self, other: _Dimension | int) -> _Dimension:
        return self._apply("PROD", other)

    def __floordiv__(self, other: _Dimension | int) -> _Dimension:
        return self._apply("FLOOR_DIV", other)

    def _apply(self, operation: str, other: _Dimension | int) -> _Dimension:
        right = self._builder.constant(other) if isinstance(other, int) else other.expr
        kind = getattr(self._trt.DimensionOperation, operation)
        return _Dimension(self._trt, self._builder, self._builder.operation(kind, self.expr, right))
