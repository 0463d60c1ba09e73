"""Watching a forward pass for attention operators that run as plain PyTorch instead of as our kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from evit_kernels.availability import why_no_kernel
from evit_kernels.registry import OPERATORS
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def plain_attention() -> Iterator[dict[str, str]]:
    """Gives a dict from operator to the reason why its kernel does not run, filled by what runs inside."""
    watch = _Watch()
    with watch:
        yield watch.reasons


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operator = func._schema.name.partition("::")[2]
        if func.namespace == "evit" and operator not in self.reasons:
            reason = _why_plain(operator, args)
            if reason is not None:
                self.reasons[operator] = reason
        return func(*args, **(kwargs or {}))


def _why_plain(operator: str, arguments: Sequence[Any]) -> str | None:
    """The reason why a call does not run as a kernel, or None."""
    device = arguments[0].device
    if device.type != "cuda":
        return f"kernels run on CUDA devices, got {device}"
    reason = why_no_kernel(arguments[0])
    if reason is not None:
        return reason
    try:
        OPERATORS[operator].launch_of(*arguments)
    except ValueError as error:
        return str(error).removeprefix(f"{operator}: ")
    return None
