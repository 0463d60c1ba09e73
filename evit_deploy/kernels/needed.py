"""The kernels that models need: their attention calls in both memory formats, each kernel once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from evit_kernels.aot import ARCHES, kernel_key
from evit_kernels.launch import DTYPE_NAMES, KernelLaunch
from evit_kernels.registry import OPERATORS
from torch import Tensor

from evit_deploy.errors import EvitDeployError
from evit_deploy.models.attention_calls import AttentionCall, attention_calls, in_channels_last
from evit_deploy.specs import ModelSpec

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, torch_name) for torch_name, name in DTYPE_NAMES.items()}

Progress = Callable[[str], None]


def silent(line: str) -> None:
    """A progress function that says nothing."""


@dataclass(frozen=True)
class NeededKernel:
    """A kernel without its architecture, and one layer that needs it.

    Attributes:
        launch: what is compiled.
        model: FAMILY-VARIANT of the first model that needs it.
        image_size: pixels of that model's square input.
        size: of that model's layer, "HxW HEADSxDIM"; with cascades also "wN" (window) and "kN" (query kernels).
        channels_last: the layer's maps lie in PyTorch's channels_last memory format.
    """

    launch: KernelLaunch
    model: str
    image_size: int
    size: str
    channels_last: bool


def needed_kernels(
    specs: Iterable[ModelSpec], dtypes: Iterable[str] = tuple(DTYPES), progress: Progress = silent
) -> list[NeededKernel]:
    """The kernels of models, in the order in which the models need them; nothing is compiled.

    Args:
        specs: the models.
        dtypes: of "fp32", "fp16" and "bf16".
        progress: called with one line per model.

    Raises:
        EvitDeployError: a layer's sizes are none that its kernel takes.
        MissingDependencyError: a family needs timm and timm is not there.
    """
    needed: dict[str, NeededKernel] = {}
    names = tuple(dtypes)
    for spec in specs:
        progress(f"looking which kernels {spec.name} needs")
        try:
            # One trace serves every dtype and layout: building the model is what takes the time.
            traced = attention_calls(spec)
            calls = [(call, False) for call in traced] + [(in_channels_last(call), True) for call in traced]
            for name in names:
                for call, channels_last in calls:
                    launch = _launch_in(call, DTYPES[name])
                    kernel = NeededKernel(launch, spec.name, spec.image_size, _size(call), channels_last)
                    needed.setdefault(kernel_key(launch, ARCHES[0]), kernel)
        except ValueError as error:
            raise EvitDeployError(
                f"{spec.name} at {spec.image_size} px has a layer without a kernel, {error}",
                hint="that layer runs as plain PyTorch; choose another --image-size for a kernel",
            ) from error
    return list(needed.values())


def _launch_in(call: AttentionCall, dtype: torch.dtype) -> KernelLaunch:
    """The launch of a call whose tensors had another dtype."""
    arguments = (value.to(dtype) if isinstance(value, Tensor) else value for value in call.arguments)
    return OPERATORS[call.operator].launch_of(*arguments)


def _size(call: AttentionCall) -> str:
    if call.operator in ("multi_scale_attention", "projected_multi_scale_attention"):
        tokens, heads = call.arguments[2 if call.operator == "multi_scale_attention" else 0], call.arguments[4]
        _, height, width, channels = tokens.shape
        return f"{height}x{width} {heads}x{channels // heads}"
    _, channels, height, width = call.arguments[0].shape
    if call.operator == "lite_mla":
        _, aggregated, dim, _ = call.arguments
        return f"{height}x{width} {(channels + aggregated.shape[1]) // (3 * dim)}x{dim}"
    query_weight, window = call.arguments[3], call.arguments[6]
    heads = query_weight.shape[0]
    return f"{height}x{width} {heads}x{channels // heads} w{window} k{query_weight.shape[-1]}"
