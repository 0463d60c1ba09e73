"""Finds the weights inside what a checkpoint file holds, and turns each into a plain float32 tensor.

A training script saves its weights bare, or under a key beside optimizer and scheduler, often twice: the trained
weights, and their exponential moving average (EMA), which is what published accuracies are measured with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evit_deploy.checkpoint.file import CheckpointFile
from evit_deploy.constants import MAX_CHECKPOINT_BYTES
from evit_deploy.errors import CheckpointError, UsageError, unknown_name_hint

# In order of preference. timm, Microsoft: model_ema, state_dict_ema; MIT: ema, {decay: state dict}.
_EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_MODEL_WRAPPERS = ("state_dict", "model", "model_state_dict")
_INNER_WRAPPERS = (*_MODEL_WRAPPERS, "module", "shadow_params")
_MAX_NESTING = 3
_BOOKKEEPING = ("n_averaged",)  # torch.optim.swa_utils.AveragedModel

WEIGHTS_CHOICES = ("ema", "model")
COUNTER_SUFFIX = "num_batches_tracked"
INDEX_SUFFIX = "attention_bias_idxs"
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class SelectedWeights:
    """One state dict of a checkpoint.

    Attributes:
        tensors: by the names in the file.
        wrapper: the key it was found under; None for a bare state dict.
        kind: "ema" or "model".
        others: wrappers of further state dicts in the same file.
    """

    tensors: dict[str, Tensor]
    wrapper: str | None
    kind: str
    others: tuple[str, ...]


def select_weights(file: CheckpointFile, wanted: str | None) -> SelectedWeights:
    """The state dict to use: the wanted kind, otherwise the EMA weights where there are any.

    Raises:
        UsageError: `wanted` is neither "ema" nor "model".
        CheckpointError: there are no weights, not of the wanted kind, or something that is no tensor among them.
    """
    if wanted is not None and wanted not in WEIGHTS_CHOICES:
        raise UsageError(f"no such weights {wanted!r}", hint=unknown_name_hint(wanted, WEIGHTS_CHOICES))
    name = file.path.name
    if not isinstance(file.content, Mapping):
        raise CheckpointError(
            f"{name} holds a {type(file.content).__name__}, not a state dict",
            hint="save the weights by name: torch.save(model.state_dict(), path)",
        )
    found = _wrapped_state_dicts(file.content)
    if not found and _is_state_dict(file.content):
        if wanted == "ema":
            raise CheckpointError(f"{name} is a bare state dict without EMA weights", hint="leave out --weights")
        return SelectedWeights(_checked(file.path, file.content), None, "model", ())
    if not found:
        listed = ", ".join(repr(key) for key in list(file.content)[:5]) or "nothing"
        raise CheckpointError(f"{name} holds no state dict with tensors; its keys are {listed}")
    kinds = {wrapper: "ema" if wrapper in _EMA_WRAPPERS else "model" for wrapper in found}
    wrappers = [wrapper for wrapper in found if wanted in (None, kinds[wrapper])]
    if not wrappers:
        raise CheckpointError(
            f"{name} holds no {wanted} weights, only {', '.join(repr(w) for w in found)}",
            hint=f"--weights {'model' if wanted == 'ema' else 'ema'}",
        )
    chosen = wrappers[0]
    others = tuple(wrapper for wrapper in found if wrapper != chosen)
    return SelectedWeights(_checked(file.path, found[chosen]), chosen, kinds[chosen], others)


def _wrapped_state_dicts(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    found = {}
    for wrapper in (*_EMA_WRAPPERS, *_MODEL_WRAPPERS):
        inner = _unwrap(content.get(wrapper), _MAX_NESTING)
        if inner is not None:
            found[wrapper] = inner
    return found


def _unwrap(value: Any, nesting: int) -> Mapping[Any, Any] | None:
    if not isinstance(value, Mapping) or nesting == 0:
        return None
    for key in _INNER_WRAPPERS:
        inner = _unwrap(value.get(key), nesting - 1)
        if inner is not None:
            return inner
    if _is_state_dict(value):
        return value
    return _unwrap(next(iter(value.values())), nesting - 1) if len(value) == 1 else None


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    tensors = sum(isinstance(item, Tensor) for item in value.values())
    return tensors > 0 and 2 * tensors >= len(value)


def _checked(path: Path, state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    total_bytes = 0
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path.name} has a weight without a name, its key is {key!r}")
        if key in _BOOKKEEPING:
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path.name} has a {type(value).__name__} among its weights: {key!r}")
        _check_plain(path, key, value)
        # A strided view of a small file may claim any size.
        total_bytes += value.numel() * torch.float32.itemsize
        if total_bytes > MAX_CHECKPOINT_BYTES:
            raise CheckpointError(
                f"{path.name} claims weights of more than {MAX_CHECKPOINT_BYTES:,} bytes, at {key!r} "
                f"of shape {list(value.shape)}"
            )
        tensors[key] = value.detach()
    return tensors


def _check_plain(path: Path, key: str, value: Tensor) -> None:
    if value.is_quantized or str(value.dtype).startswith("torch.float8"):
        problem = f"a quantized tensor ({value.dtype})"
    elif value.layout != torch.strided or value.is_nested:
        problem = f"a sparse or nested tensor ({value.layout})"
    elif value.is_meta:
        problem = "a tensor without data (meta)"
    elif value.is_complex():
        problem = f"a complex tensor ({value.dtype})"
    elif value.dtype not in _FLOAT_DTYPES and not key.endswith((COUNTER_SUFFIX, INDEX_SUFFIX)):
        problem = f"integers where floats are expected ({value.dtype})"
    else:
        return
    raise CheckpointError(f"{path.name} has {problem} at {key!r}", hint="save the FP32, FP16 or BF16 weights")


def to_float32(path: Path, key: str, value: Tensor) -> Tensor:
    """A private, contiguous float32 copy, free of NaN and Inf (of a memory-mapped tensor: the one read of it).

    Raises:
        CheckpointError: a value is NaN, infinite, or beyond the range of float32.
    """
    converted = value.to(torch.float32)
    if converted.data_ptr() == value.data_ptr() or not converted.is_contiguous():
        converted = converted.clone(memory_format=torch.contiguous_format)
    # A finite sum has only finite terms; the exact test runs when it is not, or overflowed.
    if not torch.isfinite(converted.sum()) and not torch.isfinite(converted).all():
        nan, inf = int(torch.isnan(converted).sum()), int(torch.isinf(converted).sum())
        raise CheckpointError(
            f"{path.name} has weights that are not finite: {nan} NaN and {inf} Inf in {key!r}",
            hint="the training run diverged; use an earlier checkpoint",
        )
    if key.endswith("running_var") and (converted < 0).any():
        raise CheckpointError(f"{path.name} has a negative variance in {key!r}", hint=_RESTORE_HINT)
    return converted


_RESTORE_HINT = "the BatchNorm statistics are damaged; use an earlier checkpoint"
