"""From a PyTorch module to an ONNX graph with the fused operators and their functions in it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx
import onnx.inliner
import torch
from torch import Tensor, nn

from evit_deploy.constants import INPUT_NAME, MAX_OPSET, MIN_OPSET, OPERATOR_DOMAIN, OUTPUT_NAME, SOFTMAX_OUTPUT_NAME
from evit_deploy.errors import ExportError, UsageError
from evit_deploy.models.operators import OPERATOR_VERSION
from evit_deploy.models.precision import DTYPES
from evit_deploy.onnx.blocks import marked_blocks, remove_markers
from evit_deploy.onnx.functions import Form, operator_functions
from evit_deploy.onnx.precision import sums_in_fp32, without_hard_swish
from evit_deploy.specs import ModelSpec, Preprocessing

EXAMPLE_BATCH = 2  # 0 and 1 are special to torch.export: it would bake them in


class DeployedModel(nn.Module):
    """A classifier with the optional steps before and after it.

    Args:
        model: images [B, 3, S, S], normalised, to logits [B, num_classes].
        preprocessing: if given, the input is uint8 [B, S, S, 3] in RGB order, and scaling, normalising, the model's
            channel order and the transposition are in the graph.
        softmax: whether the output is probabilities.
        io_dtype: of images (not of pixels) and output.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing | None,
        softmax: bool,
        io_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model = model
        self.softmax = softmax
        self.io_dtype = io_dtype
        self.preprocess = preprocessing is not None
        if preprocessing is not None:
            mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
            self.register_buffer("scale", 1 / (255 * std.double()).float().view(1, 3, 1, 1))
            self.register_buffer("shift", (-mean.double() / std.double()).float().view(1, 3, 1, 1))
            self.swap_channels = preprocessing.channel_order == "BGR"

    def forward(self, x: Tensor) -> Tensor:
        if self.preprocess:
            x = x.permute(0, 3, 1, 2).float() * self.scale + self.shift
            x = x[:, [2, 1, 0]] if self.swap_channels else x
        x = self.model(x)
        if self.softmax:
            x = x.float().softmax(dim=-1)
        return x.to(self.io_dtype)


def export_graph(
    model: nn.Module,
    spec: ModelSpec,
    *,
    opset: int,
    batch: int | None = None,
    max_batch: int = 64,
    preprocessing: Preprocessing | None = None,
    softmax: bool = False,
    precision: str = "fp32",
    io: str = "fp32",
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Export a module through the dynamo exporter and give its fused operators their functions.

    Args:
        model: images [B, 3, S, S] to logits [B, num_classes], as `fused_model` or `in_precision` returns it.
        spec: what it is; gives the image size.
        opset: version of the standard operator set, MIN_OPSET to MAX_OPSET.
        batch: fixes the batch size; None leaves it dynamic, from 1 to `max_batch`.
        preprocessing: see `DeployedModel`.
        softmax: see `DeployedModel`.
        precision: what `model` is in; but for "fp32", the attention's functions and every sum compute in FP32.
        io: "fp32" or "fp16", of images and output.
        metadata: written into the file's metadata_props.

    Raises:
        UsageError: an opset outside the range.
        ExportError: the exporter refused the module, or the graph is not valid.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset {opset} is not supported", hint=f"choose {MIN_OPSET} to {MAX_OPSET}")
    io_dtype = DTYPES[io]
    deployed = DeployedModel(model, preprocessing, softmax, io_dtype).eval()
    size = spec.image_size
    example_batch = batch if batch is not None else min(EXAMPLE_BATCH, max_batch)
    if preprocessing is None:
        example = torch.zeros(example_batch, 3, size, size, dtype=io_dtype)
    else:
        example = torch.zeros(example_batch, size, size, 3, dtype=torch.uint8)
    dynamic = batch is None and max_batch > 1
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=max_batch)}} if dynamic else None
    try:
        with _quiet_exporter(), torch.no_grad(), marked_blocks(model):
            program = torch.onnx.export(
                deployed,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=[SOFTMAX_OUTPUT_NAME if softmax else OUTPUT_NAME],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"the PyTorch exporter refused {spec.name}: {_first_line(_root_cause(error))}") from error
    assert program is not None
    graph = program.model_proto
    remove_markers(graph.graph)
    if precision != "fp32":
        graph = sums_in_fp32(graph)
    if precision == "bf16":
        graph = without_hard_swish(graph)
    _attach_functions(graph, opset, "fp32" if precision == "fp32" else "fp32-accumulation")
    onnx.helper.set_model_props(graph, dict(metadata or {}))
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph of {spec.name} is not valid: {_first_line(error)}") from error
    return graph


def inline_operators(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in standard operators only: each call of a fused operator replaced by its function's body.

    What the bodies compute from constants is folded, the choice of an If's branch included.
    """
    from onnxscript import optimizer  # half a second, which only this needs

    inlined = optimizer.optimize(onnx.inliner.inline_local_functions(model))
    kept = [entry for entry in inlined.opset_import if entry.domain != OPERATOR_DOMAIN]
    del inlined.opset_import[:]
    inlined.opset_import.extend(kept)
    return inlined


def fused_operator_types(graph: onnx.ModelProto) -> list[str]:
    """The op_type of every node of our domain, in graph order."""
    return [node.op_type for node in graph.graph.node if node.domain == OPERATOR_DOMAIN]


def _attach_functions(model: onnx.ModelProto, opset: int, form: Form) -> None:
    functions = operator_functions(fused_operator_types(model), opset, form)
    model.functions.extend(functions)
    if functions and OPERATOR_DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(OPERATOR_DOMAIN, OPERATOR_VERSION))


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress off stdout, and its notes on our behalf off stderr."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _root_cause(error: BaseException) -> BaseException:
    """What the exporter stumbled over; its own error only says at which of its steps, and where to read on."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
