"""What PyTorch would move and launch if it ran operation by operation: traced on the meta device, nothing is computed.

An operation that makes no view counts as one launch that reads each of its inputs once and writes its outputs once. A
fused operator is one operation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = "copies"
PRODUCTS = "products"
POINTWISE = "pointwise"
_KINDS = {
    **dict.fromkeys(("addmm", "bmm", "convolution", "mm"), PRODUCTS),
    **dict.fromkeys(("_to_copy", "cat", "clone", "constant_pad_nd", "copy_", "ones"), COPIES),
}
# A tensor's memory: which storage, and where in it. Two views that begin at the same place count as one.
Place = tuple[int, int]


@dataclass(frozen=True)
class Operation:
    """One launch.

    Attributes:
        name: the operation's own, for example "bmm".
        reads: bytes of each input, by place.
        writes: bytes of each output, by place.
        parameter_bytes: of the inputs, those that are weights.
    """

    name: str
    reads: Mapping[Place, int]
    writes: Mapping[Place, int]
    parameter_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def kind(self) -> str:
        """PRODUCTS: matrix products and convolutions; COPIES: padding, layout, concatenation; POINTWISE: the rest."""
        return _KINDS.get(self.name, POINTWISE)


class Recorder(TorchDispatchMode):
    """Collects the operations on the meta device while it is active.

    Args:
        parameters: tensors that count as weights.
        float_bytes: what a floating-point element counts; its own size without it.
    """

    def __init__(self, parameters: Collection[Tensor] = (), float_bytes: int | None = None) -> None:
        super().__init__()
        self._float_bytes = float_bytes
        self.operations: list[Operation] = []
        self._parameters = {_storage(tensor) for tensor in parameters}
        self._alive: list[Tensor] = []  # so that no storage gets the number of one that is gone

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _meta_tensors((args, kwargs)), _meta_tensors(out)
        self._alive += inputs + outputs
        storages = {_storage(tensor) for tensor in inputs}
        is_view = all(_storage(tensor) in storages for tensor in outputs) and not func._schema.is_mutable
        if outputs and not is_view and not func._schema.name.startswith("aten::empty"):
            weights = {
                _place(tensor): _extent(tensor, self._float_bytes)
                for tensor in inputs
                if _storage(tensor) in self._parameters
            }
            self.operations.append(
                Operation(
                    func._schema.name.partition("::")[2],
                    _by_place(inputs, self._float_bytes),
                    _by_place(outputs, self._float_bytes),
                    sum(weights.values()),
                )
            )
        return out


def total_bytes(operations: Sequence[Operation]) -> int:
    """Bytes of a chain, each operation for itself."""
    return sum(operation.bytes for operation in operations)


def fused_bytes(group: Sequence[Operation], everything: Sequence[Operation]) -> int:
    """Bytes of a group as one launch: what it needs from outside once, and what is needed outside once.

    Args:
        group: the operations of the launch.
        everything: the group and all that runs around it; what nobody there reads is a result.
    """
    written = {place: size for operation in group for place, size in operation.writes.items()}
    read = {place: size for operation in group for place, size in operation.reads.items() if place not in written}
    readers: dict[Place, list[Operation]] = {}
    for operation in everything:
        for place in operation.reads:
            readers.setdefault(place, []).append(operation)
    inside = {id(operation) for operation in group}
    needed = {
        place: size
        for place, size in written.items()
        if place not in readers or any(id(reader) not in inside for reader in readers[place])
    }
    return sum(read.values()) + sum(needed.values())


def _meta_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == "meta"]


def _by_place(tensors: Sequence[Tensor], float_bytes: int | None) -> dict[Place, int]:
    sizes: dict[Place, int] = {}
    for tensor in tensors:
        sizes[_place(tensor)] = max(sizes.get(_place(tensor), 0), _extent(tensor, float_bytes))
    return sizes


def _extent(tensor: Tensor, float_bytes: int | None) -> int:
    """Bytes of the different elements: a dimension that was expanded counts one."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * (float_bytes if float_bytes and tensor.is_floating_point() else tensor.element_size())


def _place(tensor: Tensor) -> Place:
    return _storage(tensor), int(tensor.storage_offset())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
