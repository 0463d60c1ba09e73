"""How many kernels a call starts, counted by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.device import Device

_NO_KERNELS = ("Memcpy", "Memset")


def count_kernels(device: Device, call: Callable[[], object]) -> int | None:
    """Kernels of one call after two that do not count; None where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        call()
    device.synchronize()
    if not device.is_gpu:
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        device.synchronize()
    return sum(_is_kernel(event) for event in profiler.events()) or None


def _is_kernel(event: Any) -> bool:
    from torch.autograd import DeviceType

    return event.device_type == DeviceType.CUDA and not event.name.startswith(_NO_KERNELS)
