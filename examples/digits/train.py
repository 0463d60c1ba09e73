"""Trains a small `msa` model on scikit-learn's handwritten digits, on the CPU, in half a minute on two cores.

    python examples/digits/train.py --output demo
    python examples/digits/train.py --output demo-b1 --model mit-b1   # a published architecture, some minutes

writes into the folder

    digits.pt       the checkpoint: weights and config, as `evit-deploy export` reads it
    heldout.npz     images (uint8 [N, S, S, 3]) and labels of the held-out split, for accuracy; S is 32, or 64
    heldout/        some of the held-out images as PNG files, for `evit-deploy verify --input`
    classes/        all of them, in one sub-folder a class, for `evit-deploy evaluate --data`
    calibration.npy images (uint8 [N, S, S, 3]) of the training split, for `evit-deploy quantize --calibrate`

The split and the seeds are fixed, so every run trains the same model up to the rounding of the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from evit_deploy.errors import EvitDeployError
from evit_deploy.models import build_model
from evit_deploy.specs import ModelSpec

SMALL = "small"
IMAGE_SIZE = 32
PUBLISHED_IMAGE_SIZE = 64  # the published architectures divide it by 32, or by 64 and round up
HELDOUT_FRACTION = 0.2
TARGET_ACCURACY = 0.97
PNG_COUNT = 48  # enough to look at, small enough for a quick verify
CALIBRATION_COUNT = 256
CONFIG = {
    "channels": (16, 32, 48),
    "depths": (1, 1, 1),
    "num_heads": 4,
    "pos_embed_size": (IMAGE_SIZE // 4, IMAGE_SIZE // 4),
}
MEAN = STD = (0.5, 0.5, 0.5)
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(NamedTuple):
    """uint8 images [N, S, S, 3] and labels [N] of both splits."""

    train_images: np.ndarray
    train_labels: np.ndarray
    heldout_images: np.ndarray
    heldout_labels: np.ndarray


def model_spec(name: str) -> ModelSpec:
    """Of SMALL, or of a published architecture with ten classes."""
    if name == SMALL:
        return ModelSpec("msa", "custom", len(CLASS_NAMES), IMAGE_SIZE, CONFIG)
    return ModelSpec.published(name, num_classes=len(CLASS_NAMES), image_size=PUBLISHED_IMAGE_SIZE)


def load_data(size: int) -> Digits:
    """The 8x8 grey digits, scaled to `size` pixels and repeated to RGB; one fixed, stratified split."""
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC)) for g in grey])
    images = np.repeat(images[..., None], 3, axis=3)
    split = train_test_split(images, digits.target, test_size=HELDOUT_FRACTION, stratify=digits.target, random_state=0)
    train_images, heldout_images, train_labels, heldout_labels = split
    return Digits(train_images, train_labels, heldout_images, heldout_labels)


def to_input(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to the network's float32 [N, 3, H, W]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 10 degrees, scaled by up to 10 % and shifted by up to a sixteenth of its side."""
    n = len(images)
    angle = (torch.rand(n, generator=generator) * 2 - 1) * 0.17
    scale = 1 + (torch.rand(n, generator=generator) * 2 - 1) * 0.1
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * 0.125
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 accuracy, 0..1."""
    model.eval()
    with torch.inference_mode():
        predicted = model(to_input(images)).argmax(1).numpy()
    return float((predicted == labels).mean())


def train(
    spec: ModelSpec, data: Digits, *, epochs: int, batch_size: int = 64, learning_rate: float = 3e-3, seed: int = 0
) -> nn.Module:
    """AdamW with a one-cycle schedule; progress on stderr."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_model(spec)
    images, labels = to_input(data.train_images), torch.from_numpy(data.train_labels)
    steps = len(images) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    started = time.monotonic()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            rows = order[step * batch_size : (step + 1) * batch_size]
            logits = model(augment(images[rows], generator))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.monotonic() - started
        print(f"epoch {epoch + 1:2d}/{epochs}  loss {loss.item():.3f}  {seconds:4.0f} s", file=sys.stderr)
    return model.eval()


def save(model: nn.Module, spec: ModelSpec, data: Digits, folder: Path) -> None:
    """Write the checkpoint, the held-out split and some training images."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = folder / "heldout"
    pictures.mkdir(exist_ok=True)
    for i, (image, label) in enumerate(zip(data.heldout_images[:PNG_COUNT], data.heldout_labels, strict=False)):
        Image.fromarray(image).save(pictures / f"{i:03d}_{CLASS_NAMES[label]}.png")
    np.save(folder / "calibration.npy", data.train_images[:CALIBRATION_COUNT])
    for i, (image, label) in enumerate(zip(data.heldout_images, data.heldout_labels, strict=True)):
        sorted_by_class = folder / "classes" / CLASS_NAMES[label]
        sorted_by_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(sorted_by_class / f"{i:03d}.png")
    np.savez_compressed(folder / "heldout.npz", images=data.heldout_images, labels=data.heldout_labels)
    small = {key: list(value) if isinstance(value, tuple) else value for key, value in CONFIG.items()}
    config = {
        "family": spec.family,
        **(small if spec.variant == "custom" else {"variant": spec.variant}),
        "num_classes": spec.num_classes,
        "image_size": spec.image_size,
        "class_names": list(CLASS_NAMES),
        "mean": list(MEAN),
        "std": list(STD),
        "crop_fraction": 1.0,
    }
    staging = folder / "digits.pt.tmp"
    torch.save({"state_dict": model.state_dict(), "config": config}, staging)
    staging.replace(folder / "digits.pt")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small EfficientViT on handwritten digits.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument("--model", default=SMALL, help="small, or a published architecture as msra-m0 (default: small)")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the 1437 training images (default: 15)")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs}: at least one is needed")

    torch.set_num_threads(1)  # a second one gains little on 32x32 pixels and loses much on a busy machine
    try:
        spec = model_spec(arguments.model)
    except EvitDeployError as error:
        parser.error(f"--model {arguments.model}: {error}")
    data = load_data(spec.image_size)
    model = train(spec, data, epochs=arguments.epochs)
    reached = accuracy(model, data.heldout_images, data.heldout_labels)
    print(f"held-out accuracy {reached:.2%} on {len(data.heldout_labels)} images")
    if reached < TARGET_ACCURACY:
        print(f"error: below {TARGET_ACCURACY:.0%}, nothing was written: train for more --epochs", file=sys.stderr)
        return 1
    save(model, spec, data, arguments.output)
    print(f"wrote {arguments.output / 'digits.pt'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
