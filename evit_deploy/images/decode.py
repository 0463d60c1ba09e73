"""An image as the model's training saw it: shorter side resized, centre cropped, scaled, normalized."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evit_deploy.errors import InputDataError, MissingDependencyError
from evit_deploy.specs import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MAX_IMAGE_PIXELS = 100_000_000  # 100 megapixels are 300 MB decoded; a larger header is more likely a bomb than a photo
MAX_ASPECT_RATIO = 100  # resizing the shorter side of a thinner image would need more memory than the image itself


def pixels_from_file(path: Path, image_size: int, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 [image_size, image_size, 3] from an image file.

    Raises:
        InputDataError: no image, a truncated one, or one of an absurd size.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("Pillow is not installed", hint="pip install pillow") from error

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs and odd metadata; the limit below decides
            with Image.open(path) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise InputDataError(f"{path.name} is too large: {image.width} x {image.height} pixels")
                upright = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputDataError(f"{path.name} is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise InputDataError(f"{path.name} is too large: a decompression bomb") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        raise InputDataError(f"{path.name} cannot be decoded: {' '.join(str(error).split())}") from error
    return _resize_and_crop(upright, image_size, preprocessing, path.name)


def pixels_from_array(image: np.ndarray, image_size: int, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 [image_size, image_size, 3] from uint8 [H,W,3]; an array of the right size is taken as it is."""
    if image.shape[:2] == (image_size, image_size):
        return image
    from PIL import Image

    return _resize_and_crop(Image.fromarray(np.ascontiguousarray(image)), image_size, preprocessing, "array")


def normalize(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 [N,H,W,3] in RGB order -> float32 [N,3,H,W] in the model's channel order."""
    mean, std = (np.array(values, dtype=np.float32) for values in (preprocessing.mean, preprocessing.std))
    scaled = (pixels.astype(np.float32) / np.float32(255.0) - mean) / std
    if preprocessing.channel_order == "BGR":
        scaled = scaled[..., ::-1]
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _resize_and_crop(image: Image.Image, image_size: int, preprocessing: Preprocessing, label: str) -> np.ndarray:
    from PIL import Image

    methods = {
        "nearest": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    }
    if preprocessing.interpolation not in methods:
        raise ValueError(f"got {preprocessing.interpolation=}, expected one of {', '.join(methods)}")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise InputDataError(f"{label} has the shape of a line: {image.width} x {image.height} pixels")
    # As timm's evaluation transform: floor(size / crop_fraction) for the shorter side, then the centre of it.
    shorter = int(image_size / preprocessing.crop_fraction)
    scale = shorter / min(image.size)
    if image.width <= image.height:
        size = (shorter, max(shorter, int(image.height * scale)))
    else:
        size = (max(shorter, int(image.width * scale)), shorter)
    resized = image.resize(size, methods[preprocessing.interpolation])
    left, top = round((size[0] - image_size) / 2), round((size[1] - image_size) / 2)
    return np.asarray(resized.crop((left, top, left + image_size, top + image_size)), dtype=np.uint8)
