"""One launch of a kernel as data: what is passed, in which order, and how many programs run.

Everything here is plain Python, so that a machine without Triton can still read a kernel pack, and so that PyTorch,
TensorRT and the ahead-of-time compiler launch the same thing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_SHARED_BYTES = 48 * 1024  # what a kernel may use without opting in; TensorRT's plugins cannot opt in
MAX_INT32 = 2**31 - 1  # addresses inside one image are 32 bits wide, the image's own offset 64
MIN_DOT = 16  # the smallest edge of a tile that tl.dot accepts

DTYPE_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # PyTorch's names to Triton's
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel with everything but the addresses of its tensors and the batch size.

    The compiled entry takes `inputs`, then `extras` as int32, then `outputs`, in that order. The grid has one
    dimension, of batch * programs_per_image programs.

    Attributes:
        operator: name of the operator, as in `torch.ops.evit`.
        kernel: "module:function" of the Triton kernel.
        inputs: names of the input tensors.
        extras: name and value of each int32 argument.
        outputs: names of the output tensors.
        constants: compile-time arguments.
        dtype: "fp32", "fp16" or "bf16", of every tensor.
        programs_per_image: programs for one image of the batch.
        num_warps: warps of a program.
        num_stages: depth of Triton's software pipeline.
    """

    operator: str
    kernel: str
    inputs: tuple[str, ...]
    extras: Mapping[str, int]
    outputs: tuple[str, ...]
    constants: Mapping[str, Any]
    dtype: str
    programs_per_image: int
    num_warps: int = 4
    num_stages: int = 1

    def load_kernel(self) -> Any:
        """The Triton kernel; imports triton.

        Raises:
            ImportError: Triton is not installed.
        """
        module, _, function = self.kernel.partition(":")
        return getattr(importlib.import_module(module), function)

    def run(self, tensors: Mapping[str, Tensor], batch: int) -> None:
        """Launch on the current stream, compiling first where Triton has not yet.

        Args:
            tensors: every input and output by name.
            batch: images in the batch.
        """
        device = tensors[self.inputs[0]].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.load_kernel()[(batch * self.programs_per_image,)](
                **{name: tensors[name] for name in (*self.inputs, *self.outputs)},
                **self.extras,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
            )


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    """value / divisor, rounded up."""
    return -(-value // divisor)
