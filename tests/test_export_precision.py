"""`export --precision`: from a checkpoint or a bundle to a verified bundle of half precision, and every refusal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from evit_deploy import api
from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.runners.ort import OnnxRuntimeRunner
from evit_deploy.runners.widened import widened
from tests.in_process import cli
from tests.tiers import tiered

HeldOut = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def half_bundles(digits_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The trained digits in FP16 or BF16, exported from their FP32 bundle; read it, and change only copies."""
    folder = tmp_path_factory.mktemp("half")
    bundles: dict[str, Bundle] = {}

    def get(precision: str) -> Bundle:
        if precision not in bundles:
            target = folder / f"digits-{precision}.evit"
            bundles[precision] = api.export(digits_bundle.path, target, precision=precision).bundle
        return bundles[precision]

    return get


def with_graph(bundle: Bundle, target: Path, change: Callable[[onnx.ModelProto], None], **facts: Any) -> Bundle:
    """A copy of a bundle with a changed graph and facts, and a manifest that vouches for them."""
    model = onnx.load(bundle.onnx_path)
    change(model)
    with BundleWriter(target) as writer:
        onnx.save(model, writer.path / "model.onnx")
        shutil.copy(bundle.weights_path, writer.path / "weights.safetensors")
        kept = ("model", "preprocessing", "class_names", "origin", "onnx", "verification", "versions", "headroom")
        manifest = {name: bundle.manifest[name] for name in kept}
        return writer.commit({**manifest, "onnx": {**manifest["onnx"], **facts}})


class TestBundle:
    @pytest.mark.parametrize("precision", tiered(["fp16", "bf16"], "fp16".__eq__))
    def test_it_keeps_the_accuracy_and_says_what_it_is(
        self, precision: str, half_bundles: Callable[[str], Bundle], digits_heldout: HeldOut
    ) -> None:
        bundle = half_bundles(precision)
        facts = bundle.manifest["onnx"]
        assert (facts["precision"], facts["io"], facts["keep_fp32"]) == (precision, "fp32", [])
        assert facts["attention"] == "fp32-accumulation"
        assert facts["nodes_by_type"]["float32"] == 1, "the pooled mean, nothing else"
        assert facts["casts"] == 4
        assert bundle.manifest["verification"]["verdict"] == "pass"
        images, labels = digits_heldout
        x = ((images.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)
        with OnnxRuntimeRunner(bundle.read_onnx()) as runner:
            predicted = np.concatenate(
                [runner.infer({"input": np.ascontiguousarray(x[i : i + 60])})["logits"] for i in range(0, 360, 60)]
            ).argmax(axis=1)
        assert (predicted == labels).mean() >= 0.97

    @pytest.mark.exhaustive
    def test_from_a_bundle_as_from_its_checkpoint(
        self, half_bundles: Callable[[str], Bundle], digits_checkpoint: Path, digits_bundle: Bundle, tmp_path: Path
    ) -> None:
        direct = api.export(digits_checkpoint, tmp_path / "direct.evit", precision="fp16", verify=False).bundle
        from_bundle = half_bundles("fp16")
        assert onnx.load(direct.onnx_path).graph == onnx.load(from_bundle.onnx_path).graph
        assert from_bundle.class_names == direct.class_names
        assert from_bundle.preprocessing == direct.preprocessing
        reference, ours = load_file(digits_bundle.weights_path), load_file(from_bundle.weights_path)
        assert all(torch.equal(ours[name], value) for name, value in reference.items())
        assert not {torch.float16, torch.bfloat16} & {value.dtype for value in ours.values()}, "the reference is FP32"

    @pytest.mark.exhaustive
    def test_random_weights_stay_known_as_such(self, tmp_path: Path) -> None:
        source = api.export(None, tmp_path / "m.evit", random_weights="msra-m0", verify=False)
        result = api.export(source.bundle.path, tmp_path / "half.evit", precision="fp16", verify=False)
        assert result.bundle.has_random_weights
        assert any("random weights" in note for note in result.notes)

    def test_verify_runs_what_is_blind_and_what_is_not(self, half_bundles: Callable[[str], Bundle]) -> None:
        done = cli("verify", half_bundles("fp16").path, "--json")
        report = json.loads(done.out)
        assert done.code == 0
        assert report["candidate"] == "onnxruntime, torch-half"
        pairs = {row["pair"] for row in report["rows"]}
        assert pairs == {"torch-fp32 -> onnxruntime", "torch-fp32 -> torch-half"}
        assert any("overflow and rounding of real fp16 hardware were not seen" in note for note in report["notes"])
        table = cli("verify", half_bundles("fp16").path, "--batch", "2").out
        assert table.count("torch-half") >= 2
        alone = json.loads(cli("verify", half_bundles("fp16").path, "--json", "--backend", "torch-half").out)
        assert {row["pair"] for row in alone["rows"]} == {"torch-fp32 -> torch-half"}

    def test_overflow_that_onnx_runtime_does_not_see_fails(self, digits_checkpoint: Path, tmp_path: Path) -> None:
        """Two weights that undo each other, with FP16's infinity between them."""
        document = torch.load(digits_checkpoint, weights_only=True)
        state = document["state_dict"]
        state["stages.0.blocks.0.local.expand.weight"] *= 1e-3  # kept small, so that the gelu stays itself
        state["stages.0.blocks.0.local.depthwise.weight"] *= 6e4
        state["stages.0.blocks.0.local.depthwise.bias"] += 3e5
        path = tmp_path / "overflow.pt"
        torch.save(document, path)
        done = cli("export", path, "--precision", "fp16", "--output", tmp_path / "m.evit")
        assert done.code in (1, 3), done.err
        assert not (tmp_path / "m.evit").exists()
        kept = cli(
            "export", path, "--precision", "fp16", "--keep-fp32", "stages.0.blocks.0", "--output", tmp_path / "k.evit"
        )
        assert kept.code in (0, 3), kept.err

    @pytest.mark.exhaustive
    def test_fp16_input_and_output(self, digits_checkpoint: Path, tmp_path: Path) -> None:
        done = cli("export", digits_checkpoint, "--precision", "fp16", "--io", "fp16", "--output", tmp_path / "m.evit")
        assert done.code == 0, done.err
        facts = Bundle.open(tmp_path / "m.evit").manifest["onnx"]
        assert [value["dtype"] for value in (*facts["inputs"], *facts["outputs"])] == ["float16", "float16"]
        assert facts["io"] == "fp16"
        assert "2 casts" in done.out

    @pytest.mark.exhaustive
    def test_pixels_and_probabilities(self, digits_checkpoint: Path, tmp_path: Path) -> None:
        done = cli(
            "export", digits_checkpoint, "--precision", "fp16", "--with-preprocess", "--with-softmax",
            "--output", tmp_path / "m.evit",
        )  # fmt: skip
        assert done.code == 0, done.err

    @pytest.mark.exhaustive
    def test_the_default_names_keep_precisions_apart(
        self, digits_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for precision in ("fp32", "fp16"):
            done = cli("export", digits_checkpoint, "--precision", precision, "--no-verify")
            assert done.code == 0, done.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-fp16.evit", "digits.evit"]


class TestWidened:
    def test_bf16_becomes_fp32_without_a_change_of_value(self, half_bundles: Callable[[str], Bundle]) -> None:
        model = onnx.load(half_bundles("bf16").onnx_path)
        wide = widened(model)
        onnx.checker.check_model(wide, full_check=True)
        for before, after in zip(model.graph.initializer, wide.graph.initializer, strict=True):
            values = numpy_helper.to_array(before)
            assert after.data_type != onnx.TensorProto.BFLOAT16
            assert np.array_equal(numpy_helper.to_array(after), values.astype(numpy_helper.to_array(after).dtype))
        assert any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer), "it changed"

    def test_the_runner_says_so_each_time(self, half_bundles: Callable[[str], Bundle]) -> None:
        runner = OnnxRuntimeRunner(half_bundles("bf16").read_onnx())
        for _ in range(2):
            with runner:
                assert (runner.graph_precision, runner.precision) == ("bf16", "fp32")


class TestGate:
    def test_a_graph_of_another_precision_than_its_manifest_says(
        self, digits_bundle: Bundle, half_bundles: Callable[[str], Bundle], tmp_path: Path
    ) -> None:
        """A wide tolerance is not to be had by a word in the manifest."""
        for name, bundle, promised in (("a", digits_bundle, "bf16"), ("b", half_bundles("fp16"), "fp32")):
            wrong = with_graph(bundle, tmp_path / f"{name}.evit", lambda model: None, precision=promised)
            done = cli("verify", wrong.path)
            assert done.code == 1
            assert f"its manifest says {promised}" in done.error

    def test_wrong_weights_in_a_half_graph_fail(self, half_bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
        def swap(model: onnx.ModelProto) -> None:
            weight = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
            flipped = np.ascontiguousarray(numpy_helper.to_array(weight)[::-1])
            weight.CopyFrom(numpy_helper.from_array(flipped, weight.name))

        wrong = with_graph(half_bundles("fp16"), tmp_path / "m.evit", swap)
        done = cli("verify", wrong.path, "--batch", "4")
        assert done.code == 3
        assert re.search(r"first bad block: (stem|stages)\S*: rms_rel", done.out), done.out

    def test_torch_half_is_for_half_bundles(self, digits_bundle: Bundle) -> None:
        done = cli("verify", digits_bundle.path, "--backend", "torch-half")
        assert done.code == 2
        assert "its graph is fp32" in done.error


class TestHeadroom:
    @pytest.fixture(scope="class")
    def measured(self, digits_bundle: Bundle, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
        """The FP32 bundle with its headroom report."""
        target = tmp_path_factory.mktemp("measured") / "digits.evit"
        shutil.copytree(digits_bundle.path, target)
        api.headroom(target, digits / "heldout", limit=8)
        return Bundle.open(target)

    def test_auto_without_a_report(self, digits_checkpoint: Path, tmp_path: Path) -> None:
        done = cli(
            "export", digits_checkpoint, "--precision", "fp16", "--keep-fp32", "auto", "--output", tmp_path / "m.evit"
        )
        assert done.code == 2
        assert "evit-deploy headroom" in done.error

    @pytest.mark.exhaustive
    def test_the_source_bundles_own_report_counts(self, measured: Bundle, tmp_path: Path) -> None:
        done = cli(
            "export", measured.path, "--precision", "fp16", "--keep-fp32", "auto", "--no-verify",
            "--output", tmp_path / "m.evit",
        )  # fmt: skip
        assert done.code == 0, done.err
        manifest = Bundle.open(tmp_path / "m.evit").manifest
        assert manifest["headroom"]["images"] == 8
        assert manifest["onnx"]["keep_fp32"] == manifest["headroom"]["keep_fp32"]

    def test_a_report_by_name_for_the_checkpoint(
        self, measured: Bundle, digits_checkpoint: Path, tmp_path: Path
    ) -> None:
        report = measured.path / "reports" / "headroom.json"
        result = api.export(digits_checkpoint, tmp_path / "m.evit", precision="fp16", headroom=report, verify=False)
        assert result.bundle.manifest["headroom"]["images"] == 8

    def test_a_report_of_other_weights(self, measured: Bundle, tmp_path: Path) -> None:
        done = cli(
            "export", "--random-weights", "msra-m0", "--precision", "fp16", "--headroom", measured.path,
            "--output", tmp_path / "m.evit",
        )  # fmt: skip
        assert done.code == 2
        assert "not about this model" in done.error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "fp8"], "unknown precision 'fp8'"),
        (["--precision", "int8"], "unknown precision 'int8'"),
        (["--io", "bf16"], "unknown type of input and output 'bf16'"),
        (["--io", "fp16"], "would cost an fp32 graph its range"),
        (["--precision", "bf16", "--io", "fp16"], "would cost an bf16 graph its range"),
        (["--keep-fp32", "stem"], "--keep-fp32 has no meaning in an FP32 export"),
        (["--headroom", "x.json"], "--headroom has no meaning in an FP32 export"),
        (["--precision", "fp16", "--keep-fp32", "auto,stem"], "auto stands alone"),
        (["--precision", "fp16", "--keep-fp32", "stm"], "no block 'stm'"),
        (["--precision", "bf16", "--opset", "20"], "opset 20 has no BF16 convolutions"),
    ],
)
def test_what_cannot_be_asked_for(options: list[str], words: str, digits_checkpoint: Path, tmp_path: Path) -> None:
    done = cli("export", digits_checkpoint, *options, "--no-verify", "--output", tmp_path / "m.evit")
    assert done.code == 2
    assert words in done.error
    assert not (tmp_path / "m.evit").exists()
