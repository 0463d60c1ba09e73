"""Decides which model a file's weights are, from their shapes, the file's own config, and the caller's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from evit_deploy.checkpoint import detect
from evit_deploy.checkpoint.config import FileConfig
from evit_deploy.checkpoint.match import Mismatch, NamedWeights, find_mismatch, mismatch_error
from evit_deploy.constants import MAX_IMAGE_SIZE_PX, MIN_IMAGE_SIZE_PX
from evit_deploy.errors import CheckpointError, UsageError, unknown_name_hint
from evit_deploy.models.msra import PATCH_SIZE_PX, attention_windows, resize_attention_biases
from evit_deploy.specs import CUSTOM_VARIANT, FAMILIES, ModelSpec, split_name, variant_names

_MIT_ATTENTION_EPS = {"mit": 1e-15, "timm": 1e-5}  # what the weights were trained with, by key format
_MIT_NORM_EPS = {"base": 1e-5, "large": 1e-7}
_DEFAULT_MSA_HEADS = 8
_BUILD_ERRORS = (ValueError, TypeError, IndexError, AssertionError, RuntimeError, ZeroDivisionError)  # of odd configs


@dataclass(frozen=True)
class Request:
    """What the caller says about the file; None where nothing was said."""

    family: str | None = None
    variant: str | None = None
    image_size: int | None = None


def parse_request(family: str | None, variant: str | None, image_size: int | None) -> Request:
    """Checked arguments; `variant` may be "m3" or "msa-m3".

    Raises:
        UsageError: an unknown name, or an image size that no model takes.
    """
    if family is not None and family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}", hint=unknown_name_hint(family, FAMILIES))
    if variant is not None and "-" in variant:
        named_family, variant = split_name(variant)
        if family not in (None, named_family):
            raise UsageError(f"family {family!r} and variant '{named_family}-{variant}' contradict each other")
        family = named_family
    if variant is not None and variant != CUSTOM_VARIANT:
        known = {name.split("-", 1)[1] for name in variant_names(family)}
        if variant not in known:
            raise UsageError(f"unknown variant {variant!r}", hint=unknown_name_hint(variant, known))
    if image_size is not None and not MIN_IMAGE_SIZE_PX <= image_size <= MAX_IMAGE_SIZE_PX:
        raise UsageError(f"image size {image_size} is not in {MIN_IMAGE_SIZE_PX} to {MAX_IMAGE_SIZE_PX} pixels")
    return Request(family, variant, image_size)


def native_spec(named: NamedWeights, config: FileConfig, request: Request) -> ModelSpec:
    """The model the weights are, at the image size they are stored for.

    Raises:
        CheckpointError: they match no model, or another than the file's config or the caller says.
    """
    family = named.key_format.family
    _check_family(named, "its config", config.family)
    _check_family(named, "the argument", request.family)
    detected, problem = _detect(named, config)
    if detected is None:
        raise _closest_mismatch(named, [], request, problem)
    try:
        mismatch = find_mismatch(named, detected)
    except _BUILD_ERRORS as error:
        raise CheckpointError(
            f"{named.path.name} has the shapes of no {family} model: {error}",
            hint="give the heads as config={'family': 'msa', 'num_heads': ...} in the file" if family == "msa" else "",
        ) from error
    if mismatch.count:
        raise _closest_mismatch(named, [(mismatch, detected)], request, problem)
    if request.variant not in (None, detected.variant):
        raise CheckpointError(
            f"{named.path.name} holds {detected.name}, not {family}-{request.variant}",
            details=[f"{key}: {value}" for key, value in detected.config.items()],
            hint="leave the variant out",
        )
    return detected


def recorded_spec(named: NamedWeights, recorded: Mapping[str, Any], request: Request) -> ModelSpec:
    """The spec that a bundle's own weights file records, checked against the weights and the arguments."""
    name = named.path.name
    try:
        spec = ModelSpec.from_json(recorded)
        mismatch = find_mismatch(named, spec)
    except (KeyError, AttributeError, *_BUILD_ERRORS) as error:
        raise CheckpointError(f"{name} records a model that cannot be built: {error!r}") from error
    for argument, said, found in (
        ("family", request.family, spec.family),
        ("variant", request.variant, spec.variant),
    ):
        if said not in (None, found):
            raise CheckpointError(
                f"{name} holds {spec.name}, not {argument} {said!r}", hint=f"leave the {argument} out"
            )
    if mismatch.count:
        raise mismatch_error(named, spec, mismatch)
    return spec


def with_image_size(
    named: NamedWeights, native: ModelSpec, config: FileConfig, request: Request
) -> tuple[ModelSpec, str]:
    """The spec at the image size to use, and who said so: "argument", "config", "weights" or "default".

    Raises:
        CheckpointError: the weights fit several sizes but not 224, or not the size of the file's config.
        UsageError: a size that the family does not take.
    """
    if request.image_size is not None:
        if native.family == "msra" and request.image_size % PATCH_SIZE_PX:
            raise UsageError(f"image size {request.image_size} is no multiple of {PATCH_SIZE_PX}, as msra needs")
        return replace(native, image_size=request.image_size), "argument"
    name = named.path.name
    if native.family == "msra":
        windows, window_size = detect.observed_windows(named.shapes), native.config["window_size"]
        possible = detect.possible_image_sizes(windows, window_size)
        if config.image_size is not None:
            if config.image_size not in possible:
                raise CheckpointError(
                    f"{name} says image size {config.image_size}, but its attention biases are for "
                    f"{possible[0]} to {possible[-1]} pixels"
                )
            return replace(native, image_size=config.image_size), "config"
        if detect.DEFAULT_IMAGE_SIZE_PX in possible:
            return replace(native, image_size=detect.DEFAULT_IMAGE_SIZE_PX), "default"
        if len(possible) > 1:
            raise CheckpointError(
                f"{name} does not say its image size: its attention biases fit {possible[0]} to {possible[-1]} pixels",
                hint="give the one it was trained at with --image-size",
            )
        return replace(native, image_size=possible[0]), "weights"
    if config.image_size is not None:
        return replace(native, image_size=config.image_size), "config"
    if native.family == "msa":
        learned = detect.pos_embed_image_size(native.config)
        if learned is None:
            raise CheckpointError(
                f"{name} has a position embedding of {native.config['pos_embed_size']}, which is not square",
                hint="give a square size with --image-size",
            )
        return replace(native, image_size=learned), "weights"
    return native, "default"


def fit_attention_biases(state_dict: dict[str, Tensor], spec: ModelSpec) -> list[str]:
    """Resizes, in place, the `msra` attention biases whose window another image size changes; returns notes."""
    if spec.family != "msra":
        return []
    notes = []
    for stage, window in enumerate(attention_windows(spec.image_size, spec.config["window_size"])):
        names = [n for n in state_dict if n.startswith(f"stages.{stage}.") and n.endswith("attention_biases")]
        old_area = state_dict[names[0]].shape[1]
        if old_area == window**2:
            continue
        for name in names:
            state_dict[name] = resize_attention_biases(state_dict[name], window)
        notes.append(
            f"attention biases of stage {stage} resized from windows of {round(old_area**0.5)} to {window} "
            f"for {spec.image_size} px; accuracy at this size is not what was trained"
        )
    return notes


def _detect(named: NamedWeights, config: FileConfig) -> tuple[ModelSpec | None, str]:
    """The spec the shapes show, or None and what stood in the way."""
    family, shapes = named.key_format.family, named.shapes
    try:
        found = detect.read_config(family, shapes)
        num_classes = detect.read_num_classes(family, shapes)
    except KeyError as error:
        return None, f"{named.file_name(error.args[0])!r} is missing"
    except ValueError as error:
        return None, str(error)
    if family == "msa":
        found["num_heads"] = config.num_heads or _DEFAULT_MSA_HEADS
    variant, hyperparameters = detect.match_variant(family, found)
    if family == "mit":
        large = hyperparameters.get("large", variant.startswith("l"))
        hyperparameters["norm_eps"] = _MIT_NORM_EPS["large" if large else "base"]
        hyperparameters["attention_eps"] = _MIT_ATTENTION_EPS[named.key_format.name]
    image_size = detect.DEFAULT_IMAGE_SIZE_PX
    if family == "msra":
        possible = detect.possible_image_sizes(detect.observed_windows(shapes), hyperparameters["window_size"])
        if possible and image_size not in possible:
            image_size = possible[0]
    return ModelSpec(family, variant, num_classes, image_size, hyperparameters), ""


def _check_family(named: NamedWeights, who: str, family: str | None) -> None:
    found = named.key_format.family
    if family not in (None, found):
        raise CheckpointError(
            f"{named.path.name} holds family {found} ({named.key_format.name} key names), not {family} as {who} says",
            hint="leave the family out" if who == "the argument" else "",
        )


def _closest_mismatch(
    named: NamedWeights, candidates: list[tuple[Mismatch, ModelSpec]], request: Request, problem: str
) -> CheckpointError:
    """The error against whichever model of the family the weights differ from least."""
    family = named.key_format.family
    num_classes = _num_classes_or_default(named)
    for name in variant_names(family):
        if request.variant in (None, CUSTOM_VARIANT, split_name(name)[1]):
            spec = ModelSpec.published(name, num_classes=num_classes)
            candidates.append((find_mismatch(named, spec), spec))
    closest, spec = min(candidates, key=lambda candidate: candidate[0].count)
    if not closest.count:  # complete, yet not to be read: an inconsistent shape that no published variant shows
        return CheckpointError(f"{named.path.name} is no model of family {family}: {problem}")
    return mismatch_error(named, spec, closest)


def _num_classes_or_default(named: NamedWeights) -> int:
    """The classes as the weight or, failing that, the bias of the classifier shows them, for an error's message."""
    weight = detect.CLASSIFIER_WEIGHT[named.key_format.family]
    for name, rank in ((weight, 2), (weight.replace("weight", "bias"), 1)):
        shape = named.shapes.get(name, ())
        if len(shape) == rank and shape[0] > 0:
            return shape[0]
    return 1000
