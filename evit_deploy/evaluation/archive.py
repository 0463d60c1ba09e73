"""Labelled images in an .npz: `images` uint8 [N,H,W,3] or float32 [N,3,S,S], and `labels` int [N].

Rows are read from the archive one after the other, compressed or not, so that its size does not matter.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from evit_deploy.errors import InputDataError
from evit_deploy.evaluation.data import LabelledImages, LoadedImage, Unreadable, chosen_rows
from evit_deploy.images.decode import pixels_from_array
from evit_deploy.specs import ModelSpec, Preprocessing

IMAGES, LABELS = "images", "labels"
MAX_LABELS = 100_000_000  # 800 MB; no set of labelled images is larger
_CHUNK_BYTES = 1024**2
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[np.generic]


class ArchiveImages(LabelledImages):
    """The rows of an .npz, in their order; see `open_labelled`."""

    kind = "npz"

    def __init__(self, path: Path, spec: ModelSpec, preprocessing: Preprocessing, limit: int | None) -> None:
        self.name = path.name
        self._path = path
        self._spec = spec
        self._preprocessing = preprocessing
        side = spec.image_size
        self._wanted = (
            f"save images uint8 [N,H,W,3] or float32 [N,3,{side},{side}] (preprocessed), and labels int [N], "
            "with numpy.savez"
        )
        with self._member(IMAGES) as (_, self._header):
            self._check_images(self._header)
        self.has_pixels = self._header.dtype == np.uint8
        labels = self._read_labels()
        self._rows = chosen_rows(len(labels), limit)
        self.labels = labels[self._rows]

    def image_name(self, position: int) -> str:
        return f"row {self._rows[position]}"

    def digest(self) -> str:
        digest = hashlib.sha256(f"npz, {len(self._rows)} rows\n".encode())
        try:
            with open(self._path, "rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise self._damaged(error) from error
        return digest.hexdigest()

    def read(self, positions: Sequence[int]) -> Iterator[tuple[int, LoadedImage | Unreadable]]:
        if not len(positions):
            return
        shape, dtype = self._header.shape[1:], self._header.dtype
        row_bytes = math.prod(shape) * dtype.itemsize
        with self._member(IMAGES) as (stream, header):
            if header != self._header:
                raise InputDataError(f"{self.name} was replaced while it was read", hint="run the command again")
            begin = stream.tell()
            for position in positions:
                stream.seek(begin + int(self._rows[position]) * row_bytes)
                data = stream.read(row_bytes)
                if len(data) != row_bytes:
                    raise EOFError
                yield position, self._loaded(np.frombuffer(data, dtype).reshape(shape))

    def _loaded(self, row: np.ndarray) -> LoadedImage | Unreadable:
        if not self.has_pixels:
            finite = bool(np.isfinite(row).all())
            return LoadedImage(row) if finite else Unreadable("holds NaN or Inf")
        try:
            return LoadedImage(pixels_from_array(row, self._spec.image_size, self._preprocessing))
        except InputDataError as error:
            return Unreadable(error.summary)

    @contextmanager
    def _member(self, name: str) -> Iterator[tuple[IO[bytes], _Header]]:
        """An array's stream behind its header, and the header."""
        try:
            with zipfile.ZipFile(self._path) as archive:
                names = [member.removesuffix(".npy") for member in archive.namelist()]
                if name not in names:
                    found = ", ".join(names[:5]) or "nothing"
                    raise InputDataError(f"{self.name} has no {name!r}, it has {found}", hint=self._wanted)
                with archive.open(f"{name}.npy") as stream:
                    yield stream, _read_header(stream)
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> InputDataError:
        reason = " ".join(str(error).split()) or "it ends too early"
        return InputDataError(f"{self.name} cannot be read as .npz: {reason}", hint=self._wanted)

    def _check_images(self, header: _Header) -> None:
        shape, side = list(header.shape), self._spec.image_size
        found = f"{self.name}: images are {header.dtype} of shape {shape}"
        if len(shape) != 4 or header.dtype not in (np.uint8, np.float32):
            raise InputDataError(found, hint=self._wanted)
        if 0 in shape:
            raise InputDataError(f"{found}, which is empty", hint=self._wanted)
        if header.fortran_order:
            raise InputDataError(f"{found} in Fortran order", hint="save numpy.ascontiguousarray(images)")
        if header.dtype == np.uint8 and shape[3] != 3:
            raise InputDataError(f"{found}, its last dimension is not 3", hint=self._wanted)
        if header.dtype == np.float32 and shape[1:] != [3, side, side]:
            raise InputDataError(f"{found}, and the model takes [3,{side},{side}]", hint=self._wanted)

    def _read_labels(self) -> np.ndarray:
        images, classes = self._header.shape[0], self._spec.num_classes
        with self._member(LABELS) as (stream, header):
            found = f"{self.name}: labels are {header.dtype} of shape {list(header.shape)}"
            if header.dtype.kind not in "iu" or header.shape != (images,):
                raise InputDataError(f"{found}, and there are {images} images", hint=self._wanted)
            if images > MAX_LABELS:
                raise InputDataError(f"{found}, more than {MAX_LABELS}", hint="split the data")
            data = stream.read(images * header.dtype.itemsize)
            if len(data) != images * header.dtype.itemsize:
                raise EOFError
            labels = np.frombuffer(data, header.dtype)
        outside = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(outside):
            raise InputDataError(
                f"{self.name}: label {labels[outside[0]]} of row {outside[0]} is no class of the model, which has "
                f"{classes}: 0 to {classes - 1} ({len(outside)} of {images} labels are outside)",
                hint="give the data that the model was trained for",
            )
        return labels.astype(np.int64)


def _read_header(stream: IO[bytes]) -> _Header:
    """Shape, order and type of an .npy, of any version that a plain array is saved in."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"an array of format {version}")
    shape, fortran_order, dtype = readers[version](stream)
    return _Header(shape, fortran_order, dtype)
