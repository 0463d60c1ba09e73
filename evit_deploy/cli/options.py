"""Arguments and options that several commands share, and the parsers of their values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evit_deploy.errors import CheckpointError, InputDataError, UsageError, unknown_name_hint
from evit_deploy.specs import FAMILIES

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

BundleArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="BUNDLE", help="The bundle to use; without it, the only one in this folder.", show_default=False
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", metavar="NAME", help="A TensorRT engine of the bundle, or its path.", show_default=False),
]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, max=2**31 - 1, help="Seed of everything random.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, max=1024, help="Threads per backend; all cores without it."),
]

MAX_BATCH = 65536  # a batch of one-pixel images beyond any use; a typing mistake more likely than a wish


def known_name(name: str, known: Iterable[str], kind: str) -> str:
    """The name itself, or a UsageError with the closest known one."""
    names = tuple(known)
    if name not in names:
        raise UsageError(f"unknown {kind} {name!r}", hint=unknown_name_hint(name, names))
    return name


def check_family(family: str | None) -> str | None:
    """A family's name, or None as it came."""
    return None if family is None else known_name(family, FAMILIES, "family")


def parse_batches(text: str, option: str = "--batch") -> tuple[int, ...]:
    """(1, 8, 64) for "1,8,64": positive, in the given order, each once."""
    batches: dict[int, None] = {}
    for part in text.split(","):
        word = part.strip()
        if not (word.isascii() and word.isdigit()) or not 1 <= int(word[:9]) <= MAX_BATCH or len(word) > 9:
            raise UsageError(
                f"{option} {text!r} has {word!r} where a batch size belongs",
                hint=f"write whole numbers from 1 to {MAX_BATCH} with commas, for example {option} 1,8,64",
            )
        batches[int(word)] = None
    return tuple(batches)


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """("onnxruntime", "torch-eager") for "onnxruntime,torch-eager"; None as it came."""
    if text is None:
        return None
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if "" in names:
        raise UsageError(f"{text!r} has an empty name", hint="separate names with single commas")
    return names


def parse_rgb(text: str, option: str) -> tuple[float, float, float]:
    """(0.5, 0.5, 0.5) for "0.5,0.5,0.5"."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise UsageError(
            f"{option} {text!r} is not three numbers", hint=f"for example {option} 0.485,0.456,0.406 (red, green, blue)"
        )
    red, green, blue = values
    return red, green, blue


def check_positive(value: float | None, option: str) -> float | None:
    """A finite number above zero, or None as it came."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{option} {value} is not a number above zero", hint=f"for example {option} 0.001")
    return value


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names from a text file with one a line, or from a JSON file with a list of strings."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputDataError(
            f"cannot read the class names of {path}, {reason}", hint="name a text file with one class a line"
        ) from error
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except ValueError as error:
            raise InputDataError(f"{path} is not JSON, {error}", hint="a list of strings is needed") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputDataError(f"{path} is not a JSON list of strings", hint='write ["cat", "dog"]')
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise InputDataError(f"{path} has no class names", hint="write one class a line")
    return tuple(names)


def check_exists(path: Path) -> None:
    """Refuse a checkpoint that is not there before anything is imported for it.

    Raises:
        CheckpointError: with the most similar name of the folder.
    """
    if os.path.lexists(path):
        return
    try:
        names = os.listdir(path.parent)
    except OSError:
        raise CheckpointError(f"{path} does not exist", hint=f"there is no folder {path.parent}") from None
    close = get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f"did you mean {path.parent / close[0]}?" if close else f"look into {path.parent.absolute()}"
    raise CheckpointError(f"{path} does not exist", hint=hint)


def open_bundle(path: Path | None) -> Bundle:
    """The bundle named on the command line, or the only one of the current folder; hashes are checked."""
    from evit_deploy.bundle import Bundle

    return Bundle.find(Path.cwd()) if path is None else Bundle.open(path)
