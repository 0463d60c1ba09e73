"""Every distinct size of a fused operator that given models have, with the layer around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from evit_kernels.registry import OPERATORS
from torch import Tensor, nn

from benchmarks.operations import Operation, Recorder
from evit_deploy.models import build_model
from evit_deploy.models.attention_calls import AttentionCall, attention_calls
from evit_deploy.models.fused import FusedCascadedAttention, FusedLiteMLA, FusedMultiScaleAttention, fused_model
from evit_deploy.specs import ModelSpec

LAYERS = (FusedMultiScaleAttention, FusedLiteMLA, FusedCascadedAttention)
DTYPE = torch.float16
Shapes = tuple[Any, ...]


@dataclass(frozen=True)
class AttentionLayer:
    """One size.

    Attributes:
        shapes: the arguments of the call for one image; a tensor stands as its shape.
        models: how many layers of this size each model has.
        calls: the call for each batch size, 1 among them.
        operations: of the layer, the operator among them, for one image.
    """

    shapes: Shapes
    models: dict[str, int]
    calls: dict[int, AttentionCall]
    operations: tuple[Operation, ...]

    @property
    def operator(self) -> str:
        """Its name, as in `torch.ops.evit`."""
        return self.calls[1].operator


def attention_layers(models: Sequence[str], batches: Sequence[int], image_size: int) -> list[AttentionLayer]:
    """The distinct sizes in FP16, in the order of the models and of their layers.

    Args:
        models: FAMILY-VARIANT names.
        batches: images in a batch.
        image_size: pixels of the square input.
    """
    found: dict[tuple[str, Shapes], AttentionLayer] = {}
    for model in models:
        spec = ModelSpec.published(model, image_size=image_size)
        calls = {batch: attention_calls(spec, DTYPE, batch=batch) for batch in sorted({1, *batches})}
        for i, operations in enumerate(_layer_operations(spec)):
            here = {batch: calls[batch][i] for batch in calls}
            shapes = _shapes(here[1])
            layer = found.setdefault((here[1].operator, shapes), AttentionLayer(shapes, {}, here, operations))
            layer.models[model] = layer.models.get(model, 0) + 1
    return list(found.values())


def definition_operations(call: AttentionCall) -> list[Operation]:
    """The operations of the operator's definition, one launch each, with every value stored in DTYPE.

    The definition computes half types in FP32; without its casts it is what a plain module in DTYPE does.
    """
    arguments = (value.float() if isinstance(value, Tensor) else value for value in call.arguments)
    with torch.no_grad():
        given = tuple(arguments)
        with Recorder(float_bytes=DTYPE.itemsize) as recorder:
            OPERATORS[call.operator].definition(*given)
    return recorder.operations


def _shapes(call: AttentionCall) -> Shapes:
    return tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in call.arguments)


def _layer_operations(spec: ModelSpec) -> list[tuple[Operation, ...]]:
    layers: list[tuple[Operation, ...]] = []
    with torch.device("meta"), torch.no_grad():
        model = fused_model(build_model(spec), spec).to(dtype=DTYPE)
        for module in model.modules():
            if isinstance(module, LAYERS):
                module.forward = _recorded(module, layers)  # type: ignore[method-assign]
        model(torch.empty(1, *spec.input_shape, dtype=DTYPE))
    return layers


def _recorded(module: nn.Module, layers: list[tuple[Operation, ...]]) -> Any:
    forward = module.forward

    def run(x: Tensor) -> Any:
        with Recorder([*module.parameters(), *module.buffers()]) as recorder:
            out = forward(x)
        layers.append(tuple(recorder.operations))
        return out

    return run
