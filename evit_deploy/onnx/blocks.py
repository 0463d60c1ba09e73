"""Knowing the models' blocks inside an ONNX graph: markers while exporting, extra outputs while searching a fault."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import onnx
import torch
from torch import Tensor, nn

from evit_deploy.constants import OPERATOR_DOMAIN
from evit_deploy.models.blocks import hook_blocks
from evit_deploy.onnx.precision import value_types

_MARKER = "BlockOutput"
BLOCK_PREFIX = "block/"


@contextlib.contextmanager
def marked_blocks(model: nn.Module) -> Iterator[None]:
    """While open, exporting `model` puts a marker node behind each block; `remove_markers` takes them out again."""

    def mark(name: str, output: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{OPERATOR_DOMAIN}::{_MARKER}",
            (output,),
            {"block": name},
            dtype=output.dtype,
            shape=tuple(output.shape),
            version=1,
        )

    handles = hook_blocks(model, mark)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def remove_markers(graph: onnx.GraphProto) -> None:
    """Take the markers out, in place, and name each block's tensor `block/NAME`."""
    producers = {output for node in graph.node for output in node.output}
    renamed: dict[str, str] = {}
    for marker in [node for node in graph.node if node.domain == OPERATOR_DOMAIN and node.op_type == _MARKER]:
        source = renamed.get(marker.input[0], marker.input[0])
        name = BLOCK_PREFIX + next(a.s.decode() for a in marker.attribute if a.name == "block")
        if marker.input[0] in producers and not source.startswith(BLOCK_PREFIX):
            renamed[marker.input[0]] = source = name
        renamed[marker.output[0]] = source
        graph.node.remove(marker)
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed.get(name, name)
    kept = [info for info in graph.value_info if info.name not in renamed]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def marked_block_names(graph: onnx.GraphProto) -> list[str]:
    """The blocks whose output is still a tensor of the graph, in graph order."""
    outputs = (output for node in graph.node for output in node.output)
    return [output.removeprefix(BLOCK_PREFIX) for output in outputs if output.startswith(BLOCK_PREFIX)]


def with_block_outputs(model: onnx.ModelProto, blocks: Iterable[str]) -> onnx.ModelProto:
    """A copy whose graph also returns the given blocks' maps, in the types they have, named `block/NAME`."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    types = value_types(model)
    for name in blocks:
        block = BLOCK_PREFIX + name
        extended.graph.output.append(
            onnx.helper.make_tensor_value_info(block, types.get(block, onnx.TensorProto.FLOAT), None)
        )
    return extended
