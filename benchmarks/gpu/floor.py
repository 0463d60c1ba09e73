"""The least time of a whole model: each layer reads its input and weights and writes its output once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from evit_kernels.registry import OPERATORS
from evit_kernels.work import tensor_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.sizes import PRECISIONS
from evit_deploy.models import build_model
from evit_deploy.models.fused import fused_model
from evit_deploy.specs import ModelSpec

# What cannot be part of its neighbour's pass over memory; everything else, pointwise work, is counted as free.
_PRODUCTS = {"convolution", "mm", "addmm", "bmm", "baddbmm"}
_REDUCTIONS = {"native_layer_norm", "mean", "avg_pool2d", "_adaptive_avg_pool2d", "_softmax"}


class _Layers(TorchDispatchMode):
    """Sums the floors of the layers that run inside."""

    def __init__(self, ceilings: Ceilings, precision: str) -> None:
        super().__init__()
        self.seconds = 0.0
        self.layers = 0
        self._ceilings = ceilings
        self._matrix_flops = ceilings.matrix_flops[precision]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "evit":
            work = OPERATORS[name].work_of(*args)
            self._add(work.floor_s(self._ceilings.bandwidth, self._matrix_flops, self._ceilings.exponentials).seconds)
        elif name in _PRODUCTS | _REDUCTIONS:
            output = result[0] if isinstance(result, tuple) else result
            tensors = [argument for argument in args if isinstance(argument, Tensor)]
            flops = _flops(name, args, output) if name in _PRODUCTS else 0
            moved_s = tensor_bytes(*tensors, output) / self._ceilings.bandwidth
            self._add(max(moved_s, flops / self._matrix_flops))
        return result

    def _add(self, seconds: float) -> None:
        self.seconds += seconds
        self.layers += 1


def layer_floor(spec: ModelSpec, batch: int, precision: str, ceilings: Ceilings) -> tuple[float, int]:
    """Seconds of one forward pass of the fused model at the ceilings, and its number of layers.

    Traced on the meta device. What stays in the cache between two layers can beat it at small batches.
    """
    with torch.device("meta"), torch.no_grad():
        model = fused_model(build_model(spec), spec).to(dtype=PRECISIONS[precision])
        images = torch.empty(batch, *spec.input_shape, dtype=PRECISIONS[precision])
        with _Layers(ceilings, precision) as layers:
            model(images)
    return layers.seconds, layers.layers


def _flops(name: str, args: Sequence[Any], output: Tensor) -> int:
    if name == "convolution":
        return 2 * output.numel() * prod(args[1].shape[1:])  # weight: [out, in / groups, ...]
    inner = args[1 if name in ("addmm", "baddbmm") else 0].shape[-1]
    return 2 * output.numel() * inner
