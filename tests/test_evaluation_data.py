"""Labelled images: which class a folder is, which rows a limit takes, and every way in which data can be wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evit_deploy.errors import InputDataError
from evit_deploy.evaluation.classes import classes_of_folders
from evit_deploy.evaluation.data import LabelledImages, LoadedImage, Unreadable, chosen_rows, open_labelled
from evit_deploy.specs import ModelSpec, Preprocessing

SIDE = 32
NAMES = ("ant", "bee", "cat")
SPEC = ModelSpec("msa", "custom", len(NAMES), SIDE, {})
PREPROCESSING = Preprocessing(crop_fraction=1.0)


def picture(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def save_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ant/0.png, ant/1.png, bee/deep/er/2.png, cat/3.png"""
    for seed, name in enumerate(("ant/0.png", "ant/1.png", "bee/deep/er/2.png", "cat/3.png")):
        save_picture(tmp_path / "val" / name, seed)
    return tmp_path / "val"


def opened(
    path: Path, names: Sequence[str] | None = NAMES, limit: int | None = None, spec: ModelSpec = SPEC
) -> LabelledImages:
    return open_labelled(path, spec, PREPROCESSING, names, limit)


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def arrays(count: int = 6) -> Mapping[str, np.ndarray]:
    return {"images": np.stack([picture(seed) for seed in range(count)]), "labels": np.arange(count) % 3}


def loaded(data: LabelledImages, positions: Sequence[int] | None = None) -> dict[int, np.ndarray]:
    found = {}
    for position, image in data.read(range(len(data)) if positions is None else positions):
        assert isinstance(image, LoadedImage)
        found[position] = image.array
    return found


# Classes


def test_folders_are_matched_by_name_whatever_their_order() -> None:
    assert classes_of_folders(["bee", "cat", "worm"], 4, ["worm", "cat", "bee", "ant"])[0] == (2, 1, 0)


def test_classes_without_a_folder_are_noted() -> None:
    classes, notes = classes_of_folders(["cat"], 3, NAMES)
    assert classes == (2,)
    assert notes == ("no images of 2 of 3 classes: 'ant', 'bee'",)


def test_an_unknown_folder_is_an_error_with_the_closest_class() -> None:
    with pytest.raises(InputDataError, match="folder 'bees' is no class of the model, and 1 more") as caught:
        classes_of_folders(["ant", "bees", "dog"], 3, NAMES)
    assert "did you mean 'bee'?" in caught.value.hint


def test_a_name_of_two_classes_is_an_error_only_where_it_is_used() -> None:
    names = ["crane", "ant", "crane"]
    assert classes_of_folders(["ant"], 3, names)[0] == (1,)
    with pytest.raises(InputDataError, match="'crane' could be any of 2 classes"):
        classes_of_folders(["ant", "crane"], 3, names)


def test_without_class_names_the_order_of_the_names_decides() -> None:
    classes, notes = classes_of_folders(["ant", "bee", "cat"], 3, None)
    assert classes == (0, 1, 2)
    assert notes == ("the bundle has no class names: class 0 is folder 'ant', and so on in the order of the names",)


@pytest.mark.parametrize(("folders", "said"), [(["10", "9"], "class 0 is folder '10'"), (["1", "9"], None)])
def test_numbers_in_another_order_than_their_names_are_noted(folders: list[str], said: str | None) -> None:
    (note,) = classes_of_folders(folders, 2, None)[1]
    assert ("not the order of the numbers" in note) == (said is not None)
    assert said is None or said in note


@pytest.mark.parametrize("folders", [["ant", "bee"], ["ant", "bee", "cat", "dog"]])
def test_without_class_names_there_must_be_one_folder_a_class(folders: list[str]) -> None:
    with pytest.raises(InputDataError, match=f"{len(folders)} class folders for a model of 3 classes"):
        classes_of_folders(folders, 3, None)


# Folders


def test_a_folder_gives_its_images_class_by_class(folder: Path) -> None:
    data = opened(folder)
    assert data.labels.tolist() == [0, 0, 1, 2]
    assert [data.image_name(i) for i in range(4)] == ["ant/0.png", "ant/1.png", "bee/deep/er/2.png", "cat/3.png"]
    assert all((array == picture(seed)).all() for seed, array in loaded(data).items())
    assert list(loaded(data, [1, 3])) == [1, 3]


def test_files_that_are_no_images_are_noted_and_hidden_ones_are_not(folder: Path) -> None:
    (folder / "ant" / "notes.txt").write_text("x")
    (folder / "readme.md").write_text("x")
    (folder / "cat" / ".DS_Store").write_text("x")
    (folder / ".git").mkdir()
    data = opened(folder)
    assert data.notes == ("left out, outside of class folders or no images by their names: 2, first readme.md",)
    assert len(data) == 4


def test_a_class_without_images_is_noted(folder: Path) -> None:
    shutil.rmtree(folder / "cat")
    (folder / "cat").mkdir()
    assert opened(folder).notes == ("folder 'cat' holds no image",)


def test_unreadable_images_are_findings_and_reading_goes_on(folder: Path) -> None:
    (folder / "ant" / "0.png").write_bytes(b"no image")
    (folder / "bee" / "deep" / "er" / "2.png").write_bytes(b"")
    found = dict(opened(folder).read([0, 1, 2, 3]))
    assert isinstance(found[0], Unreadable)
    assert found[0].reason == "0.png is no image that Pillow knows"
    assert isinstance(found[2], Unreadable)
    assert isinstance(found[1], LoadedImage)
    assert isinstance(found[3], LoadedImage)


@pytest.mark.parametrize("change", ["content", "name", "class", "removed"])
def test_the_digest_of_a_folder_depends_on_all_of_it(folder: Path, change: str) -> None:
    before = opened(folder).digest()
    assert opened(folder).digest() == before
    first = folder / "ant" / "0.png"
    if change == "content":
        save_picture(first, 77)
    elif change == "name":
        first.rename(folder / "ant" / "9.png")
    elif change == "class":
        first.rename(folder / "cat" / "0.png")
    else:
        first.unlink()
    assert opened(folder).digest() != before


def test_a_named_pipe_is_hashed_without_waiting_for_a_writer(folder: Path) -> None:
    os.mkfifo(folder / "ant" / "2.png")
    assert len(opened(folder).digest()) == 64


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "is an empty folder"),
        (lambda path: save_picture(path / "0.png", 0), "has no class folders: its files have no labels"),
        (lambda path: (path / "ant").mkdir(parents=True), "holds no image in its 1 class folders"),
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_text("x"), "holds no labelled images"),
    ],
    ids=["empty", "no-classes", "no-images", "missing", "text"],
)
def test_what_is_no_data_is_one_line(tmp_path: Path, make: object, said: str) -> None:
    path = tmp_path / "data"
    make(path)  # type: ignore[operator]
    with pytest.raises(InputDataError, match=said) as caught:
        opened(path)
    assert caught.value.hint


# Limits


@pytest.mark.parametrize(
    ("count", "limit", "rows"), [(6, 3, [0, 2, 4]), (7, 3, [0, 2, 4]), (5, 5, range(5)), (5, 9, range(5)), (3, 1, [0])]
)
def test_a_limit_spreads_over_the_data(count: int, limit: int, rows: Sequence[int]) -> None:
    assert chosen_rows(count, limit).tolist() == list(rows)


def test_a_limit_reaches_every_class_of_sorted_data(folder: Path, tmp_path: Path) -> None:
    assert opened(folder, limit=2).labels.tolist() == [0, 1]
    sorted_rows = saved(tmp_path / "sorted.npz", images=arrays(30)["images"], labels=np.repeat([0, 1, 2], 10))
    limited = opened(sorted_rows, limit=6)
    assert limited.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert limited.image_name(5) == "row 25"
    assert (loaded(limited)[5] == picture(25)).all()


# Archives


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_gives_its_rows_in_any_selection(tmp_path: Path, save: object) -> None:
    save(tmp_path / "val.npz", **arrays())  # type: ignore[operator]
    data = opened(tmp_path / "val.npz")
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.has_pixels
    assert {i: (array == picture(i)).all() for i, array in loaded(data).items()} == dict.fromkeys(range(6), True)
    assert (loaded(data, [1, 4])[4] == picture(4)).all()
    assert loaded(data, []) == {}


def test_pixels_of_another_size_are_resized(tmp_path: Path) -> None:
    path = saved(tmp_path / "val.npz", images=np.full((2, 50, 40, 3), 9, np.uint8), labels=np.array([0, 1]))
    images = loaded(opened(path))
    assert images[0].shape == (SIDE, SIDE, 3)
    assert (images[1] == 9).all()


def test_preprocessed_rows_pass_through_and_nan_is_unreadable(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, SIDE, SIDE)).astype(np.float32)
    images[1, 2, 3, 4] = np.nan
    data = opened(saved(tmp_path / "val.npz", images=images, labels=np.array([0, 1, 2], np.uint8)))
    assert not data.has_pixels
    found = dict(data.read([0, 1, 2]))
    assert found[1] == Unreadable("holds NaN or Inf")
    assert isinstance(found[2], LoadedImage)
    assert (found[2].array == images[2]).all()


def test_rows_are_streamed_and_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No single read asks for more than a row."""
    import zipfile

    path = saved(tmp_path / "val.npz", **arrays(50))
    data = opened(path)
    largest = 0
    read = zipfile.ZipExtFile.read

    def watched(stream: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        nonlocal largest
        got = read(stream, n)
        largest = max(largest, len(got))
        return got

    monkeypatch.setattr(zipfile.ZipExtFile, "read", watched)
    assert len(loaded(data)) == 50
    assert largest == SIDE * SIDE * 3


@pytest.mark.parametrize("change", ["image", "label"])
def test_the_digest_of_an_archive_depends_on_all_of_it(tmp_path: Path, change: str) -> None:
    values = {name: array.copy() for name, array in arrays().items()}
    before = opened(saved(tmp_path / "a.npz", **values)).digest()
    values["images" if change == "image" else "labels"].flat[4] ^= 1
    assert opened(saved(tmp_path / "b.npz", **values)).digest() != before
    assert opened(tmp_path / "a.npz", limit=5).digest() != before


def zeros(*shape: int, dtype: object = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)  # type: ignore[call-overload,no-any-return]


BAD_ARCHIVES = {
    "no-labels": ({"images": zeros(2, 8, 8, 3)}, "has no 'labels', it has images"),
    "no-images": ({"x": zeros(2), "labels": zeros(2, dtype=int)}, "has no 'images', it has x, labels"),
    "channels-first": ({"images": zeros(2, 3, 8, 8), "labels": zeros(2, dtype=int)}, "last dimension is not 3"),
    "size": (
        {"images": zeros(2, 3, 64, 64, dtype=np.float32), "labels": zeros(2, dtype=int)},
        r"shape \[2, 3, 64, 64\], and the model takes \[3,32,32\]",
    ),
    "double": ({"images": zeros(2, 3, 32, 32, dtype=float), "labels": zeros(2, dtype=int)}, "images are float64"),
    "flat": ({"images": zeros(2, 3072), "labels": zeros(2, dtype=int)}, r"shape \[2, 3072\]"),
    "empty": ({"images": zeros(0, 8, 8, 3), "labels": zeros(0, dtype=int)}, "which is empty"),
    "fewer-labels": ({"images": zeros(3, 8, 8, 3), "labels": zeros(2, dtype=int)}, "and there are 3 images"),
    "one-hot": ({"images": zeros(2, 8, 8, 3), "labels": zeros(2, 3, dtype=int)}, r"labels are int64 of shape \[2, 3\]"),
    "float-labels": ({"images": zeros(2, 8, 8, 3), "labels": zeros(2, dtype=float)}, "labels are float64"),
    "above": ({"images": zeros(2, 8, 8, 3), "labels": np.array([2, 3])}, "label 3 of row 1 is no class of the model"),
    "below": ({"images": zeros(2, 8, 8, 3), "labels": np.array([-1, 0])}, "label -1 of row 0 is no class"),
    "objects": ({"images": np.array([None, 1]), "labels": zeros(2, dtype=int)}, "images are object"),
    "fortran": (
        {"images": np.asfortranarray(zeros(2, 8, 8, 3)), "labels": zeros(2, dtype=int)},
        "in Fortran order",
    ),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_a_wrong_archive_is_one_line(tmp_path: Path, name: str) -> None:
    values, said = BAD_ARCHIVES[name]
    with pytest.raises(InputDataError, match=said) as caught:
        opened(saved(tmp_path / "val.npz", **values))
    assert caught.value.hint


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    whole = saved(tmp_path / "val.npz", **arrays()).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_bytes(b"no archive")
    for name in ("cut.npz", "text.npz"):
        with pytest.raises(InputDataError, match=r"cannot be read as \.npz"):
            opened(tmp_path / name)


def test_an_archive_damaged_within_a_row_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "val.npz"
    np.savez_compressed(path, **arrays())
    data = opened(path)
    content = bytearray(path.read_bytes())
    for index in range(2000, 2100):
        content[index] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputDataError, match=r"cannot be read as \.npz"):
        loaded(data)
