"""What every operation of a running model returned: its figures, by block and tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evit_deploy.headroom.inner import run_operator
from evit_deploy.headroom.rows import ACTIVATION, BIAS, IN_FP32, INNER, STORED, WEIGHT, TensorRow
from evit_deploy.headroom.statistics import TensorStatistics
from evit_deploy.models.blocks import block_names

HEAD = "head"  # everything behind the last block
_NAMES = {"addmm": "linear", "mm": "linear", "bmm": "linear", "native_layer_norm": "layer_norm"}
_MOVES = {"cat", "clone", "constant_pad_nd", "copy", "empty", "stack", "to_copy"}  # values that are elsewhere already
_ADDED = ("bias", "pos_embed")  # ends of the names of weights that are only added


class Watch(TorchDispatchMode):
    """Runs a model and measures everything that it computes.

    A fused operator is written out (`inner.py`); other operations are measured by what they return. Views and copies
    are left out: their values have been measured already.

    Args:
        model: the fused model, in FP32 on the CPU.

    Raises:
        InputDataError: a weight is NaN or infinite.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._images: Sequence[str] = ()
        blocks = block_names(model)
        self.blocks = (*blocks, HEAD)
        self._block = blocks[0]
        self._modules: list[str] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._statistics: dict[tuple[str, str], TensorStatistics] = {}
        self._leaves = {name for name, module in model.named_modules() if not any(True for _ in module.children())}
        self._model = model
        self._measuring = False
        self._add_weights()

    def measure(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Run the model on one batch, without gradients.

        Args:
            images: [B, 3, S, S]
            names: of the images, for the rows.

        Returns:
            The logits.

        Raises:
            InputDataError: a value is NaN or infinite in FP32 already.
        """
        self._images = names
        self._block = self.blocks[0]
        self._modules.clear()
        self._counts.clear()
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._begin, name)))
            handles.append(module.register_forward_hook(partial(self._end, name)))
        try:
            with torch.no_grad(), self:
                logits: Tensor = self._model(images)
        finally:
            for handle in handles:
                handle.remove()
        return logits

    def rows(self) -> list[TensorRow]:
        """The figures of every tensor so far, in the order of execution; weights first."""
        return [statistics.row() for statistics in self._statistics.values()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "evit":
            call = self._unique(name)

            def report_of(image: int) -> Callable[..., None]:
                return partial(self._report_inner, name, self._images[image : image + 1])

            result = run_operator(name, report_of, tuple(args))
            self._record(call, result, ACTIVATION, name, STORED)
            return result
        result = func(*args, **(kwargs or {}))
        operation = _NAMES.get(name, name.strip("_"))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if self._measuring or _is_view(func) or operation in _MOVES or not _is_floating(first):
            return result
        call = self._unique(operation)
        if operation == "mean":
            total = args[0].abs().sum(args[1], keepdim=True)
            self._record(f"{call}.sum", total, INNER, operation, IN_FP32, sums=total)
        if operation == "layer_norm":
            squares = result[2] ** -2  # 1 / rstd^2, the mean square
            normalized = args[0].numel() // squares.numel()
            self._record(f"{call}.variance", squares, INNER, operation, IN_FP32, sums=squares * normalized)
        self._record(call, first, ACTIVATION, operation, STORED)
        return result

    def _begin(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._modules.append(name)
        if name in self.blocks[:-1]:
            self._block = name
            self._record("input", inputs[0], ACTIVATION, "input", STORED)

    def _end(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._modules.pop()
        if name == self.blocks[-2]:
            self._block = HEAD
            self._record("input", output, ACTIVATION, "input", STORED)

    def _inside(self) -> str:
        """The path of the running module inside its block, or from the model's root behind the last block."""
        module = self._modules[-1]
        return module if self._block == HEAD else module.removeprefix(self._block).removeprefix(".")

    def _unique(self, operation: str) -> str:
        """The name of the running operation's result: the module's path, the operation, a number from the second on."""
        module, inside = self._modules[-1], self._inside()
        speaks_for_itself = module in self._leaves and any(True for _ in self._model.get_submodule(module).parameters())
        name = inside if inside and speaks_for_itself else _joined(inside, operation)
        self._counts[self._block, name] += 1
        count = self._counts[self._block, name]
        return name if count == 1 else f"{name}.{count}"

    def _report_inner(
        self,
        operation: str,
        images: Sequence[str],
        name: str,
        values: Tensor,
        *,
        sums: Tensor | None = None,
        storage: str = IN_FP32,
    ) -> None:
        # One image: a leading dimension of its own makes it the part that belongs to the image.
        self._add(
            (self._block, _joined(self._inside(), name)),
            INNER,
            operation,
            storage,
            values[None],
            None if sums is None else sums[None],
            images,
        )

    def _record(
        self, name: str, values: Tensor, kind: str, operation: str, storage: str, sums: Tensor | None = None
    ) -> None:
        self._add((self._block, name), kind, operation, storage, values, sums, self._images)

    def _add(
        self,
        key: tuple[str, str],
        kind: str,
        operation: str,
        storage: str,
        values: Tensor,
        sums: Tensor | None,
        images: Sequence[str],
    ) -> None:
        if key not in self._statistics:
            self._statistics[key] = TensorStatistics(*key, kind, operation, storage)
        self._measuring = True
        try:
            self._statistics[key].add(values, sums, images)
        finally:
            self._measuring = False

    def _add_weights(self) -> None:
        for name, values in (*self._model.named_parameters(), *self._model.named_buffers()):
            if not values.is_floating_point():
                continue
            block = next((block for block in self.blocks if name.startswith(f"{block}.")), None)
            if block is None:
                # What belongs to the model itself, as the position embedding of `msa`, comes behind the first block.
                block = HEAD if "." in name else self.blocks[0]
            inside = name if block == HEAD else name.removeprefix(f"{block}.")
            self._add((block, inside), BIAS if name.endswith(_ADDED) else WEIGHT, "", STORED, values, None, ())


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_view(func: Any) -> bool:
    """The result shares its values with an argument and the operation wrote none of them."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
