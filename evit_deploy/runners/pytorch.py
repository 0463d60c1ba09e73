"""PyTorch modules on the CPU behind the runner contract: eager or compiled, without TF32 and without autocast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evit_deploy.constants import INPUT_NAME, OUTPUT_NAME, SOFTMAX_OUTPUT_NAME
from evit_deploy.errors import EvitDeployError, LimitError, MissingDependencyError, RunnerError
from evit_deploy.runners.base import FeedDict, Runner, TensorSpec
from evit_deploy.runners.feeds import check_feed

if TYPE_CHECKING:
    import torch
    from torch import nn

Mode = Literal["eager", "compile"]
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


class TorchRunner(Runner):
    """One module, one input of images, one output.

    Args:
        module: an nn.Module, or a function without arguments that builds one on activation.
        threads: intra-op threads while active; None leaves PyTorch's setting.
        mode: "eager", or "compile" for torch.compile (compiled by the first inference of each shape: `warm_up`).
        channels_last: run the module and its input in channels_last memory format.
        softmax: append a softmax over the classes.
        name: the backend's name in tables; None stands for "torch-eager" or "torch-compile".
        input_name: key of the images in the feed.
        output_name: key of the result; None stands for "logits", or "probabilities" with `softmax`.
        image_shape: (channels, height, width) of one image where it is fixed.
    """

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        *,
        threads: int | None = None,
        mode: Mode = "eager",
        channels_last: bool = False,
        softmax: bool = False,
        name: str | None = None,
        input_name: str = INPUT_NAME,
        output_name: str | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        if mode not in ("eager", "compile"):
            raise ValueError(f"mode is 'eager' or 'compile', got {mode!r}")
        self.name = name or f"torch-{mode}"
        self.precision = "unknown"
        self._source = module
        self._threads = threads
        self._mode = mode
        self._channels_last = channels_last
        self._softmax = softmax
        self._output_name = output_name or (SOFTMAX_OUTPUT_NAME if softmax else OUTPUT_NAME)
        channels, height, width = image_shape or (None, None, None)
        self._input = TensorSpec(input_name, "float32", (None, channels, height, width))
        self._output_shape: tuple[int | None, ...] = (None, None)
        self._module: nn.Module | None = None
        self._forward: Callable[[torch.Tensor], Any] | None = None
        self._on_deactivate = ExitStack()

    def activate(self) -> None:
        if self._module is not None:
            return
        torch = _import_torch()
        with ExitStack() as undo:
            module = self._source if isinstance(self._source, torch.nn.Module) else self._source()
            undo.callback(module.train, module.training)
            module.eval()
            self.precision = _precision_of(module)
            if self._threads is not None:
                undo.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(self._threads)
            if self._channels_last:
                undo.callback(_to_memory_format, module, torch.contiguous_format)
                _to_memory_format(module, torch.channels_last)
            self._module = module
            self._forward = torch.compile(module, dynamic=False) if self._mode == "compile" else module
            self._on_deactivate = undo.pop_all()

    def deactivate(self) -> None:
        self._module = None
        self._forward = None
        self._on_deactivate.close()

    def infer(self, feed: FeedDict) -> dict[str, np.ndarray]:
        torch = _import_torch()
        from evit_deploy.runners.float32 import full_float32

        module, forward = self._module, self._forward
        if module is None or forward is None:
            raise ValueError(f"{self.name} is not active: use it as `with runner:`")
        check_feed(feed, self.inputs, self.name)
        array = np.ascontiguousarray(feed[self._input.name])
        images = torch.from_numpy(array if array.flags.writeable else array.copy())
        parameter = next(module.parameters(), None)
        if parameter is not None:
            images = images.to(parameter.dtype)
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            # Anything less than full FP32 lets oneDNN round products to BF16 or TF32.
            with full_float32(), torch.inference_mode(), torch.autocast("cpu", enabled=False):
                output = forward(images)
                if not isinstance(output, torch.Tensor):
                    raise RunnerError(f"{self.name}: the module returned {type(output).__name__}, expected one tensor")
                output = output.float()
                if self._softmax:
                    output = output.softmax(dim=-1)
        except (RuntimeError, MemoryError) as error:
            raise self._explain(error, images) from error
        self._output_shape = (None, *output.shape[1:])
        return {self._output_name: output.contiguous().numpy()}

    def warm_up(self, feed: FeedDict, iterations: int = 1) -> None:
        """Run `feed` without looking at the result, so that compilation and caches are out of the way.

        Raises:
            MissingDependencyError: torch.compile found no C++ compiler.
            RunnerError: the module or its compilation failed.
        """
        for _ in range(iterations):
            self.infer(feed)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (self._input,)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The output; its shape is known after the first inference."""
        return (TensorSpec(self._output_name, "float32", self._output_shape),)

    def _explain(self, error: BaseException, images: torch.Tensor) -> EvitDeployError:
        text = " ".join(str(error).split())
        if _caused_by(error, "InvalidCxxCompiler") or "No working C++ compiler" in text:
            return MissingDependencyError(
                f"{self.name}: torch.compile needs a C++ compiler and found none",
                hint="install g++ or clang, or name one in CXX",
            )
        if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
            return LimitError(f"{self.name}: out of memory with input {list(images.shape)}", hint="use a smaller batch")
        return RunnerError(f"{self.name}: inference failed with input {list(images.shape)}: {text[:400]}")


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("PyTorch is not installed", hint="pip install torch") from error
    return torch


def _to_memory_format(module: nn.Module, memory_format: torch.memory_format) -> None:
    module.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stubs lack this overload


def _precision_of(module: nn.Module) -> str:
    """The precision that holds most of the parameters; FP32 for a module without any."""
    sizes: Counter[str] = Counter()
    for parameter in module.parameters():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return _PRECISIONS.get(sizes.most_common(1)[0][0], "unknown") if sizes else "fp32"


def _caused_by(error: BaseException | None, class_name: str) -> bool:
    while error is not None:
        if type(error).__name__ == class_name:
            return True
        error = error.__cause__ or error.__context__
    return False
