"""The operators' descriptions for TensorRT, the layers of a graph, and their kernels; nothing here needs TensorRT."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from evit_kernels import cache
from evit_kernels.aot import ARCHES, KernelRefusedError, kernel_key
from evit_kernels.launch import KernelLaunch
from evit_kernels.registry import OPERATORS
from onnx import TensorProto, helper

from evit_deploy.errors import EvitDeployError, InputDataError, MissingDependencyError, UsageError
from evit_deploy.models.attention_calls import attention_calls
from evit_deploy.onnx.functions import operator_functions
from evit_deploy.trt import plugin_kernels
from evit_deploy.trt.operators import PLUGIN_OPERATORS, PluginLayer, plugin_layers
from evit_deploy.trt.plugin_kernels import compile_for, compiled_kernel, kernel_hash
from tests.made_up_kernels import TRITON, kernel_of, replace_compiler
from tests.plugin_graphs import ASKING, CASES, DTYPES, OP_TYPES, TYPICAL, plugin_graph
from tests.small_exports import ATTENTION, FAMILIES, SPECS, simplified

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def meta_tensors(op_type: str, batch: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in CASES[op_type].shapes(batch)]


def launch_of(op_type: str, dtype: str = "fp32", batch: int = -1, **changes: Any) -> KernelLaunch:
    operator, case = PLUGIN_OPERATORS[op_type], CASES[op_type]
    attributes = operator.read_attributes({**case.attributes, **changes})
    return operator.launch(attributes, case.shapes(batch), dtype)


def layers_of(op_type: str, dtype: str = "fp32", **options: Any) -> list[PluginLayer]:
    return plugin_layers(plugin_graph(op_type, dtype, **options).SerializeToString())


class TestDescriptions:
    def test_every_operator_is_a_plugin(self) -> None:
        assert {operator.operator for operator in PLUGIN_OPERATORS.values()} == set(OPERATORS)
        assert set(PLUGIN_OPERATORS) == set(OP_TYPES)

    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_inputs_and_attributes_are_those_of_the_function(self, op_type: str) -> None:
        operator = PLUGIN_OPERATORS[op_type]
        (function,) = operator_functions([op_type], 20)
        assert tuple(function.input) == operator.inputs
        assert set(function.attribute) == {*operator.attributes, *ASKING}
        assert list(function.output) == [operator.output]

    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_inputs_are_those_of_the_kernel(self, op_type: str) -> None:
        operator, launch = PLUGIN_OPERATORS[op_type], launch_of(op_type)
        assert launch.inputs == tuple(f"p_{name}" for name in operator.inputs)
        assert launch.outputs == (f"p_{operator.output}",)

    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_the_output_has_the_shape_that_pytorch_gives(self, op_type: str) -> None:
        operator, case = PLUGIN_OPERATORS[op_type], CASES[op_type]
        tensors = meta_tensors(op_type, 3)
        arguments = {name: case.attributes[name] for name in operator.arguments}
        expected = OPERATORS[operator.operator].call(*tensors, **arguments).shape
        assert operator.output_shape(case.shapes(3)) == list(expected)
        assert operator.output_shape(case.shapes()) == [-1, *expected[1:]]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_the_launch_is_the_one_of_pytorch(self, op_type: str, dtype: str) -> None:
        operator, case = PLUGIN_OPERATORS[op_type], CASES[op_type]
        tensors = meta_tensors(op_type, 2, TORCH_DTYPES[dtype])
        arguments = {name: case.attributes[name] for name in operator.arguments}
        expected = OPERATORS[operator.operator].launch_of(*tensors, **arguments)
        for batch in (-1, 0, 1, 8):
            assert launch_of(op_type, dtype, batch) == expected
        attributes = operator.read_attributes(case.attributes)
        assert operator.launches(attributes, case.shapes(), dtype) == (expected,)

    @pytest.mark.parametrize(
        ("op_type", "changes", "words"),
        [
            ("EvitMultiScaleAttention", {"height": 7}, "says height=7, but its inputs have 6"),
            ("EvitMultiScaleAttention", {"head_dim": 16}, "says head_dim=16, but its inputs have 8"),
            ("EvitMultiScaleAttention", {"heads": 3}, "heads must be positive and divide channels"),
            ("EvitLiteMLA", {"width": 5}, "says width=5, but its inputs have 7"),
            ("EvitLiteMLA", {"dim": 7}, "must be positive and divide"),
            ("EvitLiteMLA", {"eps": 0.0}, "eps must be above zero"),
            ("EvitCascadedAttention3", {"key_dim": 4}, "says key_dim=4, but its inputs have 8"),
            ("EvitCascadedAttention3", {"window": 4}, r"attention_bias must have shape \[3, 16, 16\]"),
        ],
    )
    def test_attributes_that_contradict_the_inputs(self, op_type: str, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            launch_of(op_type, **changes)

    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_shapes_that_contradict_each_other(self, op_type: str) -> None:
        operator, case = PLUGIN_OPERATORS[op_type], CASES[op_type]
        shapes = case.shapes(2)
        for i, shape in enumerate(shapes):
            for axis in range(len(shape)):
                wrong = [list(sizes) for sizes in shapes]
                wrong[i][axis] += 1
                if (i, axis) == (0, 0) and operator.maps == 1:
                    continue  # one map alone has any batch
                with pytest.raises(ValueError):
                    operator.launch(operator.read_attributes(case.attributes), wrong, "fp16")

    def test_another_number_of_heads_than_the_type_has(self) -> None:
        operator = PLUGIN_OPERATORS["EvitCascadedAttention3"]
        attributes = operator.read_attributes(CASES["EvitCascadedAttention3"].attributes)
        with pytest.raises(ValueError, match="EvitCascadedAttention3 has 3 heads, but its inputs have 2"):
            operator.launch(attributes, CASES["EvitCascadedAttention2"].shapes(), "fp16")

    def test_sizes_that_no_kernel_takes(self) -> None:
        operator = PLUGIN_OPERATORS["EvitMultiScaleAttention"]
        attributes = {"heads": 1, "head_dim": 144, "height": 2, "width": 2, "query_blocks": 1}
        shapes = [(1, 2, 2, 432), (1, 2, 2, 432), (1, 2, 2, 144), (1, 1, 1, 288)]
        with pytest.raises(ValueError, match="the kernel takes a head dim of at most 128, got 144"):
            operator.launch(attributes, shapes, "fp16")

    @pytest.mark.parametrize("shape", [(2, -1, 7, 48), (2, 6, 0, 48)], ids=["dynamic", "empty"])
    def test_only_the_batch_may_be_unknown(self, shape: tuple[int, ...]) -> None:
        operator, case = PLUGIN_OPERATORS["EvitMultiScaleAttention"], CASES["EvitMultiScaleAttention"]
        with pytest.raises(ValueError, match="qkv_small of EvitMultiScaleAttention must have known sizes"):
            operator.launch(case.attributes, [shape, *case.shapes(2)[1:]], "fp16")

    def test_another_number_of_inputs(self) -> None:
        operator, case = PLUGIN_OPERATORS["EvitLiteMLA"], CASES["EvitLiteMLA"]
        with pytest.raises(ValueError, match="has the inputs qkv, aggregated, got 1 inputs"):
            operator.launch(case.attributes, case.shapes()[:1], "fp16")


class TestAttributes:
    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: np.array(x), lambda x: np.array([x])])
    def test_numbers_and_arrays(self, wrap: Callable[[Any], Any]) -> None:
        found = {"dim": wrap(np.int32(8)), "eps": wrap(np.float32(1e-5)), "height": wrap(5), "width": wrap(7)}
        read = PLUGIN_OPERATORS["EvitLiteMLA"].read_attributes(found)
        assert read == {"dim": 8, "eps": 1e-5, "height": 5, "width": 7}
        assert {type(value) for value in read.values()} == {int, float}

    def test_several_numbers(self) -> None:
        found = {**CASES["EvitCascadedAttention3"].attributes, "kernels": np.array([5, 3, 3], np.int32)}
        assert PLUGIN_OPERATORS["EvitCascadedAttention3"].read_attributes(found)["kernels"] == (5, 3, 3)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"dim": None}, "EvitLiteMLA lacks the attribute 'dim'"),
            ({"more": 1}, "EvitLiteMLA has no attribute 'more', only dim, eps, height, width"),
            ({"dim": 8.0}, "dim of EvitLiteMLA must be int, got 8.0"),
            ({"dim": [8, 8]}, "dim of EvitLiteMLA must be int"),
            ({"dim": []}, "dim of EvitLiteMLA must be int"),
            ({"eps": "1"}, "eps of EvitLiteMLA must be float, got '1'"),
        ],
        ids=["missing", "surplus", "float", "several", "none", "text"],
    )
    def test_what_is_not_an_attribute(self, changes: dict[str, Any], words: str) -> None:
        found = {**CASES["EvitLiteMLA"].attributes, **changes}
        with pytest.raises(ValueError, match=words):
            PLUGIN_OPERATORS["EvitLiteMLA"].read_attributes({k: v for k, v in found.items() if v is not None})


class TestLayersOfAGraph:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_they_launch_what_the_fused_model_launches(self, family: str) -> None:
        layers = plugin_layers(simplified(family)[0].SerializeToString())
        assert [layer.op_type for layer in layers] == ATTENTION[family]
        expected = [call.launch for call in attention_calls(SPECS[family])]
        assert [layer.launch for layer in layers] == expected
        assert [kernel_key(layer.launch, 89) for layer in layers] == [kernel_key(launch, 89) for launch in expected]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_what_a_layer_is(self, op_type: str, dtype: str) -> None:
        (layer,) = layers_of(op_type, dtype)
        assert (layer.name, layer.op_type, layer.dtype) == ("attention", op_type, dtype)
        assert layer.input_shapes == tuple(CASES[op_type].shapes())
        assert layer.launch == launch_of(op_type, dtype)
        (fixed,) = layers_of(op_type, dtype, batch=4)
        assert fixed.input_shapes == tuple(CASES[op_type].shapes(4))
        assert fixed.launch == layer.launch

    def test_a_node_without_a_name_is_named_by_its_output(self) -> None:
        model = plugin_graph("EvitLiteMLA")
        model.graph.node[0].name = ""
        assert [layer.name for layer in plugin_layers(model.SerializeToString())] == ["out"]

    @pytest.mark.parametrize(
        "attributes", [{"plugin_namespace": None}, {"plugin_namespace": "other"}, {"plugin_version": "2"}], ids=str
    )
    def test_nodes_that_ask_for_no_plugin_of_ours(self, attributes: dict[str, Any]) -> None:
        assert layers_of("EvitLiteMLA", attributes=attributes) == []

    def test_calls_in_a_subgraph_or_of_another_domain(self) -> None:
        model = plugin_graph("EvitLiteMLA")
        node = model.graph.node[0]
        node.domain = "other"
        assert plugin_layers(model.SerializeToString()) == []
        node.domain = "evit"
        body = helper.make_graph([node], "body", [], [model.graph.output[0]])
        branch = helper.make_node("If", ["yes"], ["out"], then_branch=body, else_branch=copy.deepcopy(body))
        del model.graph.node[:]
        model.graph.node.append(branch)
        assert plugin_layers(model.SerializeToString()) == []

    def test_shapes_the_file_does_not_say_are_inferred(self) -> None:
        model = plugin_graph("EvitLiteMLA")
        model.graph.node[0].input[0] = "relu"
        model.graph.node.insert(0, helper.make_node("Relu", ["qkv"], ["relu"]))
        assert not model.graph.value_info
        assert plugin_layers(model.SerializeToString()) == layers_of("EvitLiteMLA")

    def test_a_shape_that_cannot_be_known(self) -> None:
        model = plugin_graph("EvitLiteMLA")
        model.graph.node[0].input[0] = "strange"
        model.graph.node.insert(0, helper.make_node("Strange", ["qkv"], ["strange"], domain="strange"))
        model.opset_import.append(helper.make_opsetid("strange", 1))
        with pytest.raises(EvitDeployError, match=r"layer attention \(EvitLiteMLA\).*'strange' is not known") as caught:
            plugin_layers(model.SerializeToString())
        assert "--no-plugin" in caught.value.hint

    @pytest.mark.parametrize(
        ("kinds", "words"),
        [
            ((TensorProto.DOUBLE, TensorProto.DOUBLE), "got DOUBLE, DOUBLE"),
            ((TensorProto.FLOAT, TensorProto.FLOAT16), "got FLOAT, FLOAT16"),
        ],
        ids=["double", "mixed"],
    )
    def test_types_that_no_kernel_takes(self, kinds: tuple[int, ...], words: str) -> None:
        model = plugin_graph("EvitLiteMLA")
        for value, kind in zip(model.graph.input, kinds, strict=True):
            value.type.tensor_type.elem_type = kind
        with pytest.raises(EvitDeployError, match=f"its inputs must all be FLOAT, FLOAT16 or BFLOAT16, {words}"):
            plugin_layers(model.SerializeToString())

    def test_a_layer_that_contradicts_itself_is_named(self) -> None:
        with pytest.raises(EvitDeployError, match=r"layer attention .* says height=9, but its inputs have 5") as caught:
            layers_of("EvitLiteMLA", attributes={"height": 9})
        assert caught.value.exit_code == 1

    def test_no_onnx_model(self) -> None:
        with pytest.raises(InputDataError, match="no ONNX model"):
            plugin_layers(b"\xff not a model")

    def test_a_graph_of_standard_operators(self) -> None:
        model = onnx.inliner.inline_local_functions(plugin_graph("EvitLiteMLA"))
        assert plugin_layers(model.SerializeToString()) == []


class TestKernelHash:
    @pytest.fixture
    def layers(self) -> list[PluginLayer]:
        return [layer for op_type in TYPICAL for layer in layers_of(op_type)]

    def test_of_nothing(self, layers: list[PluginLayer]) -> None:
        assert kernel_hash([], ARCHES) == ""
        assert kernel_hash(layers, []) == ""

    def test_order_and_repetition_do_not_matter(self, layers: list[PluginLayer]) -> None:
        expected = kernel_hash(layers, (80, 89))
        assert len(expected) == 64
        assert kernel_hash([*reversed(layers), layers[0]], [89, 80, 89]) == expected

    def test_architectures_layers_and_constants_do(self, layers: list[PluginLayer]) -> None:
        layer = layers[0]
        other = replace(layer, launch=replace(layer.launch, num_warps=2 * layer.launch.num_warps))
        found = {
            kernel_hash(layers, (80, 89)),
            kernel_hash(layers, (80,)),
            kernel_hash(layers[1:], (80, 89)),
            kernel_hash([other, *layers[1:]], (80, 89)),
        }
        assert len(found) == 4

    def test_the_batch_and_the_name_do_not(self) -> None:
        (layer,) = layers_of("EvitLiteMLA", batch=4)
        assert kernel_hash([replace(layer, name="other")], (80,)) == kernel_hash(layers_of("EvitLiteMLA"), (80,))

    def test_triton_is_not_asked(self, layers: list[PluginLayer], monkeypatch: pytest.MonkeyPatch) -> None:
        expected = kernel_hash(layers, (80,))
        monkeypatch.setitem(sys.modules, "triton", None)
        assert kernel_hash(layers, (80,)) == expected


class TestCompiling:
    @pytest.fixture
    def layers(self) -> list[PluginLayer]:
        (layer,) = layers_of("EvitMultiScaleAttention", "fp16")
        return [layer, replace(layer, name="second"), *layers_of("EvitCascadedAttention2", "fp16")]

    @pytest.fixture
    def no_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "installed_triton", lambda: None)

    def fail(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def compiled(*arguments: object) -> None:
            raise error

        monkeypatch.setattr(cache, "compiled", compiled)
        monkeypatch.setattr(plugin_kernels, "interpreting", lambda: False)

    def test_every_kernel_once(
        self, layers: list[PluginLayer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        replace_compiler(monkeypatch, kernel_of)
        monkeypatch.setattr(plugin_kernels, "interpreting", lambda: False)
        lines: list[str] = []
        kernels = compile_for(layers, [90, 80, 90], lines.append, tmp_path)
        launches = [layers[0].launch, layers[2].launch]
        assert kernels == {
            (kernel_key(launch, arch), arch): kernel_of(launch, arch) for launch in launches for arch in (80, 90)
        }
        assert sorted(lines) == sorted(
            f"compiling {name} in fp16 for sm_{arch}"
            for arch in (80, 90)
            for name in ("multi_scale_attention", "cascaded_attention")
        )

    def test_from_a_kernel_pack_without_triton(
        self, layers: list[PluginLayer], no_triton: None, tmp_path: Path
    ) -> None:
        for layer in layers:
            cache.store(kernel_of(layer.launch, 80), tmp_path)
        lines: list[str] = []
        assert len(compile_for(layers, [80], lines.append, tmp_path)) == 2
        assert lines == []

    @pytest.mark.parametrize("arch", [86, 87, 89])
    def test_ptx_that_is_the_same_is_taken_from_another_architecture(
        self, arch: int, layers: list[PluginLayer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Whether Triton is there or not."""
        kernel = kernel_of(layers[0].launch, 80)
        cache.store(kernel, tmp_path)
        for version in (TRITON, None):
            monkeypatch.setattr(cache, "installed_triton", lambda version=version: version)
            assert compiled_kernel(layers[0].launch, arch, folder=tmp_path) == kernel

    @pytest.mark.parametrize("arch", [90, 100, 120])
    def test_a_later_gpu_takes_older_kernels_where_nothing_compiles_its_own(
        self,
        arch: int,
        layers: list[PluginLayer],
        no_triton: None,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        kernel = kernel_of(layers[0].launch, 80)
        cache.store(kernel, tmp_path)
        with caplog.at_level(logging.WARNING):
            assert compiled_kernel(layers[0].launch, arch, folder=tmp_path) == kernel
        (line,) = [record.getMessage() for record in caplog.records]
        assert line == f"multi_scale_attention in fp16 for sm_{arch}: there is none, the kernel for sm_80 is taken"

    def test_a_later_gpu_gets_its_own_kernels_where_triton_is(
        self, layers: list[PluginLayer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(cache, "installed_triton", lambda: TRITON)
        monkeypatch.setattr(plugin_kernels, "interpreting", lambda: False)
        replace_compiler(monkeypatch, kernel_of)
        cache.store(kernel_of(layers[0].launch, 80), tmp_path)
        assert compiled_kernel(layers[0].launch, 120, folder=tmp_path).arch == 120

    @pytest.mark.parametrize(("there", "wanted"), [(90, 100), (120, 90), (89, 80)])
    def test_kernels_that_a_gpu_cannot_run_are_not_taken(
        self, there: int, wanted: int, layers: list[PluginLayer], no_triton: None, tmp_path: Path
    ) -> None:
        """PTX of sm_90a and later is for that architecture alone, and none runs on an older GPU."""
        cache.store(kernel_of(layers[0].launch, there), tmp_path)
        with pytest.raises(MissingDependencyError, match=f"for sm_{wanted} is not in"):
            compiled_kernel(layers[0].launch, wanted, folder=tmp_path)

    def test_neither_pack_nor_triton(self, layers: list[PluginLayer], no_triton: None, tmp_path: Path) -> None:
        with pytest.raises(MissingDependencyError, match=r"multi_scale_attention in fp16 for sm_80 is not in") as error:
            compile_for(layers, [80], print, tmp_path)
        assert "evit-deploy kernels pack --arch 80 --dtype fp16" in error.value.hint
        assert "--no-plugin" in error.value.hint

    def test_an_architecture_without_kernels(self, layers: list[PluginLayer], tmp_path: Path) -> None:
        with pytest.raises(EvitDeployError, match="there is no kernel for sm_75, only for sm_80"):
            compile_for(layers, [75], print, tmp_path)

    def test_the_interpreter(self, layers: list[PluginLayer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(plugin_kernels, "interpreting", lambda: True)
        with pytest.raises(UsageError, match="Triton interprets kernels in this process: unset TRITON_INTERPRET"):
            compile_for(layers, [80], print, tmp_path)

    def test_no_usable_cache(self, layers: list[PluginLayer], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(cache.FOLDER_VARIABLE, "relative")
        with pytest.raises(UsageError, match="must be an absolute path, got 'relative'"):
            compile_for(layers, [80], print)

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (KernelRefusedError("spills 8 bytes"), "for sm_80 is refused: spills 8 bytes"),
            (PermissionError(13, "Permission denied"), "cannot be kept in .*: Permission denied"),
            (KeyError("made up"), "does not compile: KeyError: 'made up'"),
        ],
        ids=["refused", "unwritable", "broken"],
    )
    def test_what_else_goes_wrong(
        self,
        layers: list[PluginLayer],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        error: Exception,
        words: str,
    ) -> None:
        self.fail(monkeypatch, error)
        with pytest.raises(EvitDeployError, match=f"multi_scale_attention in fp16 .*{words}") as caught:
            compile_for(layers, [80], print, tmp_path)
        assert caught.value.hint
