"""`export` from checkpoint to bundle: every family and option, what the bundle records, and that accuracy survives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import evit_deploy
from evit_deploy import exporting
from evit_deploy.bundle import Bundle
from evit_deploy.errors import BundleError, CheckpointError, UsageError
from evit_deploy.models import load_model
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.specs import ModelSpec
from tests.in_process import cli
from tests.tiers import tiered

if TYPE_CHECKING:
    from conftest import RunCli

# Attention layers: msa and msra have one per block, mit has them in its last two stages only.
OPERATORS = {
    "digits": {"EvitMultiScaleAttention": 2, "EvitProjectedMultiScaleAttention": 1},
    "mit-b0": {"EvitLiteMLA": 4},
    "msra-m0": {"EvitCascadedAttention4": 6},
}


def export(*arguments: str | Path) -> Bundle:
    """A bundle by the command line; the last argument is its path."""
    *options, target = arguments
    done = cli("export", *options, "--output", target)
    assert done.code == 0, done.err
    return Bundle.open(target)


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def run_onnx(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    """As somebody else would run the file: ONNX Runtime alone, and what the file says of its input."""
    session = onnxruntime.InferenceSession(bundle.onnx_path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images})
    result: np.ndarray = output
    return result


def network_input(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 32, 32, 3] to float32 [N, 3, 32, 32] with mean and deviation 0.5, as the digits model was trained."""
    scaled = (images.astype(np.float32) / 255 - 0.5) / 0.5
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def pytorch_logits(digits_checkpoint: Path, digits_heldout: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """All held-out images through PyTorch, with the weights straight from the checkpoint."""
    saved = torch.load(digits_checkpoint, weights_only=True)
    config = {key: saved["config"][key] for key in ("channels", "depths", "num_heads", "pos_embed_size")}
    model = load_model(ModelSpec("msa", "custom", 10, 32, config), saved["state_dict"])
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(network_input(digits_heldout[0]))).numpy()
    return logits


@pytest.fixture(scope="module")
def exported(digits_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The trained digits model, or `export --random-weights NAME` at 64 px, once per name."""
    folder = tmp_path_factory.mktemp("random")
    bundles = {"digits": digits_bundle}

    def get(name: str) -> Bundle:
        if name not in bundles:
            bundles[name] = export("--random-weights", name, "--image-size", "64", folder / f"{name}.evit")
        return bundles[name]

    return get


# Families


@pytest.mark.parametrize("name", OPERATORS)
def test_each_family_is_exported_fused_and_verified(name: str, exported: Callable[[str], Bundle]) -> None:
    bundle = exported(name)
    operators = OPERATORS[name]
    facts = bundle.manifest["onnx"]
    assert facts["operators"] == operators
    assert facts["simplified"]["applied"] is True, facts["simplified"]["reason"]
    assert (facts["simplified"]["checks"], facts["simplified"]["batches"]) == (3, [1, 3])
    assert bundle.manifest["verification"]["verdict"] == "pass"
    assert bundle.manifest["verification"]["worst_rms_rel"] <= 2e-5
    graph = onnx.load(bundle.onnx_path)
    assert sum(node.domain == "evit" for node in graph.graph.node) == sum(operators.values())
    assert [function.name for function in graph.functions] == sorted(operators)
    assert not any(node.op_type == "BatchNormalization" for node in graph.graph.node)


@pytest.mark.parametrize("name", ["mit-b0", "msra-m0"])
def test_random_weights_are_told_for_ever(name: str, exported: Callable[[str], Bundle]) -> None:
    bundle = exported(name)
    assert bundle.has_random_weights
    assert bundle.manifest["origin"]["random_weights"] is True
    assert metadata(bundle.onnx_path)["evit_deploy.random_weights"] == "true"
    for path in (bundle.path, bundle.onnx_path, bundle.weights_path):
        assert "RANDOM WEIGHTS" in cli("inspect", path).out, path.name


@pytest.mark.exhaustive
def test_what_a_user_should_know_is_printed(digits_checkpoint: Path, tmp_path: Path) -> None:
    printed = cli("export", "--no-verify", "--no-simplify", digits_checkpoint, "-o", tmp_path / "digits.evit").out
    assert "note" not in printed
    arguments = ("--random-weights", "msra-m0", "--image-size", "64", "--no-verify", "--no-simplify")
    printed = cli("export", *arguments, "-o", tmp_path / "random.evit").out
    assert "note" in printed.splitlines()[-1]
    assert "random weights: the logits mean nothing" in printed.splitlines()[-1]


@pytest.mark.exhaustive
def test_random_weights_stay_random_when_they_are_exported_again(
    exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    weights = exported("msra-m0").weights_path
    again = export(weights, "--no-verify", "--no-simplify", tmp_path / "trained.evit")
    assert again.has_random_weights
    assert metadata(again.onnx_path)["evit_deploy.random_weights"] == "true"
    assert "random weights: the logits mean nothing" in again.manifest["origin"]["notes"]
    assert "RANDOM WEIGHTS" in cli("inspect", again.weights_path).out


@pytest.mark.exhaustive
def test_a_published_checkpoint_gets_its_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In timm's keys and the wrapper of a training script; the bundle lands in the current folder."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "work").mkdir()
    spec = ModelSpec.published("mit-b0", num_classes=12, image_size=64)
    torch.save({"state_dict": random_state_dict(spec, 3)}, tmp_path / "weights" / "flowers.pth")
    monkeypatch.chdir(tmp_path / "work")
    done = cli("export", "../weights/flowers.pth", "--image-size", "64", "--no-simplify", "--no-verify", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["bundle"] == "flowers.evit"
    assert names_in(tmp_path / "work") == ["flowers.evit"]
    bundle = Bundle.open("flowers.evit")
    assert (bundle.spec.name, bundle.spec.num_classes, bundle.has_random_weights) == ("mit-b0", 12, False)
    assert metadata(bundle.onnx_path)["evit_deploy.random_weights"] == "false"
    assert "RANDOM" not in cli("inspect", "flowers.evit").out


def test_the_default_name_of_random_weights_says_so() -> None:
    assert exporting.default_output(None, ModelSpec.published("msra-m0")) == Path("msra-m0-random.evit")


# The trained model


def test_every_answer_survives(
    digits_bundle: Bundle, pytorch_logits: np.ndarray, digits_heldout: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits_heldout
    logits = run_onnx(digits_bundle, network_input(images))
    assert (logits.argmax(1) == pytorch_logits.argmax(1)).all()
    assert (logits.argmax(1) == labels).mean() == (pytorch_logits.argmax(1) == labels).mean() >= 0.97


@pytest.mark.parametrize("softmax", tiered([False, True], bool))
def test_every_answer_survives_from_raw_pixels(
    softmax: bool,
    digits_checkpoint: Path,
    pytorch_logits: np.ndarray,
    digits_heldout: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
) -> None:
    options = ["--with-preprocess", *(["--with-softmax"] if softmax else [])]
    bundle = export(digits_checkpoint, *options, tmp_path / "m.evit")
    facts = bundle.manifest["onnx"]
    assert facts["inputs"] == [{"name": "input", "dtype": "uint8", "shape": ["batch", 32, 32, 3]}]
    assert facts["outputs"][0]["name"] == ("probabilities" if softmax else "logits")
    output = run_onnx(bundle, digits_heldout[0])
    assert (output.argmax(1) == pytorch_logits.argmax(1)).all()
    expected = torch.from_numpy(pytorch_logits).softmax(1).numpy() if softmax else pytorch_logits
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_bundle_knows_what_the_checkpoint_knew(digits_bundle: Bundle, digits_checkpoint: Path) -> None:
    config = torch.load(digits_checkpoint, weights_only=True)["config"]
    assert digits_bundle.class_names == config["class_names"]
    assert digits_bundle.preprocessing.mean == tuple(config["mean"])
    assert digits_bundle.manifest["origin"]["path"] == "digits.pt"
    facts = metadata(digits_bundle.onnx_path)
    assert json.loads(facts["evit_deploy.model"]) == digits_bundle.spec.to_json()
    assert json.loads(facts["evit_deploy.preprocessing"]) == json.loads(
        json.dumps(digits_bundle.preprocessing.to_json())
    )
    assert facts["evit_deploy.checkpoint_sha256"] == digits_bundle.manifest["origin"]["sha256"]


@pytest.mark.exhaustive
def test_the_weights_of_a_bundle_export_to_the_same_graph(
    digits_bundle: Bundle, digits_heldout: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    again = export(digits_bundle.weights_path, tmp_path / "again.evit")
    assert again.spec == digits_bundle.spec
    assert again.preprocessing == digits_bundle.preprocessing
    assert again.class_names == digits_bundle.class_names
    images = network_input(digits_heldout[0])
    assert (run_onnx(again, images) == run_onnx(digits_bundle, images)).all()


def test_exporting_twice_gives_the_same_bytes(
    run_cli: RunCli, digits_bundle: Bundle, digits_checkpoint: Path, tmp_path: Path
) -> None:
    """Also from another process, with another hash seed and another name."""
    done = run_cli("export", digits_checkpoint, "-o", tmp_path / "b.evit", env={"PYTHONHASHSEED": "12345"})
    assert done.returncode == 0, done.stderr
    other = Bundle.open(tmp_path / "b.evit")
    assert other.onnx_sha256 == digits_bundle.onnx_sha256
    weights, others = digits_bundle.load_state_dict(), other.load_state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


# Options


def test_a_fixed_batch(digits_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(digits_checkpoint, "--batch", "3", tmp_path / "m.evit")
    facts = bundle.manifest["onnx"]
    assert (facts["dynamic_batch"], facts["batch"], facts["max_batch"]) == (False, 3, 3)
    assert facts["inputs"][0]["shape"] == [3, 3, 32, 32]
    assert facts["simplified"]["batches"] == [3]
    document = json.loads(cli("verify", bundle.path, "--json").out)
    assert {row["batch"] for row in document["rows"]} == {3}
    for batch in ("1", "4"):
        done = cli("verify", bundle.path, "--batch", batch)
        assert done.code == 2
        assert f"fixed batch of 3, got {batch}" in done.error


@pytest.mark.exhaustive
def test_the_largest_batch_and_class_names(digits_checkpoint: Path, tmp_path: Path) -> None:
    names = [f"digit {index}" for index in range(10)]
    (tmp_path / "names.json").write_text(json.dumps(names))
    options = ("--max-batch", "5", "--class-names", tmp_path / "names.json")
    bundle = export(digits_checkpoint, *options, tmp_path / "m.evit")
    assert bundle.class_names == names
    facts = bundle.manifest["onnx"]
    assert (facts["dynamic_batch"], facts["batch"], facts["max_batch"]) == (True, None, 5)
    document = json.loads(cli("verify", bundle.path, "--json").out)
    assert {row["batch"] for row in document["rows"]} == {1, 3, 5}
    done = cli("verify", bundle.path, "--batch", "6")
    assert done.code == 2
    assert "above the bundle's largest, 5" in done.error


@pytest.mark.exhaustive
@pytest.mark.parametrize("opset", [18, 23])
def test_the_opset(opset: int, digits_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(digits_checkpoint, "--opset", str(opset), tmp_path / "m.evit")
    graph = onnx.load(bundle.onnx_path)
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == opset
    assert bundle.manifest["onnx"]["opset"] == opset
    assert bundle.manifest["verification"]["verdict"] == "pass"


def test_plain_operators(digits_bundle: Bundle, digits_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(digits_checkpoint, "--no-fused-operators", tmp_path / "m.evit")
    graph = onnx.load(bundle.onnx_path)
    assert not graph.functions
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert bundle.manifest["onnx"]["operators"] == {}
    assert bundle.manifest["onnx"]["fused_operators"] is False
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    fused = run_onnx(digits_bundle, images)
    np.testing.assert_allclose(run_onnx(bundle, images), fused, rtol=0, atol=2e-5 * np.abs(fused).max())


def test_without_simplifying_and_verifying(digits_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.evit"
    done = cli("export", digits_checkpoint, "--no-simplify", "--no-verify", "-o", target)
    assert done.code == 0
    assert "no, --no-verify" in done.out
    bundle = Bundle.open(target)
    assert bundle.manifest["onnx"]["simplified"] is None
    assert bundle.manifest["verification"] == {"verdict": "skipped"}
    assert json.loads(cli("inspect", target, "--json").out)["verification"] == {"verdict": "skipped"}
    verified = next(line for line in cli("inspect", target).out.splitlines() if line.startswith("verified"))
    assert verified.split() == ["verified", "skipped"]
    assert cli("verify", target, "--batch", "1").code == 0


def test_a_wrong_number_of_class_names(digits_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    done = cli("export", digits_checkpoint, "--class-names", tmp_path / "names.txt", "-o", tmp_path / "m.evit")
    assert (done.code, done.out) == (2, "")
    assert "2 class names were given, the model has 10 classes" in done.error
    assert names_in(tmp_path) == ["names.txt"]


# An existing bundle


def test_an_existing_bundle_is_kept_or_replaced_as_a_whole(
    digits_bundle: Bundle, digits_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "m.evit"
    shutil.copytree(digits_bundle.path, target)
    (target / "engines").mkdir()
    done = cli("export", digits_checkpoint, "-o", target)
    assert (done.code, done.out) == (1, "")
    assert "m.evit exists: replace it with --force" in done.error
    assert Bundle.open(target).manifest == digits_bundle.manifest
    new = export(digits_checkpoint, "--force", "--no-simplify", target)
    assert new.onnx_sha256 != digits_bundle.onnx_sha256
    assert new.manifest["verification"]["verdict"] == "pass"
    assert names_in(target) == ["manifest.json", "model.onnx", "weights.safetensors"], "engines were made of the old"
    assert names_in(tmp_path) == ["m.evit"]


@pytest.mark.parametrize("has_old", [True, False], ids=["old-bundle", "no-bundle"])
@pytest.mark.parametrize(("fault", "code"), [("weight", 3), ("operator", 4)], ids=["wrong", "cannot-run"])
def test_a_graph_that_does_not_pass_is_not_written(
    fault: str,
    code: int,
    has_old: bool,
    digits_bundle: Bundle,
    digits_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault is planted behind PyTorch's exporter; everything after it is real."""
    target = tmp_path / "m.evit"
    if has_old:
        shutil.copytree(digits_bundle.path, target)
    faulty = onnx.load(digits_bundle.onnx_path)
    if fault == "operator":
        faulty.graph.node[-1].op_type = "NoSuchOperator"
    else:
        weight = next(t for t in faulty.graph.initializer if t.name == "model.stages.2.transition.weight")
        weight.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(weight), weight.name))
    monkeypatch.setattr(exporting, "_export", lambda *arguments: faulty)
    done = cli("export", digits_checkpoint, "--no-simplify", "--force", "-o", target)
    assert (done.code, done.out) == (code, "")
    if code == 3:
        assert "does not match PyTorch" in done.err
        assert "rms_rel" in done.err
        assert done.err.splitlines()[-1].startswith("  first bad block: stages.2.transition")
    else:
        assert "could not be verified" in done.error
        assert "NoSuchOperator" in done.error
    assert names_in(tmp_path) == (["m.evit"] if has_old else [])
    if has_old:
        assert Bundle.open(target).manifest == digits_bundle.manifest


# From Python


def test_the_verbs_are_there_at_once_and_cost_nothing(child_environment: dict[str, str]) -> None:
    code = """
import sys
import evit_deploy
heavy = {"torch", "onnx", "onnxruntime", "timm", "numpy"}
print(sorted(heavy & set(sys.modules)), sorted(set(evit_deploy.__all__) - set(dir(evit_deploy))))
from evit_deploy import Bundle, bench, export, verify
print(Bundle.__name__, bench.__name__, export.__name__, verify.__name__, callable(evit_deploy.bench))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] []\nBundle bench export verify True\n"


@pytest.mark.parametrize("verb", ["export", "verify", "bench"])
def test_the_verbs_are_typed_and_documented(verb: str) -> None:
    function = getattr(evit_deploy, verb)
    parameters = signature(function).parameters
    assert get_type_hints(function).keys() == {*parameters, "return"}
    for word in (*parameters, "Args:", "Raises:"):
        assert word in function.__doc__, word
    assert (Path(evit_deploy.__file__).parent / "py.typed").exists()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="exprot"):
        evit_deploy.exprot


def test_python_gives_the_result_and_its_steps(digits_checkpoint: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    result = evit_deploy.export(
        digits_checkpoint, tmp_path / "m.evit", batch=1, class_names="abcdefghij", progress=steps.append
    )
    assert isinstance(result.bundle, evit_deploy.Bundle)
    assert result.verification is not None
    assert result.verification.exit_code == 0
    assert result.simplification is not None
    assert list(result.seconds) == ["load", "export", "simplify", "write", "verify", "commit"]
    assert result.bundle.class_names == list("abcdefghij")
    starts = ("loading", "exporting msa-custom", "simplifying", "writing", "random, seed 0: batch 1")
    assert len(steps) == len(starts)
    assert all(step.startswith(start) for step, start in zip(steps, starts, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, UsageError, "either a checkpoint or random_weights"),
        ({"checkpoint": "m3.pt", "random_weights": "msa-m3"}, UsageError, "either"),
        ({"random_weights": "msa-m9"}, UsageError, "did you mean 'msa-m"),
        ({"random_weights": "msa-m1", "family": "mit"}, UsageError, "family is about a checkpoint"),
        ({"random_weights": "msa-m1", "image_size": 8}, UsageError, "image size 8"),
        ({"checkpoint": "m3.pt", "batch": 0}, UsageError, "batch sizes start at 1"),
        ({"checkpoint": "m3.pt", "max_batch": 0}, UsageError, "batch sizes start at 1"),
        ({"checkpoint": "no/m3.pt"}, CheckpointError, "does not exist"),
        ({"checkpoint": "DIGITS", "opset": 7}, UsageError, "opset 7"),
        ({"checkpoint": "DIGITS", "family": "mit"}, CheckpointError, "msa"),
        ({"checkpoint": "DIGITS", "output": "no/such/m.evit"}, BundleError, "no/such"),
        ({"checkpoint": "DIGITS", "class_names": []}, UsageError, "0 class names"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "nothing" if isinstance(value, dict) else None,
)
def test_python_raises_the_class_of_the_mistake(
    arguments: dict[str, Any],
    error: type[Exception],
    words: str,
    digits_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {key: digits_checkpoint if value == "DIGITS" else value for key, value in arguments.items()}
    with pytest.raises(error, match=words):
        evit_deploy.export(**given)
    assert names_in(tmp_path) == []
