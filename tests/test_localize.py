"""A fault planted in one block of a bundle's graph is found in exactly that block."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.constants import OPERATOR_DOMAIN
from evit_deploy.images.sources import InputBatch, RandomInputs
from evit_deploy.models.blocks import block_names
from evit_deploy.onnx.blocks import BLOCK_PREFIX
from evit_deploy.onnx.export import inline_operators
from evit_deploy.parity.gate import tolerance_for
from evit_deploy.parity.localize import first_bad_block
from evit_deploy.runners.ort import OnnxRuntimeRunner
from evit_deploy.specs import Preprocessing
from evit_deploy.verifying import verify_bundle
from tests.faults import FaultyRunner, set_element
from tests.small_exports import MAX_BATCH, SPECS, changed, exported, reference, simplified

FP32 = tolerance_for("fp32")
PREPROCESSING = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
BLOCKS = {
    "msa": ["stem", "stages.0.blocks.0", "stages.1.transition", "stages.1.blocks.0"],
    "mit": [
        "stem",
        "stages.0.blocks.0",
        "stages.1.blocks.0",
        "stages.2.blocks.0",
        "stages.2.blocks.1",
        "stages.3.blocks.0",
        "stages.3.blocks.1",
    ],
    "msra": [
        "patch_embed",
        "stages.0.blocks.0",
        "stages.1.downsample",
        "stages.1.blocks.0",
        "stages.2.downsample",
        "stages.2.blocks.0",
        "stages.2.blocks.1",
    ],
}
FAMILIES = tuple(BLOCKS)
WriteBundle = Callable[..., Bundle]


@pytest.fixture
def write_bundle(tmp_path: Path) -> WriteBundle:
    """Write a bundle of a graph and of the reference's weights; its hashes are those of the files, faults and all."""

    def write(name: str, model: onnx.ModelProto, *, with_preprocess: bool = False) -> Bundle:
        manifest: dict[str, Any] = {
            "model": SPECS[name].to_json(),
            "preprocessing": PREPROCESSING.to_json(),
            "class_names": None,
            "origin": {"random_weights": True, "seed": 0},
            "onnx": {
                "opset": 20,
                "precision": "fp32",
                "dynamic_batch": True,
                "batch": None,
                "max_batch": MAX_BATCH,
                "with_preprocess": with_preprocess,
                "with_softmax": False,
            },
            "verification": {"verdict": "skipped"},
            "versions": {},
        }
        with BundleWriter(tmp_path / f"{name}.evit") as writer:
            onnx.save(model, writer.path / "model.onnx")
            writer.save_weights(reference(name).state_dict())
            writer.commit(manifest)
        return Bundle.open(tmp_path / f"{name}.evit")

    return write


def batch_of(name: str, count: int = 2) -> InputBatch:
    return RandomInputs(SPECS[name].image_size, PREPROCESSING).draw(count)


def weights_of(model: onnx.ModelProto, block: str) -> list[str]:
    """Initializers that belong to a block, the largest first."""
    owned = [t for t in model.graph.initializer if t.name.startswith(f"model.{block}.") and len(t.dims) > 0]
    return [t.name for t in sorted(owned, key=lambda t: -int(np.prod(t.dims)))]


def scaled(array: np.ndarray) -> np.ndarray:
    return array * np.float32(1.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_is_tried_below(name: str) -> None:
    assert block_names(reference(name)) == BLOCKS[name]


@pytest.mark.parametrize(("name", "block"), [(name, block) for name, blocks in BLOCKS.items() for block in blocks])
def test_the_first_bad_block_is_the_one_with_the_fault(write_bundle: WriteBundle, name: str, block: str) -> None:
    graph = simplified(name)[0]
    bundle = write_bundle(name, changed(graph, weights_of(graph, block)[0], scaled))
    found = first_bad_block(bundle, batch_of(name), FP32)
    before = "the first of the model" if block == BLOCKS[name][0] else "the blocks before it agree"
    match = re.fullmatch(rf"{re.escape(block)}: rms_rel (\S+), {before}", found)
    assert match is not None, found
    assert float(match[1]) > FP32.rms_rel


@pytest.mark.parametrize("name", FAMILIES)
def test_of_two_faults_the_first_counts(write_bundle: WriteBundle, name: str) -> None:
    blocks = BLOCKS[name]
    graph = exported(name)
    for block in (blocks[-1], blocks[1]):
        graph = changed(graph, weights_of(graph, block)[0], scaled)
    assert first_bad_block(write_bundle(name, graph), batch_of(name), FP32).startswith(f"{blocks[1]}: ")


def test_a_fault_inside_a_fused_operators_call_is_found(write_bundle: WriteBundle) -> None:
    """The second attention node gets another eps: no weight has changed."""
    graph = onnx.ModelProto()
    graph.CopyFrom(simplified("mit")[0])
    node = [node for node in graph.graph.node if node.domain == OPERATOR_DOMAIN][1]
    next(a for a in node.attribute if a.name == "eps").f = 0.5
    assert first_bad_block(write_bundle("mit", graph), batch_of("mit"), FP32).startswith("stages.3.blocks.1: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(write_bundle: WriteBundle, value: float) -> None:
    graph = exported("msa")

    def spoil(array: np.ndarray) -> np.ndarray:
        spoiled = array.copy()
        spoiled.flat[0] = value
        return spoiled

    bundle = write_bundle("msa", changed(graph, "model.stages.1.blocks.0.local.project.bias", spoil))
    assert first_bad_block(bundle, batch_of("msa"), FP32).startswith("stages.1.blocks.0: rms_rel ")


def test_one_bad_row_is_enough(write_bundle: WriteBundle) -> None:
    """The second block turns the third image's map into zeros, two others stay."""
    graph = onnx.ModelProto()
    graph.CopyFrom(exported("msa"))
    tensor = BLOCK_PREFIX + "stages.1.transition"
    producer = next(node for node in graph.graph.node if tensor in node.output)
    producer.output[0] = "sound"
    ones = np.ones((3, 1, 1, 1), np.float32)
    ones[2] = 0
    graph.graph.initializer.append(onnx.numpy_helper.from_array(ones, "rows"))
    index = list(graph.graph.node).index(producer)
    graph.graph.node.insert(index + 1, onnx.helper.make_node("Mul", ["sound", "rows"], [tensor]))
    bundle = write_bundle("msa", graph)
    assert first_bad_block(bundle, batch_of("msa", 3), FP32).startswith("stages.1.transition: rms_rel 1.0e+00")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["exported", "simplified", "inlined"])
def test_a_sound_graph_is_called_sound(write_bundle: WriteBundle, name: str, kind: str) -> None:
    graph = {
        "exported": lambda: exported(name),
        "simplified": lambda: simplified(name)[0],
        "inlined": lambda: inline_operators(exported(name)),
    }[kind]()
    last = BLOCKS[name][-1]
    assert first_bad_block(write_bundle(name, graph), batch_of(name, 3), FP32) == (
        f"every block up to {last} agrees: the fault lies behind it, or in the runtime's batching"
    )


def test_a_fault_behind_the_blocks_is_said_to_lie_there(write_bundle: WriteBundle) -> None:
    bundle = write_bundle("msa", changed(exported("msa"), "model.head.bias", lambda bias: bias + np.float32(1)))
    assert first_bad_block(bundle, batch_of("msa"), FP32).startswith("every block up to stages.1.blocks.0 agrees")


def test_the_tolerance_decides(write_bundle: WriteBundle) -> None:
    bundle = write_bundle("msa", changed(exported("msa"), "model.stem.0.weight", lambda w: w * np.float32(1.001)))
    assert first_bad_block(bundle, batch_of("msa"), FP32).startswith("stem: ")
    assert first_bad_block(bundle, batch_of("msa"), replace(FP32, rms_rel=0.01)).startswith("every block")


def test_a_graph_that_takes_pixels_gets_pixels(write_bundle: WriteBundle) -> None:
    name = "msa-resized"
    graph = exported(name, preprocessing=PREPROCESSING)
    batch = RandomInputs(SPECS[name].image_size, PREPROCESSING).draw(2, pixels=True)
    sound = write_bundle(name, graph, with_preprocess=True)
    assert first_bad_block(sound, batch, FP32).startswith("every block up to stages.0.blocks.0 agrees")


def test_a_graph_without_named_blocks_is_said_to_have_none(write_bundle: WriteBundle) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(exported("msa"))
    for node in graph.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = name.replace(BLOCK_PREFIX, "tensor/")
    bundle = write_bundle("msa", graph)
    assert first_bad_block(bundle, batch_of("msa"), FP32) == "not found: the graph names no blocks"


class TestVerify:
    def test_a_failure_names_the_block(self, write_bundle: WriteBundle) -> None:
        graph = simplified("msra")[0]
        bundle = write_bundle("msra", changed(graph, weights_of(graph, "stages.2.blocks.0")[0], scaled))
        lines: list[str] = []
        report = verify_bundle(bundle, batches=(1, 3), progress=lines.append)
        assert report.verdict == "fail"
        assert report.first_bad_block is not None
        assert report.first_bad_block.startswith("stages.2.blocks.0: rms_rel ")
        assert lines[-1] == "looking for the first bad block"

    def test_a_failure_of_a_graph_that_takes_pixels_names_the_block(self, write_bundle: WriteBundle) -> None:
        name = "msa-resized"
        graph = changed(exported(name, preprocessing=PREPROCESSING), "model.stem.3.bias", lambda b: b + np.float32(1))
        report = verify_bundle(write_bundle(name, graph, with_preprocess=True), batches=(1, 2))
        assert report.verdict == "fail"
        assert report.first_bad_block is not None
        assert report.first_bad_block.startswith("stem: ")

    def test_a_sound_bundle_passes_and_names_none(self, write_bundle: WriteBundle) -> None:
        report = verify_bundle(write_bundle("msa", simplified("msa")[0]), batches=(1, 3))
        assert (report.verdict, report.first_bad_block) == ("pass", None)

    def test_a_graph_that_does_not_run_block_by_block_is_said_so(self, write_bundle: WriteBundle) -> None:
        """The bundle's own graph is broken; another runner stands in for it, and its logits are wrong."""
        graph = onnx.ModelProto()
        graph.CopyFrom(exported("msa"))
        next(node for node in graph.graph.node if node.op_type == "Conv").op_type = "NoSuchOperator"
        sound = OnnxRuntimeRunner(exported("msa").SerializeToString())
        candidate = FaultyRunner(sound, set_element(0, 1e3))
        report = verify_bundle(write_bundle("msa", graph), batches=(1,), candidate=candidate)
        assert report.verdict == "fail"
        assert report.first_bad_block is not None
        assert report.first_bad_block.startswith("not found: onnxruntime: the graph cannot be loaded: ")
