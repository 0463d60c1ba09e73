"""Names, defaults and limits that more than one module needs, each with its unit and why."""

from __future__ import annotations

BUNDLE_SUFFIX = ".evit"
ONNX_FILE = "model.onnx"
WEIGHTS_FILE = "weights.safetensors"
MANIFEST_FILE = "manifest.json"

INPUT_NAME = "input"
OUTPUT_NAME = "logits"
SOFTMAX_OUTPUT_NAME = "probabilities"

OPERATOR_DOMAIN = "evit"  # domain of the fused operators and of their model-local functions

DEFAULT_OPSET = 20  # first opset with Gelu as one operator
MIN_OPSET = 18  # the dynamo exporter writes nothing older
MAX_OPSET = 23  # what the oldest supported ONNX Runtime (1.23) implements
DEFAULT_MAX_BATCH = 64

MAX_CHECKPOINT_BYTES = 8 * 1024**3  # the largest published model is 1 GiB; eight leaves room for optimizer state
MIN_IMAGE_SIZE_PX = 32  # the stride of every family: below it a stage would have no map
MAX_IMAGE_SIZE_PX = 4096  # above it the attention of every family exceeds the memory of a workstation

PROJECT_SEED = 0  # default of every --seed, so that two runs compare the same inputs
