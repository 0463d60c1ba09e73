from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from evit_deploy.bundle import Bundle, hash_file
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.cost import published_costs
from evit_deploy.errors import EXIT_FAILED, BundleError, EvitDeployError, MissingDependencyError
from evit_deploy.inspection import inspect_path, list_models
from evit_deploy.models import build_model
from evit_deploy.runners import engines
from evit_deploy.specs import FAMILIES, ModelSpec, variant_names
from tests.engine_files import NO_PLUGIN, write_engine
from tests.fake_device import FakeDevice
from tests.fake_trt import FakeTrt
from tests.tiny_bundle import TINY_SPEC, tiny_manifest


def small_graph() -> onnx.ModelProto:
    """Two nodes of a local function, a Gemm and an If with a node in each branch; 12 float32 and 4 float16 weights."""
    weights = [
        numpy_helper.from_array(np.ones((3, 4), np.float32), "w"),
        numpy_helper.from_array(np.ones(4, np.float16), "h"),
        numpy_helper.from_array(np.array([0, -1], np.int64), "shape"),
        numpy_helper.from_array(np.array(True), "condition"),
    ]
    float_out = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    then = helper.make_graph([helper.make_node("Relu", ["g"], ["branch"])], "then", [], [float_out])
    otherwise = helper.make_graph([helper.make_node("Neg", ["g"], ["branch"])], "else", [], [float_out])
    nodes = [
        helper.make_node("Twice", ["input"], ["a"], domain="evit"),
        helper.make_node("Twice", ["a"], ["b"], domain="evit"),
        helper.make_node("Gemm", ["b", "w"], ["g"]),
        helper.make_node("If", ["condition"], ["logits"], then_branch=then, else_branch=otherwise),
    ]
    twice = helper.make_function(
        "evit", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 20)]
    )
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        initializer=weights,
    )
    model = helper.make_model(
        graph,
        functions=[twice],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("evit", 1)],
        producer_name="test",
        ir_version=9,
    )
    helper.set_model_props(model, {"evit_family": "msa"})
    return model


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.onnx"
    onnx.save(small_graph(), path)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    with BundleWriter(tmp_path / "m3.evit") as writer:
        onnx.save(small_graph(), writer.path / "model.onnx")
        writer.save_weights(build_model(TINY_SPEC).state_dict())
        return writer.commit(tiny_manifest(class_names=["cat", "dog", "bird"]))


def as_json(facts: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(facts, allow_nan=False))
    return document


def test_onnx_facts(onnx_file: Path) -> None:
    facts = as_json(inspect_path(onnx_file))
    assert (facts["schema"], facts["schema_version"], facts["kind"]) == ("evit-deploy/inspect", 1, "onnx")
    assert facts["path"] == str(onnx_file)
    assert facts["opset"] == {"ai.onnx": 20, "evit": 1}
    assert facts["ir_version"] == 9
    assert facts["inputs"] == [{"name": "input", "dtype": "float", "shape": ["batch", 3]}]
    assert facts["outputs"] == [{"name": "logits", "dtype": "float", "shape": ["batch", 4]}]
    assert facts["operators"] == {"ai.onnx": {"Gemm": 1, "If": 1, "Neg": 1, "Relu": 1}, "evit": {"Twice": 2}}
    assert facts["nodes"] == 6
    assert facts["functions"] == [{"domain": "evit", "name": "Twice", "operators": {"ai.onnx": {"Add": 1}}}]
    assert facts["parameters"] == 16
    assert facts["initializers"] == {"bool": 1, "float": 12, "float16": 4, "int64": 2}
    assert facts["precision"] == ["float", "float16"]
    assert facts["metadata"] == {"evit_family": "msa"}
    assert facts["external_data"] is False
    assert facts["sha256"] == hash_file(onnx_file)
    assert facts["size_bytes"] == onnx_file.stat().st_size


def test_onnx_file_is_known_by_its_content_too(onnx_file: Path) -> None:
    other = onnx_file.rename(onnx_file.with_name("model"))
    assert inspect_path(other)["kind"] == "onnx"


def test_external_data_is_told_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "external.onnx"
    onnx.save(small_graph(), path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    (tmp_path / "weights.bin").unlink()
    facts = inspect_path(path)
    assert facts["external_data"] is True
    assert facts["parameters"] == 16


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[: len(data) // 2], "is not an ONNX model"),
        (lambda data: b"hello, this is text", "is not an ONNX model"),
        (lambda data: b"\x08\x09", "has no graph"),
    ],
    ids=["empty", "truncated", "text", "header-only"],
)
def test_onnx_file_that_is_none(onnx_file: Path, content: Callable[[bytes], bytes], words: str) -> None:
    onnx_file.write_bytes(content(onnx_file.read_bytes()))
    with pytest.raises(EvitDeployError, match=words) as caught:
        inspect_path(onnx_file)
    assert str(onnx_file) in caught.value.summary
    assert caught.value.exit_code == EXIT_FAILED


def test_bundle_facts(bundle: Bundle) -> None:
    engine = write_engine(bundle.path / "engines", bundle=bundle)
    (bundle.path / "engines" / "half.engine").write_text("engine")
    facts = as_json(inspect_path(bundle.path))
    assert facts["kind"] == "bundle"
    assert facts["name"] == "msa-custom"
    assert ModelSpec.from_json(facts["model"]) == TINY_SPEC
    assert facts["parameters"] == sum(p.numel() for p in build_model(TINY_SPEC).parameters())
    assert facts["multiply_adds"] > 0
    assert facts["random_weights"] is True
    assert facts["class_names"] == ["cat", "dog", "bird"]
    assert facts["verification"] == {"verdict": "skipped"}
    assert facts["onnx"]["sha256"] == facts["files"]["model.onnx"]["sha256"] == bundle.onnx_sha256
    assert facts["onnx"]["operators"]["evit"] == {"Twice": 2}
    half, whole = facts["engines"]
    assert half["name"] == "half"
    assert "has no half.json beside it" in half["problem"]
    assert whole == {
        "name": engine.name,
        "problem": None,
        "size_bytes": 21,
        "flavor": "rtx",
        "tensorrt_version": "11.4.0.106",
        "precision": "fp32",
        "profiles": [{"min": 1, "opt": 4, "max": 8}],
        "targets": ["sm89"],
        "targets_note": "",
        "gpu": None,
        "plugin": {"used": False, "layers": 0, "form": None, "reason": "--no-plugin"},
    }
    assert facts["reports"] == []


def test_engine_of_another_bundle_is_a_problem_of_that_engine(bundle: Bundle) -> None:
    write_engine(bundle.path / "engines")
    (engine,) = inspect_path(bundle.path)["engines"]
    assert "was built from another ONNX file" in engine["problem"]


@pytest.mark.parametrize("suffix", [".engine", ".json", ""], ids=["engine", "json", "name"])
def test_engine_facts(tmp_path: Path, suffix: str) -> None:
    record = write_engine(tmp_path / "engines", layers=[{"name": "head", "type": "Gemm", "precision": "Float"}])
    path = tmp_path / "engines" / (record.name + suffix)
    facts = as_json(inspect_path(path))
    assert (facts["schema"], facts["kind"], facts["path"]) == ("evit-deploy/inspect", "engine", str(path))
    assert facts["engine_path"] == str(record.engine_path)
    assert facts["hash_checked"] is True
    document = record.json_dict
    for name in document.keys() - {"schema", "schema_version", "record_sha256"}:
        assert facts[name] == document[name]


@pytest.mark.parametrize("plugin", [False, True], ids=["no-plugin", "jit-plugin"])
def test_engine_facts_say_whether_it_can_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: bool
) -> None:
    used = {"used": True, "layers": 1, "form": "jit", "kernel_hash": "a" * 64, "op_types": {"EvitLiteMLA": 1}}
    changes: dict[str, Any] = {"plugin": {**NO_PLUGIN, **used, "arches": [89]}} if plugin else {}
    record = write_engine(tmp_path, **changes)
    monkeypatch.setattr(engines, "find_gpus", lambda: ())
    facts = inspect_path(record.path)
    assert (facts["runs_here"], facts["why_not_here"]) == (False, "built, not run: no GPU")
    assert (facts["layers"], facts["layers_note"]) == (None, "not readable without a GPU")

    layers = [{"name": "head", "type": "Gemm", "precision": "Float"}]
    registered: list[Any] = []
    monkeypatch.setattr(engines, "why_not_here", lambda record: None)
    trt = FakeTrt(FakeDevice(), record.io, [(1, 4, 8)])
    monkeypatch.setattr("evit_deploy.trt.flavors.load_flavor", trt.flavor)
    monkeypatch.setattr("evit_deploy.trt.layers.engine_layers", lambda trt, plan, logger, has_gpu: (layers, ""))
    monkeypatch.setattr(
        "evit_deploy.trt.plugin.register_plugins", lambda flavor, names, **options: registered.append(names)
    )
    facts = inspect_path(record.path)
    assert (facts["runs_here"], facts["why_not_here"]) == (True, None)
    assert (facts["layers"], facts["layers_note"]) == (layers, "")
    assert registered == ([["EvitLiteMLA"]] if plugin else [])

    def refuse(name: str) -> None:
        raise MissingDependencyError("TensorRT is too old")

    monkeypatch.setattr("evit_deploy.trt.flavors.load_flavor", refuse)
    facts = inspect_path(record.path)
    assert (facts["layers"], facts["layers_note"]) == (None, "not readable: TensorRT is too old")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("no.engine", None, "no.engine does not exist"),
        ("lonely.engine", "engine", "has no lonely.json beside it"),
        ("other.json", '{"schema": "evit-deploy/bundle"}', "is not an engine's JSON"),
    ],
)
def test_engine_that_is_none(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BundleError, match=words):
        inspect_path(tmp_path / name)


def test_damaged_bundle_is_refused(bundle: Bundle) -> None:
    data = bytearray(bundle.onnx_path.read_bytes())
    data[40] ^= 1
    bundle.onnx_path.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx has changed"):
        inspect_path(bundle.path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoint_facts(tmp_path: Path, suffix: str) -> None:
    model = build_model(ModelSpec.published("msra-m0", num_classes=10))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"model": model.state_dict()}, path)
    else:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    facts = as_json(inspect_path(path))
    assert facts["kind"] == "checkpoint"
    assert facts["name"] == "msra-m0"
    assert facts["model"]["num_classes"] == 10
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["multiply_adds"] < published_costs()["msra-m0"].multiply_adds
    assert facts["sha256"] == hash_file(path)
    assert facts["dtypes"]["float32"] > 100
    assert facts["origin"]["file_format"] == suffix[1:]


def test_published_model_takes_its_cost_from_the_table(tmp_path: Path) -> None:
    torch.save(build_model(ModelSpec.published("msra-m0")).state_dict(), tmp_path / "m0.pth")
    facts = inspect_path(tmp_path / "m0.pth")
    assert facts["multiply_adds"] == published_costs()["msra-m0"].multiply_adds


def test_weights_of_a_bundle_are_a_checkpoint(tmp_path: Path) -> None:
    from evit_deploy.checkpoint import SPEC_METADATA_KEY

    with BundleWriter(tmp_path / "m3.evit") as writer:
        (writer.path / "model.onnx").write_bytes(b"onnx")
        metadata = {SPEC_METADATA_KEY: json.dumps(TINY_SPEC.to_json())}
        writer.save_weights(build_model(TINY_SPEC).state_dict(), metadata=metadata)
        written = writer.commit(tiny_manifest())
    facts = inspect_path(written.weights_path)
    assert ModelSpec.from_json(facts["model"]) == TINY_SPEC


@pytest.mark.parametrize("name", ["notes.txt", "weights.pt", "weights.safetensors"])
def test_text_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("just some words\n" * 20)
    with pytest.raises(EvitDeployError) as caught:
        inspect_path(tmp_path / name)
    assert name in caught.value.summary


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EvitDeployError, match="neither a file nor a folder"):
        inspect_path(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("asked", "meant"), [("smal.onnx", "small.onnx"), ("m2.evit", "m3.evit"), ("m3.pt", "m3.evit")]
)
def test_path_that_does_not_exist(bundle: Bundle, onnx_file: Path, tmp_path: Path, asked: str, meant: str) -> None:
    with pytest.raises(EvitDeployError, match="does not exist") as caught:
        inspect_path(tmp_path / asked)
    assert f"did you mean {tmp_path / meant}?" in caught.value.hint


def test_list_of_models() -> None:
    rows = list_models()
    assert tuple(row["name"] for row in rows) == variant_names()
    assert {row["family"] for row in rows} == set(FAMILIES)
    m3 = next(row for row in rows if row["name"] == "msa-m3")
    assert (m3["parameters"], m3["image_size"], m3["num_classes"]) == (13_989_624, 224, 1000)


def test_list_of_models_needs_no_torch() -> None:
    code = (
        "import sys; from evit_deploy.inspection import list_models; list_models();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'timm')))"
    )
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    done = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0
