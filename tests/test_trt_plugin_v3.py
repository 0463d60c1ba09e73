"""The IPluginV3 classes under the real bindings of TensorRT for RTX, called as TensorRT calls them.

The driver is a stand-in: nothing here runs on a GPU.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evit_kernels import cache
from evit_kernels.aot import kernel_key
from evit_kernels.driver import pack_arguments
from evit_kernels.launch import KernelLaunch

from evit_deploy.errors import EvitDeployError
from evit_deploy.trt import plugin_v3
from evit_deploy.trt.description import PluginOperator
from evit_deploy.trt.flavors import load_flavor
from evit_deploy.trt.operators import PLUGIN_OPERATORS, plugin_layers
from evit_deploy.trt.plugin_context import MAX_ERRORS
from evit_deploy.trt.plugin_kernels import kernel_hash
from tests.plugin_graphs import DTYPES, OP_TYPES, plugin_graph
from tests.plugin_layer import ARCHES, STREAM, TRT_DTYPES, Layer, StandIn

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def trt() -> Any:
    return load_flavor("rtx").trt


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty kernel cache, where made-up kernels are as good as compiled ones."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "installed_triton", lambda: None)
    return tmp_path


def as_numbers(collection: Any) -> dict[str, list[int | float]]:
    return {item.name: np.array(item.data).tolist() for item in collection}


class TestFromANode:
    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_the_creator_says_what_the_parser_must_look_for(self, trt: Any, op_type: str) -> None:
        creator = Layer(trt, op_type).creator
        assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (op_type, "1", "evit")
        kinds = {item.name: item.type for item in creator.field_names}
        expected = {"int": trt.PluginFieldType.INT32, "ints": trt.PluginFieldType.INT32}
        expected["float"] = trt.PluginFieldType.FLOAT32
        assert kinds == {name: expected[kind] for name, kind in PLUGIN_OPERATORS[op_type].attributes.items()}

    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_a_plugin_knows_its_name(self, trt: Any, op_type: str) -> None:
        made = Layer(trt, op_type).create()
        assert (made.plugin_name, made.plugin_version, made.plugin_namespace) == (op_type, "1", "evit")
        assert made.num_outputs == 1

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"heads": None}, "EvitMultiScaleAttention lacks the attribute 'heads'"),
            ({"heads": [2, 2]}, "heads of EvitMultiScaleAttention must be int"),
            ({"heads": 2.0}, "heads of EvitMultiScaleAttention must be int"),
        ],
        ids=["missing", "several", "float"],
    )
    def test_attributes_that_are_refused(self, trt: Any, changes: dict[str, Any], words: str) -> None:
        layer = Layer(trt, "EvitMultiScaleAttention", **changes)
        with pytest.raises(ValueError, match=words):
            layer.create()
        assert str(layer.context.take_errors()[0]).startswith(words)
        assert layer.log[0].startswith(f"EvitMultiScaleAttention: create_plugin: {words}")
        assert layer.context.take_errors() == []


class TestSizes:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_output_has_the_type_of_the_inputs(self, trt: Any, dtype: str) -> None:
        layer = Layer(trt, "EvitLiteMLA", dtype)
        kind = getattr(trt.DataType, TRT_DTYPES[dtype])
        assert layer.create().get_output_data_types([kind, kind]) == [kind]

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, True),
            ({"format": "HWC"}, False),
            ({"dtype": "fp32"}, False),
            ({"dtype": "INT8"}, False),
        ],
        ids=["linear", "another-format", "another-type", "no-kernel"],
    )
    def test_formats(self, trt: Any, changes: dict[str, str], expected: bool) -> None:
        layer = Layer(trt, "EvitLiteMLA", "fp16")
        inputs, outputs = layer.descs(-1, **changes)
        tensors = layer.dynamic([*inputs, *outputs])
        made = layer.create()
        assert made.supports_format_combination(1, tensors, 2) is expected
        assert made.supports_format_combination(0, tensors, 2)
        assert made.supports_format_combination(2, tensors, 2)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_type_with_a_kernel(self, trt: Any, dtype: str) -> None:
        layer = Layer(trt, "EvitLiteMLA", dtype)
        inputs, outputs = layer.descs(-1)
        tensors = layer.dynamic([*inputs, *outputs])
        assert all(layer.create().supports_format_combination(i, tensors, 2) for i in range(3))

    def test_one_tactic_needs_no_number(self, trt: Any) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        assert layer.create().get_valid_tactics() == []
        assert layer.configured().get_valid_tactics() == []

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"height": 9}, "EvitLiteMLA says height=9, but its inputs have 5"),
            ({"dim": 7}, "must be positive and divide"),
        ],
        ids=["height", "dim"],
    )
    def test_attributes_that_contradict_the_inputs(self, trt: Any, changes: dict[str, Any], words: str) -> None:
        layer = Layer(trt, "EvitLiteMLA", **changes)
        with pytest.raises(ValueError, match=words):
            layer.configured()
        assert len(layer.context.take_errors()) == 1

    def test_types_that_differ(self, trt: Any) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        inputs, outputs = layer.descs(-1, dtype="fp32")
        with pytest.raises(ValueError, match="EvitLiteMLA takes inputs of one type, fp32, fp16 or bf16, got"):
            layer.create().configure_plugin(layer.dynamic(inputs), layer.dynamic(outputs))

    def test_a_type_without_kernels(self, trt: Any) -> None:
        layer = Layer(trt, "EvitLiteMLA", "INT8")
        with pytest.raises(ValueError, match=r"one type, fp32, fp16 or bf16, got DataType\.INT8"):
            layer.configured()

    def test_batches_that_differ(self, trt: Any) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        inputs = [layer.desc(shape) for shape in ((2, 48, 5, 7), (3, 72, 5, 7))]
        with pytest.raises(ValueError, match="EvitLiteMLA takes inputs of one batch, got 2, 3"):
            layer.create().on_shape_change(inputs, [])

    def test_a_batch_that_no_grid_can_have(self, trt: Any) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        (launch,) = layer.launches()
        inputs, outputs = layer.descs(-1)
        largest = (2**31 - 1) // launch.programs_per_image
        layer.create().configure_plugin(layer.dynamic(inputs, largest), layer.dynamic(outputs, largest))
        with pytest.raises(EvitDeployError, match="cannot take a batch of"):
            layer.create().configure_plugin(layer.dynamic(inputs, largest + 1), layer.dynamic(outputs, largest + 1))


class TestWhatAnEngineHolds:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_a_round_trip(self, trt: Any, op_type: str, dtype: str) -> None:
        layer = Layer(trt, op_type, dtype)
        serialized = layer.serialized()
        found = as_numbers(serialized)
        (graph_layer,) = plugin_layers(plugin_graph(op_type, dtype).SerializeToString())
        assert set(found) == {*layer.case.attributes, "kernel_hash", "kernel_arches", "input_shapes", "dtype"}
        assert bytes(found["kernel_hash"]).decode() == kernel_hash([graph_layer], ARCHES)
        assert found["kernel_arches"] == list(ARCHES)
        for name, value in layer.case.attributes.items():
            assert found[name] == pytest.approx(np.reshape(value, -1).tolist())
        layer.context.renew((80,), None, print)  # another registration: what the engine holds counts
        again = layer.restore(serialized)
        assert as_numbers(again.get_fields_to_serialize()) == {
            **found,
            "kernel_arches": [80],
            "kernel_hash": list(kernel_hash([graph_layer], (80,)).encode()),
        }

    def test_a_clone_serializes_the_same_and_shares_nothing_that_changes(self, trt: Any) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        made = layer.configured()
        copy = made.clone()
        before = as_numbers(made.get_fields_to_serialize())
        assert as_numbers(copy.get_fields_to_serialize()) == before
        layer.dtype = "fp32"
        copy.on_shape_change(*layer.descs(1))
        assert as_numbers(made.get_fields_to_serialize()) == before
        assert bytes(as_numbers(copy.get_fields_to_serialize())["dtype"]).decode() == "fp32"

    def test_a_plugin_without_sizes_cannot_be_kept(self, trt: Any) -> None:
        with pytest.raises(EvitDeployError, match="EvitLiteMLA was never told its sizes"):
            Layer(trt, "EvitLiteMLA").create().get_fields_to_serialize()

    def changed(self, layer: Layer, name: str, values: Any) -> Any:
        """What an engine holds, with one field of it replaced, or left out."""
        kept = [item for item in layer.serialized() if item.name != name]
        kind = layer.trt.PluginFieldType
        if isinstance(values, bytes):
            kept.append(layer.trt.PluginField(name, np.frombuffer(values, np.int8), kind.CHAR))
        elif values is not None:
            kept.append(layer.trt.PluginField(name, np.array(values, np.int32), kind.INT32))
        layer.kept.append(kept)
        return layer.trt.PluginFieldCollection(kept)

    @pytest.mark.parametrize(
        ("name", "values", "words"),
        [
            ("kernel_hash", b"0123456789abcdef", "was built with the kernels 01234567, this version has"),
            ("kernel_arches", [89], "was built with the kernels"),
            ("dtype", b"fp32", "was built with the kernels"),
            ("kernel_hash", None, "lacks kernel_hash"),
            ("kernel_arches", None, "lacks kernel_arches"),
            ("input_shapes", None, "lacks input_shapes"),
            ("dtype", None, "lacks dtype"),
            ("input_shapes", [4, -1, 48], "has sizes that cannot be read"),
            ("input_shapes", [-1], "has sizes that cannot be read"),
            ("input_shapes", [0], "has the inputs qkv, aggregated, got 1 inputs"),
            ("dtype", b"int8", "EvitLiteMLA has kernels for fp32, fp16, bf16, got 'int8'"),
        ],
    )
    def test_what_another_version_or_a_damaged_engine_holds(self, trt: Any, name: str, values: Any, words: str) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        serialized = self.changed(layer, name, values)
        with pytest.raises((EvitDeployError, ValueError), match=words):
            layer.restore(serialized)
        assert len(layer.context.take_errors()) == 1

    def test_text_may_end_in_zeros(self, trt: Any) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        assert layer.restore(self.changed(layer, "dtype", b"fp16\0")) is not None

    def test_kernels_that_changed_since_are_refused(self, trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        serialized = layer.serialized()
        monkeypatch.setattr(plugin_v3, "hash_of_launches", lambda launches, arches: "f" * 64)
        with pytest.raises(EvitDeployError, match="this version has ffffffff: build the engine again"):
            layer.restore(serialized)


class TestRunning:
    @pytest.mark.parametrize("batch", [1, 8])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_a_launch_is_what_the_driver_would_be_given(
        self, trt: Any, kernels: Path, op_type: str, dtype: str, batch: int
    ) -> None:
        layer = Layer(trt, op_type, dtype)
        layer.store_kernels()
        (launch,) = layer.launches()
        made, launcher = layer.running(batch)
        shapes = [*layer.case.shapes(batch), (batch, *layer.case.output)]
        tensors = [torch.empty(shape, dtype=TORCH_DTYPES[dtype]) for shape in shapes]
        expected = pack_arguments(launch, dict(zip((*launch.inputs, *launch.outputs), tensors, strict=True)))
        pointers = [tensor.data_ptr() for tensor in tensors]
        layer.enqueue(made, batch, pointers[:-1], pointers[-1:])
        handle = f"handle of {kernel_key(launch, 89)}"
        arguments = [value.value for value in expected.values]
        assert launcher.launches == [(handle, batch * launch.programs_per_image, arguments, STREAM)]

    def test_everything_is_looked_up_before(self, trt: Any, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        layer.store_kernels()
        made, launcher = layer.running(1)
        for name in ("compiled_kernel", "hash_of_launches"):
            monkeypatch.setattr(plugin_v3, name, None)
        monkeypatch.setattr(PluginOperator, "launches", None)
        for batch in (1, 8, 3):
            made.on_shape_change(*layer.descs(batch))
            layer.enqueue(made, batch, [1, 2], [3])
        assert len(launcher.loaded) == 1
        grids = [grid for _, grid, _, _ in launcher.launches]
        assert grids == [batch * layer_grid for batch in (1, 8, 3) for layer_grid in [grids[0]]]

    def test_an_engines_kernel_is_loaded_when_a_context_is_made(self, trt: Any, kernels: Path) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        layer.store_kernels()
        serialized, launcher = layer.serialized(), StandIn()
        layer.context.renew(ARCHES, launcher, print)
        restored = layer.restore(serialized)
        assert launcher.loaded == []
        made = restored.attach_to_context(None)
        assert len(launcher.loaded) == 1
        layer.enqueue(made, 2, [1, 2], [3])  # even if TensorRT should not tell the shapes again
        assert len(launcher.launches) == 1

    def test_a_kernel_is_loaded_once_for_all_layers(self, trt: Any, kernels: Path) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        layer.store_kernels()
        made, launcher = layer.running(1)
        serialized = layer.serialized()
        for _ in range(3):
            layer.restore(serialized).attach_to_context(None).on_shape_change(*layer.descs(2))
        made.clone().on_shape_change(*layer.descs(2))
        assert [kernel.arch for kernel in launcher.loaded] == [89]

    def test_other_sizes_get_another_kernel(self, trt: Any, kernels: Path) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        layer.store_kernels()
        made, launcher = layer.running(1)
        layer.dtype = "fp32"
        layer.store_kernels()
        made.on_shape_change(*layer.descs(1))
        assert [kernel.dtype for kernel in launcher.loaded] == ["fp16", "fp32"]

    def test_another_launcher_loads_anew(self, trt: Any, kernels: Path) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        layer.store_kernels()
        layer.running(1)
        _, launcher = layer.running(1)
        assert len(launcher.loaded) == 1

    def test_a_running_layer_keeps_its_launcher(self, trt: Any, kernels: Path) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        layer.store_kernels()
        made, launcher = layer.running(1)
        layer.context.renew(ARCHES, None, print)
        made.on_shape_change(*layer.descs(2))
        layer.enqueue(made, 2, [1, 2], [3])
        assert len(launcher.launches) == 1

    def test_where_engines_are_only_built(self, trt: Any) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        made = layer.configured().attach_to_context(None)
        made.on_shape_change(*layer.descs(1))
        for _ in range(MAX_ERRORS + 5):
            with pytest.raises(EvitDeployError, match="EvitLiteMLA cannot run in this process, which only builds"):
                layer.enqueue(made, 1, [1, 2], [3])
        assert len(layer.context.take_errors()) == MAX_ERRORS
        assert layer.log[0].startswith("EvitLiteMLA: enqueue: EvitLiteMLA cannot run")

    def test_a_kernel_that_is_not_there(self, trt: Any, kernels: Path) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        with pytest.raises(EvitDeployError, match="lite_mla in fp16 for sm_89 is not in"):
            layer.running(1)
        assert "evit-deploy kernels pack" in str(layer.context.take_errors()[0])

    def test_what_the_launcher_raises_reaches_the_bindings_and_is_remembered(self, trt: Any, kernels: Path) -> None:
        layer = Layer(trt, "EvitLiteMLA")
        layer.store_kernels()
        made, launcher = layer.running(1)
        launcher.failure = RuntimeError("CUDA_ERROR_MADE_UP")
        with pytest.raises(RuntimeError, match="CUDA_ERROR_MADE_UP"):
            layer.enqueue(made, 1, [1, 2], [3])
        assert layer.context.take_errors() == [launcher.failure]
        assert layer.log == ["EvitLiteMLA: enqueue: CUDA_ERROR_MADE_UP"]


class _TwoLaunches(PluginOperator):
    """A made-up operator with two kernel configurations."""

    def launches(self, attributes: Any, shapes: Any, dtype: str) -> tuple[KernelLaunch, ...]:
        (first,) = super().launches(attributes, shapes, dtype)
        return first, KernelLaunch(**{**vars(first), "num_warps": 8, "programs_per_image": 1000})


class TestTactics:
    @pytest.mark.parametrize(("tactic", "chosen"), [(None, 0), (0, 0), (1, 0), (2, 1)])
    def test_each_configuration_is_a_tactic(self, trt: Any, kernels: Path, tactic: int | None, chosen: int) -> None:
        original = PLUGIN_OPERATORS["EvitLiteMLA"]
        operator = _TwoLaunches(**{item.name: getattr(original, item.name) for item in fields(original)})
        layer = Layer(trt, "EvitLiteMLA", operator=operator)
        layer.store_kernels()
        launches = layer.launches()
        assert layer.configured().get_valid_tactics() == [1, 2]
        made, launcher = layer.running(2)
        if tactic is not None:
            made.set_tactic(tactic)
            made.on_shape_change(*layer.descs(2))
        layer.enqueue(made, 2, [1, 2], [3])
        handle, grid, _, _ = launcher.launches[0]
        assert handle == f"handle of {kernel_key(launches[chosen], 89)}"
        assert grid == 2 * launches[chosen].programs_per_image
