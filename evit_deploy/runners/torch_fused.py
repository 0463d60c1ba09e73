"""The fused model in PyTorch on a CUDA device: our attention kernels, channels_last, one CUDA graph per batch size.

Tested on a CPU, where the operators compute their definitions; never run on a GPU yet.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evit_deploy.constants import INPUT_NAME, OUTPUT_NAME
from evit_deploy.errors import EvitDeployError, LimitError, MissingDependencyError, RunnerError
from evit_deploy.runners.base import FeedDict, Runner, TensorSpec
from evit_deploy.runners.feeds import check_feed
from evit_deploy.runners.precision import PRECISIONS, converted, precision_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from evit_deploy.bundle import Bundle
    from evit_deploy.runners.cuda_graph import Captured

Precision = Literal["fp32", "fp16", "bf16"]
MAX_BATCH_SIZES = 8  # graphs kept, each with the memory of its activations; the one not used for longest goes first

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")

log = logging.getLogger(__name__)


@dataclass
class _Slot:
    """What one batch size needs: buffers at fixed addresses, and the graph where there is one."""

    host_input: torch.Tensor
    device_input: torch.Tensor
    host_output: torch.Tensor | None = None
    captured: Captured[torch.Tensor] | None = None


class TorchFusedRunner(Runner):
    """One fused module, one input of FP32 images in host memory, FP32 logits in host memory.

    Args:
        module: what `models.fused.fused_model` returns, in FP32, or a function that makes it on activation; it is
            copied, not changed.
        precision: of weights and activations.
        device: "cuda", "cuda:N", or "cpu" for tests.
        cuda_graph: capture the forward pass of each batch size when it is first asked for.
        name: the backend's name in tables; None stands for "torch-fused", with "-fp16" or "-bf16".
        image_shape: (channels, height, width) of one image where it is fixed.

    Attributes:
        plain_attention: after the first inference, why attention runs as plain PyTorch, one line per operator; empty
            where every attention layer is one of our kernels.
        captured: whether the last inference was a replay of a CUDA graph.
    """

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        *,
        precision: Precision = "fp32",
        device: str = "cuda",
        cuda_graph: bool = True,
        name: str | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.name = name or ("torch-fused" if precision == "fp32" else f"torch-fused-{precision}")
        self.precision = "unknown"
        self.plain_attention: tuple[str, ...] = ()
        self.captured = False
        self._source = module
        self._asked_precision = precision
        self._device_name = device
        self._cuda_graph = cuda_graph
        channels, height, width = image_shape or (None, None, None)
        self._input = TensorSpec(INPUT_NAME, "float32", (None, channels, height, width))
        self._output_shape: tuple[int | None, ...] = (None, None)
        self._module: nn.Module | None = None
        self._stream: torch.cuda.Stream | None = None
        self._slots: OrderedDict[int, _Slot] = OrderedDict()

    def activate(self) -> None:
        if self._module is not None:
            return
        torch = _import_torch()
        device = self._find_device(torch)
        module = self._source if isinstance(self._source, torch.nn.Module) else self._source()
        try:
            module = converted(module, self._asked_precision, device)
        except RuntimeError as error:
            raise self._explain(error, "loading the weights failed") from error
        except EvitDeployError as error:
            raise RunnerError(f"{self.name}: {error.summary}", hint=error.hint) from error
        self.precision = precision_of(module)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._module = module

    def deactivate(self) -> None:
        self._slots.clear()
        self._module = None
        self._stream = None

    def infer(self, feed: FeedDict) -> dict[str, np.ndarray]:
        torch = _import_torch()
        if self._module is None:
            raise ValueError(f"{self.name} is not active: use it as `with runner:`")
        check_feed(feed, self.inputs, self.name)
        array = feed[self._input.name]
        try:
            with torch.inference_mode():
                logits = self._infer_on_cpu(array) if self._stream is None else self._infer_on_gpu(array)
        except (RuntimeError, MemoryError) as error:
            self._slots.clear()  # their memory may be what was missing
            raise self._explain(error, f"inference failed with input {list(array.shape)}") from error
        self._output_shape = (None, *logits.shape[1:])
        return {OUTPUT_NAME: logits}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (self._input,)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The output; its shape is known after the first inference."""
        return (TensorSpec(OUTPUT_NAME, "float32", self._output_shape),)

    def _infer_on_cpu(self, array: np.ndarray) -> np.ndarray:
        import torch

        images = torch.from_numpy(np.ascontiguousarray(array).copy())
        with self._settings(), self._kernels_looked_at():
            logits: np.ndarray = self._forward(images).numpy()
        return logits

    def _infer_on_gpu(self, array: np.ndarray) -> np.ndarray:
        import torch

        assert self._stream is not None
        slot = self._slots.get(len(array))
        if slot is None:
            slot = self._make_slot(array.shape)
        self._slots.move_to_end(len(array))
        np.copyto(slot.host_input.numpy(), array)
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            slot.device_input.copy_(slot.host_input, non_blocking=True)
            if slot.captured is not None:
                output = slot.captured.replay()
            else:
                with self._settings():
                    output = self._forward(slot.device_input)
            if slot.host_output is None:
                slot.host_output = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            slot.host_output.copy_(output, non_blocking=True)
            self._stream.synchronize()
        self.captured = slot.captured is not None
        logits: np.ndarray = slot.host_output.numpy().copy()  # the buffer is filled again by the next inference
        return logits

    def _make_slot(self, shape: tuple[int, ...]) -> _Slot:
        """Buffers for one batch size, and its graph where that works."""
        import torch

        from evit_deploy.runners.cuda_graph import CaptureFailedError, capture

        assert self._stream is not None
        while len(self._slots) >= MAX_BATCH_SIZES:
            self._slots.popitem(last=False)
        host_input = torch.zeros(shape, dtype=torch.float32, pin_memory=True)
        slot = _Slot(host_input, torch.zeros(shape, dtype=torch.float32, device=self._stream.device))
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream), self._settings():
            self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
            with self._kernels_looked_at():
                self._forward(slot.device_input)
            if self._cuda_graph:
                try:
                    slot.captured = capture(lambda: self._forward(slot.device_input), self._stream)
                except CaptureFailedError as error:
                    self._stream = torch.cuda.Stream(self._stream.device)
                    log.warning("%s: batch %d runs without a CUDA graph: %s", self.name, shape[0], error)
        self._slots[shape[0]] = slot
        return slot

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, H, W] in any layout to float32 logits, on the module's device."""
        import torch

        assert self._module is not None
        dtype = getattr(torch, PRECISIONS[self._asked_precision])
        output = self._module(images.to(dtype=dtype, memory_format=torch.channels_last))
        if not isinstance(output, torch.Tensor):
            raise RunnerError(f"{self.name}: the module returned {type(output).__name__}, expected one tensor")
        return output.float()

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """No TF32, no autocast, and cuDNN's fastest convolutions, for the length of a forward pass."""
        import torch

        from evit_deploy.runners.float32 import full_float32

        device = "cpu" if self._stream is None else "cuda"
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            with full_float32(), torch.autocast(device, enabled=False):
                yield
        finally:
            torch.backends.cudnn.benchmark = benchmark

    @contextmanager
    def _kernels_looked_at(self) -> Iterator[None]:
        """Note, once, which attention operators of a forward pass are not run by their kernel, and why."""
        from evit_deploy.runners.kernel_watch import plain_attention

        if self.plain_attention:
            yield
            return
        with plain_attention() as reasons:
            yield
        if reasons:
            self.plain_attention = tuple(f"{operator}: {reason}" for operator, reason in reasons.items())
            log.info("%s: attention as plain PyTorch: %s", self.name, "; ".join(self.plain_attention))

    def _find_device(self, torch: Any) -> torch.device:
        device = torch.device(self._device_name)
        if device.type == "cpu":
            return device
        if device.type != "cuda":
            raise ValueError(f"device is cuda, cuda:N or cpu, got {self._device_name!r}")
        if not torch.cuda.is_available():
            without = "PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
            hint = "it needs an NVIDIA GPU with its driver, and a PyTorch with CUDA: evit-deploy doctor"
            raise MissingDependencyError(f"{self.name}: {without}", hint=hint)
        if (device.index or 0) >= torch.cuda.device_count():
            raise MissingDependencyError(
                f"{self.name}: there is no {self._device_name}", hint=f"found {torch.cuda.device_count()} CUDA devices"
            )
        return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())

    def _explain(self, error: BaseException, what: str) -> EvitDeployError:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
            return LimitError(f"{self.name}: {what}: out of memory", hint="use a smaller batch")
        return RunnerError(f"{self.name}: {what}: {text[:400]}")


def fused_runner(
    bundle: Bundle,
    *,
    precision: Precision | None = None,
    device: str = "cuda",
    cuda_graph: bool = True,
    name: str | None = None,
) -> TorchFusedRunner:
    """The fused model of a bundle; its weights are read on activation.

    Args:
        bundle: an opened bundle.
        precision: None stands for the precision of the bundle's graph.
        device, cuda_graph, name: as for `TorchFusedRunner`.
    """
    spec = bundle.spec

    def load() -> nn.Module:
        from evit_deploy.models import load_model
        from evit_deploy.models.fused import fused_model

        return fused_model(load_model(spec, bundle.load_state_dict()), spec)

    return TorchFusedRunner(
        load,
        precision=precision or bundle.manifest["onnx"].get("precision", "fp32"),
        device=device,
        cuda_graph=cuda_graph,
        name=name,
        image_shape=spec.input_shape,
    )


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("PyTorch is not installed", hint="pip install torch") from error
    return torch
