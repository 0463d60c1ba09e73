"""The image files below a folder, at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from evit_deploy.errors import InputDataError
from evit_deploy.images.decode import IMAGE_SUFFIXES


def files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images and the files that are none by their names: folder by folder, each in the order of its names.

    What is hidden is left out, and links to folders are not followed.

    Raises:
        InputDataError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputDataError(f"{error.filename} cannot be listed: {error.strerror}", hint="check its permissions")

    images: list[Path] = []
    others: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                file = Path(root, name)
                (images if file.suffix.lower() in IMAGE_SUFFIXES else others).append(file)
    return images, others


def folders_in_turn(files: Iterable[Path]) -> list[Path]:
    """The first file of each folder, then the second of each, and so on: the first files of all are of every class."""
    by_folder: dict[Path, list[Path]] = {}
    for file in files:
        by_folder.setdefault(file.parent, []).append(file)
    return [file for turn in zip_longest(*by_folder.values()) for file in turn if file is not None]
