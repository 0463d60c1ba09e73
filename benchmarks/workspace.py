"""The temporary folder of a benchmark run: each model exported once, everything gone at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.arms import plain_path
from benchmarks.settings import WEIGHT_SEED
from evit_deploy.bench.workdir import working_folder
from evit_deploy.constants import BUNDLE_SUFFIX

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

Progress = Callable[[str], None]


class Workspace:
    """Models with random weights, as bundles and as what a bundle is compared with.

    Args:
        folder: existing and empty.
        progress: called with one line per step.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder = folder
        self.progress = progress

    def bundle(self, model: str, image_size: int) -> Bundle:
        """Our export. The benchmark itself compares its outputs with PyTorch's, so that it is not verified here."""
        from evit_deploy import api
        from evit_deploy.bundle import Bundle

        path = self.folder / f"{model}-{image_size}{BUNDLE_SUFFIX}"
        if path.exists():
            return Bundle.open(path)
        self.progress(f"{model}: our export")
        exported = api.export(None, path, random_weights=model, seed=WEIGHT_SEED, image_size=image_size, verify=False)
        return exported.bundle

    def with_plain_export(self, bundle: Bundle) -> Bundle:
        """The same bundle, with the plain export of its model beside it."""
        from benchmarks.plain import write_plain_export

        if not plain_path(bundle.path).exists():
            self.progress(f"{bundle.spec.name}: plain export")
            write_plain_export(bundle)
        return bundle

    def checkpoint(self, model: str, image_size: int) -> Path:
        """A checkpoint as training would leave it: {"state_dict": ...} in a .pt file."""
        import torch

        from evit_deploy.models.random_weights import random_state_dict
        from evit_deploy.specs import ModelSpec

        path = self.folder / f"{model}-{image_size}.pt"
        if not path.exists():
            spec = ModelSpec.published(model, image_size=image_size)
            torch.save({"state_dict": random_state_dict(spec, WEIGHT_SEED)}, path)
        return path


@contextmanager
def workspace(progress: Progress) -> Iterator[Workspace]:
    """A workspace in a temporary folder that is removed at the end, also of a run that was killed (by the next run)."""
    with working_folder() as folder:
        yield Workspace(folder, progress)
