"""Which class of a model a folder of images stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from evit_deploy.errors import InputDataError, unknown_name_hint

MAX_LISTED = 5


def classes_of_folders(
    folders: Sequence[str], num_classes: int, class_names: Sequence[str] | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The class of each folder, and what a user should know about the match.

    Args:
        folders: names of the folders, sorted.
        num_classes: of the model.
        class_names: of the model, by class; without them the folders' order decides, as in torchvision's ImageFolder.

    Raises:
        InputDataError: a folder is no class, or classes cannot be told apart.
    """
    if class_names is None:
        return _by_order(folders, num_classes)
    counts = Counter(class_names)
    classes = {name: index for index, name in enumerate(class_names)}
    for folder in folders:
        if folder not in classes:
            others = sum(name not in classes for name in folders) - 1
            more = f", and {others} more" if others else ""
            raise InputDataError(
                f"folder {folder!r} is no class of the model{more}",
                hint=f"rename it; {_known(folder, class_names)}",
            )
        if counts[folder] > 1:
            raise InputDataError(
                f"folder {folder!r} could be any of {counts[folder]} classes of that name",
                hint="give an .npz with images and labels",
            )
    absent = [name for name in class_names if name not in folders]
    notes = () if not absent else (f"no images of {len(absent)} of {num_classes} classes: {_listed(absent)}",)
    return tuple(classes[folder] for folder in folders), notes


def _by_order(folders: Sequence[str], num_classes: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if len(folders) != num_classes:
        raise InputDataError(
            f"{len(folders)} class folders for a model of {num_classes} classes without names",
            hint="give one folder a class, or an .npz with images and labels, or a bundle with class names",
        )
    note = f"the bundle has no class names: class 0 is folder {folders[0]!r}, and so on in the order of the names"
    if all(name.isdecimal() for name in folders):
        by_number = sorted(folders, key=int)
        moved = [index for index, name in enumerate(folders) if name != by_number[index]]
        if moved:
            note += f"; that is not the order of the numbers: class {moved[0]} is folder {folders[moved[0]]!r}"
    return tuple(range(num_classes)), (note,)


def _known(folder: str, class_names: Sequence[str]) -> str:
    if len(class_names) <= 2 * MAX_LISTED:
        return unknown_name_hint(folder, class_names)
    return f"known: {_listed(class_names)}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:MAX_LISTED]))
    return shown if len(names) <= MAX_LISTED else f"{shown} ..."
