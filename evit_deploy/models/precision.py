"""A fused module in another precision: weights and activations in the low type, chosen blocks in FP32.

The attention operators take and return the low type and compute in FP32 inside (`evit_kernels.OPERATOR.naive`), layer
norms keep their statistics in FP32. Each block casts what it is given to its own type, so that two neighbours of one
type pass values on as they are: what leaves FP16's range between two FP32 blocks is not lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from evit_deploy.errors import ExportError, UsageError, unknown_name_hint
from evit_deploy.models.blocks import block_names

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEAD = "head"  # everything behind the last block: pooling, norm, classifier


def in_precision(fused: nn.Module, precision: str, keep_fp32: Collection[str] = ()) -> nn.Module:
    """A copy of a fused module for images [B, 3, S, S] of any floating type; logits come in the head's type.

    Args:
        fused: an FP32 module, as `fused_model` returns it; left as it is.
        precision: one of DTYPES.
        keep_fp32: names of blocks, or HEAD, that stay in FP32.

    Raises:
        UsageError: a name that is no block's.
        ExportError: a weight that is finite in FP32 and not in the precision.
    """
    dtype = DTYPES[precision]
    model = copy.deepcopy(fused).eval()
    blocks = block_names(model)
    for name in keep_fp32:
        if name not in (*blocks, HEAD):
            raise UsageError(
                f"the model has no block {name!r} to keep in FP32", hint=unknown_name_hint(name, (*blocks, HEAD))
            )
    types = {name: torch.float32 if name in keep_fp32 else dtype for name in (*blocks, HEAD)}
    modules = dict(model.named_modules())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            block = _owner(name, blocks)
            tensor.data = _converted(name, block, tensor.data, types[block], precision)
    for name in blocks or [""]:
        modules[name].register_forward_pre_hook(_cast_inputs(types[name or HEAD]))
    if blocks:
        modules[blocks[-1]].register_forward_hook(_cast_output(types[HEAD]))
    return model


def _owner(name: str, blocks: Collection[str]) -> str:
    """The block whose tensor it is; what belongs to the model itself, as `msa`'s position embedding, is the stem's."""
    for block in blocks:
        if name.startswith(f"{block}."):
            return block
    return HEAD if "." in name or not blocks else next(iter(blocks))


def _converted(name: str, block: str, value: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    low = value.to(dtype)
    lost = value.isfinite() & ~low.isfinite()
    if lost.any():
        largest = value[lost].abs().max().item()
        raise ExportError(
            f"{name} has {largest:.3g}, beyond the range of {precision}",
            hint=f"--keep-fp32 {block} keeps its block in FP32, --precision bf16 has the range",
        )
    return low


def _cast_inputs(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, inputs: tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.dtype != dtype else value for value in inputs
    )


def _cast_output(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda module, inputs, output: output if output.dtype == dtype else output.to(dtype)
