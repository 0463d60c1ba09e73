"""`evaluate` on graphs that take or give other types than FP32 images: the same answers, and faults that are seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from evit_deploy import api
from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.errors import InputDataError
from evit_deploy.evaluation import EvaluationReport, candidates
from evit_deploy.runners.base import FeedDict, Runner
from tests.small_exports import changed
from tests.tiers import tiered

Change = Callable[[np.ndarray], np.ndarray]
BACKENDS = ("onnxruntime", "openvino")
IMAGES = 120
VARIANTS: dict[str, dict[str, Any]] = {
    "fp16-io": {"precision": "fp16", "io": "fp16"},
    "uint8": {"with_preprocess": True},
    "uint8-fp16": {"with_preprocess": True, "precision": "fp16"},
    "softmax": {"with_softmax": True},
    "uint8-bf16": {"with_preprocess": True, "precision": "bf16"},
}
FED = {"fp16-io": ("float16", (3, 32, 32)), "softmax": ("float32", (3, 32, 32))}
FED_PIXELS = ("uint8", (32, 32, 3))


FAST_VARIANTS = ("uint8-bf16",)


@pytest.fixture(scope="module", params=tiered(VARIANTS, FAST_VARIANTS.__contains__))
def variant(
    request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Bundle]:
    """A name of VARIANTS and the trained model, exported so."""
    target = tmp_path_factory.mktemp("variants") / f"{request.param}.evit"
    return request.param, api.export(digits / "digits.pt", target, **VARIANTS[request.param], verify=False).bundle


def evaluate(bundle: Bundle, digits: Path, backends: tuple[str, ...] = BACKENDS) -> EvaluationReport:
    return api.evaluate(bundle, digits / "heldout.npz", backends=backends, limit=IMAGES, threads=1)


def with_changed(bundle: Bundle, target: Path, tensor: str, change: Change) -> Bundle:
    """A copy of a bundle, one tensor of its graph changed; the reference stays as it is."""
    with BundleWriter(target) as writer:
        onnx.save(changed(onnx.load(bundle.onnx_path), tensor, change), writer.path / "model.onnx")
        shutil.copyfile(bundle.weights_path, writer.path / "weights.safetensors")
        return writer.commit({key: value for key, value in bundle.manifest.items() if key != "manifest_sha256"})


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], list[tuple[str, tuple[int, ...]]]]:
    """Change what every backend is fed; the answer is filled with type and shape of each image before the change."""
    real = candidates.backend_runner

    def plant(change: Change) -> list[tuple[str, tuple[int, ...]]]:
        seen: list[tuple[str, tuple[int, ...]]] = []

        def make(*arguments: Any, **options: Any) -> Runner:
            runner = real(*arguments, **options)
            infer = runner.infer

            def changed(feed: FeedDict) -> dict[str, np.ndarray]:
                seen.extend((array.dtype.name, array.shape[1:]) for array in feed.values())
                return infer({name: change(array) for name, array in feed.items()})

            monkeypatch.setattr(runner, "infer", changed)
            return runner

        monkeypatch.setattr(candidates, "backend_runner", make)
        return seen

    return plant


def test_the_accuracy_is_that_of_the_plain_bundle(
    variant: tuple[str, Bundle],
    digits: Path,
    digits_bundle: Bundle,
    fed: Callable[[Change], list[tuple[str, tuple[int, ...]]]],
) -> None:
    name, bundle = variant
    plain = evaluate(digits_bundle, digits, ("onnxruntime",))
    seen = fed(lambda images: images)
    report = evaluate(bundle, digits)
    assert [row.backend for row in report.rows] == ["reference", *BACKENDS]
    assert {row.correct for row in report.rows} == {plain.rows[0].correct}
    assert plain.rows[0].correct > 0.97 * IMAGES
    assert [row.agreement for row in report.rows] == [None, 1.0, 1.0]
    assert set(seen) == {FED.get(name, FED_PIXELS)}


def test_images_that_are_upside_down_for_the_graph_alone_are_seen(
    variant: tuple[str, Bundle], digits: Path, fed: Callable[[Change], list[tuple[str, tuple[int, ...]]]]
) -> None:
    """Rows of a map [N,C,H,W] or of pixels [N,H,W,C], turned around."""
    _, bundle = variant
    fed(lambda images: np.ascontiguousarray(images[:, ::-1] if images.dtype == np.uint8 else images[:, :, ::-1]))
    report = api.evaluate(bundle, digits / "heldout.npz", backends=BACKENDS, limit=IMAGES, threads=1, max_top1_drop=0.5)
    assert report.exit_code == 3
    for row in report.rows[1:]:
        assert row.agreement is not None
        assert row.agreement < 0.8
        assert row.top1_drop_points is not None
        assert row.top1_drop_points > 10


def test_classes_in_another_order_in_the_graph_are_seen(
    variant: tuple[str, Bundle], digits: Path, tmp_path: Path
) -> None:
    """The last layer's rows moved by one: every answer is the class behind the right one."""
    _, bundle = variant
    for tensor in ("model.head.weight", "model.head.bias"):
        bundle = with_changed(bundle, tmp_path / f"{tensor}.evit", tensor, lambda rows: np.roll(rows, 1, axis=0))
    report = evaluate(bundle, digits)
    assert report.rows[0].top1 > 0.97
    assert [row.agreement for row in report.rows[1:]] == [0.0, 0.0]


@pytest.mark.parametrize(("tensor", "factor"), [("shift", 0.0), ("scale", 2.0)], ids=["no mean", "half the deviation"])
@pytest.mark.parametrize(
    "variant", tiered((name for name in VARIANTS if name not in FED), FAST_VARIANTS.__contains__), indirect=True
)
def test_a_wrong_mean_or_deviation_in_the_graph_is_seen(
    variant: tuple[str, Bundle], digits: Path, tmp_path: Path, tensor: str, factor: float
) -> None:
    _, bundle = variant
    report = evaluate(with_changed(bundle, tmp_path / "wrong.evit", tensor, lambda values: values * factor), digits)
    assert report.rows[0].top1 > 0.97
    for row in report.rows[1:]:
        assert row.agreement is not None
        assert row.agreement < 0.9


def test_preprocessed_images_do_not_fit_a_graph_that_preprocesses(
    variant: tuple[str, Bundle], digits_heldout: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    name, bundle = variant
    images, labels = (array[:8] for array in digits_heldout)
    floats = np.ascontiguousarray(((images.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2))
    np.savez(tmp_path / "floats.npz", images=floats, labels=labels)
    if name in FED:
        report = api.evaluate(bundle, tmp_path / "floats.npz", backends=BACKENDS, threads=1)
        assert [row.agreement for row in report.rows] == [None, 1.0, 1.0]
        return
    with pytest.raises(InputDataError, match="takes uint8 images"):
        api.evaluate(bundle, tmp_path / "floats.npz", backends=BACKENDS, threads=1)
