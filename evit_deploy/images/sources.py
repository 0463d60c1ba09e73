"""Where the compared images come from: seeded random ones, a .npy array, an image, a folder of images.

A source yields batches. Each batch carries what the reference takes (float32 [N,3,H,W], preprocessed) and, where the
source has pixels, the uint8 [N,H,W,3] they came from, for graphs that do the preprocessing themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from evit_deploy.constants import PROJECT_SEED
from evit_deploy.errors import InputDataError
from evit_deploy.images.decode import IMAGE_SUFFIXES, normalize, pixels_from_array, pixels_from_file
from evit_deploy.images.folder import files_below, folders_in_turn
from evit_deploy.specs import Preprocessing

MIN_RANDOM_ROWS = 4  # a fixed batch of one is drawn several times, or nothing would show that the input matters
NORMALIZED_LIMIT = 2.5  # black is -2.1 and white 2.6 after ImageNet's mean and std


@dataclass(frozen=True)
class InputBatch:
    """N images.

    Attributes:
        images: float32 [N,3,H,W], preprocessed.
        pixels: uint8 [N,H,W,3] of the same images, or None where they were given preprocessed.
        labels: N names for messages: file names, or row numbers of an array.
    """

    images: np.ndarray
    pixels: np.ndarray | None
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


class InputSource(ABC):
    """Images to compare on.

    Attributes:
        name: how tables and reports call it.
        generated: the source can draw a batch of any size; otherwise its rows are what the user gave.
    """

    name: str
    generated: bool = False

    @abstractmethod
    def batches(self, size: int, *, pixels: bool = False) -> Iterator[InputBatch]:
        """Batches of `size` images, the last one possibly smaller; `pixels`: every batch has its pixels.

        Raises:
            InputDataError: an image is unreadable, or the source has no pixels.
        """


class RandomInputs(InputSource):
    """Seeded images of five kinds in turn: noise, blobs, faint noise, strong blobs, one colour with a trace of noise.

    White noise alone averages out in the first layers, and all rows then give nearly one output. Noise stronger than
    any photo is left out: it drives untrained attention to where FP32 itself is off by several percent.

    Args:
        image_size: pixels of the square image.
        preprocessing: mean and std, used where pixels are asked for.
        seed: the same seed gives the same images for each batch size, on every machine.
    """

    generated = True

    def __init__(
        self, image_size: int, preprocessing: Preprocessing | None = None, *, seed: int = PROJECT_SEED
    ) -> None:
        self.name = f"random, seed {seed}"
        self._image_size = image_size
        self._preprocessing = preprocessing or Preprocessing()
        self._seed = seed

    def batches(self, size: int, *, pixels: bool = False) -> Iterator[InputBatch]:
        for index in range(max(1, MIN_RANDOM_ROWS // size)):
            yield self.draw(size, index, pixels=pixels)

    def draw(self, size: int, index: int = 0, *, pixels: bool = False) -> InputBatch:
        """One batch of `size` images; `index` tells several of the same size apart."""
        generator = np.random.default_rng([self._seed, size, index])
        images = np.stack([self._image(generator, row + index * size) for row in range(size)]).astype(np.float32)
        labels = tuple(str(row + index * size) for row in range(size))
        if not pixels:
            return InputBatch(images, None, labels)
        mean, std = (
            np.array(v, dtype=np.float32)[:, None, None] for v in (self._preprocessing.mean, self._preprocessing.std)
        )
        scaled = np.clip(np.rint((images * std + mean) * 255.0), 0, 255).astype(np.uint8)
        stored = np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))
        return InputBatch(normalize(stored, self._preprocessing), stored, labels)

    def _image(self, generator: np.random.Generator, row: int) -> np.ndarray:
        side = self._image_size
        noise = generator.standard_normal((3, side, side))
        kind = row % 5
        if kind in (1, 3):
            cells = 8 if kind == 1 else 3
            cell = -(-side // cells)
            blobs = generator.standard_normal((3, cells, cells)).repeat(cell, axis=1).repeat(cell, axis=2)
            contrast = 0.7 if kind == 1 else 1.2
            return np.clip(contrast * blobs[:, :side, :side] + 0.1 * noise, -NORMALIZED_LIMIT, NORMALIZED_LIMIT)
        if kind == 4:
            return generator.uniform(-1.5, 1.5, (3, 1, 1)) + 0.02 * noise
        return noise if kind == 0 else 0.25 * noise


class ArrayInputs(InputSource):
    """A .npy file: float32 [N,3,H,W], preprocessed; or uint8 [N,H,W,3] of any size, preprocessed here.

    Raises:
        InputDataError: on construction, for a file that is no such array, is empty, or holds NaN or Inf.
    """

    def __init__(self, path: Path, image_size: int, preprocessing: Preprocessing) -> None:
        self.name = path.name
        self._image_size = image_size
        self._preprocessing = preprocessing
        self._array = _load_array(path, image_size)

    def batches(self, size: int, *, pixels: bool = False) -> Iterator[InputBatch]:
        raw = self._array.dtype == np.uint8
        if pixels and not raw:
            raise InputDataError(
                f"{self.name}: the model preprocesses by itself and takes uint8 images, got preprocessed float32",
                hint="give uint8 [N,H,W,3], an image or a folder of images",
            )
        for start in range(0, len(self._array), size):
            part = np.array(self._array[start : start + size])
            labels = tuple(str(start + row) for row in range(len(part)))
            if raw:
                yield _batch_from_pixels(
                    [pixels_from_array(image, self._image_size, self._preprocessing) for image in part],
                    labels,
                    self._preprocessing,
                )
            else:
                yield InputBatch(part.astype(np.float32, copy=False), None, labels)


class ImageInputs(InputSource):
    """Image files, read one batch at a time.

    An unreadable file does not end the stream at once: all are read, then the error lists every unreadable one.

    Args:
        name: how tables and reports call them.
        paths: in the order to read them.
        image_size: pixels of the model's square input.
        preprocessing: how the model was trained to see images.
        folder: what the files are named from.
    """

    def __init__(
        self, name: str, paths: list[Path], image_size: int, preprocessing: Preprocessing, folder: Path
    ) -> None:
        self.name = name
        self._paths = paths
        self._folder = folder
        self._image_size = image_size
        self._preprocessing = preprocessing

    def batches(self, size: int, *, pixels: bool = False) -> Iterator[InputBatch]:
        unreadable: list[str] = []
        images: list[np.ndarray] = []
        labels: list[str] = []
        for path in self._paths:
            label = path.relative_to(self._folder).as_posix()
            try:
                images.append(pixels_from_file(path, self._image_size, self._preprocessing))
            except InputDataError as error:
                unreadable.append(label + error.summary.removeprefix(path.name))
                continue
            labels.append(label)
            if len(images) == size:
                yield _batch_from_pixels(images, tuple(labels), self._preprocessing)
                images, labels = [], []
        if images:
            yield _batch_from_pixels(images, tuple(labels), self._preprocessing)
        if unreadable:
            if len(self._paths) == 1:
                raise InputDataError(unreadable[0], hint="give a JPEG, PNG or another file that Pillow reads")
            raise InputDataError(
                f"{self.name}: {len(unreadable)} of {len(self._paths)} images cannot be read, first {unreadable[0]}",
                details=unreadable,
                hint="remove or replace them: nothing is skipped silently",
            )


class FirstInputs(InputSource):
    """The first images of another source, to the next whole batch."""

    def __init__(self, source: InputSource, images: int) -> None:
        self.name = source.name
        self._source = source
        self._images = images

    def batches(self, size: int, *, pixels: bool = False) -> Iterator[InputBatch]:
        yield from islice(self._source.batches(size, pixels=pixels), -(-self._images // size))


class RepeatedInputs(InputSource):
    """A batch of any size from the images of another source, repeated where they do not suffice."""

    generated = True

    def __init__(self, source: InputSource) -> None:
        self.name = source.name
        self._source = source

    def batches(self, size: int, *, pixels: bool = False) -> Iterator[InputBatch]:
        wanted = max(size, MIN_RANDOM_ROWS)
        first = next(iter(self._source.batches(wanted, pixels=pixels)))
        rows = np.resize(np.arange(len(first)), -(-wanted // size) * size)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            stored = None if first.pixels is None else first.pixels[part]
            yield InputBatch(first.images[part], stored, tuple(first.labels[row] for row in part))


def open_inputs(path: str | Path, image_size: int, preprocessing: Preprocessing | None = None) -> InputSource:
    """The source for `--input PATH`.

    Args:
        path: a .npy file, an image file, or a folder of images (its files in the order of their names; those of
            sub-folders too, one of each in turn).
        image_size: pixels of the model's square input.
        preprocessing: how the model was trained to see images.

    Raises:
        InputDataError: nothing there, nothing usable in it, or an array of a wrong shape, dtype or content.
    """
    path = Path(path)
    preprocessing = preprocessing or Preprocessing()
    if path.is_dir():
        return _open_folder(path, image_size, preprocessing)
    if not path.exists():
        raise InputDataError(f"no such file or folder: {path}", hint="give a .npy file, an image or a folder of images")
    if not path.is_file():
        raise InputDataError(f"{path} is neither a file nor a folder", hint="give a .npy file, an image or a folder")
    if path.suffix.lower() == ".npy":
        return ArrayInputs(path, image_size, preprocessing)
    if path.suffix.lower() == ".npz":
        raise InputDataError(f"{path} is an archive of arrays", hint="save one array with numpy.save")
    return ImageInputs(path.name, [path], image_size, preprocessing, path.parent)


def _open_folder(path: Path, image_size: int, preprocessing: Preprocessing) -> InputSource:
    images, others = files_below(path)
    if not images and not others:
        raise InputDataError(
            f"{path} is an empty folder", hint="give a folder that holds images; links to folders are not followed"
        )
    if not images:
        first = others[0].relative_to(path).as_posix()
        raise InputDataError(
            f"{path} holds no image among its {len(others)} files; the first is {first}",
            hint=f"images end in {', '.join(sorted(IMAGE_SUFFIXES))}",
        )
    return ImageInputs(
        f"{path.name or path.absolute().name}/", folders_in_turn(images), image_size, preprocessing, path
    )


def _load_array(path: Path, image_size: int) -> np.ndarray:
    wanted = f"give float32 [N,3,{image_size},{image_size}] (preprocessed) or uint8 [N,H,W,3]"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        pickled = "allow_pickle" in str(error) or "Python object" in str(error)
        found = "a pickle or an array of Python objects, which is never loaded" if pickled else "no readable .npy array"
        raise InputDataError(f"{path.name} holds {found}", hint=wanted) from error
    shape = list(array.shape)
    if array.ndim != 4:
        raise InputDataError(f"{path.name} has shape {shape}", hint=wanted)
    if array.size == 0:
        raise InputDataError(f"{path.name} is empty: shape {shape}", hint=wanted)
    if array.dtype == np.uint8:
        if array.shape[3] != 3:
            raise InputDataError(f"{path.name} is uint8 of shape {shape}, its last dimension is not 3", hint=wanted)
    elif array.dtype == np.float32:
        if array.shape[1:] != (3, image_size, image_size):
            raise InputDataError(f"{path.name} is float32 of shape {shape}", hint=wanted)
        for row, image in enumerate(array):
            if not np.isfinite(image).all():
                raise InputDataError(f"{path.name} has NaN or Inf in row {row}", hint="give finite numbers")
    else:
        raise InputDataError(f"{path.name} has dtype {array.dtype}", hint=wanted)
    return array


def _batch_from_pixels(pixels: list[np.ndarray], labels: tuple[str, ...], preprocessing: Preprocessing) -> InputBatch:
    stacked = np.stack(pixels)
    return InputBatch(normalize(stacked, preprocessing), stacked, labels)
