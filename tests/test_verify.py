"""`verify` on whole bundles: what passes, the faults that must not, and the words and exit codes they end in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import evit_deploy
from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.cli import main
from evit_deploy.errors import BundleError, InputDataError, UsageError
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.parity.report import VerifyReport
from evit_deploy.verifying import verify_bundle
from tests.faults import FaultyRunner, set_element, swap_rows
from tests.in_process import Outcome, cli

if TYPE_CHECKING:
    from conftest import RunCli

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "schemas" / "verify.schema.json").read_text())
SIZE = 32
GraphChange = Callable[[onnx.ModelProto], None]


def verify(*arguments: str | Path) -> Outcome:
    """`evit-deploy verify ARGUMENTS` in this process."""
    return cli("verify", *arguments)


def tampered(bundle: Bundle, target: Path, change: GraphChange | bytes, **manifest: Any) -> Path:
    """A copy with another graph, and hashes that agree with it: what a wrong exporter would have written."""
    if isinstance(change, bytes):
        data = change
    else:
        model = onnx.load(bundle.onnx_path)
        change(model)
        data = model.SerializeToString()
    with BundleWriter(target) as writer:
        (writer.path / "model.onnx").write_bytes(data)
        shutil.copyfile(bundle.weights_path, writer.path / "weights.safetensors")
        return writer.commit({**bundle.manifest, **manifest}).path


def set_weight(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change one initializer."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value = numpy_helper.to_array(tensor).copy()
    change(value)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def nan_in_the_classifier(model: onnx.ModelProto) -> None:
    def change(bias: np.ndarray) -> None:
        bias[3] = np.nan

    set_weight(model, "model.head.bias", change)


def one_kernel_off_by_a_percent(model: onnx.ModelProto) -> None:
    def change(kernel: np.ndarray) -> None:
        kernel *= 1.01

    set_weight(model, "model.stages.1.blocks.0.local.depthwise.weight", change)


def rename_output(model: onnx.ModelProto, name: str) -> None:
    old = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [name if output == old else output for output in node.output]
    model.graph.output[0].name = name


def no_classes(model: onnx.ModelProto) -> None:
    """Logits of no columns: there is nothing in them to compare."""
    rename_output(model, "all_logits")
    for name, value in (("no_start", 0), ("no_end", 0), ("class_axis", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    node = helper.make_node("Slice", ["all_logits", "no_start", "no_end", "class_axis"], ["logits"], name="cut")
    model.graph.node.append(node)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 0]))


def swap_classes(model: onnx.ModelProto) -> None:
    """Two rows of the classifier in each other's place: plausible logits, wrong names."""

    def change(values: np.ndarray) -> None:
        values[[3, 8]] = values[[8, 3]]

    weight = next(t for t in model.graph.initializer if t.name == "model.head.weight")
    assert weight.dims[0] == 10
    set_weight(model, "model.head.weight", change)
    set_weight(model, "model.head.bias", change)


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 3]))


def surplus_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("block/stem", TensorProto.FLOAT, None))


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "NoSuchOperator"


@pytest.fixture(scope="module")
def other_seed(digits_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """model.onnx of the digits model's shape with random weights."""
    folder = tmp_path_factory.mktemp("other")
    spec = digits_bundle.spec
    config = {"family": spec.family, **spec.config, "num_classes": spec.num_classes, "image_size": spec.image_size}
    torch.save({"state_dict": random_state_dict(spec, seed=7), "config": config}, folder / "other.pt")
    return evit_deploy.export(folder / "other.pt", folder / "other.evit", simplify=False).bundle.read_onnx()


# What passes


def test_a_sound_bundle_passes_at_every_size_and_order(digits_bundle: Bundle) -> None:
    done = verify(digits_bundle.path, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    jsonschema.validate(document, SCHEMA)
    assert document["verdict"] == "pass"
    assert document["subject"] == {"bundle": str(digits_bundle.path), "onnx_sha256": digits_bundle.onnx_sha256}
    compared = {(row["batch"], row["permuted"]) for row in document["rows"]}
    assert compared == {(1, False), *((size, order) for size in (3, 8, 64) for order in (False, True))}
    assert all(row["rms_rel"] <= 2e-5 and row["top1"] == row["top5"] == 1.0 for row in document["rows"])


def test_the_table_says_what_was_compared_and_within_what(digits_bundle: Bundle) -> None:
    done = verify(digits_bundle.path, "--batch", "1,3", "--seed", "5")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "torch-fp32 -> onnxruntime"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["1", "3", "3 permuted"]
    assert "random, seed 5" in done.out
    assert lines[-2:] == ["tolerance: rms_rel <= 2e-05, max_rel <= 0.0001 (fp32)", "verdict: pass"]


@pytest.mark.parametrize(
    ("given", "name", "images"),
    [
        ("floats.npy", "floats.npy", 5),
        ("pixels.npy", "pixels.npy", 5),
        ("heldout/000_seven.png", "000_seven.png", 1),
        ("heldout", "heldout/", 48),
    ],
)
def test_given_images_are_all_compared(
    given: str, name: str, images: int, digits_bundle: Bundle, digits: Path, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "floats.npy", generator.standard_normal((5, 3, SIZE, SIZE)).astype(np.float32))
    np.save(tmp_path / "pixels.npy", generator.integers(0, 256, (5, 40, 50, 3), dtype=np.uint8))
    path = (tmp_path if given.endswith(".npy") else digits) / given
    done = verify(digits_bundle.path, "--batch", "1,3", "--input", path, "--json")
    assert done.code == 0, done.err
    rows = [row for row in json.loads(done.out)["rows"] if row["input"] == name]
    assert rows[0]["images"] == images
    assert any(row["input"].startswith("random") for row in json.loads(done.out)["rows"]), "beside, not instead"


def test_a_tolerance_of_ones_own_is_used_and_shown(digits_bundle: Bundle, tmp_path: Path) -> None:
    wrong = tampered(digits_bundle, tmp_path / "m.evit", one_kernel_off_by_a_percent)
    assert verify(wrong, "--batch", "3").code == 3
    done = verify(wrong, "--batch", "3", "--tolerance", "0.05")
    assert done.code == 0, done.err
    assert "tolerance: rms_rel <= 0.05, max_rel <= 0.25 (custom, from fp32)" in done.out


# Planted faults in the graph


FAULTS: list[tuple[GraphChange, str, str]] = [
    (nan_in_the_classifier, "NaN in every row of 3", "every block up to stages.2.blocks.0 agrees"),
    (one_kernel_off_by_a_percent, "exceeds 2e-05", "stages.1.blocks.0: rms_rel"),
    (swap_classes, "the outputs differ everywhere", "every block up to stages.2.blocks.0 agrees"),
    (lambda model: rename_output(model, "scores"), "output 'logits' is missing; the model has: scores", "agrees"),
    (surplus_output, "surplus output 'block/stem'; expected only: logits", "agrees"),
    (no_classes, "shape of 'logits' differs: got [3, 0], expected [3, 10]", "agrees"),
    (second_input, "the model has 2 inputs (input, mask), expected one", "not found: onnxruntime: inputs are named"),
]
FAULT_IDS = ["nan", "percent", "classes-swapped", "renamed", "surplus", "no-classes", "two-inputs"]


@pytest.mark.parametrize(("change", "words", "block"), FAULTS, ids=FAULT_IDS)
def test_a_wrong_graph_with_right_hashes_fails(
    change: GraphChange, words: str, block: str, digits_bundle: Bundle, tmp_path: Path
) -> None:
    wrong = tampered(digits_bundle, tmp_path / "m.evit", change)
    done = verify(wrong, "--batch", "3", "--json")
    assert done.code == 3
    document = json.loads(done.out)
    jsonschema.validate(document, SCHEMA)
    assert document["verdict"] == "fail"
    assert words in document["rows"][0]["reason"]
    assert block in document["first_bad_block"]
    assert words in done.error
    assert "do not deploy this bundle" in done.error


def test_weights_of_another_seed_fail_from_the_first_block_on(
    other_seed: bytes, digits_bundle: Bundle, tmp_path: Path
) -> None:
    done = verify(tampered(digits_bundle, tmp_path / "m.evit", other_seed), "--batch", "1,3")
    assert done.code == 3
    assert "parity failed, 0 of 3 comparisons within rms_rel <= 2e-05" in done.error
    assert "the outputs differ everywhere" in done.error
    assert "other weights?" in done.error
    assert "first bad block: stem" in done.out
    assert done.out.endswith("verdict: fail\n")


@pytest.mark.parametrize(
    ("fault", "words"),
    [(set_element(1, np.nan), "NaN in row 1 of 3"), (swap_rows(0, 2), "rows 0 and 2 are swapped")],
    ids=["nan-in-one-row", "two-rows-swapped"],
)
def test_a_runtime_that_spoils_single_rows_fails(fault: Any, words: str, digits_bundle: Bundle) -> None:
    from evit_deploy.runners.ort import OnnxRuntimeRunner

    candidate = FaultyRunner(OnnxRuntimeRunner(digits_bundle.read_onnx()), fault, from_batch=3)
    report = verify_bundle(digits_bundle, batches=(3,), candidate=candidate)
    assert (report.verdict, report.exit_code) == ("fail", 3)
    assert words in report.rows[0].reason
    assert report.first_bad_block is not None


def test_a_comparison_of_nothing_fails(digits_bundle: Bundle) -> None:
    report = evit_deploy.verify(digits_bundle, batches=())
    assert (report.verdict, report.exit_code, report.rows) == ("fail", 3, ())
    assert report.failures == ("nothing was compared",)


@pytest.mark.parametrize("change", [unknown_operator, b"\x08\x0a this is no graph"], ids=["operator", "garbage"])
def test_a_graph_that_no_runtime_opens_is_unverified(
    change: GraphChange | bytes, digits_bundle: Bundle, tmp_path: Path
) -> None:
    wrong = tampered(digits_bundle, tmp_path / "m.evit", change)
    done = verify(wrong, "--json", "--junit", tmp_path / "parity.xml")
    assert done.code == 4
    document = json.loads(done.out)
    jsonschema.validate(document, SCHEMA)
    assert document["verdict"] == "unverified"
    assert "nothing was proved" in done.error
    assert "could not run" in done.error
    suite = ElementTree.parse(tmp_path / "parity.xml").getroot()
    assert int(suite.attrib["errors"]) == int(suite.attrib["tests"]) > 0, "CI must not be green"


# A damaged bundle is refused


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "manifest.json"])
@pytest.mark.parametrize("command", ["verify", "bench", "inspect"])
def test_one_changed_byte_is_refused_by_the_name_of_the_file(
    name: str, command: str, digits_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits_bundle.path, tmp_path / "m.evit")
    data = bytearray((tmp_path / "m.evit" / name).read_bytes())
    position = data.index(b'"num_classes": 10') + 16 if name == "manifest.json" else len(data) // 2
    data[position] ^= 1
    (tmp_path / "m.evit" / name).write_bytes(data)
    assert main([command, str(tmp_path / "m.evit")]) == 1
    captured = capsys.readouterr()
    assert f"m.evit/{name} has changed since the bundle was written" in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_a_truncated_graph_is_refused(digits_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(digits_bundle.path, tmp_path / "m.evit")
    graph = tmp_path / "m.evit" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    done = verify(tmp_path / "m.evit")
    assert (done.code, done.out) == (1, "")
    assert "model.onnx is truncated" in done.error


# Wrong inputs


def image_array(rows: int = 3) -> np.ndarray:
    return np.zeros((rows, 3, SIZE, SIZE), np.float32)


def nan_array() -> np.ndarray:
    array = image_array()
    array[1, 0, 0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("none.png", lambda path: None, "no such file or folder"),
        ("no.npy", lambda path: np.save(path, image_array(0)), "is empty"),
        ("wide.npy", lambda path: np.save(path, np.zeros((2, 3, SIZE, 64), np.float32)), "shape [2, 3, 32, 64]"),
        ("double.npy", lambda path: np.save(path, image_array().astype(np.float64)), "dtype float64"),
        ("nan.npy", lambda path: np.save(path, nan_array()), "NaN or Inf in row 1"),
        ("all.npz", lambda path: np.savez(path, images=image_array()), "archive of arrays"),
        ("cut.npy", lambda path: path.write_bytes(b"\x93NUMPY"), "no readable .npy array"),
        ("words.txt", lambda path: path.write_text("hello"), "is no image"),
        ("empty", lambda path: path.mkdir(), "is an empty folder"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else None,
)
def test_images_that_do_not_fit(
    name: str, write: Callable[[Path], Any], words: str, digits_bundle: Bundle, tmp_path: Path
) -> None:
    write(tmp_path / name)
    done = verify(digits_bundle.path, "--batch", "1", "--input", tmp_path / name)
    assert (done.code, done.out) == (1, "")
    assert words in done.error
    assert name in done.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "1,65"), "batch 65 is above the bundle's largest, 64: export again with a larger --max-batch"),
        (("--backend", "onnxruntim"), "unknown backend 'onnxruntim': did you mean 'onnxruntime'?"),
        (("--tolerance", "1"), "is no tolerance"),
        (("--tolerance", "nan"), "is no tolerance"),
    ],
    ids=" ".join,
)
def test_usage_errors(arguments: tuple[str, ...], words: str, digits_bundle: Bundle) -> None:
    done = verify(digits_bundle.path, *arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.error


# The JUnit file


def cases(path: Path) -> list[ElementTree.Element]:
    return ElementTree.parse(path).getroot().findall("testsuite/testcase")


def test_junit_of_a_pass(digits_bundle: Bundle, tmp_path: Path) -> None:
    done = verify(digits_bundle.path, "--batch", "1,3", "--junit", tmp_path / "parity.xml")
    assert done.code == 0
    root = ElementTree.parse(tmp_path / "parity.xml").getroot()
    assert {key: root.attrib[key] for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "0",
        "errors": "0",
        "skipped": "0",
    }
    names = [case.attrib["name"] for case in cases(tmp_path / "parity.xml")]
    assert names == [f"logits, random, seed 0, batch {rest}" for rest in ("1", "3", "3, permuted")]
    facts = {p.attrib["name"]: p.attrib["value"] for p in root.iter("property")}
    assert facts["verdict"] == "pass"
    assert facts["subject.onnx_sha256"] == digits_bundle.onnx_sha256


def test_junit_of_a_failure(digits_bundle: Bundle, tmp_path: Path) -> None:
    wrong = tampered(digits_bundle, tmp_path / "m.evit", nan_in_the_classifier)
    (tmp_path / "parity.xml").write_text("the report of the last run")
    done = verify(wrong, "--batch", "1,3", "--junit", tmp_path / "parity.xml")
    assert done.code == 3
    root = ElementTree.parse(tmp_path / "parity.xml").getroot()
    assert (root.attrib["tests"], root.attrib["failures"]) == ("3", "3")
    messages = [element.attrib["message"] for element in root.iter("failure")]
    assert messages == ["NaN in every row of 4", "NaN in every row of 3", "NaN in every row of 3"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.evit", "parity.xml"]


def test_no_junit_file_stands_for_a_refused_bundle(tmp_path: Path) -> None:
    assert verify(tmp_path / "no.evit", "--junit", tmp_path / "parity.xml").code == 1
    assert list(tmp_path.iterdir()) == []


# From Python


def test_a_failed_comparison_is_a_report_not_an_exception(digits_bundle: Bundle, tmp_path: Path) -> None:
    wrong = tampered(digits_bundle, tmp_path / "m.evit", nan_in_the_classifier)
    steps: list[str] = []
    report = evit_deploy.verify(str(wrong), batches=[1], progress=steps.append)
    assert isinstance(report, VerifyReport)
    assert (report.verdict, report.exit_code) == ("fail", 3)
    assert steps == ["random, seed 0: batch 1", "looking for the first bad block"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"backend": "tensorrt-nano"}, UsageError),
        ({"batches": (0,)}, UsageError),
        ({"batches": (65,)}, UsageError),
        ({"threads": 0}, UsageError),
        ({"seed": -1}, UsageError),
        ({"tolerance": 1.0}, UsageError),
        ({"inputs": "no/such/image.png"}, InputDataError),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_python_raises_the_class_of_the_mistake(
    arguments: dict[str, Any], error: type[Exception], digits_bundle: Bundle
) -> None:
    with pytest.raises(error):
        evit_deploy.verify(digits_bundle, **arguments)


def test_python_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        evit_deploy.verify(tmp_path / "no.evit")


def test_a_process_of_its_own_exits_with_the_same_code(run_cli: RunCli, digits_bundle: Bundle, tmp_path: Path) -> None:
    wrong = tampered(digits_bundle, tmp_path / "m.evit", nan_in_the_classifier)
    done = run_cli("verify", wrong.name, "--batch", "1", "--json", cwd=tmp_path)
    assert done.returncode == 3
    assert json.loads(done.stdout)["verdict"] == "fail"
    assert "NaN in every row of 4" in done.stderr.splitlines()[-1]
