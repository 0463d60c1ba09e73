"""`quantize` from end to end: accuracy on the digits, what the new bundle says, the same bytes twice, every refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
from jsonschema import Draft202012Validator

from evit_deploy import api
from evit_deploy.bundle import Bundle, hash_file
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.cli import quantize as command
from evit_deploy.errors import EXIT_FAILED, EXIT_PARITY, EXIT_USAGE, ParityError
from evit_deploy.images.decode import normalize
from evit_deploy.quantization.thresholds import METHODS
from evit_deploy.quantizing import DEFAULT_METHOD
from tests.conftest import process_environment
from tests.in_process import cli
from tests.test_schemas import REGISTRY, SCHEMAS

if TYPE_CHECKING:
    from evit_deploy.api import QuantizeResult

MAX_TOP1_DROP = 0.005
CALIBRATION_IMAGES = 256


@pytest.fixture(scope="module")
def images(digits: Path) -> Path:
    """uint8 [256, 32, 32, 3] of the training split."""
    return digits / "calibration.npy"


@pytest.fixture(scope="module")
def result(digits_bundle: Bundle, images: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizeResult:
    output = tmp_path_factory.mktemp("int8") / "digits-int8.evit"
    return api.quantize(digits_bundle, images, output)


@pytest.fixture(scope="module")
def document(result: QuantizeResult) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(result.to_json(), allow_nan=False))
    return loaded


def logits_of(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(bundle.onnx_path, providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"input": normalize(images, bundle.preprocessing)})[0]
    return logits


def test_accuracy_stays(
    result: QuantizeResult, digits_bundle: Bundle, digits_heldout: tuple[np.ndarray, np.ndarray]
) -> None:
    """Top-1 on images that calibration has not seen; the logits do change, so INT8 it is."""
    pixels, labels = digits_heldout
    exact, rounded = (logits_of(bundle, pixels) for bundle in (digits_bundle, Bundle.open(result.path)))
    before, after = ((logits.argmax(1) == labels).mean() for logits in (exact, rounded))
    assert before - after <= MAX_TOP1_DROP
    difference = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 1e-3 < difference < 0.1


def test_the_bundle_says_what_it_is(result: QuantizeResult, digits_bundle: Bundle) -> None:
    bundle, source = Bundle.open(result.path), digits_bundle
    assert bundle.manifest["onnx"]["precision"] == "int8"
    assert bundle.manifest["verification"]["verdict"] == "pass"
    assert bundle.manifest["verification"]["tolerance"]["precision"] == "int8"
    assert hash_file(bundle.weights_path) == hash_file(source.weights_path), "the reference is the same"
    for field in ("model", "preprocessing", "class_names", "origin"):
        assert bundle.manifest[field] == source.manifest[field]
    for field in ("inputs", "outputs", "blocks", "operators", "max_batch"):
        assert bundle.manifest["onnx"][field] == source.manifest["onnx"][field]
    calibration = bundle.manifest["calibration"]
    assert calibration["method"] == DEFAULT_METHOD
    assert (calibration["source"], calibration["images"]) == ("calibration.npy", CALIBRATION_IMAGES)
    assert calibration["source_onnx_sha256"] == source.onnx_sha256
    assert calibration["quantized"] == len(result.quantized)
    assert calibration["excluded"] == {"node_conv2d": "first or last layer", "node_linear_12": "first or last layer"}
    assert "calibration" not in source.manifest
    Draft202012Validator(SCHEMAS["manifest"], registry=REGISTRY).validate(bundle.manifest)
    assert result.onnx_bytes == bundle.onnx_path.stat().st_size < 0.5 * result.source_bytes


def test_the_report_lists_every_layer_worst_first(result: QuantizeResult, document: dict[str, Any]) -> None:
    Draft202012Validator(SCHEMAS["quantize"], registry=REGISTRY).validate(document)
    stored = json.loads((result.path / "reports/quantize.json").read_text(encoding="utf-8"))
    assert stored == document
    errors = [layer["error"] for layer in document["layers"] if layer["quantized"]]
    assert len(errors) == len(document["layers"]) - 2
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 2 * document["error"]
    assert all(0 < layer["threshold"] <= layer["highest"] for layer in document["layers"])


@pytest.mark.exhaustive
def test_the_same_images_give_the_same_bytes(digits_bundle: Bundle, images: Path, tmp_path: Path) -> None:
    """In two processes whose sets and dictionaries of strings are in different order."""
    hashes = set()
    for seed in ("1", "2"):
        output = tmp_path / f"{seed}.evit"
        arguments = ("quantize", digits_bundle.path, "--calibrate", images, "-o", output, "--no-verify", "--json")
        arguments = (*arguments, "--exclude", "stages.0", "--exclude", "stages.1")
        done = subprocess.run(
            [sys.executable, "-m", "evit_deploy", *map(str, arguments)],
            env=process_environment({"PYTHONHASHSEED": seed}),
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        assert found["verification"] is None
        layers = json.dumps([found["error"], found["layers"], found["calibration"]])
        hashes.add((hash_file(output / "model.onnx"), layers))
    assert len(hashes) == 1


@pytest.mark.exhaustive
def test_other_ranges_give_other_bytes(digits_bundle: Bundle, images: Path, tmp_path: Path) -> None:
    seen = set()
    for method in METHODS:
        output = tmp_path / f"{method}.evit"
        found = api.quantize(digits_bundle, images, output, method=method, exclude=["stages"], verify=False)
        seen.add(found.onnx_sha256)
    assert len(seen) == len(METHODS)


@pytest.mark.exhaustive
def test_layers_are_chosen_by_name(digits_bundle: Bundle, images: Path, tmp_path: Path) -> None:
    found = api.quantize(
        digits_bundle,
        images,
        tmp_path / "a.evit",
        exclude=["stages.0", "stages.1", "Gemm_18"],
        include_first_last=True,
        verify=False,
    )
    kept = {row.layer.node: row.excluded for row in found.kept}
    assert kept.pop("Gemm_18") == "--exclude Gemm_18"
    assert set(kept.values()) == {"--exclude stages.0", "--exclude stages.1"}
    assert all(row.layer.module.startswith(row.excluded.split()[1]) for row in found.kept if row.layer.node in kept)
    assert {"node_conv2d", "node_linear_12"} <= {row.layer.node for row in found.quantized}


@pytest.mark.exhaustive
def test_the_text(digits_bundle: Bundle, digits: Path, tmp_path: Path) -> None:
    heldout = digits / "heldout"
    done = cli(
        "quantize", digits_bundle.path, "--calibrate", heldout, "-o", tmp_path / "t.evit", "--exclude", "stages.0"
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert any(line.startswith("calibrated  48 images of heldout/, percentile") for line in lines)
    assert any(line.startswith("layers      25 in INT8, 10 in FP32") for line in lines)
    assert any(line.startswith("verified    pass") for line in lines)
    at = lines.index("error of the output with one layer alone in INT8, the worst 10 of 25:")
    assert lines[at + 1].split() == ["layer", "type", "module", "rms_rel", "range/largest"]
    assert lines[at + 12] == ""
    assert "first or last layer" in lines[-1]
    inspected = cli("inspect", tmp_path / "t.evit").out
    assert "48 images of heldout/, percentile, 25 layers in int8, 10 left in FP32" in inspected
    assert "precision            int8, float" in inspected


def test_the_images_may_lie_in_folders_of_classes(digits_bundle: Bundle, digits: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.evit"
    quick = ("--exclude", "stages", "--no-verify", "-o", target)
    done = cli("quantize", digits_bundle.path, "--calibrate", digits / "classes", *quick)
    assert done.code == 0, done.err
    assert any(line.startswith("calibrated  360 images of classes/, percentile") for line in done.out.splitlines())
    assert Bundle.open(target).manifest["calibration"]["images"] == 360


def test_the_command_knows_the_methods() -> None:
    """It names them without importing what computes them."""
    assert set(command.METHOD_CHOICES) == set(METHODS)


@pytest.mark.exhaustive
def test_a_graph_that_preprocesses_and_has_a_fixed_batch(digits_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    made = api.export(digits_checkpoint, tmp_path / "p.evit", with_preprocess=True, batch=3, verify=False)
    found = api.quantize(made.bundle, images, tmp_path / "q.evit", exclude=["stages.0", "stages.1"])
    assert found.verification is not None
    assert found.verification.verdict == "pass"
    assert not found.notes
    float32 = tmp_path / "float32.npy"
    np.save(float32, np.zeros((2, 3, 32, 32), np.float32))
    done = cli("quantize", made.bundle.path, "--calibrate", float32, "-o", tmp_path / "r.evit")
    assert done.code == EXIT_FAILED
    assert "takes uint8 images" in done.error


def test_float_values_that_are_no_normalised_pixels_are_noted(digits_bundle: Bundle, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "raw.npy", pixels)
    np.save(tmp_path / "good.npy", (pixels / 255 - 0.5) / 0.5)

    def notes(name: str) -> tuple[str, ...]:
        found = api.quantize(
            digits_bundle, tmp_path / f"{name}.npy", tmp_path / f"{name}.evit", exclude=["stages"], verify=False
        )
        return found.notes

    assert ["reach 255" in note for note in notes("raw")] == [True]
    assert not notes("good")


# What fails leaves nothing behind


def test_a_dead_layer_stays_in_fp32(digits_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """A layer that works on zeros has no range; it is left alone, and said so."""
    saved = torch.load(digits_checkpoint, weights_only=True)
    for name in ("weight", "bias"):
        saved["state_dict"][f"stages.0.blocks.0.local.expand.{name}"].zero_()
    torch.save(saved, tmp_path / "dead.pt")
    made = api.export(tmp_path / "dead.pt", tmp_path / "dead.evit", verify=False)
    found = api.quantize(made.bundle, images, tmp_path / "q.evit", exclude=["stages.1", "stages.2"], verify=False)
    dead = [row.layer.module for row in found.kept if row.excluded == "its input was always zero"]
    assert "stages.0.blocks.0.local.depthwise" in dead


def test_a_graph_too_far_from_pytorch_is_not_written(
    digits_bundle: Bundle, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges planted a hundred times too small."""
    monkeypatch.setattr("evit_deploy.quantizing.threshold", lambda histogram, method: histogram.highest / 100)
    with pytest.raises(ParityError, match="too far from PyTorch") as caught:
        api.quantize(digits_bundle, images, tmp_path / "bad.evit", exclude=["stages"])
    assert "--exclude the worst layers (node_conv2d_1)" in caught.value.hint
    assert caught.value.exit_code == EXIT_PARITY
    assert not list(tmp_path.iterdir())


def test_the_default_name_and_no_silent_replacement(
    digits_bundle: Bundle, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{digits_bundle.path.stem}-int8.evit"
    quick = ("--calibrate", images, "--exclude", "stages", "--no-verify")
    assert cli("quantize", digits_bundle.path, *quick).code == 0
    assert Bundle.open(name).manifest["verification"] == {"verdict": "skipped"}
    again = cli("quantize", digits_bundle.path, *quick)
    assert (again.code, f"{name} exists" in again.error) == (EXIT_FAILED, True)
    assert cli("quantize", digits_bundle.path, *quick, "--force").code == 0


def test_the_only_fp32_bundle_is_not_replaced(digits_bundle: Bundle, images: Path) -> None:
    before = digits_bundle.onnx_sha256
    path = os.path.join(digits_bundle.path.parent, ".", digits_bundle.path.name)
    done = cli("quantize", digits_bundle.path, "--calibrate", images, "-o", path, "--force")
    assert (done.code, "is the bundle to quantize" in done.error) == (EXIT_USAGE, True)
    assert Bundle.open(digits_bundle.path).onnx_sha256 == before


@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_only_fp32_can_be_quantized(digits_bundle: Bundle, images: Path, tmp_path: Path, precision: str) -> None:
    source = tmp_path / "s.evit"
    with BundleWriter(source) as writer:
        for name in ("model.onnx", "weights.safetensors"):
            (writer.path / name).write_bytes((digits_bundle.path / name).read_bytes())
        onnx = {**digits_bundle.manifest["onnx"], "precision": precision}
        kept = {key: digits_bundle.manifest[key] for key in ("model", "preprocessing", "class_names", "origin")}
        writer.commit({**kept, "onnx": onnx, "verification": {"verdict": "skipped"}, "versions": {}})
    done = cli("quantize", source, "--calibrate", images)
    assert done.code == EXIT_USAGE
    assert f"s.evit is {precision}, and only an FP32 bundle can be quantized" in done.error


def test_an_int8_bundle_is_verified_on_given_images_alone(result: QuantizeResult, images: Path) -> None:
    without = cli("verify", result.path)
    assert (without.code, "give some with --input" in without.error) == (EXIT_USAGE, True)
    report = api.verify(result.path, inputs=images, batches=[1, 5])
    assert report.verdict == "pass"
    assert {row.input for row in report.rows} == {"calibration.npy"}
    assert {row.batch for row in report.rows} == {1, 5}


def save_images(folder: Path, kind: str) -> Path:
    """Calibration data that is none."""
    path = folder / f"{kind}.npy"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    floats = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    if kind == "colours":
        np.save(path, np.broadcast_to(pixels[:, :1, :1], pixels.shape))
    elif kind == "same":
        np.save(path, pixels[[0, 0, 0]])
    elif kind == "nan":
        floats[2, 1, 3, 3] = np.nan
        np.save(path, floats)
    elif kind == "size":
        np.save(path, floats[:, :, :31])
    elif kind == "empty":
        np.save(path, floats[:0])
    elif kind == "text":
        path.write_text("no array")
    elif kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        path.mkdir()
        (path / "a.png").write_bytes(b"\x89PNG")
    elif kind == "nested":
        (path / "cat").mkdir(parents=True)
        (path / "cat" / "a.png").write_bytes(b"\x89PNG")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("colours", "every one of 4 images is a single colour"),
        ("same", "all 3 images are the same"),
        ("nan", "has NaN or Inf in row 2"),
        ("size", "is float32 of shape [4, 3, 31, 32]"),
        ("empty", "is empty"),
        ("text", "text.npy holds"),
        ("folder", "is an empty folder"),
        ("unreadable", "a.png"),
        ("nested", "cat/a.png is no image that Pillow knows"),
        ("missing", "no such file or folder"),
    ],
)
def test_bad_calibration_data_is_one_line(digits_bundle: Bundle, tmp_path: Path, kind: str, message: str) -> None:
    done = cli("quantize", digits_bundle.path, "--calibrate", save_images(tmp_path, kind), "-o", tmp_path / "x.evit")
    assert done.code == EXIT_FAILED
    assert message in next(line for line in done.err.splitlines() if line.startswith("evit-deploy: error: "))
    assert not (tmp_path / "x.evit").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no calibration images were named"),
        (("--method", "mean"), "unknown calibration method 'mean'"),
        (("--exclude", "stages.9"), "is called 'stages.9': did you mean 'stages."),
        (("--exclude", "stem", "--exclude", "stages"), "every layer is excluded"),
    ],
)
def test_usage_errors(
    digits_bundle: Bundle, images: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = ("--calibrate", images) if arguments else ()
    done = cli("quantize", digits_bundle.path, *given, *arguments, "-o", tmp_path / "x.evit")
    assert (done.code, message in done.error) == (EXIT_USAGE, True), done.error
    assert not list(tmp_path.iterdir())
