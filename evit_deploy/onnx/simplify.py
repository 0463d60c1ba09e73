"""Simplifying a graph with onnxsim, and comparing the result instead of believing it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx

from evit_deploy.constants import PROJECT_SEED
from evit_deploy.errors import MissingDependencyError

CHECKS_PER_BATCH = 3  # random inputs compared at each batch size; onnxsim's own default is none


@dataclass(frozen=True)
class Simplification:
    """What simplifying did.

    Attributes:
        applied: whether the simplified graph was kept.
        reason: why not; empty when it was.
        checks: random inputs compared at each batch size.
        batches: the batch sizes compared.
        nodes_before, nodes_after: nodes of the main graph; functions count as one node per call.
    """

    applied: bool
    reason: str = ""
    checks: int = 0
    batches: tuple[int, ...] = field(default=())
    nodes_before: int = 0
    nodes_after: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "batches": list(self.batches)}


def simplify_graph(model: onnx.ModelProto, batches: Sequence[int]) -> tuple[onnx.ModelProto, Simplification]:
    """Simplify a graph and compare it with the original on random inputs at each batch size.

    Args:
        model: a graph with one input whose first dimension is the batch.
        batches: batch sizes to compare at; the only one of a fixed graph.

    Returns:
        The simplified graph, or the given one where a comparison failed or onnxsim gave up; and what happened.

    Raises:
        MissingDependencyError: onnxsim is not installed.
        ValueError: no batch size to compare at.
    """
    if not batches:
        raise ValueError("simplify_graph compares at one batch size at least, got none")
    try:
        import onnxsim
        from onnxsim import model_checking
    except ImportError as error:
        raise MissingDependencyError(
            "onnxsim is not installed", hint="pip install onnxsim, or --no-simplify"
        ) from error
    nodes_before = len(model.graph.node)

    def kept(reason: str) -> tuple[onnx.ModelProto, Simplification]:
        return model, Simplification(False, reason, nodes_before=nodes_before, nodes_after=nodes_before)

    if any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer):
        return kept("nothing can be compared: ONNX Runtime has no BF16 convolutions on a CPU")
    images = model.graph.input[0]
    generator = np.random.default_rng(PROJECT_SEED)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            simplified, _ = onnxsim.simplify(model, check_n=0)
        except Exception as error:  # noqa: BLE001 - onnxsim's C++ core reports failures as whatever pybind made of them
            return kept(f"onnxsim failed: {_first_line(error)}")
        if _interface(simplified) != _interface(model):
            return kept("its inputs or outputs differ")
        for batch in batches:
            feeds = [{images.name: _random_array(images, batch, generator)} for _ in range(CHECKS_PER_BATCH)]
            try:
                equal = all(
                    model_checking.compare(simplified, model, 1, input_data=feed, verbose=False) for feed in feeds
                )
            except Exception as error:  # noqa: BLE001 - the runtime below onnxsim fails in as many ways
                return kept(f"comparing at batch {batch} failed: {_first_line(error)}")
            if not equal:
                return kept(f"its outputs differ at batch {batch}")
    record = Simplification(
        True,
        checks=CHECKS_PER_BATCH,
        batches=tuple(batches),
        nodes_before=nodes_before,
        nodes_after=len(simplified.graph.node),
    )
    del simplified.metadata_props[:]  # onnxsim adds its options and every node it touched
    simplified.metadata_props.extend(model.metadata_props)
    return simplified, record


def _interface(model: onnx.ModelProto) -> list[tuple[str, int]]:
    """Names and element types of the inputs and outputs; onnxsim compares the outputs the simplified graph has."""
    return [(value.name, value.type.tensor_type.elem_type) for value in (*model.graph.input, *model.graph.output)]


def _random_array(images: onnx.ValueInfoProto, batch: int, generator: np.random.Generator) -> np.ndarray:
    """Pixels of 0 to 255 or normal numbers; onnxsim's own inputs lie between 0 and 1, as integers they are all 0."""
    tensor = images.type.tensor_type
    shape = [batch, *(dim.dim_value for dim in tensor.shape.dim[1:])]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if np.issubdtype(dtype, np.integer):
        return generator.integers(0, 256, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
