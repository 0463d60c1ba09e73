"""From images to ranges: histograms whatever the batches, thresholds, what is refused, and memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from evit_deploy.errors import InputDataError
from evit_deploy.images.sources import FirstInputs, InputBatch, InputSource, RepeatedInputs
from evit_deploy.onnx.quantize import find_layers
from evit_deploy.quantization.calibration import CHUNK_IMAGES, KEPT_IMAGES, Calibration, calibrate
from evit_deploy.quantization.histogram import BINS, Histogram
from evit_deploy.quantization.sensitivity import layer_errors, output_error
from evit_deploy.quantization.thresholds import METHODS, PERCENTILE, threshold
from tests import small_exports
from tests.small_models import random_images, small_graph


def histogram_of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part.astype(np.float32))
    return histogram


def normal(count: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


# Histograms


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 300.0, 1e30])
def test_a_histogram_counts_as_numpy_does(scale: float) -> None:
    values = normal(5000, scale)
    histogram = histogram_of(values)
    edges = np.arange(BINS + 1) * histogram.bin_width
    assert (histogram.counts == np.histogram(np.abs(values), edges)[0]).all()
    assert histogram.highest == np.abs(values).max()
    assert BINS // 2 * histogram.bin_width <= histogram.highest < BINS * histogram.bin_width


def test_neither_batches_nor_their_order_matter() -> None:
    parts = [normal(700, scale, seed) for seed, scale in enumerate((1e-4, 50.0, 1.0, 0.0, 7e6))]
    whole = histogram_of(np.concatenate(parts))
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (3, 2, 4, 0, 1)):
        pieces = histogram_of(*(parts[index] for index in order))
        assert (pieces.counts == whole.counts).all()
        assert pieces.bin_width == whole.bin_width
        assert pieces.highest == whole.highest


@pytest.mark.parametrize("value", [1.0, 2.0**-20, 2.0**40])
def test_a_power_of_two_has_a_bin(value: float) -> None:
    """It is the lowest value of the bins above it, so one more doubling is needed."""
    histogram = histogram_of(np.array([value]))
    assert histogram.counts.sum() == 1
    assert histogram.counts[BINS // 2] == 1


def test_values_too_small_for_a_factor_count_as_zeros() -> None:
    histogram = histogram_of(np.array([1e-40, 0.0]))
    assert histogram.counts[0] + histogram.counts[1:].sum() == 2
    assert histogram_of(np.array([1e-40]), np.array([1.0])).counts[0] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_histogram_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        histogram_of(np.array([0.0, bad, 1.0]))


# Thresholds


def test_minmax_is_the_largest() -> None:
    assert threshold(histogram_of(np.array([1.0, -3.7, 2.0])), "minmax") == np.float32(3.7)


@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0])
def test_percentile_is_numpys(scale: float) -> None:
    values = normal(200_000, scale)
    histogram = histogram_of(values)
    expected = np.percentile(np.abs(values), PERCENTILE)
    assert threshold(histogram, "percentile") == pytest.approx(expected, abs=2 * histogram.bin_width)
    assert threshold(histogram, "percentile") < histogram.highest


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_no_range(method: str) -> None:
    assert threshold(histogram_of(np.zeros(10)), method) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_few_values_have_a_range(method: str, count: int) -> None:
    values = normal(count, seed=count)
    assert 0 < threshold(histogram_of(values), method) <= np.abs(values).max()


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_one_outlier_does_not_set_the_range(method: str) -> None:
    """A million normal values and one at 60: of 127 levels, minmax would leave the others eight."""
    histogram = histogram_of(normal(1_000_000), np.array([60.0]))
    assert threshold(histogram, "minmax") == 60
    assert 2.5 < threshold(histogram, method) < 6


def test_entropy_keeps_a_range_that_is_used_to_its_end() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 1_000_000)
    assert threshold(histogram_of(values), "entropy") > 0.97


def test_entropy_does_not_mind_the_zeros_of_a_relu() -> None:
    values = normal(500_000)
    with_zeros = histogram_of(values, np.zeros(5_000_000))
    assert threshold(with_zeros, "entropy") == pytest.approx(threshold(histogram_of(values), "entropy"), rel=0.1)


# Calibration


class CountedImages(InputSource):
    """Random 16 x 16 images, drawn one batch at a time."""

    name = "counted"

    def __init__(self, count: int, images: np.ndarray | None = None) -> None:
        self.count = count if images is None else len(images)
        self.given = images
        self.largest_batch = 0
        self.passes = 0

    def batches(self, size: int, *, pixels: bool = False) -> Iterator[InputBatch]:
        self.passes += 1
        for start in range(0, self.count, size):
            rows = min(size, self.count - start)
            self.largest_batch = max(self.largest_batch, rows)
            images = random_images(rows, seed=start) if self.given is None else self.given[start : start + rows]
            yield InputBatch(images, None, tuple(str(start + row) for row in range(rows)))


def calibrated(source: InputSource, batch: int | str = "batch") -> Calibration:
    model = onnx.load_model_from_string(small_graph(batch=batch))
    return calibrate(model, find_layers(model), source, lambda text: None, threads=1)


def peak_bytes(count: int) -> int:
    tracemalloc.start()
    try:
        calibrated(CountedImages(count))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_many_images_need_the_memory_of_few() -> None:
    """Of the 1900 images that are more, the pixels alone would be 5.8 MB."""
    calibrated(CountedImages(8))  # imports
    few, many = peak_bytes(100), peak_bytes(2000)
    assert many < few + 300_000


def test_images_are_read_once_and_a_few_at_a_time() -> None:
    source = CountedImages(50)
    found = calibrated(source)
    assert (source.passes, source.largest_batch) == (1, CHUNK_IMAGES)
    assert found.images == 50
    assert sum(map(len, found.kept)) == KEPT_IMAGES
    (first, second) = found.histograms.values()
    assert first.counts.sum() == 50 * 3 * 16 * 16
    assert second.counts.sum() == 50 * 8 * 3 * 3


@pytest.mark.parametrize("images", [2, 3, 7, 9])
def test_what_fills_up_a_fixed_batch_is_not_counted(images: int) -> None:
    dynamic, fixed = (
        calibrated(CountedImages(0, random_images(images))),
        calibrated(CountedImages(0, random_images(images)), batch=3),
    )
    assert {len(feed) for feed in fixed.kept} == {3}
    assert dynamic.digest == fixed.digest
    for one, other in zip(dynamic.histograms.values(), fixed.histograms.values(), strict=True):
        assert one.counts.sum() == other.counts.sum()
        assert one.highest == pytest.approx(other.highest, rel=1e-6)


def test_the_digest_is_that_of_the_images_in_their_order() -> None:
    images = random_images(10)
    digest = calibrated(CountedImages(0, images)).digest
    assert calibrated(CountedImages(0, images.copy())).digest == digest
    assert calibrated(CountedImages(0, images[::-1])).digest != digest
    assert calibrated(CountedImages(0, images[:9])).digest != digest


def test_few_and_plain_images_are_noted() -> None:
    images = random_images(40)
    assert calibrated(CountedImages(0, images)).notes == ()
    images[[3, 5]] = np.array([0.1, 0.2, 0.3], np.float32).reshape(3, 1, 1)
    assert calibrated(CountedImages(0, images)).notes == ("2 of 40 calibration images are a single colour",)
    assert "on 31 images only" in calibrated(CountedImages(31)).notes[0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 3, 16, 16), np.float32), "counted holds no images"),
        (np.full((3, 3, 16, 16), 0.5, np.float32), "every one of 3 images is a single colour"),
        (random_images(3).mean(axis=(2, 3), keepdims=True).repeat(16, 2).repeat(16, 3), "is a single colour"),
        (random_images(1).repeat(6, 0), "all 6 images are the same"),
        (7e37 * random_images(6), "head works on NaN or infinity for one of 0, 1, 2, 3"),
    ],
    ids=["none", "grey", "colours", "same", "overflow"],
)
def test_images_that_calibrate_nothing(images: np.ndarray, message: str) -> None:
    assert np.isfinite(images).all()
    with pytest.raises(InputDataError, match=message) as caught:
        calibrated(CountedImages(0, images.astype(np.float32)))
    assert caught.value.hint


# Sensitivity


def test_the_layer_with_a_bad_range_is_the_worst() -> None:
    """A range that is planted ten times too small shows in this layer's error, and in no other's."""
    model = small_exports.simplified("msa")[0]
    layers = [layer for layer in find_layers(model) if not layer.at_edge][:6]
    array = small_exports.input_array("msa", 8)
    source = CountedImages(0, array)
    found = calibrate(model, layers, source, lambda text: None, threads=1)
    limits = {name: threshold(histogram, "minmax") for name, histogram in found.histograms.items()}
    good = layer_errors(model, layers, limits, found.kept, lambda text: None, threads=1)
    planted = layers[3]
    bad = layer_errors(
        model, layers, {**limits, planted.activation: limits[planted.activation] / 10}, found.kept, lambda text: None, 1
    )
    assert max(range(len(bad)), key=bad.__getitem__) == 3
    assert bad[3] > 3 * good[3]
    assert [error for index, error in enumerate(bad) if index != 3] == [e for i, e in enumerate(good) if i != 3]


def test_the_same_graph_has_no_error() -> None:
    model = onnx.load_model_from_string(small_graph())
    assert output_error(model, model, [random_images(3)]) == 0


# Sources around sources


def test_a_batch_of_any_size_from_given_images() -> None:
    images = random_images(5)
    source = RepeatedInputs(CountedImages(0, images))
    assert source.generated
    ones = list(source.batches(1))
    assert [len(batch) for batch in ones] == [1, 1, 1, 1]
    assert (np.concatenate([batch.images for batch in ones]) == images[:4]).all()
    (twelve,) = source.batches(12)
    assert (twelve.images == images[np.arange(12) % 5]).all()
    assert twelve.labels == tuple(str(row % 5) for row in range(12))


def test_the_first_images_of_many() -> None:
    assert [len(batch) for batch in FirstInputs(CountedImages(100), 10).batches(4)] == [4, 4, 4]
    assert [len(batch) for batch in FirstInputs(CountedImages(6), 10).batches(4)] == [4, 2]
