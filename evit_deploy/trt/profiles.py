"""Optimization profiles: for which batch sizes an engine is built, and for which it is made fastest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evit_deploy.errors import UsageError

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

DEFAULT_OPT_BATCH = 8
MAX_PROFILE_BATCH = 65536
_FORM = "write MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, or one number, for example --batch 1:8:64"


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes of one optimization profile: smallest, tuned for, largest."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    def to_json(self) -> dict[str, int]:
        return {"min": self.min, "opt": self.opt, "max": self.max}


def parse_profiles(texts: Iterable[str]) -> tuple[BatchProfile, ...]:
    """(BatchProfile(1, 8, 64),) for ["1:8:64"]; a single number N stands for N:N:N; each profile once.

    Raises:
        UsageError: a text that is no profile, or one that runs backwards.
    """
    return tuple(dict.fromkeys(_parse(text) for text in texts))


def profiles_for(bundle: Bundle, wanted: Sequence[BatchProfile]) -> tuple[BatchProfile, ...]:
    """The profiles to build: the wanted ones, checked against the model; 1:8:MAX of the bundle without any.

    Raises:
        UsageError: a profile that the bundle's graph cannot take.
    """
    onnx = bundle.manifest["onnx"]
    fixed = onnx.get("batch")
    largest = bundle.max_batch
    if fixed is not None:
        for profile in wanted:
            if profile != BatchProfile(fixed, fixed, fixed):
                raise UsageError(
                    f"--batch {profile} contradicts {bundle.path}, whose graph has the fixed batch {fixed}",
                    hint=f"use --batch {fixed}, or export again without --batch",
                )
        return (BatchProfile(fixed, fixed, fixed),)
    for profile in wanted:
        if largest is not None and profile.max > largest:
            raise UsageError(
                f"--batch {profile} goes above {largest}, the largest batch that {bundle.path} was exported for",
                hint=f"stay at or below {largest}, or export again with --max-batch {profile.max}",
            )
    if wanted:
        return tuple(wanted)
    top = DEFAULT_OPT_BATCH if largest is None else largest
    return (BatchProfile(1, min(DEFAULT_OPT_BATCH, top), top),)


def _parse(text: str) -> BatchProfile:
    words = [word.strip() for word in text.split(":")]
    if len(words) not in (1, 3) or not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"--batch {text!r} is no batch profile", hint=_FORM)
    numbers = [int(word[:9]) for word in words]
    if any(len(word) > 9 for word in words) or max(numbers) > MAX_PROFILE_BATCH:
        raise UsageError(f"--batch {text!r} goes above {MAX_PROFILE_BATCH}", hint=_FORM)
    smallest, tuned, largest = numbers * 3 if len(numbers) == 1 else numbers
    if smallest < 1:
        raise UsageError(f"--batch {text!r} has a batch of zero", hint=_FORM)
    if not smallest <= tuned <= largest:
        ordered = ":".join(map(str, sorted((smallest, tuned, largest))))
        raise UsageError(f"--batch {text!r} runs backwards", hint=f"did you mean {ordered}? {_FORM}")
    return BatchProfile(smallest, tuned, largest)
