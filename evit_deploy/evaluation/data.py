"""Labelled images, read one after the other: a folder with one sub-folder a class, or an .npz of images and labels.

Nothing but labels and names is kept, so that the number of images does not matter. An image that cannot be read is a
finding, not an end: reading goes on behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evit_deploy.errors import InputDataError
from evit_deploy.specs import ModelSpec, Preprocessing

DATA_HINT = "give a folder with one sub-folder of images a class, or an .npz with images and labels"


@dataclass(frozen=True)
class LoadedImage:
    """One image: pixels uint8 [S,S,3], or float32 [3,S,S] where it was given preprocessed."""

    array: np.ndarray


@dataclass(frozen=True)
class Unreadable:
    """Why an image could not be read, one line."""

    reason: str


class LabelledImages(ABC):
    """A data set, or as much of it as was asked for.

    Attributes:
        name: of the folder or file.
        kind: "folder" or "npz".
        labels: int64 [N], each a class of the model.
        has_pixels: whether images are pixels, and not preprocessed.
        notes: what a user should know of the data, one line each.
    """

    name: str
    kind: str
    labels: np.ndarray
    has_pixels: bool = True
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image_name(self, position: int) -> str:
        """What messages call an image."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of the images, their names and labels; reads all of them."""

    @abstractmethod
    def read(self, positions: Sequence[int]) -> Iterator[tuple[int, LoadedImage | Unreadable]]:
        """Position and image, for each of the ascending positions.

        Raises:
            InputDataError: the data changed or ended since it was opened.
        """


def chosen_rows(count: int, limit: int | None) -> np.ndarray:
    """Row numbers int64 of the images that a limit leaves: spread evenly, because data is mostly sorted by class."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def open_labelled(
    path: Path,
    spec: ModelSpec,
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
) -> LabelledImages:
    """The data set at a path.

    Args:
        path: a folder of class folders, or an .npz.
        spec: the model.
        preprocessing: how the model was trained to see images.
        class_names: of the model.
        limit: use only so many images, spread evenly over the data.

    Raises:
        InputDataError: nothing there, nothing usable in it, or labels that do not fit the model.
    """
    from evit_deploy.evaluation.archive import ArchiveImages
    from evit_deploy.evaluation.folder import FolderImages

    if path.is_dir():
        return FolderImages(path, spec, preprocessing, class_names, limit)
    if not path.exists():
        raise InputDataError(f"no such file or folder: {path}", hint=DATA_HINT)
    if path.suffix.lower() != ".npz" or not path.is_file():
        raise InputDataError(f"{path} holds no labelled images", hint=DATA_HINT)
    return ArchiveImages(path, spec, preprocessing, limit)
