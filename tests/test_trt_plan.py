"""What a build would do: profiles, targets, flavors, options and the plugin, each contradiction with its own error."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from evit_deploy.bundle import Bundle
from evit_deploy.environment import Gpu
from evit_deploy.errors import EngineError, EvitDeployError, InputDataError, MissingDependencyError, UsageError
from evit_deploy.trt import BuildOptions, builder, flavors, plan_build
from evit_deploy.trt import plan as planning
from evit_deploy.trt.build import timing_cache_path
from evit_deploy.trt.flavors import Flavor, choose_flavor, load_flavor
from evit_deploy.trt.layers import count_plugins, engine_layers, layers_from_inspector
from evit_deploy.trt.plan import gpu_of_build
from evit_deploy.trt.profiles import BatchProfile, parse_profiles, profiles_for
from evit_deploy.trt.request import BuildRequest
from evit_deploy.trt.targets import parse_targets
from tests import small_exports
from tests.in_process import cli
from tests.tiny_bundle import tiny_manifest, write_tiny

H100 = Gpu("NVIDIA H100", "580.1", 80 * 1024**3, "9.0")
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "580.1", 24 * 1024**3, "8.9")


# Profiles


@pytest.mark.parametrize(
    ("texts", "profiles"),
    [
        pytest.param(["1:8:64"], ["1:8:64"], id="three"),
        pytest.param([" 1 : 8:64"], ["1:8:64"], id="spaces"),
        pytest.param(["4"], ["4:4:4"], id="one-number"),
        pytest.param(["1:1:1", "2:8:64"], ["1:1:1", "2:8:64"], id="two-profiles"),
        pytest.param(["8", "8:8:8"], ["8:8:8"], id="twice-the-same"),
        pytest.param([], [], id="none"),
    ],
)
def test_profiles(texts: list[str], profiles: list[str]) -> None:
    assert [str(profile) for profile in parse_profiles(texts)] == profiles


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("64:8:1", "'64:8:1' runs backwards: did you mean 1:8:64?", id="backwards"),
        pytest.param("1:64:8", "runs backwards", id="opt-above-max"),
        pytest.param("0:8:64", "has a batch of zero", id="zero"),
        pytest.param("1:8", "is no batch profile", id="two-numbers"),
        pytest.param("1:8:64:128", "is no batch profile", id="four-numbers"),
        pytest.param("1,8,64", "is no batch profile", id="commas"),
        pytest.param("-1:8:64", "is no batch profile", id="negative"),
        pytest.param("", "is no batch profile", id="empty"),
        pytest.param("1:8:65537", "goes above 65536", id="too-large"),
        pytest.param("1:8:99999999999999999999", "goes above 65536", id="absurd"),
    ],
)
def test_a_text_that_is_no_profile(text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_profiles([text])
    assert said in str(raised.value)


def bundle_with(tmp_path: Path, **onnx: Any) -> Bundle:
    return write_tiny(tmp_path / "tiny.evit", onnx={**tiny_manifest()["onnx"], **onnx})


@pytest.mark.parametrize(
    ("onnx", "wanted", "profiles"),
    [
        pytest.param({}, [], ["1:8:64"], id="default"),
        pytest.param({"max_batch": 5}, [], ["1:5:5"], id="default-below-eight"),
        pytest.param({"max_batch": None}, [], ["1:8:8"], id="default-of-unknown-largest"),
        pytest.param({"max_batch": 16}, ["1:16:16", "2"], ["1:16:16", "2:2:2"], id="wanted"),
        pytest.param({"batch": 3, "max_batch": 3}, [], ["3:3:3"], id="fixed"),
        pytest.param({"batch": 3, "max_batch": 3}, ["3"], ["3:3:3"], id="fixed-and-wanted"),
    ],
)
def test_the_profiles_of_a_bundle(onnx: dict[str, Any], wanted: list[str], profiles: list[str], tmp_path: Path) -> None:
    found = profiles_for(bundle_with(tmp_path, **onnx), parse_profiles(wanted))
    assert [str(profile) for profile in found] == profiles


@pytest.mark.parametrize(
    ("onnx", "wanted", "said"),
    [
        pytest.param({"max_batch": 16}, "1:8:64", "goes above 16", id="above-the-largest"),
        pytest.param({"batch": 3, "max_batch": 3}, "1:3:3", "whose graph has the fixed batch 3", id="fixed-batch"),
    ],
)
def test_a_profile_that_contradicts_the_model(onnx: dict[str, Any], wanted: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        profiles_for(bundle_with(tmp_path, **onnx), parse_profiles([wanted]))
    assert "export again" in raised.value.hint


# Flavors and targets


@pytest.mark.parametrize(
    ("name", "gpus", "failure", "chosen", "why"),
    [
        pytest.param("auto", (), None, "rtx", "no GPU answers", id="no-gpu"),
        pytest.param("auto", (H100,), None, "tensorrt", "NVIDIA H100 answers", id="gpu"),
        pytest.param("auto", (H100,), "no libnvinfer", "rtx", "does not import here (no libnvinfer)", id="no-tensorrt"),
        pytest.param("tensorrt", (), None, "tensorrt", "asked for", id="asked-for"),
    ],
)
def test_the_flavor_and_why(
    name: str,
    gpus: tuple[Gpu, ...],
    failure: str | None,
    chosen: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flavors, "find_gpus", lambda: gpus)
    monkeypatch.setattr(flavors, "_import_failure", lambda name: failure)
    flavor, reason = choose_flavor(name)
    assert flavor == chosen
    assert why in reason


def test_an_unknown_flavor() -> None:
    with pytest.raises(UsageError, match="unknown flavor 'tensort'") as raised:
        choose_flavor("tensort")
    assert "did you mean 'tensorrt'?" in raised.value.hint


def module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize(
    ("version", "said"),
    [
        pytest.param("10.15.1.29", "TensorRT 10.15.1.29 is too old: 10.16 or later is needed", id="before-10.16"),
        pytest.param("8.6.1", "is too old", id="long-ago"),
        pytest.param("", "of unknown version", id="no-version"),
        pytest.param("10.16.1.11", None, id="oldest"),
        pytest.param("11.4.0.106", None, id="newest"),
    ],
)
def test_an_old_tensorrt_is_refused(version: str, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", module("tensorrt", __version__=version))
    if said is None:
        assert load_flavor("tensorrt").version == version
        return
    with pytest.raises(MissingDependencyError) as raised:
        load_flavor("tensorrt")
    assert said in raised.value.summary
    assert "pip install tensorrt-cu13==" in raised.value.hint


def test_whether_tensorrt_imports_is_tried_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A front-end without its libraries is not the end of the program."""
    failure = flavors._import_failure.__wrapped__
    monkeypatch.setitem(flavors._MODULES, "tensorrt", ("made_up_tensorrt",))
    assert failure("tensorrt") == "it is not installed"
    package = tmp_path / "made_up_tensorrt.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for text, said in (
        ("", None),
        ("raise ImportError('libnvinfer.so.11: no such file')", "ImportError: libnvinfer.so.11: no such file"),
        ("import os; os._exit(7)", "its import ends the process with code 7"),
    ):
        package.write_text(text)
        assert failure("tensorrt") == said


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt_rtx_bindings", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError) as raised:
        load_flavor("rtx")
    assert "TensorRT for RTX" in raised.value.summary
    assert "pip install tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116" in raised.value.hint
    assert raised.value.exit_code == 4


def test_flavor_tensorrt_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="no GPU answers here") as raised:
        plan_build(write_tiny(tmp_path / "tiny.evit"), BuildOptions(flavor="tensorrt"))
    assert "--flavor rtx builds without one" in raised.value.hint


@pytest.fixture(scope="module")
def rtx() -> Flavor:
    return load_flavor("rtx")


def test_the_real_rtx_and_its_targets(rtx: Flavor) -> None:
    assert rtx.version.startswith("1.")
    assert {"sm75", "sm80", "sm89", "sm120"} <= set(rtx.known_targets)
    assert not {"none", "current"} & set(rtx.known_targets)
    assert rtx.plugin_forms == ("jit",)
    assert rtx.network_flags("jit") == 1 << int(rtx.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_targets_in_every_spelling(rtx: Flavor) -> None:
    assert parse_targets(("sm89", "8.0", "SM_120", "80"), rtx) == ("sm80", "sm89", "sm120")
    assert parse_targets((), rtx) == ()


@pytest.mark.parametrize("word", ["sm99", "ampere", "8", "current", "sm8.9.1"])
def test_an_unknown_target(word: str, rtx: Flavor) -> None:
    with pytest.raises(UsageError, match="unknown target") as raised:
        parse_targets((word,), rtx)
    assert "sm89" in raised.value.hint


def test_flavor_tensorrt_takes_no_targets() -> None:
    with pytest.raises(UsageError, match="--targets belongs to flavor rtx"):
        parse_targets(("sm89",), Flavor("tensorrt", SimpleNamespace(), "11.4.0.106"))


# The plan


def plan(bundle: Bundle, **options: Any) -> planning.BuildPlan:
    return plan_build(bundle, BuildOptions(**{"flavor": "rtx", **options}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"plugin": "aot"}, "has no plugins of the form aot", id="aot"),
        pytest.param({"plugin": "qdp"}, "unknown form of plugin 'qdp'", id="unknown-form"),
        pytest.param({"plugin": "off", "require_plugin": True}, "contradict each other", id="off-and-required"),
        pytest.param({"refit": True}, "--refit is not for TensorRT for RTX", id="refit"),
        pytest.param({"strip_weights": True}, "--strip-weights is not for TensorRT for RTX", id="strip"),
        pytest.param({"version_compatible": True}, "--version-compatible is not for", id="version-compatible"),
        pytest.param({"hardware_compatible": True}, "--hardware-compatible is not for", id="hardware-compatible"),
        pytest.param({"workspace_bytes": 0}, "at least one byte", id="workspace"),
        pytest.param({"optimization_level": 6}, "go from 0 to 5", id="optimization-level"),
        pytest.param({"targets": ("sm42",)}, "unknown target 'sm42'", id="target"),
        pytest.param({"profiles": (BatchProfile(1, 8, 128),)}, "goes above 64", id="profile"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        plan(write_tiny(tmp_path / "tiny.evit"), **options)
    assert said in raised.value.summary


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        pytest.param(("--batch", "64:8:1"), 2, "runs backwards: did you mean 1:8:64?", id="backwards"),
        pytest.param(("--batch", "1:8:128", "--flavor", "rtx"), 2, "--max-batch 128", id="above-the-bundle"),
        pytest.param(("--flavor", "rtx", "--targets", "sm42"), 2, "unknown target 'sm42'", id="target"),
        pytest.param(("--flavor", "rtx", "--targets", "sm80,"), 2, "has an empty name", id="empty-target"),
        pytest.param(("--flavor", "trt"), 2, "unknown flavor 'trt'", id="flavor"),
        pytest.param(("--plugin", "qdp"), 2, "known: aot, jit", id="form"),
        pytest.param(("--plugin", "jit", "--no-plugin"), 2, "contradict each other", id="form-and-none"),
        pytest.param(("--flavor", "rtx", "--refit"), 2, "leave --refit out", id="refit"),
        pytest.param(("--optimization-level", "9"), 2, "optimization-level", id="level"),
        pytest.param(("--flavor", "tensorrt"), 4, "--flavor rtx builds without one", id="no-gpu"),
        pytest.param(("--flavor", "rtx"), 1, "no ONNX model", id="corrupted"),
    ],
)
def test_the_command_s_errors(options: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.evit")
    outcome = cli("build-trt", tmp_path / "tiny.evit", *options)
    assert (outcome.code, outcome.out) == (code, "")
    assert said in outcome.error


def with_graph(tmp_path: Path, data: bytes) -> Bundle:
    """A tiny bundle around another graph."""
    from evit_deploy.bundle.writer import BundleWriter
    from tests.tiny_bundle import fill

    with BundleWriter(tmp_path / "graph.evit") as writer:
        fill(writer, 0)
        (writer.path / "model.onnx").write_bytes(data)
        return writer.commit(tiny_manifest())


def test_a_corrupted_graph(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match="no ONNX model"):
        plan(write_tiny(tmp_path / "tiny.evit"))


@pytest.mark.parametrize("family", small_exports.FAMILIES)
def test_the_plugin_of_each_family(family: str, tmp_path: Path) -> None:
    bundle = with_graph(tmp_path, small_exports.exported(family).SerializeToString())
    made = plan(bundle, targets=("sm80", "sm89"))
    expected = small_exports.ATTENTION[family]
    assert made.plugin.form == "jit"
    assert made.plugin.op_types == {name: expected.count(name) for name in sorted(set(expected))}
    assert made.plugin.arches == (80, 89)
    assert len(made.plugin.kernel_hash) == 64
    kernels = made.plugin.kernels()
    assert 2 <= kernels["cached"] + kernels["absent"] <= 2 * len(expected)
    assert made.key_parts["plugin"] == {
        "form": "jit",
        "op_types": made.plugin.op_types,
        "kernel_hash": made.plugin.kernel_hash,
    }
    assert "no-plugin" not in made.name
    without = plan(bundle, targets=("sm80", "sm89"), plugin="off")
    assert without.key != made.key
    assert without.plugin.reason == "--no-plugin"


@pytest.mark.parametrize("required", [False, True], ids=["auto", "required"])
@pytest.mark.parametrize(
    ("family", "targets", "reason"),
    [
        pytest.param("mit", ("sm75",), "there is no kernel for sm75", id="no-kernel-for-the-target"),
        pytest.param("plain", (), "the graph has no fused operators", id="no-fused-operators"),
    ],
)
def test_a_fall_back_has_its_reason(
    family: str, targets: tuple[str, ...], reason: str, required: bool, tmp_path: Path
) -> None:
    from tests.small_models import small_graph

    data = small_graph() if family == "plain" else small_exports.exported(family).SerializeToString()
    bundle = with_graph(tmp_path, data)
    if required:
        with pytest.raises(EngineError) as raised:
            plan(bundle, targets=targets, require_plugin=True)
        assert reason in raised.value.summary
        return
    made = plan(bundle, targets=targets)
    assert made.plugin.form is None
    assert reason in made.plugin.reason
    assert made.plugin.to_json()["used"] is False


def tensorrt_plan(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, **options: Any) -> planning.BuildPlan:
    """A plan as it would be where TensorRT 11.4 and an H100 are."""
    members = {"STRONGLY_TYPED": 0, "PREFER_AOT_PYTHON_PLUGINS": 2, "PREFER_JIT_PYTHON_PLUGINS": 1}
    stand_in = module(
        "tensorrt", __version__="11.4.0.106", NetworkDefinitionCreationFlag=SimpleNamespace(__members__=members)
    )
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    for place in (flavors, planning):
        monkeypatch.setattr(place, "find_gpus", lambda: (H100,))
    return plan_build(bundle, BuildOptions(**{"flavor": "tensorrt", **options}))


def test_flavor_tensorrt_is_for_the_gpu_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    bundle = with_graph(tmp_path, small_exports.exported("mit").SerializeToString())
    made = tensorrt_plan(bundle, monkeypatch)
    assert (made.targets, made.gpu, made.plugin.form, made.plugin.arches) == (("sm90",), "NVIDIA H100", "aot", (90,))
    kernels = made.plugin.kernel_hash[:16]
    expected = f"/var/cache/evit-deploy/timings/tensorrt-11.4.0.106-nvidia-h100-sm90-{kernels}.cache"
    assert timing_cache_path(made) == expected
    assert timing_cache_path(tensorrt_plan(bundle, monkeypatch, timing_cache=False)) is None
    assert made.flavor.network_flags("aot") == 0b101
    assert made.flavor.network_flags(None) == 0b001
    assert tensorrt_plan(bundle, monkeypatch, plugin="jit").plugin.form == "jit"
    assert timing_cache_path(plan(bundle)) is None, "a build without a GPU has no timings"


@pytest.mark.parametrize("option", ["hardware_compatible", "version_compatible"])
def test_a_compatible_engine_has_no_plugin(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_graph(tmp_path, small_exports.exported("mit").SerializeToString())
    made = tensorrt_plan(bundle, monkeypatch, **{option: True})
    assert made.plugin.form is None
    assert option.replace("_", "-") in made.plugin.reason
    with pytest.raises(EngineError):
        tensorrt_plan(bundle, monkeypatch, require_plugin=True, **{option: True})


@pytest.mark.parametrize(
    ("visible", "gpu"),
    [
        pytest.param({}, H100, id="first"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "1,0"}, RTX_4090, id="chosen"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "7"}, H100, id="out-of-range"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "GPU-0a1b"}, H100, id="by-uuid"),
    ],
)
def test_the_gpu_of_a_build(visible: dict[str, str], gpu: Gpu) -> None:
    assert gpu_of_build((H100, RTX_4090), visible) == gpu


def test_a_gpu_of_unknown_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_plan(write_tiny(tmp_path / "tiny.evit"), monkeypatch, plugin="off")
    for place in (flavors, planning):
        monkeypatch.setattr(place, "find_gpus", lambda: (Gpu("NVIDIA Something", None, None, None),))
    with pytest.raises(MissingDependencyError, match="compute capability of NVIDIA Something is not known"):
        plan_build(Bundle.open(tmp_path / "tiny.evit"), BuildOptions(flavor="tensorrt", plugin="off"))


@pytest.mark.parametrize(
    ("targets", "compiled"),
    [((), (80,)), (("sm89",), (80,)), (("sm89", "sm120"), (80,)), (("sm120",), (120,))],
    ids=str,
)
def test_an_engine_without_kernels_has_the_fewest_compiled(
    targets: tuple[str, ...], compiled: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evit_deploy.trt import plugin_kernels
    from tests.trt_builds import fake_build

    asked: list[Any] = []

    class Recording(NothingCompiled):
        def __init__(self, needed: Any, arches: Any, **options: Any) -> None:
            asked.append((len(needed), tuple(arches)))

    monkeypatch.setattr("evit_deploy.kernels.Compilation", Recording)
    monkeypatch.setattr(plugin_kernels, "compile_for", lambda layers, arches, progress: asked.append(tuple(arches)))
    monkeypatch.setenv("EVIT_DEPLOY_KERNEL_CACHE", str(tmp_path / "kernels"))
    bundle = with_graph(tmp_path, small_exports.exported("mit").SerializeToString())
    made = plan_build(bundle, BuildOptions(flavor="rtx", targets=targets))
    assert made.plugin.compiled_arches == compiled
    assert made.plugin.kernels() == {"cached": 0, "absent": 2}
    result = fake_build(bundle.path, plugin="auto", targets=targets)
    assert asked == [(2, compiled), compiled]
    assert result.record.plugin["arches"] == list(made.plugin.arches), "what the engine is for does not change"


class NothingCompiled:
    """Stands in for the threads that compile kernels."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def rows(self) -> list[Any]:
        return []

    def __enter__(self) -> NothingCompiled:
        return self

    def __exit__(self, *arguments: object) -> None:
        pass


def test_kernels_that_cannot_be_had_are_a_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiles here: the engine is built without the plugin, and says so."""
    from evit_deploy.trt import plugin_kernels
    from tests.trt_builds import fake_build

    bundle = with_graph(tmp_path, small_exports.exported("mit").SerializeToString())

    def missing(*arguments: Any, **keywords: Any) -> None:
        raise MissingDependencyError("lite_mla for sm_80 is not in the cache", hint="unpack a kernel pack")

    monkeypatch.setattr("evit_deploy.kernels.Compilation", NothingCompiled)
    monkeypatch.setattr(plugin_kernels, "compile_for", missing)
    result = fake_build(bundle.path, plugin="auto")
    assert result.record.plugin["used"] is False
    assert "is not in the cache: unpack a kernel pack" in result.record.plugin["reason"]
    assert result.record.warnings[0].startswith("without the plugin: ")
    assert any(note.startswith("built without the plugin: ") for note in result.notes)
    with pytest.raises(EvitDeployError, match="the plugin cannot be used"):
        fake_build(bundle.path, plugin="auto", require_plugin=True)


def test_a_plugin_that_tensorrt_does_not_take_is_a_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evit_deploy.trt import plugin_kernels
    from tests.trt_builds import fake_build

    bundle = with_graph(tmp_path, small_exports.exported("mit").SerializeToString())
    monkeypatch.setattr("evit_deploy.kernels.Compilation", NothingCompiled)
    monkeypatch.setattr(plugin_kernels, "compile_for", lambda *arguments: {})
    result = fake_build(bundle.path, "plugin", plugin="auto")
    assert result.record.plugin["reason"] == "TensorRT took 0 of 2 attention layers as plugins"
    assert result.record.key_parts["plugin"] is None
    with pytest.raises(EngineError, match="took 0 of 2"):
        fake_build(bundle.path, "plugin", plugin="auto", require_plugin=True)


def test_an_interpreter_in_place_of_the_compiler_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of the environment, which the user can mend: no reason to build something else."""
    from tests.trt_builds import fake_build

    monkeypatch.setattr("evit_deploy.kernels.compiling.interpreting", lambda: True)
    monkeypatch.setenv("EVIT_DEPLOY_KERNEL_CACHE", str(tmp_path / "kernels"))
    bundle = with_graph(tmp_path, small_exports.exported("mit").SerializeToString())
    with pytest.raises(UsageError, match="TRITON_INTERPRET"):
        fake_build(bundle.path, plugin="auto")
    monkeypatch.setenv("EVIT_DEPLOY_KERNEL_CACHE", "relative")
    with pytest.raises(UsageError, match="must be an absolute path"):
        plan(bundle).to_json()


class FakeTimings:
    """A configuration that takes a timing cache unless it is damaged."""

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        return cache != b"damaged"


@pytest.mark.parametrize(
    ("stored", "taken"), [(None, b""), (b"timings", b"timings"), (b"damaged", b"")], ids=["none", "stored", "damaged"]
)
def test_a_timing_cache_is_read_and_kept(stored: bytes | None, taken: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "one.cache"
    if stored is not None:
        path.parent.mkdir()
        path.write_bytes(stored)
    request = BuildRequest("tensorrt", "", "", "", ((1, 1, 1),), timing_cache_path=str(path))
    assert builder._timing_cache(FakeTimings(), request) == taken
    builder._store_timing_cache(SimpleNamespace(serialize=lambda: b"new timings"), path)
    assert path.read_bytes() == b"new timings"
    assert [file.name for file in path.parent.iterdir()] == ["one.cache"]


def test_a_timing_cache_that_cannot_be_kept_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    builder._store_timing_cache(SimpleNamespace(serialize=lambda: b"new"), tmp_path / "file" / "one.cache")
    assert (tmp_path / "file").read_bytes() == b""
    assert builder._timing_cache(None, BuildRequest("rtx", "", "", "", ((1, 1, 1),))) is None


# Layers

DETAILED = (
    '{"Layers": [{"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Half"}], '
    '"Outputs": [{"Format/Datatype": "Half NHWC"}]}, {"Name": "mla", "ParameterType": "PluginV3", "Outputs": []}]}'
)


def test_layers_as_the_inspector_gives_them() -> None:
    layers = layers_from_inspector(DETAILED)
    assert layers == [
        {"name": "conv", "type": "CaskConvolution", "precision": "Half NHWC"},
        {"name": "mla", "type": "PluginV3", "precision": None},
    ]
    assert count_plugins(layers) == 1
    assert layers_from_inspector('{"Layers": ["conv"]}') == [{"name": "conv", "type": None, "precision": None}]


@pytest.mark.parametrize("text", ["", "[]", '{"Layers": 1}'])
def test_what_no_inspector_says(text: str) -> None:
    with pytest.raises(ValueError):
        layers_from_inspector(text)


def test_without_a_gpu_no_layer_is_read() -> None:
    assert engine_layers(None, b"", None, has_gpu=False) == (None, "not readable without a GPU")
