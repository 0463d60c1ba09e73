"""From a checkpoint file to a model spec and its weights, under canonical names, or an error that says what is wrong.

The weights decide which model it is; arguments only choose between readings. An argument that contradicts the file is
an error about the file (exit code 1); a mistyped argument is refused before the file is opened (exit code 2).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from evit_deploy.checkpoint.config import FileConfig, read_config
from evit_deploy.checkpoint.file import parse_json_metadata, read_checkpoint_file
from evit_deploy.checkpoint.match import convert_weights, name_weights
from evit_deploy.checkpoint.spec import (
    fit_attention_biases,
    native_spec,
    parse_request,
    recorded_spec,
    with_image_size,
)
from evit_deploy.checkpoint.weights import SelectedWeights, select_weights
from evit_deploy.errors import CheckpointError
from evit_deploy.specs import ModelSpec, Preprocessing

SPEC_METADATA_KEY = "evit_deploy_spec"  # safetensors metadata: ModelSpec.to_json() of a bundle's weights

_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A model and its weights.

    Attributes:
        spec: family, variant, classes, image size and hyperparameters.
        state_dict: canonical keys, float32 (BatchNorm counters int64), independent of the file.
        origin: where it came from, JSON-able: path (the file's name), sha256, size_bytes, file_format ("pt",
            "safetensors"), key_format ("timm", "mit", "microsoft", "evit-deploy"), wrapper (or None), weights ("ema",
            "model"), dtypes (number of tensors per dtype in the file), image_size_from ("argument", "config",
            "weights", "default"), notes (sentences a user should read).
        class_names: one per class, where the file has them.
    """

    spec: ModelSpec
    state_dict: dict[str, Tensor]
    origin: dict[str, Any]
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None


def load_checkpoint(
    path: str | Path,
    *,
    family: str | None = None,
    variant: str | None = None,
    image_size: int | None = None,
    weights: str | None = None,
) -> Checkpoint:
    """The model in a `.pt`, `.pth` or `.safetensors` file of any of the three families and key formats.

    Args:
        family: "msa", "mit" or "msra"; an error if the file holds another.
        variant: "m3", "b1", ... or "msa-m3"; an error if the file holds another.
        image_size: pixels of the square input, where it is not the one the weights show, or 224.
        weights: "ema" or "model", for a file that has both; the EMA weights by default.

    Raises:
        CheckpointError: the file cannot be read, is damaged or unsafe, holds no classifier of these families, does not
            match its model tensor by tensor, or contradicts an argument.
        UsageError: an argument names something unknown.
        MissingDependencyError: the family needs timm and timm is not there.
    """
    path = Path(path)
    request = parse_request(family, variant, image_size)
    file = read_checkpoint_file(path)
    selected = select_weights(file, weights)
    config = read_config(file)
    named = name_weights(path, selected)

    recorded = parse_json_metadata(path, file.metadata, SPEC_METADATA_KEY)
    if recorded is None:
        native = native_spec(named, config, request)
        spec, image_size_from = with_image_size(named, native, config, request)
    else:
        native = recorded_spec(named, recorded, request)
        at_recorded_size = FileConfig(image_size=native.image_size)
        spec, image_size_from = with_image_size(named, native, at_recorded_size, request)
    _check_class_names(path, config, spec)

    state_dict = convert_weights(named, native)
    notes = _selection_notes(selected) + fit_attention_biases(state_dict, spec)
    origin = {
        "path": path.name,
        "sha256": _sha256(path),
        "size_bytes": file.size_bytes,
        "file_format": file.file_format,
        "key_format": "evit-deploy" if recorded is not None else named.key_format.name,
        "wrapper": selected.wrapper,
        "weights": selected.kind,
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in named.tensors.values())),
        "image_size_from": image_size_from,
        "notes": notes,
    }
    return Checkpoint(spec, state_dict, origin, config.class_names, config.preprocessing)


def _check_class_names(path: Path, config: FileConfig, spec: ModelSpec) -> None:
    if config.class_names is not None and len(config.class_names) != spec.num_classes:
        raise CheckpointError(
            f"{path.name} has {len(config.class_names)} class names for {spec.num_classes} classes",
            hint="correct config['class_names'] or leave it out",
        )


def _selection_notes(selected: SelectedWeights) -> list[str]:
    if not selected.others:
        return []
    others = ", ".join(repr(wrapper) for wrapper in selected.others)
    return [f"used the {selected.kind} weights {selected.wrapper!r}; the file also holds {others}"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
