"""Matches a file's weights with the reference module, tensor by tensor: nothing missing, nothing unused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from evit_deploy.checkpoint.key_formats import KeyFormat, other_task, recognise_key_format, strip_wrapper_prefixes
from evit_deploy.checkpoint.weights import COUNTER_SUFFIX, INDEX_SUFFIX, SelectedWeights, to_float32
from evit_deploy.errors import CheckpointError
from evit_deploy.models import build_model
from evit_deploy.models.msra import bias_indices
from evit_deploy.specs import FAMILY_TITLES, ModelSpec

_LISTED_KEYS = 5
_ONLY_CLASSIFIERS = "only classification models can be exported"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NamedWeights:
    """A state dict under canonical names.

    Attributes:
        path: the file, for messages.
        tensors: by canonical name, with the file's dtype.
        file_names: canonical name to name in the file.
        unknown: names in the file for which the key format has no rule.
    """

    path: Path
    key_format: KeyFormat
    tensors: dict[str, Tensor]
    file_names: dict[str, str]
    unknown: tuple[str, ...]

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def file_name(self, canonical: str) -> str:
        """The name a tensor has, or would have, in the file."""
        return self.file_names.get(canonical) or self.key_format.to_file(canonical)


@dataclass(frozen=True)
class Mismatch:
    """How weights differ from a model; canonical names, except for unused ones that have none."""

    missing: tuple[str, ...]
    unused: tuple[str, ...]
    reshaped: tuple[tuple[str, Shape, Shape], ...]  # name, found, expected

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.unused) + len(self.reshaped)


def name_weights(path: Path, selected: SelectedWeights) -> NamedWeights:
    """The weights under canonical names.

    Raises:
        CheckpointError: the names are of no known format, of another task, or two name the same weight.
    """
    try:
        stripped = strip_wrapper_prefixes(selected.tensors)
    except ValueError as error:
        raise CheckpointError(f"{path.name} names a weight twice: {error}") from error
    task = other_task(stripped.values())
    if task is not None:
        raise CheckpointError(f"{path.name} is {task}, and {_ONLY_CLASSIFIERS}")
    key_format = recognise_key_format(stripped.values())
    if key_format is None:
        first = ", ".join(repr(key) for key in list(selected.tensors)[:3])
        families = ", ".join(FAMILY_TITLES)
        raise CheckpointError(
            f"{path.name} is no EfficientViT of the families {families}: its weights begin with {first}",
            details=[f"{family}: {title}" for family, title in FAMILY_TITLES.items()],
        )
    if not any(name.startswith("head.") for name in stripped.values()):
        raise CheckpointError(f"{path.name} is a backbone without a head, and {_ONLY_CLASSIFIERS}")
    if any(name.startswith("head_dist.") for name in stripped.values()):
        raise CheckpointError(
            f"{path.name} has a distillation head 'head_dist' beside 'head', which is not supported",
            hint="fine-tune or save the model with distillation=False",
        )
    tensors: dict[str, Tensor] = {}
    file_names: dict[str, str] = {}
    unknown = []
    for key, name in stripped.items():
        canonical = key_format.to_canonical(name)
        if canonical is None:
            unknown.append(key)
        elif canonical in tensors:
            raise CheckpointError(f"{path.name} names a weight twice: {file_names[canonical]!r} and {key!r}")
        else:
            tensors[canonical] = selected.tensors[key]
            file_names[canonical] = key
    return _drop_index_tables(NamedWeights(path, key_format, tensors, file_names, tuple(unknown)))


def _drop_index_tables(named: NamedWeights) -> NamedWeights:
    """Checks and drops the tables that Microsoft's modules save beside their attention biases and timm's rebuild."""
    tables = [name for name in named.tensors if name.endswith(f".{INDEX_SUFFIX}") and named.key_format.family == "msra"]
    for name in tables:
        table = named.tensors.pop(name)
        window = round(table.shape[0] ** 0.5) if table.ndim == 2 else 0
        if window == 0 or window > 64 or not torch.equal(table.long(), bias_indices(window)):
            raise CheckpointError(
                f"{named.path.name} has an index table that its attention does not use: {named.file_names[name]!r} "
                f"of shape {list(table.shape)}"
            )
    return named


def find_mismatch(named: NamedWeights, spec: ModelSpec) -> Mismatch:
    """How the weights differ from the reference module of a spec; BatchNorm counters may be missing."""
    expected = expected_shapes(spec)
    found = named.shapes
    return Mismatch(
        missing=tuple(n for n in expected if n not in found and not n.endswith(COUNTER_SUFFIX)),
        unused=(*named.unknown, *(named.file_names[n] for n in found if n not in expected)),
        reshaped=tuple(
            (n, found[n], shape) for n, shape in expected.items() if n in found and not _fits(named, n, shape)
        ),
    )


def expected_shapes(spec: ModelSpec) -> Mapping[str, Shape]:
    """Names and shapes of the reference module's tensors; costs no memory."""
    return _expected_shapes(json.dumps(spec.to_json(), sort_keys=True))


@lru_cache(maxsize=32)
def _expected_shapes(spec_json: str) -> Mapping[str, Shape]:
    spec = ModelSpec.from_json(json.loads(spec_json))
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build_model(spec).state_dict().items()}


def _fits(named: NamedWeights, name: str, expected: Shape) -> bool:
    found = named.shapes[name]
    # Microsoft's loader takes 1x1 convolutions that were saved as matrices.
    return found == expected or (named.key_format.name == "microsoft" and (*found, 1, 1) == expected)


def mismatch_error(named: NamedWeights, spec: ModelSpec, mismatch: Mismatch) -> CheckpointError:
    """One line with the counts and the first offender of each kind, and a few more of each as details."""
    total = len(expected_shapes(spec))
    missing = [f"missing {named.file_name(name)!r}" for name in mismatch.missing]
    unused = [f"unused {name!r}" for name in mismatch.unused]
    reshaped = [
        f"{named.file_name(name)!r} has shape {list(found)}, expected {list(expected)}"
        for name, found, expected in mismatch.reshaped
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {total} tensors missing, first {named.file_name(mismatch.missing[0])!r}")
    if unused:
        parts.append(f"{len(unused)} unused, first {mismatch.unused[0]!r}")
    if reshaped:
        parts.append(f"{len(reshaped)} of another shape, first {reshaped[0]}")
    details = [line for lines in (missing, unused, reshaped) for line in lines[:_LISTED_KEYS]]
    return CheckpointError(f"{named.path.name} does not fit {spec.name}: {'; '.join(parts)}", details=details)


def convert_weights(named: NamedWeights, spec: ModelSpec) -> dict[str, Tensor]:
    """The reference module's state dict, in its order; the weights must match the spec.

    Raises:
        CheckpointError: a weight is NaN, infinite or out of range.
    """
    state_dict = {}
    for name, shape in expected_shapes(spec).items():
        if name.endswith(COUNTER_SUFFIX):
            counter = named.tensors.get(name)
            state_dict[name] = torch.zeros((), dtype=torch.int64) if counter is None else counter.to(torch.int64)
        else:
            state_dict[name] = to_float32(named.path, named.file_names[name], named.tensors[name]).reshape(shape)
    return state_dict
