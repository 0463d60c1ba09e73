"""Labelled images in the layout of torchvision's ImageFolder: DATA/CLASS/IMAGE, at any depth below CLASS."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from evit_deploy.errors import InputDataError
from evit_deploy.evaluation.classes import classes_of_folders
from evit_deploy.evaluation.data import DATA_HINT, LabelledImages, LoadedImage, Unreadable, chosen_rows
from evit_deploy.images.decode import IMAGE_SUFFIXES, pixels_from_file
from evit_deploy.images.folder import files_below
from evit_deploy.specs import ModelSpec, Preprocessing

_CHUNK_BYTES = 1024**2


class FolderImages(LabelledImages):
    """The images of a folder, class by class, in the order of their names; see `open_labelled`."""

    kind = "folder"

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        preprocessing: Preprocessing,
        class_names: Sequence[str] | None,
        limit: int | None,
    ) -> None:
        self.name = f"{path.name or path.absolute().name}/"
        self._path = path
        self._spec = spec
        self._preprocessing = preprocessing
        folders, beside = _class_folders(path)
        classes, notes = classes_of_folders([folder.name for folder in folders], spec.num_classes, class_names)
        files: list[Path] = []
        labels: list[int] = []
        others = beside
        for folder, label in zip(folders, classes, strict=True):
            found, no_images = files_below(folder)
            if not found:
                notes += (f"folder {folder.name!r} holds no image",)
            files += found
            labels += [label] * len(found)
            others += no_images
        if not files:
            raise InputDataError(f"{path} holds no image in its {len(folders)} class folders", hint=_suffixes())
        if others:
            first = others[0].relative_to(path)
            notes += (f"left out, outside of class folders or no images by their names: {len(others)}, first {first}",)
        rows = chosen_rows(len(files), limit)
        self._files = [files[row] for row in rows]
        self.labels = np.array(labels, np.int64)[rows]
        self.notes = notes

    def image_name(self, position: int) -> str:
        return self._files[position].relative_to(self._path).as_posix()

    def digest(self) -> str:
        digest = hashlib.sha256(b"folder\n")
        for position, label in enumerate(self.labels):
            name = os.fsencode(self.image_name(position))
            digest.update(b"%d %d %s " % (label, len(name), name))
            digest.update(_content_digest(self._files[position]))
        return digest.hexdigest()

    def read(self, positions: Sequence[int]) -> Iterator[tuple[int, LoadedImage | Unreadable]]:
        for position in positions:
            try:
                pixels = pixels_from_file(self._files[position], self._spec.image_size, self._preprocessing)
            except InputDataError as error:
                yield position, Unreadable(error.summary)
            else:
                yield position, LoadedImage(pixels)


def _class_folders(path: Path) -> tuple[list[Path], list[Path]]:
    """The sub-folders in the order of their names, and the files beside them."""
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputDataError(f"{path} cannot be listed: {error.strerror}", hint="check its permissions") from error
    folders = [entry for entry in entries if entry.is_dir()]
    if not entries:
        raise InputDataError(f"{path} is an empty folder", hint=DATA_HINT)
    if not folders:
        raise InputDataError(f"{path} has no class folders: its files have no labels", hint=DATA_HINT)
    return folders, [entry for entry in entries if not entry.is_dir()]


def _content_digest(file: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        if not file.is_file():  # a named pipe would block for ever
            return b"no file"
        with open(file, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        return f"unreadable, {error.errno}".encode()
    return digest.digest()


def _suffixes() -> str:
    return f"images end in {', '.join(sorted(IMAGE_SUFFIXES))}"
