from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evit_deploy.errors import InputDataError
from evit_deploy.images.decode import normalize
from evit_deploy.images.sources import InputBatch, RandomInputs, open_inputs
from evit_deploy.specs import Preprocessing

SIZE = 16
PLAIN = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop_fraction=1.0)


def save_image(path: Path, color: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (20, 30)) -> None:
    Image.new("RGB", size, color).save(path)


def collect(
    path: Path, size: int = 2, *, pixels: bool = False, preprocessing: Preprocessing = PLAIN
) -> list[InputBatch]:
    return list(open_inputs(path, SIZE, preprocessing).batches(size, pixels=pixels))


def refused(path: Path, *, pixels: bool = False) -> InputDataError:
    with pytest.raises(InputDataError) as raised:
        collect(path, pixels=pixels)
    assert "\n" not in str(raised.value)
    assert raised.value.hint
    return raised.value


class TestRandomInputs:
    def test_seeded(self):
        first, again, other = (RandomInputs(SIZE, seed=seed).draw(3).images for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)

    @pytest.mark.parametrize("pixels", [False, True])
    def test_all_rows_differ_in_content_and_scale(self, pixels: bool):
        batch = RandomInputs(SIZE).draw(10, pixels=pixels)
        assert len({image.tobytes() for image in batch.images}) == 10
        deviations = batch.images.std(axis=(1, 2, 3))
        assert deviations.max() > 3 * deviations.min()
        assert np.isfinite(batch.images).all()
        assert batch.images.dtype == np.float32

    def test_pixels_belong_to_the_images(self):
        preprocessing = Preprocessing()
        batch = RandomInputs(SIZE, preprocessing).draw(5, pixels=True)
        assert batch.pixels is not None
        assert batch.pixels.dtype == np.uint8
        assert batch.pixels.shape == (5, SIZE, SIZE, 3)
        np.testing.assert_array_equal(batch.images, normalize(batch.pixels, preprocessing))

    @pytest.mark.parametrize(("size", "count"), [(1, 4), (2, 2), (3, 1), (8, 1)])
    def test_small_batches_are_drawn_several_times(self, size: int, count: int):
        batches = list(RandomInputs(SIZE).batches(size))
        assert len(batches) == count
        assert len({batch.images.tobytes() for batch in batches}) == count

    @pytest.mark.parametrize("side", [1, 7, 33])
    def test_any_image_size(self, side: int):
        assert RandomInputs(side).draw(5).images.shape == (5, 3, side, side)


class TestArrays:
    def test_preprocessed_float32_is_taken_as_it_is(self, tmp_path: Path):
        array = np.random.default_rng(0).standard_normal((5, 3, SIZE, SIZE)).astype(np.float32)
        np.save(tmp_path / "x.npy", array)
        batches = collect(tmp_path / "x.npy")
        assert [len(batch) for batch in batches] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate([batch.images for batch in batches]), array)
        assert batches[-1].labels == ("4",)

    def test_uint8_is_normalized(self, tmp_path: Path):
        array = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
        np.save(tmp_path / "x.npy", array)
        (batch,) = collect(tmp_path / "x.npy", 3, preprocessing=Preprocessing())
        np.testing.assert_array_equal(batch.pixels, array)
        wanted = (array[1, 2, 3] / 255 - np.array(Preprocessing().mean)) / np.array(Preprocessing().std)
        np.testing.assert_allclose(batch.images[1, :, 2, 3], wanted, rtol=1e-5)

    def test_uint8_of_another_size_is_resized(self, tmp_path: Path):
        np.save(tmp_path / "x.npy", np.full((2, 40, 50, 3), 128, dtype=np.uint8))
        (batch,) = collect(tmp_path / "x.npy")
        assert batch.images.shape == (2, 3, SIZE, SIZE)
        np.testing.assert_allclose(batch.images, 128 / 255, rtol=1e-6)

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.zeros((3, SIZE, SIZE), np.float32), "has shape [3, 16, 16]"),
            (np.zeros((1, 3, 8, 8), np.float32), "float32 of shape [1, 3, 8, 8]"),
            (np.zeros((1, SIZE, SIZE, 3), np.float32), "float32 of shape [1, 16, 16, 3]"),
            (np.zeros((0, 3, SIZE, SIZE), np.float32), "is empty"),
            (np.zeros((2, 3, SIZE, SIZE), np.float64), "has dtype float64"),
            (np.zeros((2, 3, SIZE, SIZE), ">f4"), "has dtype >f4"),
            (np.zeros((2, SIZE, SIZE, 3), np.int64), "has dtype int64"),
            (np.zeros((2, 3, SIZE, SIZE), np.uint8), "its last dimension is not 3"),
            (np.zeros((), np.float32), "has shape []"),
        ],
        ids=["rank", "size", "layout", "zero", "float64", "endian", "int64", "planes", "scalar"],
    )
    def test_a_wrong_array(self, tmp_path: Path, array: np.ndarray, words: str):
        np.save(tmp_path / "x.npy", array)
        error = refused(tmp_path / "x.npy")
        assert words in error.summary
        assert "[N,3,16,16]" in error.hint

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_nan_and_inf_name_the_row(self, tmp_path: Path, value: float):
        array = np.zeros((4, 3, SIZE, SIZE), np.float32)
        array[2, 1, 3, 3] = value
        np.save(tmp_path / "x.npy", array)
        assert "NaN or Inf in row 2" in refused(tmp_path / "x.npy").summary

    def test_pickles_are_never_loaded(self, tmp_path: Path):
        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

        objects = np.empty(1, dtype=object)
        objects[0] = Bomb()
        np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
        (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bomb()))
        for name in ("objects.npy", "pickle.npy"):
            assert "never loaded" in refused(tmp_path / name).summary
        assert not (tmp_path / "ran").exists()

    def test_truncated_or_empty(self, tmp_path: Path):
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((4, 3, SIZE, SIZE), np.float32))
        for length in (0, 7, 60, 200, 5000):
            (tmp_path / "x.npy").write_bytes(buffer.getvalue()[:length])
            assert "x.npy holds" in refused(tmp_path / "x.npy").summary

    def test_preprocessed_arrays_do_not_fit_a_uint8_model(self, tmp_path: Path):
        np.save(tmp_path / "x.npy", np.zeros((1, 3, SIZE, SIZE), np.float32))
        assert "takes uint8 images" in refused(tmp_path / "x.npy", pixels=True).summary

    def test_an_archive(self, tmp_path: Path):
        np.savez(tmp_path / "x.npz", a=np.zeros(3))
        assert "archive" in refused(tmp_path / "x.npz").summary


class TestImages:
    def test_one_image(self, tmp_path: Path):
        save_image(tmp_path / "red.png")
        (batch,) = collect(tmp_path / "red.png")
        assert batch.labels == ("red.png",)
        assert batch.images.shape == (1, 3, SIZE, SIZE)
        np.testing.assert_array_equal(batch.images[0, :, 5, 5], [1.0, 0.0, 0.0])

    def test_channel_order(self, tmp_path: Path):
        save_image(tmp_path / "red.png")
        bgr = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), channel_order="BGR")
        (batch,) = collect(tmp_path / "red.png", preprocessing=bgr)
        np.testing.assert_array_equal(batch.images[0, :, 5, 5], [0.0, 0.0, 1.0])

    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
    def test_shorter_side_then_centre_crop(self, tmp_path: Path, interpolation: str):
        image = np.zeros((32, 96, 3), np.uint8)
        image[:, 32:64] = 200  # the centre square
        Image.fromarray(image).save(tmp_path / "wide.png")
        preprocessing = Preprocessing((0, 0, 0), (1, 1, 1), interpolation, crop_fraction=0.5)
        (batch,) = collect(tmp_path / "wide.png", preprocessing=preprocessing)
        np.testing.assert_allclose(batch.images[0, :, 1:-1, 1:-1], 200 / 255, rtol=1e-6)

    @pytest.mark.parametrize(("width", "height"), [(20, 30), (30, 20), (7, 5), (16, 16), (101, 33), (224, 225)])
    @pytest.mark.parametrize("crop_fraction", [0.875, 0.95, 1.0])
    def test_it_is_timms_evaluation_transform(self, tmp_path: Path, width: int, height: int, crop_fraction: float):
        import torch

        from evit_deploy.models.timm_import import import_timm

        import_timm()
        from timm.data.transforms_factory import create_transform

        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "x.png")
        preprocessing = Preprocessing(crop_fraction=crop_fraction)
        (batch,) = collect(tmp_path / "x.png", preprocessing=preprocessing)
        transform = create_transform(
            (3, SIZE, SIZE),
            interpolation="bicubic",
            crop_pct=crop_fraction,
            mean=preprocessing.mean,
            std=preprocessing.std,
        )
        wanted = transform(Image.open(tmp_path / "x.png"))
        np.testing.assert_allclose(batch.images[0], torch.as_tensor(wanted).numpy(), atol=1e-5)

    @pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
    def test_every_mode_becomes_rgb(self, tmp_path: Path, mode: str):
        name = "x.tiff" if mode == "CMYK" else "x.png"
        Image.new(mode, (20, 20)).save(tmp_path / name)
        (batch,) = collect(tmp_path / name)
        assert batch.images.shape == (1, 3, SIZE, SIZE)

    def test_a_folder_streams_in_the_order_of_names(self, tmp_path: Path):
        for name in ("c.png", "a.jpg", "b.PNG"):
            save_image(tmp_path / name)
        (tmp_path / ".hidden.png").write_bytes(b"no image")
        (tmp_path / "notes.txt").write_text("no image")
        batches = collect(tmp_path)
        assert [batch.labels for batch in batches] == [("a.jpg", "b.PNG"), ("c.png",)]

    def test_sub_folders_take_turns(self, tmp_path: Path):
        """The first images, which is all that calibration may look at, are of every class."""
        for name in (
            "cat/a.png",
            "cat/b.png",
            "cat/c.png",
            "dog/a.png",
            "dog/deep/a.png",
            "emu/.hidden/a.png",
            "z.png",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            save_image(tmp_path / name)
        (batch,) = collect(tmp_path, 8)
        assert batch.labels == ("z.png", "cat/a.png", "dog/a.png", "dog/deep/a.png", "cat/b.png", "cat/c.png")

    def test_links_to_folders_are_not_followed(self, tmp_path: Path):
        (tmp_path / "inside").mkdir()
        (tmp_path / "outside").mkdir()
        save_image(tmp_path / "outside" / "a.png")
        save_image(tmp_path / "inside" / "b.png")
        (tmp_path / "inside" / "loop").symlink_to(tmp_path / "inside")
        (tmp_path / "inside" / "away").symlink_to(tmp_path / "outside")
        (batch,) = collect(tmp_path / "inside", 4)
        assert batch.labels == ("b.png",)

    def test_an_unreadable_image_is_named_from_the_folder(self, tmp_path: Path):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir()
            save_image(tmp_path / name / "a.png")
        (tmp_path / "dog" / "a.png").write_bytes(b"no image")
        with pytest.raises(InputDataError, match=r"1 of 2 images cannot be read, first dog/a\.png is no image"):
            collect(tmp_path)

    def test_pixels_belong_to_the_images(self, tmp_path: Path):
        save_image(tmp_path / "a.png", (10, 20, 30))
        (batch,) = collect(tmp_path / "a.png", pixels=True)
        assert batch.pixels is not None
        np.testing.assert_array_equal(batch.pixels[0, 4, 4], [10, 20, 30])

    def test_unreadable_images_are_counted_and_listed_after_the_others(self, tmp_path: Path):
        for name in ("a.png", "d.png", "e.png"):
            save_image(tmp_path / name)
        (tmp_path / "b.png").write_bytes(b"no image")
        (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
        stream = open_inputs(tmp_path, SIZE, PLAIN).batches(2)
        assert [next(stream).labels, next(stream).labels] == [("a.png", "d.png"), ("e.png",)]
        with pytest.raises(InputDataError, match=r"2 of 5 images cannot be read, first b\.png") as raised:
            next(stream)
        assert [line.split()[0] for line in raised.value.details] == ["b.png", "c.png"]

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
    def test_truncated_images(self, tmp_path: Path, suffix: str):
        path = tmp_path / f"x.{suffix}"
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        whole = path.read_bytes()
        for length in (0, 10, len(whole) // 2):
            path.write_bytes(whole[:length])
            assert path.name in refused(path).summary

    def test_a_decompression_bomb(self, tmp_path: Path):
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        for side in (11_000, 40_000):
            header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
            content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
            (tmp_path / "bomb.png").write_bytes(content + chunk(b"IEND", b""))
            assert "bomb.png is too large" in refused(tmp_path / "bomb.png").summary

    def test_a_line_is_no_image(self, tmp_path: Path):
        save_image(tmp_path / "line.png", size=(5000, 1))
        assert "shape of a line" in refused(tmp_path / "line.png").summary


class TestPaths:
    def test_nothing_there(self, tmp_path: Path):
        assert "no such file or folder" in refused(tmp_path / "absent").summary

    def test_an_empty_folder(self, tmp_path: Path):
        assert "is an empty folder" in refused(tmp_path).summary

    def test_a_folder_without_images(self, tmp_path: Path):
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "c.txt").write_text("c")
        assert "holds no image among its 2 files; the first is a.txt" in refused(tmp_path).summary

    def test_a_folder_of_empty_folders(self, tmp_path: Path):
        (tmp_path / "a" / "b").mkdir(parents=True)
        assert "is an empty folder" in refused(tmp_path).summary

    def test_a_device_is_no_file(self):
        assert "neither a file nor a folder" in refused(Path("/dev/null")).summary

    @pytest.mark.parametrize("name", ["a.txt", "a.onnx", "a"])
    def test_a_file_of_another_kind(self, tmp_path: Path, name: str):
        (tmp_path / name).write_text("words")
        assert "is no image that Pillow knows" in refused(tmp_path / name).summary
