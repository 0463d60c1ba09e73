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
    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.calls: list[AttentionCall] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "evit":
            arguments = tuple(args)
            if self.channels_last:  # convolutions on the meta device lose the memory format
                arguments = tuple(
                    value.contiguous(memory_format=torch.channels_last) if i < _MAPS.get(name, 0) else value
                    for i, value in enumerate(args)
                )
            self.calls.append(AttentionCall(name, arguments, OPERATORS[name].launch_of(*arguments)))
        return func(*args, **(kwargs or {}))


def attention_calls(
    spec: ModelSpec, dtype: torch.dtype = torch.float32, *, batch: int = 1, channels_last: bool = False
) -> list[AttentionCall]:
    """The calls of one forward pass of the fused model, in order.

    Args:
        spec: the model.
        dtype: of weights and images.
        batch: images.
        channels_last: run the model in channels_last memory format.

    Raises:
        ValueError: sizes that an operator's kernel does not take.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    with torch.device("meta"), torch.no_grad():
        model = fused_model(build_model(spec), spec).to(dtype=dtype)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        images = torch.empty(batch, *spec.input_shape, dtype=dtype).contiguous(memory_format=memory_format)
        with _Recorder(channels_last) as recorder:
            model(images)
    return recorder.calls
