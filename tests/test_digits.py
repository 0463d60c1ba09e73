"""The trained example: it reaches its accuracy, and every step after training keeps each answer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from evit_deploy import api
from evit_deploy.models import load_model
from tests.tiers import tiered

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples/digits/train.py"
HELDOUT = 360
MIN_ACCURACY = 0.97


def network_input(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 32, 32, 3] to float32 [N, 3, 32, 32] with mean and deviation 0.5, as the model was trained."""
    scaled = (images.astype(np.float32) / 255 - 0.5) / 0.5
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def reference_logits(
    digits_checkpoint: Path, digits_heldout: tuple[np.ndarray, np.ndarray], digits_bundle: Bundle
) -> np.ndarray:
    """The trained weights, straight from the checkpoint, in PyTorch."""
    state_dict = torch.load(digits_checkpoint, weights_only=True)["state_dict"]
    model = load_model(digits_bundle.spec, state_dict)
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(network_input(digits_heldout[0]))).numpy()
    return logits


def test_the_trained_model_is_accurate(
    reference_logits: np.ndarray, digits_heldout: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits_heldout
    assert images.shape == (HELDOUT, 32, 32, 3)
    assert images.dtype == np.uint8
    assert (reference_logits.argmax(1) == labels).mean() >= MIN_ACCURACY


def test_the_bundle_keeps_every_answer(
    reference_logits: np.ndarray, digits_heldout: tuple[np.ndarray, np.ndarray], digits_bundle: Bundle
) -> None:
    """With ONNX Runtime alone, as somebody else would use the file."""
    session = onnxruntime.InferenceSession(digits_bundle.onnx_path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": network_input(digits_heldout[0])})
    assert (logits.argmax(1) == reference_logits.argmax(1)).all()
    np.testing.assert_allclose(logits, reference_logits, rtol=0, atol=1e-4 * np.abs(reference_logits).max())


def test_the_bundle_knows_its_classes(digits_bundle: Bundle) -> None:
    assert digits_bundle.class_names is not None
    assert digits_bundle.class_names[:3] == ["zero", "one", "two"]
    assert digits_bundle.preprocessing.mean == (0.5, 0.5, 0.5)


def test_the_pictures_are_the_heldout_images(digits: Path, digits_heldout: tuple[np.ndarray, np.ndarray]) -> None:
    pictures = sorted((digits / "heldout").glob("*.png"))
    assert len(pictures) == 48
    for picture, image in zip(pictures, digits_heldout[0], strict=False):
        assert (np.asarray(Image.open(picture)) == image).all(), picture.name


def test_every_heldout_image_stands_in_the_folder_of_its_class(
    digits: Path, digits_heldout: tuple[np.ndarray, np.ndarray], digits_bundle: Bundle
) -> None:
    images, labels = digits_heldout
    pictures = sorted((digits / "classes").glob("*/*.png"), key=lambda picture: picture.name)
    assert len(pictures) == HELDOUT
    assert digits_bundle.class_names is not None
    for picture, image, label in zip(pictures, images, labels, strict=True):
        assert picture.parent.name == digits_bundle.class_names[label]
        assert (np.asarray(Image.open(picture)) == image).all(), picture.name


@pytest.mark.exhaustive
def test_below_the_target_nothing_is_written(tmp_path: Path, child_environment: dict[str, str]) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out"), "--epochs", "1"]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "nothing was written" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("digits_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["mit-b0", "msra-m0"])
def test_a_published_architecture_is_trained_for_the_same_classes(
    script: ModuleType, name: str, tmp_path: Path
) -> None:
    """One pass: its checkpoint, whatever it is worth, says all that `export` has to know."""
    spec = script.model_spec(name)
    data = script.load_data(spec.image_size)
    few = data._replace(train_images=data.train_images[:128], train_labels=data.train_labels[:128])
    model = script.train(spec, few, epochs=1)
    script.save(model, spec, data, tmp_path / "out")
    bundle = api.export(tmp_path / "out" / "digits.pt", tmp_path / "model.evit", verify=False).bundle
    assert bundle.spec.name == name
    assert (bundle.spec.num_classes, bundle.spec.image_size) == (10, 64)
    assert bundle.class_names is not None
    assert bundle.class_names[9] == "nine"
    with np.load(tmp_path / "out" / "heldout.npz") as heldout:
        assert heldout["images"].shape == (HELDOUT, 64, 64, 3)


@pytest.mark.parametrize("name", tiered(["nonsense", "mit-b9"], "mit-b9".__eq__))
def test_an_unknown_architecture_is_named(name: str, tmp_path: Path, child_environment: dict[str, str]) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out"), "--model", name]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"--model {name}: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
