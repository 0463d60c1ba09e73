"""Which fused operators a model calls and with what sizes: traced on the meta device, so that nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from evit_kernels.launch import KernelLaunch
from evit_kernels.registry import OPERATORS
from torch.utils._python_dispatch import TorchDispatchMode

from evit_deploy.models import build_model
from evit_deploy.models.fused import fused_model
from evit_deploy.specs import ModelSpec

# How many leading arguments are maps [B, C, H, W]; tokens [B, H, W, C] have the same layout either way.
_MAPS = {"lite_mla": 2, "cascaded_attention": 1}


@dataclass(frozen=True)
class AttentionCall:
    """One call of a fused operator.

    Attributes:
        operator: its name, as in `evit_kernels.registry.OPERATORS`.
        arguments: what it is called with; tensors are on the meta device.
        launch: the kernel launch that it is.
    """

    operator: str
    arguments: tuple[Any, ...]
    launch: KernelLaunch


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "evit":
            self.calls.append((name, tuple(args)))
        return func(*args, **(kwargs or {}))


def attention_calls(
    spec: ModelSpec, dtype: torch.dtype = torch.float32, *, batch: int = 1, channels_last: bool = False
) -> list[AttentionCall]:
    """The calls of one forward pass of the fused model, in order.

    Args:
        spec: the model.
        dtype: of weights and images.
        batch: images.
        channels_last: the model runs in channels_last memory format.

    Raises:
        ValueError: sizes that an operator's kernel does not take.
    """
    with torch.device("meta"), torch.no_grad():
        model = fused_model(build_model(spec), spec).to(dtype=dtype)
        images = torch.empty(batch, *spec.input_shape, dtype=dtype)
        with _Recorder() as recorder:
            model(images)
    calls = [_call(operator, arguments) for operator, arguments in recorder.calls]
    return [in_channels_last(call) for call in calls] if channels_last else calls


def in_channels_last(call: AttentionCall) -> AttentionCall:
    """The same call of a model that runs in channels_last memory format."""
    maps = _MAPS.get(call.operator, 0)
    arguments = (
        value.contiguous(memory_format=torch.channels_last) if i < maps else value
        for i, value in enumerate(call.arguments)
    )
    return _call(call.operator, tuple(arguments))


def _call(operator: str, arguments: tuple[Any, ...]) -> AttentionCall:
    return AttentionCall(operator, arguments, OPERATORS[operator].launch_of(*arguments))
