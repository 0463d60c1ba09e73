"""Argument checks shared by the operators: what was found and what is allowed, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """Raise ValueError unless `x` has the given shape (None: any positive size) and the dtype and device of `like`.

    Args:
        name: the argument's name, for the message.
        x: the tensor to check.
        shape: expected size of each dimension; None accepts any size above zero.
        like: tensor whose dtype and device `x` must share.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be a floating point tensor, got {x.dtype=}")
    fits = x.dim() == len(shape) and all(
        size == wanted if wanted is not None else size > 0 for size, wanted in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {tuple(x.shape)}")
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise ValueError(f"{name} must be {like.dtype} on {like.device}, got {x.dtype} on {x.device}")


def check_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raise ValueError unless `divisor` is positive and divides `value`."""
    if divisor <= 0 or value % divisor:
        raise ValueError(
            f"{divisor_name} must be positive and divide {name}, got {divisor_name}={divisor} {name}={value}"
        )


def computing_dtype(x: Tensor) -> torch.dtype:
    """What an operator's definition computes in: FP32 for half types, else the type itself."""
    return torch.promote_types(x.dtype, torch.float32)
