"""Which of a bundle's engines to run here, as far as that can be told without loading TensorRT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from evit_deploy.environment import find_gpus
from evit_deploy.errors import BundleError, UsageError
from evit_deploy.runners.base import NO_GPU, BuiltNotRunError
from evit_deploy.runners.engine_slot import describe_profiles, profile_index
from evit_deploy.trt.flavors import installed_version
from evit_deploy.trt.plan import gpu_of_build
from evit_deploy.trt.record import EngineRecord, check_runnable, engine_names, open_engine

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

_NO_ENGINE = "the bundle has no engine: evit-deploy build-trt"
_MIDDLE_BATCH = 3


@dataclass(frozen=True)
class EngineChoice:
    """An engine of a bundle, and whether it can be tried here.

    Attributes:
        record: None where the bundle has no engine that can be read.
        reason: why it cannot be run here; None where it can be tried.
    """

    record: EngineRecord | None
    reason: str | None


def choose_engine(bundle: Bundle, name: str | None = None) -> EngineChoice:
    """The engine of that name, or the newest that fits this machine; else the newest, and why it does not.

    Args:
        bundle: an opened bundle.
        name: NAME in the bundle, or a path; None leaves the choice.

    Raises:
        BundleError: the named engine is missing, damaged, or of another bundle.
    """
    if name is not None:
        record = open_engine(name, bundle=bundle, check_hash=False)
        return EngineChoice(record, why_not_here(record))
    choices, problem = [], None
    for found in engine_names(bundle):
        try:
            record = open_engine(found, bundle=bundle, check_hash=False)
        except BundleError as error:
            problem = str(error)
        else:
            choices.append(EngineChoice(record, why_not_here(record)))
    choices.sort(key=lambda choice: choice.record.created if choice.record else "", reverse=True)
    able = [choice for choice in choices if choice.reason is None]
    return next(iter([*able, *choices]), EngineChoice(None, problem or _NO_ENGINE))


def why_not_here(record: EngineRecord) -> str | None:
    """Why this machine cannot run an engine, with what to do about it; None where it can be tried."""
    gpus = find_gpus()
    if not gpus:
        return BuiltNotRunError(NO_GPU).summary
    version = installed_version(record.flavor)
    if version is None:
        return BuiltNotRunError(f"the TensorRT of flavor {record.flavor} is not installed: evit-deploy doctor").summary
    if find_spec("pycuda") is None:
        return BuiltNotRunError("pycuda is not installed: evit-deploy doctor").summary
    capability = gpu_of_build(gpus, os.environ).compute_capability
    arch = None if capability is None else int(capability.replace(".", ""))
    try:
        check_runnable(record, record.flavor, version, arch, record.plugin["kernel_hash"])
    except BundleError as error:
        return str(error)
    return None


def why_not_batch(record: EngineRecord, batch: int) -> str | None:
    """Why an engine does not take a batch size, or None."""
    if profile_index(record.batch_profiles, batch) is not None:
        return None
    return (
        f"batch {batch} is outside every profile of {record.name}, {describe_profiles(record.batch_profiles)}: "
        f"evit-deploy build-trt --batch {batch}"
    )


def check_batches(record: EngineRecord, batches: Sequence[int]) -> None:
    """Refuse a batch size that no profile takes.

    Raises:
        UsageError: the first such, with the profiles.
    """
    for batch in batches:
        reason = why_not_batch(record, batch)
        if reason is not None:
            summary, _, hint = reason.rpartition(": ")
            raise UsageError(summary, hint=f"build an engine for it: {hint}")


def batches_of(record: EngineRecord) -> tuple[int, ...]:
    """Batch sizes that say most of an engine: each profile's smallest, an odd one, the tuned one and the largest."""
    sizes = {
        size
        for profile in record.batch_profiles
        for size in (profile.min, _MIDDLE_BATCH, profile.opt, profile.max)
        if profile.min <= size <= profile.max
    }
    return tuple(sorted(sizes))
