"""The plugins as quickly deployable ones: TensorRT puts the kernel's PTX, its grid and arguments into the engine.

The bindings read what a function takes from its signature, so the functions made here carry one that comes from the
operator's description. They read annotations as objects: this module does not import them from `__future__`.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorrt as trt
import tensorrt.plugin as trtp
from evit_kernels.aot import CompiledKernel
from evit_kernels.launch import KernelLaunch

from evit_deploy.trt.description import FLOAT, PluginOperator
from evit_deploy.trt.operators import PLUGIN_NAMESPACE
from evit_deploy.trt.plugin_context import PluginContext
from evit_deploy.trt.plugin_kernels import compiled_kernel

_TYPE_NAMES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}
_DTYPES = {trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}
_Outputs = tuple[trtp.TensorDesc]
_Implementation = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]


def register_qdp(operator: PluginOperator, context: PluginContext) -> None:
    """Register an operator with TensorRT, whose parser then takes it for nodes of its type.

    Args:
        operator: what the plugin is made from.
        context: shared with the other plugins; its one architecture is the build's GPU.
    """
    name = f"{PLUGIN_NAMESPACE}::{operator.op_type}"
    tensors = dict.fromkeys(operator.inputs, trtp.TensorDesc)
    attributes = {
        key: npt.NDArray[np.float32] if kind == FLOAT else npt.NDArray[np.int32]
        for key, kind in operator.attributes.items()
    }

    def describe(inputs: Mapping[str, Any]) -> _Outputs:
        descs = [inputs[key] for key in operator.inputs]
        output = descs[0].like()
        output.shape_expr = trtp.ShapeExprs.from_tuple(operator.output_shape([desc.shape_expr for desc in descs]))
        return (output,)

    def tune(inputs: Mapping[str, Any]) -> list[trtp.AutoTuneCombination]:
        combinations = []
        for dtype, type_name in _TYPE_NAMES.items():
            tactics = range(1, len(_launches(operator, inputs, dtype)) + 1)  # 0 is TensorRT's own
            types = ", ".join([type_name] * (len(operator.inputs) + 1))
            combinations.append(trtp.AutoTuneCombination(types, "LINEAR", list(tactics)))
        return combinations

    def implement(inputs: Mapping[str, Any]) -> _Implementation:
        first = inputs[operator.inputs[0]]
        launch = _launches(operator, inputs, _DTYPES[first.dtype])[max(inputs["tactic"] - 1, 0)]
        operator.check_batch([launch], first.shape.max[0] if first.shape.is_dynamic else first.shape[0])
        (arch,) = context.arches
        return _implementation(launch, compiled_kernel(launch, arch), first.shape_expr[0])

    function = _Functions(operator, context)
    trtp.register(name)(function(describe, {**tensors, **attributes}, _Outputs))
    outputs = {"outputs": _Outputs}
    trtp.autotune(name)(function(tune, {**tensors, **attributes, **outputs}, list[trtp.AutoTuneCombination]))
    parameters = {**tensors, **attributes, **outputs, "tactic": int}
    trtp.aot_impl(name)(function(implement, parameters, _Implementation))


class _Functions:
    """Makes functions of one operator that the bindings can read and call."""

    def __init__(self, operator: PluginOperator, context: PluginContext) -> None:
        self._operator, self._context = operator, context

    def __call__(
        self, body: Callable[[Mapping[str, Any]], Any], parameters: Mapping[str, Any], returns: Any
    ) -> Callable[..., Any]:
        """A function of these parameters, which its body gets by name; what it raises is remembered and logged."""
        kind = Parameter.POSITIONAL_OR_KEYWORD
        signature = Signature(
            [Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
            return_annotation=returns,
        )

        def function(*args: Any, **kwargs: Any) -> Any:
            with self._context.reporting(f"{self._operator.op_type}: {body.__name__}"):
                return body(signature.bind(*args, **kwargs).arguments)

        function.__name__ = body.__name__
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function


def _launches(operator: PluginOperator, inputs: Mapping[str, Any], dtype: str) -> Sequence[KernelLaunch]:
    attributes = operator.read_attributes({key: inputs[key] for key in operator.attributes})
    return operator.launches(attributes, [tuple(inputs[key].shape) for key in operator.inputs], dtype)


def _implementation(launch: KernelLaunch, kernel: CompiledKernel, batch: Any) -> _Implementation:
    """What TensorRT passes and launches; `batch` is an expression, the rest numbers."""
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x = batch * launch.programs_per_image
    parameters.block_x = kernel.threads
    parameters.shared_mem = kernel.shared_bytes
    extras = trtp.SymIntExprs(len(launch.extras))
    for i, value in enumerate(launch.extras.values()):
        extras[i] = trtp.SymInt32(value)
    return kernel.entry, kernel.ptx, parameters, extras
