"""The calls of the fused operators that published models make, as tensors to measure on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from evit_kernels.registry import OPERATORS
from torch import Tensor

from evit_deploy.models.attention_calls import attention_calls
from evit_deploy.specs import ModelSpec, variant_config

# Leading arguments that have the batch.
MAPS = {"multi_scale_attention": 4, "projected_multi_scale_attention": 2, "lite_mla": 2, "cascaded_attention": 1}
CHANNELS_LAST = {"lite_mla", "cascaded_attention"}  # whose maps come from convolutions, in the layout of those
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IMAGE_SIZE_PX = 224

# Models that a CPU computes in no time, for tests.
SMOKE_SPECS = {
    "msa-m3": ModelSpec(
        "msa", "custom", 6, 40, {"channels": (8, 36), "depths": (1, 1), "num_heads": 2, "pos_embed_size": (10, 10)}
    ),
    "mit-b1": ModelSpec(
        "mit",
        "custom",
        6,
        80,
        {
            **variant_config("mit", "b0"),
            "widths": (8, 8, 16, 32, 32),
            "depths": (1, 1, 1, 1, 1),
            "head_widths": (32, 64),
        },
    ),
    "msra-m3": ModelSpec(
        "msra",
        "custom",
        6,
        64,
        {**variant_config("msra", "m0"), "embed_dim": (32, 32, 48), "depth": (1, 1, 2), "num_heads": (2, 1, 3)},
    ),
}


@dataclass(frozen=True, eq=False)
class Size:
    """One operator at one size, without batch and precision.

    Attributes:
        operator: as in `evit_kernels.registry.OPERATORS`.
        arguments: of a call with a batch of 2; tensors are on the meta device.
        model: the first that has it.
        calls: how often a forward pass of that model makes it.
        rank: 0 for the model's first attention layer, and so on.
    """

    operator: str
    arguments: tuple[Any, ...]
    model: str
    calls: int
    rank: int

    @property
    def label(self) -> str:
        """For people: the operator and what tells its sizes apart."""
        shape = "x".join(map(str, self.arguments[0].shape[1:]))
        return f"{self.operator} {shape} of {self.model}"


def spec_of(model: str, *, smoke: bool = False) -> ModelSpec:
    """What is measured under the name of a model."""
    return SMOKE_SPECS[model] if smoke else ModelSpec.published(model, image_size=IMAGE_SIZE_PX)


def sizes_of(models: Iterable[str], *, smoke: bool = False) -> list[Size]:
    """Every distinct size of the models, each model's first layers before any model's later ones."""
    found: dict[Any, tuple[Any, str, int, int]] = {}
    for model in models:
        for rank, call in enumerate(attention_calls(spec_of(model, smoke=smoke), batch=2, channels_last=True)):
            key = (call.operator, *(_key(argument) for argument in call.arguments))
            first = found.get(key, (call, model, 0, rank))
            found[key] = (*first[:2], first[2] + (first[1] == model), first[3])
    sizes = [Size(call.operator, call.arguments, model, n, rank) for call, model, n, rank in found.values()]
    return sorted(sizes, key=lambda size: size.rank)


def meta_arguments(size: Size, batch: int, precision: str) -> tuple[Any, ...]:
    """The arguments with another batch and precision, on the meta device."""
    maps = MAPS[size.operator]

    def changed(index: int, argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        shape = (batch, *argument.shape[1:]) if index < maps else tuple(argument.shape)
        last = index < maps and size.operator in CHANNELS_LAST
        memory_format = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=PRECISIONS[precision], device="meta", memory_format=memory_format)

    return tuple(changed(index, argument) for index, argument in enumerate(size.arguments))


def random_arguments(meta: tuple[Any, ...], operator: str, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Normal numbers in the places of meta tensors; the cascade's parameters small enough to keep it of order one."""
    generator = torch.Generator(device).manual_seed(seed)
    values: list[Any] = []
    for index, argument in enumerate(meta):
        if not isinstance(argument, Tensor):
            values.append(argument)
            continue
        value = torch.empty_like(argument, device=device).normal_(generator=generator)
        if operator.startswith("projected") and index >= MAPS[operator]:
            value.mul_(argument.shape[-1] ** -0.5)
        elif operator == "cascaded_attention" and index >= MAPS[operator]:
            value.mul_(argument[0, 0].numel() ** -0.5 if index == 3 else argument.shape[-1] ** -0.5)
        values.append(value)
    return tuple(values)


def first_and_last(arguments: tuple[Any, ...], operator: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """The call for the first and the last image alone, in another precision: few enough for a reference."""
    return tuple(
        (a[[0, -1]] if index < MAPS[operator] else a).to(dtype) if isinstance(a, Tensor) else a
        for index, a in enumerate(arguments)
    )


def work_of(size: Size, batch: int, precision: str) -> Any:
    """The least that a call has to do, an `evit_kernels.work.Work`."""
    return OPERATORS[size.operator].work_of(*meta_arguments(size, batch, precision))


def _key(argument: Any) -> Any:
    return (tuple(argument.shape), argument.stride()) if isinstance(argument, Tensor) else argument
