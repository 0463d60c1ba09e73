"""Real builds with TensorRT for RTX, on a machine without a GPU: every family, with the plugin and without it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import TensorProto, helper

from evit_deploy import api
from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.errors import EngineError
from evit_deploy.trt import engines_of, open_engine
from tests.conftest import process_environment
from tests.small_models import small_graph
from tests.tiers import tiered
from tests.tiny_bundle import fill, tiny_manifest
from tests.trt_builds import names_in

if TYPE_CHECKING:
    from conftest import RunCli

SMALLEST = {"msa-m1": 96, "mit-b0": 64, "msra-m0": 224}  # pixels, at which building is quick
LARGE = ("msa-m4", "mit-b3", "msra-m5")


@pytest.fixture(scope="module")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A kernel cache of this file's own; the environment that names it."""
    return {"EVIT_DEPLOY_KERNEL_CACHE": str(tmp_path_factory.mktemp("kernels"))}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A published model's bundle with random weights, not verified; change only copies."""
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            path = tmp_path_factory.mktemp("exported") / f"{name}.evit"
            done[name] = api.export(
                None, path, random_weights=name, image_size=SMALLEST.get(name, 224), verify=False, simplify=False
            ).bundle.path
        return done[name]

    return get


@pytest.fixture(scope="module")
def built(
    exported: Callable[[str], Path],
    run_cli: RunCli,
    kernel_cache: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Bundle, dict[str, Any], dict[str, Any]]]:
    """A model's bundle with two engines, and the documents of their builds: with the plugin, and without it."""
    done: dict[str, tuple[Bundle, dict[str, Any], dict[str, Any]]] = {}

    def get(name: str) -> tuple[Bundle, dict[str, Any], dict[str, Any]]:
        if name not in done:
            path = tmp_path_factory.mktemp("build") / f"{name}.evit"
            shutil.copytree(exported(name), path)
            run = run_cli("build-trt", path, "--targets", "sm89", "--json", "--require-plugin", env=kernel_cache)
            assert run.returncode == 0, run.stderr
            without = api.build_trt(path, flavor="rtx", targets=("sm89",), plugin="off")
            done[name] = (Bundle.open(path), json.loads(run.stdout), without.to_json())
        return done[name]

    return get


@pytest.mark.parametrize("name", tiered([*SMALLEST, *LARGE], "msra-m0".__eq__))
def test_an_engine_with_the_plugin_and_one_without(
    name: str, built: Callable[[str], tuple[Bundle, dict[str, Any], dict[str, Any]]]
) -> None:
    bundle, with_plugin, without = built(name)
    operators = bundle.manifest["onnx"]["operators"]
    plugin = with_plugin["engine"]["plugin"]
    assert plugin["used"] is True
    assert plugin["layers"] == sum(operators.values()), "as TensorRT's own network counts them"
    assert plugin["op_types"] == operators
    assert (plugin["form"], plugin["reason"], plugin["arches"]) == ("jit", "", [89])
    assert without["engine"]["plugin"]["layers"] == 0
    assert without["engine"]["plugin"]["reason"] == "--no-plugin"
    assert with_plugin["engine"]["engine_sha256"] != without["engine"]["engine_sha256"]
    assert with_plugin["engine"]["key"] != without["engine"]["key"]
    records = engines_of(bundle)
    assert len(records) == 2
    for record in records:
        assert open_engine(record.path, bundle=bundle).key == record.key
        assert record.profiles == [{"min": 1, "opt": 8, "max": 64}]
        assert [(t["mode"], t["dtype"], t["shape"][0]) for t in record.io] == [
            ("input", "float32", None),
            ("output", "float32", None),
        ]
        assert record.targets == ["sm89"]
        assert (record.layers, record.layers_note) == (None, "not readable without a GPU")
        assert record.peak_memory_bytes is not None
        assert 0 < record.peak_memory_bytes < 3 * 1024**3
        plan = record.engine_path.read_bytes()
        assert (plan.count(b"kernel_hash") >= record.plugin["layers"] > 0) == record.plugin["used"]
        assert (b"kernel_hash" in plan) == record.plugin["used"], "what each plugin keeps in the engine"
    assert "built, not run: no GPU on this machine" in with_plugin["notes"]


def test_the_same_engine_is_reused_and_forced(
    built: Callable[[str], tuple[Bundle, dict[str, Any], dict[str, Any]]], tmp_path: Path
) -> None:
    bundle, _, without = built("msra-m0")
    copy = shutil.copytree(bundle.path, tmp_path / "copy.evit")
    again = api.build_trt(copy, flavor="rtx", plugin="off", targets=("sm89",))
    assert again.reused
    assert again.record.key == without["engine"]["key"]
    forced = api.build_trt(copy, flavor="rtx", plugin="off", targets=("8.9",), force=True)
    assert not forced.reused
    assert forced.record.key == again.record.key
    assert forced.record.created >= again.record.created


@pytest.fixture
def bundle(digits_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the digits bundle."""
    (tmp_path / "bundles").mkdir()
    return shutil.copytree(digits_bundle.path, tmp_path / "bundles" / "digits.evit")


def test_several_profiles_and_default_targets(bundle: Path) -> None:
    steps: list[str] = []
    result = api.build_trt(
        bundle,
        flavor="rtx",
        plugin="off",
        batch=("1", "2:8:64"),
        workspace_bytes=256 * 1024**2,
        optimization_level=3,
        trt_progress=True,
        progress=steps.append,
    )
    record = result.record
    assert record.name.startswith("rtx-fp32-b1-1-1_b2-8-64-no-plugin-")
    assert record.targets == []
    assert record.targets_note.startswith("default of TensorRT for RTX ")
    assert record.options["workspace_bytes"] == 256 * 1024**2
    assert record.options["timing_cache"] is False
    assert any(step.startswith("TensorRT: ") for step in steps)
    assert names_in(bundle.parent) == [bundle.name]


def test_a_dry_run_says_the_same_and_writes_nothing(
    bundle: Path, run_cli: RunCli, kernel_cache: dict[str, str]
) -> None:
    before = names_in(bundle)
    run = run_cli("build-trt", bundle, "--batch", "1:2:4", "--dry-run", env=kernel_cache)
    assert run.returncode == 0, run.stderr
    rows = dict(line.split(None, 1) for line in run.stdout.splitlines())
    assert rows["engine"].endswith("would be built")
    assert rows["batch"] == "1:2:4"
    assert rows["plugin"].startswith("jit, ")
    assert rows["kernels"].endswith("to compile")
    assert names_in(bundle) == before
    assert api.build_trt(bundle, batch=("1:2:4",), plugin="off").record.name not in rows["engine"]


def test_what_the_command_prints(bundle: Path, run_cli: RunCli) -> None:
    for state in ("", ", was there already"):
        run = run_cli("build-trt", "--no-plugin", "--batch", "4", cwd=bundle.parent)
        assert run.returncode == 0, run.stderr
        rows = dict(line.split(None, 1) for line in run.stdout.splitlines())
        (engine,) = (bundle / "engines").glob("*.engine")
        assert rows["engine"] == f"{engine}{state}"
        assert "no GPU answers" in rows["flavor"]
        assert rows["plugin"] == "no: --no-plugin"
        assert rows["layers"] == "not readable without a GPU"
        assert run.stdout.splitlines()[-1] == "note: built, not run: no GPU on this machine"


def with_graph(folder: Path, data: bytes) -> Path:
    """A tiny bundle around another graph."""
    path = folder / "bundles" / "graph.evit"
    path.parent.mkdir(exist_ok=True)
    with BundleWriter(path) as writer:
        fill(writer, 0)
        (writer.path / "model.onnx").write_bytes(data)
        writer.commit(tiny_manifest())
    return path


def unknown_operator() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Levitate", ["input"], ["logits"], name="/stage/levitate", domain="made.up")],
        "unknown",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 8, 8])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("made.up", 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return data


@pytest.mark.parametrize(
    ("data", "said", "detail"),
    [
        pytest.param(
            unknown_operator, "it stops at node /stage/levitate (Levitate)", "Levitate", id="unknown-operator"
        ),
        pytest.param(lambda: small_graph()[:-3000], "cannot parse the ONNX file", "", id="cut-short"),
        pytest.param(lambda: b"\x08\x0a" + b"x" * 4000, "finds no outputs in the ONNX file", "", id="no-onnx"),
    ],
)
def test_a_graph_that_tensorrt_cannot_parse(data: Callable[[], bytes], said: str, detail: str, tmp_path: Path) -> None:
    path = with_graph(tmp_path, data())
    with pytest.raises(EngineError) as raised:
        api.build_trt(path, flavor="rtx", plugin="off")
    assert said in raised.value.summary
    assert detail in "".join(raised.value.details)
    assert raised.value.exit_code == 1
    assert names_in(path) == ["manifest.json", "model.onnx", "weights.safetensors"]


def test_a_graph_whose_profile_contradicts_it(tmp_path: Path) -> None:
    """The manifest says a dynamic batch, the graph has a fixed one."""
    path = with_graph(tmp_path, small_graph(batch=2))
    with pytest.raises(EngineError, match="contradicts input input of shape"):
        api.build_trt(path, flavor="rtx", plugin="off")


def test_what_the_builder_refuses_has_its_last_messages(bundle: Path) -> None:
    """FP32 matrix products are more than TensorRT for RTX has for Turing."""
    before = names_in(bundle)
    with pytest.raises(EngineError, match="has no FP32 matrix products for sm75") as raised:
        api.build_trt(bundle, flavor="rtx", plugin="off", targets=("sm75",))
    assert any("Turing" in line and "FP32 GEMM" in line for line in raised.value.details)
    assert names_in(bundle) == before


class Building:
    """`evit-deploy build-trt` as a process that is stopped in the middle of the real build."""

    def __init__(self, bundle: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "evit_deploy", "build-trt", str(bundle), "--no-plugin"],
            env=process_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "] building" in line:
                break
        else:
            pytest.fail("the build never began")

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        os.kill(self.process.pid, number)
        _, errors = self.process.communicate()
        return self.process.returncode, errors


@pytest.fixture
def large(exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a bundle whose build takes seconds."""
    (tmp_path / "bundles").mkdir()
    return shutil.copytree(exported("msra-m0"), tmp_path / "bundles" / "m0.evit")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
def test_a_build_that_is_stopped_leaves_nothing(number: signal.Signals, code: int, large: Path) -> None:
    before = names_in(large)
    found, errors = Building(large).stop(number)
    assert found == code
    assert len([line for line in errors.splitlines() if not line.startswith("[")]) == (code == 130)
    assert names_in(large) == before
    assert names_in(large.parent) == [large.name]


def test_a_build_that_is_killed_is_cleaned_up_by_the_next(large: Path) -> None:
    code, _ = Building(large).stop(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert engines_of(Bundle.open(large)) == []
    result = api.build_trt(large, flavor="rtx", plugin="off")
    assert names_in(large / "engines") == [f"{result.record.name}.engine", f"{result.record.name}.json"]


def test_the_parser_takes_the_function_where_no_plugin_is_registered(
    built: Callable[[str], tuple[Bundle, dict[str, Any], dict[str, Any]]],
) -> None:
    """Both engines are of one file: its nodes ask for the plugin, and its functions are there."""
    bundle, with_plugin, without = built("msra-m0")
    model = onnx.load_model_from_string(bundle.read_onnx())
    operators = set(bundle.manifest["onnx"]["operators"])
    assert {function.name for function in model.functions} == operators
    assert with_plugin["engine"]["onnx_sha256"] == without["engine"]["onnx_sha256"] == bundle.onnx_sha256
