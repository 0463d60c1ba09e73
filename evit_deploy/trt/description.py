"""What TensorRT has to know of an operator: what a node carries, and how it is a call of the PyTorch operator.

Checks, tiles, grid and arguments are then those of `evit_kernels`. Nothing here needs TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from evit_kernels.driver import MAX_GRID
from evit_kernels.launch import DTYPE_NAMES, KernelLaunch
from evit_kernels.registry import OPERATORS

from evit_deploy.errors import EvitDeployError

INT, FLOAT, INTS = "int", "float", "ints"  # kinds of attributes

_TORCH_DTYPES = {short: getattr(torch, name) for name, short in DTYPE_NAMES.items()}

Attributes = Mapping[str, Any]
Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class PluginOperator:
    """One operator as a plugin: a node's inputs and attributes, and the call of the PyTorch operator that it is.

    Attributes:
        op_type: type of the ONNX node and name of the plugin.
        operator: name in `evit_kernels.registry.OPERATORS`.
        inputs: names of the inputs, in the order of the node, of the PyTorch operator and of the kernel.
        maps: how many of the inputs, from the first on, have the batch as their first dimension; the others are
            parameters.
        output: name of the output.
        attributes: name to INT, FLOAT or INTS, of every attribute but the two that TensorRT's parser is told by.
        arguments: attributes that the PyTorch operator takes as well, under the same names.
        sizes: attributes that only repeat the inputs' shapes, as the shapes and the other attributes have them.
        output_shape: dimensions of the inputs to those of the output. A dimension may be an expression that takes
            +, * and // with others and, on its right, with int.
    """

    op_type: str
    operator: str
    inputs: tuple[str, ...]
    maps: int
    output: str
    attributes: Mapping[str, str]
    arguments: tuple[str, ...]
    sizes: Callable[[Attributes, Shapes], Mapping[str, int]]
    output_shape: Callable[[Sequence[Sequence[Any]]], list[Any]]

    def read_attributes(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes as int, float and tuples of int, from whatever holds them: numbers, lists, arrays.

        Args:
            found: name to one number or several; more names than the operator has are an error.

        Raises:
            ValueError: a name is missing or unknown, or its values are not of its kind.
        """
        surplus = [name for name in found if name not in self.attributes]
        if surplus:
            raise ValueError(f"{self.op_type} has no attribute {surplus[0]!r}, only {', '.join(self.attributes)}")
        return {name: self._read(name, kind, found) for name, kind in self.attributes.items()}

    def launch(self, attributes: Attributes, shapes: Shapes, dtype: str) -> KernelLaunch:
        """The launch of a node.

        Args:
            attributes: as `read_attributes` gives them.
            shapes: of the inputs; a batch that is not above zero is unknown.
            dtype: "fp32", "fp16" or "bf16", of every input.

        Raises:
            ValueError: inputs that contradict each other or the attributes, or that the kernel does not take.
        """
        if len(shapes) != len(self.inputs):
            raise ValueError(f"{self.op_type} has the inputs {', '.join(self.inputs)}, got {len(shapes)} inputs")
        if dtype not in _TORCH_DTYPES:
            raise ValueError(f"{self.op_type} has kernels for {', '.join(_TORCH_DTYPES)}, got {dtype!r}")
        tensors = [self._meta_tensor(i, shape, dtype) for i, shape in enumerate(shapes)]
        arguments = {name: attributes[name] for name in self.arguments}
        operator = OPERATORS[self.operator]
        operator.call(*tensors, **arguments)  # on the meta device, it only checks its arguments
        for name, size in self.sizes(attributes, shapes).items():
            if attributes[name] != size:
                raise ValueError(f"{self.op_type} says {name}={attributes[name]}, but its inputs have {size}")
        return operator.launch_of(*tensors, **arguments)

    def launches(self, attributes: Attributes, shapes: Shapes, dtype: str) -> tuple[KernelLaunch, ...]:
        """Every launch that would do, the preferred one first: what a plugin offers TensorRT as tactics."""
        return (self.launch(attributes, shapes, dtype),)

    def check_batch(self, launches: Sequence[KernelLaunch], batch: int) -> None:
        """Raise EvitDeployError unless every launch has a grid for this many images."""
        programs = max(launch.programs_per_image for launch in launches)
        if not 0 < batch * programs <= MAX_GRID:
            raise EvitDeployError(
                f"{self.op_type} cannot take a batch of {batch}: {programs} programs an image, {MAX_GRID} in all",
                hint="give a smaller maximum: --batch MIN:OPT:MAX",
            )

    def _read(self, name: str, kind: str, found: Mapping[str, Any]) -> Any:
        if name not in found:
            raise ValueError(f"{self.op_type} lacks the attribute {name!r}")
        values = np.asarray(found[name])
        of_kind = np.issubdtype(values.dtype, np.number) if kind == FLOAT else np.issubdtype(values.dtype, np.integer)
        if not of_kind or values.ndim > 1 or (kind != INTS and values.size != 1):
            raise ValueError(f"{name} of {self.op_type} must be {kind}, got {found[name]!r}")
        if kind == INTS:
            return tuple(int(value) for value in values.reshape(-1))
        value = values.reshape(-1)[0]
        # FLOAT has 32 bits in ONNX: its shortest decimal is the number that was written, and that packs know.
        return int(value) if kind == INT else float(str(np.float32(value)))

    def _meta_tensor(self, i: int, shape: Sequence[int], dtype: str) -> torch.Tensor:
        sizes = [int(size) for size in shape]
        if i < self.maps and sizes:
            sizes[0] = max(sizes[0], 1)
        if any(size <= 0 for size in sizes):
            raise ValueError(f"{self.inputs[i]} of {self.op_type} must have known sizes, got {tuple(shape)}")
        return torch.empty(sizes, dtype=_TORCH_DTYPES[dtype], device="meta")
