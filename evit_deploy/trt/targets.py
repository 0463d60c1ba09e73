"""The GPUs an engine is for, by compute capability."""

from __future__ import annotations

import re

from evit_deploy.errors import UsageError, unknown_name_hint
from evit_deploy.trt.flavors import TENSORRT, Flavor

_TARGET = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)", re.IGNORECASE)


def parse_targets(words: tuple[str, ...], flavor: Flavor) -> tuple[str, ...]:
    """("sm80", "sm89") for ("sm80", "8.9"), ascending, each once; () stands for the flavor's own choice.

    Args:
        words: "sm80", "sm_80", "80" or "8.0".
        flavor: what knows the targets.

    Raises:
        UsageError: an unknown target, or a flavor without a choice.
    """
    if not words:
        return ()
    if flavor.name == TENSORRT:
        raise UsageError(
            "--targets belongs to flavor rtx: flavor tensorrt builds for the GPU of the machine",
            hint="leave --targets out, or use --flavor rtx",
        )
    known = flavor.known_targets
    return tuple(sorted({_known_target(word, known) for word in words}, key=arch_of))


def arch_of(target: str) -> int:
    """89 for "sm89"."""
    return int(target.removeprefix("sm"))


def target_of(compute_capability: str) -> str:
    """ "sm89" for "8.9"."""
    return "sm" + compute_capability.replace(".", "")


def _known_target(word: str, known: tuple[str, ...]) -> str:
    match = _TARGET.fullmatch(word.strip())
    name = f"sm{match[1]}{match[2]}" if match else word.strip()
    if name not in known:
        raise UsageError(f"unknown target {word!r}", hint=unknown_name_hint(name, known))
    return name
