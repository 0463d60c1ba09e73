from __future__ import annotations

import numpy as np
import pytest

from evit_deploy.parity.metrics import RowMetrics, compare_rows


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_definitions_on_numbers_done_by_hand():
    metrics = compare_rows(rows([3.0, 4.0]), rows([3.0, 4.5]))
    rms = np.sqrt(12.5)
    assert metrics.max_abs == pytest.approx([0.5])
    assert metrics.rms_rel == pytest.approx([np.sqrt(0.125) / rms])
    assert metrics.max_rel == pytest.approx([0.5 / 4.0])
    assert metrics.cosine == pytest.approx([27.0 / (5.0 * np.hypot(3.0, 4.5))])
    assert metrics.psnr_db == pytest.approx([20 * np.log10(4.0 / np.sqrt(0.125))])


def test_max_rel_has_the_rms_as_its_floor():
    metrics = compare_rows(rows([0.0, 1.0, 1.0, 1.0]), rows([0.1, 1.0, 1.0, 1.0]))
    assert metrics.max_rel == pytest.approx([0.1 / np.sqrt(0.75)])


def test_equal_rows():
    metrics = compare_rows(rows([1.0, 2.0]), rows([1.0, 2.0]))
    assert (metrics.max_abs, metrics.rms_rel, metrics.max_rel) == (0.0, 0.0, 0.0)
    assert metrics.cosine == pytest.approx([1.0])
    assert np.isnan(metrics.psnr_db).all()
    assert metrics.top1.all()
    assert metrics.top5.all()


def test_every_row_has_its_own_metrics():
    metrics = compare_rows(rows([1.0, 2.0], [100.0, 200.0]), rows([1.1, 2.0], [100.1, 200.0]))
    assert metrics.rms_rel[0] == pytest.approx(100 * metrics.rms_rel[1], rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_non_finite_rows_have_no_distance_and_spoil_no_other_row(value: float, side: str):
    sound, spoiled = rows([1.0, 2.0], [3.0, 4.0]), rows([1.0, 2.0], [3.0, value])
    metrics = compare_rows(spoiled, sound) if side == "reference" else compare_rows(sound, spoiled)
    for name in ("max_abs", "max_rel", "rms_rel", "cosine", "psnr_db"):
        assert np.isnan(getattr(metrics, name)[1]), name
    assert metrics.rms_rel[0] == 0.0
    assert metrics.top1.tolist() == [True, False]
    assert metrics.top5.tolist() == [True, False]
    counted = int(side == "candidate")
    assert (metrics.nan.sum(), metrics.inf.sum()) == ((counted, 0) if np.isnan(value) else (0, counted))


def test_zero_reference_has_no_finite_relative_error():
    metrics = compare_rows(rows([0.0, 0.0], [0.0, 0.0]), rows([0.0, 0.0], [1.0, 0.0]))
    assert not np.isfinite(metrics.rms_rel).any()
    assert not (metrics.rms_rel <= 1e9).any()


@pytest.mark.parametrize(("dtype", "value"), [(np.float16, 60000.0), (np.float32, 2.0**127)])
def test_differences_beyond_the_range_of_the_inputs_type_are_finite(dtype: type[np.floating], value: float):
    reference = np.full((1, 4), value, dtype=dtype)
    metrics = compare_rows(reference, -reference)
    assert float(metrics.max_abs[0]) == 2 * value
    assert float(metrics.rms_rel[0]) == pytest.approx(2.0)


class TestAgreement:
    reference = rows([0.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5])

    def test_another_first_class_disagrees(self):
        metrics = compare_rows(self.reference, rows([9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5]))
        assert not metrics.top1[0]
        assert not metrics.top5[0]

    def test_the_order_among_the_five_does_not_matter(self):
        metrics = compare_rows(self.reference, rows([0.0, 4.0, 5.0, 1.0, 2.0, 3.0, 0.5]))
        assert not metrics.top1[0]
        assert metrics.top5[0]

    def test_exact_ties_agree_whichever_wins(self):
        tied = rows([1.0, 1.0, 0.0])
        assert compare_rows(tied, rows([1.0, 1.1, 0.0])).top1[0]
        assert compare_rows(tied, rows([1.1, 1.0, 0.0])).top1[0]

    @pytest.mark.parametrize(("gap", "agrees"), [(1e-5, True), (1e-2, False)])
    def test_ties_within_the_tolerance_agree(self, gap: float, agrees: bool):
        metrics = compare_rows(rows([1.0, 1.0 + gap, 0.0]), rows([1.0 + gap, 1.0, 0.0]), tie_rel=1e-4)
        assert bool(metrics.top1[0]) is agrees

    @pytest.mark.parametrize("classes", [1, 2, 4, 5])
    def test_fewer_than_six_classes(self, classes: int):
        reference = np.arange(1.0, classes + 1)[None]
        metrics = compare_rows(reference, reference[:, ::-1])
        assert metrics.top5[0]
        assert bool(metrics.top1[0]) is (classes == 1)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), ()])
def test_nothing_to_compare_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_rows(np.zeros(shape), np.zeros(shape))


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        compare_rows(np.zeros((2, 3)), np.zeros((1, 3)))


def test_concatenate_keeps_the_order():
    parts = [compare_rows(rows([1.0, 1.0]), rows([1.0, 1.0 + error])) for error in (0.1, 0.3)]
    assert RowMetrics.concatenate(parts).max_abs == pytest.approx([0.1, 0.3], rel=1e-5)
