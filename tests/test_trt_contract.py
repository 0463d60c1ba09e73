"""What our code tells TensorRT, against `evit_kernels`: under the real bindings of 10.16 and 11.4, over a simulation.

What is built and run stands in `tests.trtsim.contract`; what it can show, in `tests.trtsim`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evit_kernels import cache
from evit_kernels.aot import CompiledKernel, _ptxas
from evit_kernels.cascaded_attention.launch import launch_cascaded_attention
from evit_kernels.launch import KernelLaunch
from evit_kernels.lite_mla.launch import launch_lite_mla
from evit_kernels.multi_scale_attention.launch import launch_multi_scale_attention
from evit_kernels.projected_multi_scale_attention.launch import launch_projected_multi_scale_attention
from evit_kernels.ptx import assemble, entry_parameters, ptx_target

from evit_deploy.constants import INPUT_NAME, OUTPUT_NAME
from evit_deploy.models.attention_calls import attention_calls
from evit_deploy.trt.plugin_kernels import hash_of_launches
from tests.plugin_graphs import CASES, DTYPES, OP_TYPES, PluginCase
from tests.small_exports import ATTENTION, FAMILIES, SPECS, simplified
from tests.trtsim.contract import (
    ARCH,
    FIRST_ADDRESS,
    OPTIMIZATION_LEVEL,
    PROFILE,
    STREAM,
    TWO_PROFILES,
    WORKSPACE_BYTES,
    run_in_child,
)
from tests.trtsim.expressions import evaluate
from tests.trtsim.runtime import SCRATCH_ADDRESS
from tests.trtsim.setup import VERSIONS
from tests.trtsim.structures import BF16, FLOAT, HALF, LINEAR

pytest.importorskip("triton", reason="Triton is needed to compile kernels")  # published for Linux only

FORMS = ("aot", "jit")
TRT_DTYPES = {"fp32": FLOAT, "fp16": HALF, "bf16": BF16}
NODES = [(op_type, dtype) for op_type in OP_TYPES for dtype in DTYPES]
# Their names in the results; one test reads them all, because reading them costs nothing and making them does.
NODE_NAMES = [f"{op_type}-{dtype}" for op_type, dtype in NODES]
SELECTORS = ("min", "opt", "max")
RUN_BATCHES = (1, 8, 3)
# What stays at TensorRT's default in a build without options.
FEW_CALLS = ["setProfilingVerbosity", "clearFlag", "addOptimizationProfile"]

Results = dict[str, Any]


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory, kernel_folder: Path) -> dict[tuple[str, str], Results]:
    found = {}
    for version in VERSIONS:
        for form in FORMS:
            folder = tmp_path_factory.mktemp("contract")
            for family in FAMILIES:
                (folder / f"{family}.onnx").write_bytes(simplified(family)[0].SerializeToString())
            found[version, form] = run_in_child(version, form, folder, kernel_folder)
    return found


@pytest.fixture(scope="module", params=[(v, f) for v in VERSIONS for f in FORMS], ids=lambda p: f"{p[0]}-{p[1]}")
def contract(request: pytest.FixtureRequest, contracts: dict[tuple[str, str], Results]) -> Results:
    version, form = request.param
    return {**contracts[version, form], "form": form, "asked": version}


@pytest.fixture(scope="module", params=VERSIONS)
def aot(request: pytest.FixtureRequest, contracts: dict[tuple[str, str], Results]) -> Results:
    return contracts[request.param, "aot"]


@pytest.fixture(scope="module", params=VERSIONS)
def jit(request: pytest.FixtureRequest, contracts: dict[tuple[str, str], Results]) -> Results:
    return contracts[request.param, "jit"]


def launch_of(op_type: str, dtype: str) -> KernelLaunch:
    """The launch of a case of `tests.plugin_graphs`, from its numbers alone."""
    case = CASES[op_type]
    attributes, height, width = case.attributes, case.attributes["height"], case.attributes["width"]
    if op_type == "EvitMultiScaleAttention":
        return launch_multi_scale_attention(attributes["heads"], attributes["head_dim"], height, width, dtype)
    if op_type == "EvitProjectedMultiScaleAttention":
        return launch_projected_multi_scale_attention(attributes["heads"], attributes["head_dim"], height, width, dtype)
    if op_type == "EvitLiteMLA":
        dim = attributes["dim"]
        heads, aggregated = (case.maps[name][0] // (3 * dim) for name in ("qkv", "aggregated"))
        return launch_lite_mla(heads, aggregated, dim, height, width, attributes["eps"], dtype)
    heads, key_dim, kernel, _ = case.parameters["query_weight"]
    window, channels = attributes["window"], case.maps["x"][0] // heads
    return launch_cascaded_attention(heads, key_dim, channels, kernel, window, height, width, dtype)


def stored(launch: KernelLaunch, folder: Path) -> CompiledKernel:
    kernel = cache.find(launch, ARCH, folder)
    assert kernel is not None, f"{launch.operator} in {launch.dtype} was not compiled"
    return kernel


def succeeded(result: Results) -> Results:
    assert result["error"] is None, result
    return result


def plugins(result: Results) -> list[Any]:
    found: list[Any] = succeeded(result)["plan"]["plugins"]
    return found


def all_results(contract: Results) -> Iterator[tuple[str, Results]]:
    return ((name, result) for name, result in contract.items() if isinstance(result, dict) and "faults" in result)


# What a test below must not have to look at


def test_the_bindings_are_those_of_the_version(contract: Results) -> None:
    assert contract["version"] == contract["asked"]


def test_the_simulation_knew_every_call_and_nothing_in_it_failed(contract: Results) -> None:
    names = []
    for name, result in all_results(contract):
        names.append(name)
        assert result["unknown"] == [], name
        assert result["faults"] == [], name
    assert len(names) > len(NODES) + 2 * len(OP_TYPES)


# Plugin or function


def test_unregistered_the_functions_body_is_taken(contract: Results) -> None:
    for name in (*OP_TYPES, *FAMILIES):
        result = succeeded(contract[f"function-{name}"])
        ours = [choice for op_type, choice in result["choices"] if op_type.startswith("Evit")]
        assert ours == ["function"] * len(ATTENTION.get(name, [name])), name
        assert plugins(result) == [], name
        assert result["answer"]["plugin_layers"] == [], name


def test_asked_for_and_unregistered_is_an_error(contract: Results) -> None:
    result = contract["unregistered"]
    assert result["choices"] == [["EvitMultiScaleAttention", "function"]]
    assert result["error"] == "PluginUnusedError"
    assert "took 0 of 1 attention layers" in result["message"]


def test_a_node_that_does_not_ask_gets_its_functions_body(contract: Results) -> None:
    result = succeeded(contract["not-asking"])
    assert result["choices"] == [["EvitLiteMLA", "function"]]
    assert plugins(result) == []


def test_registered_the_plugin_is_taken(contract: Results) -> None:
    for name, (op_type, _) in zip(NODE_NAMES, NODES, strict=True):
        result = succeeded(contract[name])
        assert result["choices"] == [[op_type, "plugin"]], name
        assert result["warnings"] == [], f"{name}: TensorRT's parser only warns of an attribute that a node lacks"
        assert result["plugin_errors"] == [], name
        assert result["answer"]["plugin_layers"] == ["attention"], name
        (plugin,) = plugins(result)
        assert plugin["creator"] == [op_type, "1", "evit"], name
        assert plugin["form"] == contract["form"], name


def test_the_output_has_the_type_and_shape_of_the_definition(contract: Results) -> None:
    for name, (op_type, dtype) in zip(NODE_NAMES, NODES, strict=True):
        (plugin,) = plugins(contract[name])
        (output,) = plugin["outputs"]
        assert output["dtype"] == TRT_DTYPES[dtype], name
        for batch in PROFILE:
            shapes = {name: (batch, *shape) for name, shape in CASES[op_type].maps.items()}
            found = tuple(evaluate(tree, shapes) for tree in output["trees"])
            assert found == (batch, *CASES[op_type].output), name


# The kernel in the plan


def test_a_quick_plugin_launches_what_evit_kernels_does(aot: Results, kernel_folder: Path) -> None:
    for name, (op_type, dtype) in zip(NODE_NAMES, NODES, strict=True):
        (plugin,) = plugins(aot[name])
        assert [variant["tactic"] for variant in plugin["variants"]] == [1], name
        check_variants(plugin, [launch_of(op_type, dtype)], [PROFILE], dtype, kernel_folder)


def check_variants(
    plugin: Any, launches: list[KernelLaunch], profiles: list[tuple[int, int, int]], dtype: str, folder: Path
) -> None:
    """Every variant of a plugin: one for each profile and launch."""
    assert len(plugin["variants"]) == len(profiles) * len(launches)
    tensors = len(plugin["inputs"]) + len(plugin["outputs"])
    for i, variant in enumerate(plugin["variants"]):
        batches, launch = profiles[i // len(launches)], launches[i % len(launches)]
        kernel = stored(launch, folder)
        assert variant["types"] == [TRT_DTYPES[dtype]] * tensors
        assert variant["formats"] == [LINEAR] * tensors
        assert (variant["kernel"], variant["code"]) == (kernel.entry, kernel.ptx)
        for selector, batch in zip(SELECTORS, batches, strict=True):
            grid = {"GridX": batch * launch.programs_per_image, "GridY": 1, "GridZ": 1}
            block = {"BlockX": kernel.threads, "BlockY": 1, "BlockZ": 1}
            assert variant["launch"][selector] == {**grid, **block, "SharedMem": kernel.shared_bytes}
            assert list(variant["extras"][selector].values()) == list(launch.extras.values())


def test_the_entry_takes_what_tensorrt_passes(aot: Results) -> None:
    """Inputs, extras and outputs, in this order: pointers, numbers of 32 bits, pointers."""
    for node in NODE_NAMES:
        (plugin,) = plugins(aot[node])
        for variant in plugin["variants"]:
            name, parameters = entry_parameters(variant["code"])
            assert name == variant["kernel"], node
            kinds = ["u64" if ".u64" in parameter else "u32" for parameter in parameters]
            extras = len(variant["extras"]["opt"])
            expected = ["u64"] * len(plugin["inputs"]) + ["u32"] * extras + ["u64"] * len(plugin["outputs"])
            assert kinds == expected, node


def test_ptxas_assembles_every_kernel_of_every_plan(aot: Results) -> None:
    codes = {
        variant["code"]
        for name in [*NODE_NAMES, *FAMILIES]
        for plugin in plugins(aot[name])
        for variant in plugin["variants"]
    }
    assert len(codes) >= 9, "three operators in three types"
    for code in codes:
        assert ptx_target(code) == f"sm_{ARCH}a"
        assert assemble(code, _ptxas(ARCH)).spill_bytes == 0


# Whole models


def test_every_attention_layer_of_a_model_is_a_plugin(contract: Results) -> None:
    for family in FAMILIES:
        result = succeeded(contract[family])
        assert [plugin["creator"][0] for plugin in plugins(result)] == ATTENTION[family]
        assert result["warnings"] == [], family
        assert len(result["answer"]["plugin_layers"]) == len(ATTENTION[family])
        assert result["answer"]["io"] == [
            {"name": INPUT_NAME, "mode": "input", "dtype": "float32", "shape": [None, *SPECS[family].input_shape]},
            {"name": OUTPUT_NAME, "mode": "output", "dtype": "float32", "shape": [None, SPECS[family].num_classes]},
        ]


def test_a_models_plugins_launch_what_its_layers_call(aot: Results, kernel_folder: Path) -> None:
    for family in FAMILIES:
        calls = attention_calls(SPECS[family], torch.float32)
        found = plugins(aot[family])
        assert len(found) == len(calls) > 0, family
        for plugin, call in zip(found, calls, strict=True):
            check_variants(plugin, [call.launch], list(TWO_PROFILES), "fp32", kernel_folder)


def test_the_profiles_reach_the_plan(contract: Results) -> None:
    for name, batches in (("msa", TWO_PROFILES), ("EvitLiteMLA-fp16", (PROFILE,))):
        for profile, sizes in zip(succeeded(contract[name])["plan"]["profiles"], batches, strict=True):
            assert {tuple(shape[0] for shape in shapes) for shapes in profile.values()} == {sizes}


# What the builder is told


def test_networks_are_strongly_typed_and_ask_for_the_form(contract: Results) -> None:
    bits = contract["flags"]["NetworkDefinitionCreationFlag"]
    typed = 1 << bits["STRONGLY_TYPED"]
    preferred = 1 << bits[f"PREFER_{contract['form'].upper()}_PYTHON_PLUGINS"]
    assert succeeded(contract["EvitLiteMLA-fp16"])["plan"]["network_flags"] == typed | preferred
    assert succeeded(contract["function-EvitLiteMLA"])["plan"]["network_flags"] == typed


def test_without_options_everything_stays_at_its_default(contract: Results) -> None:
    calls = succeeded(contract["EvitLiteMLA-fp16"])["config"]
    assert [method for method, _ in calls] == FEW_CALLS
    assert ["setProfilingVerbosity", [contract["flags"]["ProfilingVerbosity"]["DETAILED"]]] in calls


def test_float32_is_not_rounded_to_tf32(contract: Results) -> None:
    result = succeeded(contract["EvitLiteMLA-fp16"])
    assert ["clearFlag", [contract["flags"]["BuilderFlag"]["TF32"]]] in result["config"]
    assert result["plan"]["builder_flags"] == []


def test_options_reach_the_builder_by_name(contract: Results) -> None:
    result = succeeded(contract["options"])
    flags = contract["flags"]["BuilderFlag"]
    asked = {flags[name] for name in ("VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN")}
    assert set(result["plan"]["builder_flags"]) == asked
    pool = contract["flags"]["MemoryPoolType"]["WORKSPACE"]
    level = contract["flags"]["HardwareCompatibilityLevel"]["AMPERE_PLUS"]
    for call in (
        ["setMemoryPoolLimit", [pool, WORKSPACE_BYTES]],
        ["setBuilderOptimizationLevel", [OPTIMIZATION_LEVEL]],
        ["setHardwareCompatibilityLevel", [level]],
    ):
        assert call in result["config"]


def test_progress_comes_from_tensorrts_callback(contract: Results) -> None:
    texts = [event["text"] for event in succeeded(contract["options"])["events"]]
    assert "TensorRT: Building, 3 steps" in texts
    assert not any(event["text"].startswith("TensorRT: ") for event in contract["EvitLiteMLA-fp16"]["events"])


def test_a_timing_cache_is_made_read_and_kept(contract: Results) -> None:
    """The simulated builder appends to what it was given."""
    for name in ("options", "options-again"):
        assert [method for method, _ in succeeded(contract[name])["config"]][-2:] == [
            "createTimingCache",
            "setTimingCache",
        ]
    assert contract["timing-cache"] == "+timed"
    assert contract["timing-cache-again"] == "+timed+timed"


# Failures


FAILURES = {
    "bad-profile": ("EngineError", "TensorRT refuses the profile 4:2:1"),
    "fixed-batch": ("EngineError", "contradicts input qkv_small of shape [4, 6, 7, 48]"),
    "unknown-operator": ("EngineError", "it stops at node the_culprit (EvitNothing)"),
    "no-model": ("EngineError", "cannot parse the ONNX file"),
    "missing-attribute": ("EvitDeployError", "EvitLiteMLA lacks the attribute 'eps'"),
}


def test_a_failure_is_one_error_with_its_reason(contract: Results) -> None:
    for name, (error, words) in FAILURES.items():
        assert contract[name]["error"] == error, name
        assert words in contract[name]["message"], name


def test_an_error_inside_a_plugin_is_not_lost(contract: Results) -> None:
    """TensorRT itself only says that it failed; without a kernel for the GPU, only the form with kernels does."""
    result = contract["unknown-arch"]
    if contract["form"] == "jit":
        succeeded(result)
        return
    assert result["error"] == "EngineError"
    assert "there is no kernel for sm_75" in " ".join(result["details"])
    words = [event["text"] for event in result["events"] if event.get("severity") == "ERROR"]
    assert any("[builder]" in text for text in words), "TensorRT's own last words reach us as well"


# Running


def test_an_engine_with_the_kernel_inside_needs_nothing_of_ours(aot: Results) -> None:
    for op_type in OP_TYPES:
        result = succeeded(aot[f"run-{op_type}"])
        assert result["ran"] == [True] * len(RUN_BATCHES), op_type
        assert result["without_creator"] is True, op_type
        assert result["launches"] == [], op_type


def test_a_plugin_class_launches_the_kernel_on_tensorrts_stream(jit: Results) -> None:
    for op_type in OP_TYPES:
        result, case, launch = succeeded(jit[f"run-{op_type}"]), CASES[op_type], launch_of(op_type, "fp16")
        assert result["ran"] == [True] * len(RUN_BATCHES), op_type
        assert result["without_creator"] is False, op_type
        assert result["loads"] == [launch.kernel.partition(":")[2]], "loaded once, and not while it runs"
        assert [grid for _, grid, _, _ in result["launches"]] == [b * launch.programs_per_image for b in RUN_BATCHES]
        for _, _, arguments, stream in result["launches"]:
            check_arguments(arguments, case, launch, result["addresses"])
            assert stream == STREAM, op_type


def check_arguments(arguments: list[int], case: PluginCase, launch: KernelLaunch, addresses: dict[str, int]) -> None:
    """Inputs of the engine by their addresses, weights wherever TensorRT has them, extras, the output."""
    maps, inputs = len(case.maps), len(case.maps) + len(case.parameters)
    assert arguments[:maps] == [addresses[name] for name in case.maps]
    assert all(address >= SCRATCH_ADDRESS for address in arguments[maps:inputs])
    assert arguments[inputs:-1] == list(launch.extras.values())
    assert arguments[-1] == addresses["out"] >= FIRST_ADDRESS


def test_an_engine_carries_the_attributes_and_the_kernels_hash(jit: Results) -> None:
    for node, (op_type, dtype) in zip(NODE_NAMES, NODES, strict=True):
        (plugin,) = plugins(jit[node])
        fields = {name: bytes.fromhex(data) for name, _, data in plugin["fields"]}
        assert set(CASES[op_type].attributes) <= set(fields), node
        expected = hash_of_launches([launch_of(op_type, dtype)], [ARCH])
        assert fields["kernel_hash"].decode() == expected, node
        assert plugin["workspace_bytes"] == 0, node
