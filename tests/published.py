"""The attention layers of the published models, each model traced once per process and only when a test asks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evit_deploy.models.attention_calls import AttentionCall, attention_calls
from evit_deploy.specs import ModelSpec

Size = tuple[Any, ...]  # shapes of the tensors, other arguments as they are


@cache
def calls_of(model: str, dtype: torch.dtype = torch.float32, batch: int = 1) -> tuple[AttentionCall, ...]:
    """The attention layers of a published model at 224 px, in order; tensors are on the meta device."""
    return tuple(attention_calls(ModelSpec.published(model), dtype, batch=batch))


def size_of(call: AttentionCall) -> Size:
    """What tells two layers of one operator apart."""
    return tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in call.arguments)


def distinct_calls(model: str, dtype: torch.dtype = torch.float32, batch: int = 1) -> Iterator[AttentionCall]:
    """The layers of a model, each size once."""
    seen = set()
    for call in calls_of(model, dtype, batch):
        if (call.operator, size_of(call)) not in seen:
            seen.add((call.operator, size_of(call)))
            yield call
