"""Registering the plugins, and what the real parser and builder of TensorRT for RTX make of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from evit_deploy.errors import EvitDeployError, UsageError
from evit_deploy.trt import plugin
from evit_deploy.trt.flavors import Flavor, load_flavor
from evit_deploy.trt.operators import PLUGIN_OPERATORS
from tests.plugin_builder import build_in_child
from tests.plugin_graphs import CASES, DTYPES, OP_TYPES, TYPICAL
from tests.plugin_layer import ARCHES, StandIn


@pytest.fixture(scope="module")
def flavor() -> Flavor:
    return load_flavor("rtx")


class TestRegistering:
    """In this process nothing is parsed; the registry is real, and nothing leaves it."""

    @pytest.fixture(autouse=True)
    def as_before(self) -> Iterator[None]:
        yield
        for context in plugin._contexts.values():
            context.renew((), None, print)

    def test_what_cannot_be_registered(self, flavor: Flavor) -> None:
        with pytest.raises(ValueError, match=r"no plugin for 'EvitLiteML': did you mean 'EvitLiteMLA'"):
            plugin.register_plugins(flavor, ["EvitLiteML"], form="jit", arches=ARCHES)
        with pytest.raises(UsageError, match=r"TensorRT for RTX 1\.7.* has no plugins of the form 'aot', only jit"):
            plugin.register_plugins(flavor, ["EvitLiteMLA"], form="aot", arches=(89,))

    def test_a_plugin_holds_the_kernel_of_one_gpu(self) -> None:
        flavor = Flavor("tensorrt", None, "11.4.0.106")
        for arches, found in (((80, 89), "sm_80, sm_89"), ((), "none")):
            with pytest.raises(UsageError, match=f"holds the kernel of one GPU, got {found}: use --plugin jit"):
                plugin.register_plugins(flavor, ["EvitLiteMLA"], form="aot", arches=arches)

    def test_one_process_has_one_form(self, flavor: Flavor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugin, "_registered", {("rtx", "EvitLiteMLA"): ("aot", None)})
        with pytest.raises(EvitDeployError, match="EvitLiteMLA is registered as aot in this process"):
            plugin.register_plugins(flavor, ["EvitLiteMLA"], form="jit", arches=ARCHES)

    def test_a_registry_that_does_not_take_it(self, flavor: Flavor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugin, "missing_plugins", lambda flavor, op_types: list(op_types))
        with pytest.raises(EvitDeployError, match=r"TensorRT for RTX 1\.7.* did not take the plugins EvitLiteMLA"):
            plugin.register_plugins(flavor, ["EvitLiteMLA"], form="jit", arches=ARCHES)

    def test_registering_again_renews_the_launcher(self, flavor: Flavor) -> None:
        plugin.register_plugins(flavor, ["EvitLiteMLA"], form="jit", arches=ARCHES)
        assert plugin.missing_plugins(flavor, ["EvitLiteMLA", "EvitNone"]) == ["EvitNone"]
        context = plugin._contexts[("rtx", "jit")]
        launcher = StandIn()
        names = plugin.register_plugins(flavor, ["EvitLiteMLA"], form="jit", arches=(89,), launcher=launcher)
        assert names == ["EvitLiteMLA"]
        assert plugin._contexts[("rtx", "jit")] is context
        assert (context.arches, context.launcher) == ((89,), launcher)

    def test_errors_go_to_the_logger_of_tensorrt(self, flavor: Flavor) -> None:

        class Logger(flavor.trt.ILogger):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                flavor.trt.ILogger.__init__(self)
                self.lines: list[tuple[Any, str]] = []

            def log(self, severity: Any, line: str) -> None:
                self.lines.append((severity, line))

        logger = Logger()
        plugin.register_plugins(flavor, ["EvitLiteMLA"], form="jit", arches=ARCHES, logger=logger)
        plugin.take_plugin_errors()
        with pytest.raises(KeyError), plugin._contexts[("rtx", "jit")].reporting("EvitLiteMLA: made_up"):
            raise KeyError("words")
        assert logger.lines == [(flavor.trt.ILogger.Severity.ERROR, "EvitLiteMLA: made_up: 'words'")]
        assert [str(error) for error in plugin.take_plugin_errors()] == ["'words'"]
        assert plugin.take_plugin_errors() == []


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return build_in_child(tmp_path_factory.mktemp("rtx"))


class TestInTheRealBuilder:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("op_type", OP_TYPES)
    def test_the_parser_takes_the_plugin_and_the_engine_is_built(
        self, results: dict[str, dict[str, Any]], op_type: str, dtype: str
    ) -> None:
        result = results[f"{op_type}-{dtype}"]
        assert result["plugins"] == ["attention"]
        assert result["output"] == [-1, *CASES[op_type].output]
        assert result["built"], result["errors"]
        assert result["holds"] == ["kernel_hash", "input_shapes"]
        assert result["errors"] == []

    @pytest.mark.parametrize("op_type", TYPICAL)
    def test_without_a_creator_it_takes_the_body(self, results: dict[str, dict[str, Any]], op_type: str) -> None:
        result = results[f"body-{op_type}"]
        assert result["plugins"] == []
        assert result["layers"] > 10
        assert result["output"] == [-1, *CASES[op_type].output]
        assert result["built"]
        assert result["holds"] == []
        assert result["size_bytes"] != results[f"{op_type}-fp32"]["size_bytes"]

    def test_a_node_that_does_not_ask_is_its_body(self, results: dict[str, dict[str, Any]]) -> None:
        assert results["not-asking"]["built"]
        assert results["not-asking"]["plugins"] == []
        assert results["not-asking"]["layers"] == results[f"body-{TYPICAL[0]}"]["layers"]

    def test_a_fixed_batch(self, results: dict[str, dict[str, Any]]) -> None:
        assert results["fixed-batch"]["plugins"] == ["attention"]
        assert results["fixed-batch"]["output"] == [4, *CASES[TYPICAL[0]].output]
        assert results["fixed-batch"]["built"]

    def test_registering_twice_is_registering_once(self, results: dict[str, dict[str, Any]]) -> None:
        registry = results["registry"]
        assert registry["missing"] == list(OP_TYPES)
        assert registry["names"] == [list(OP_TYPES)] * 2
        assert registry["counts"] == [1] * len(OP_TYPES)

    @pytest.mark.parametrize(
        ("fault", "parsed", "words"),
        [
            ("missing", False, "EvitLiteMLA lacks the attribute 'eps'"),
            ("kind", False, "heads of EvitMultiScaleAttention must be int"),
            ("contradiction", True, "EvitMultiScaleAttention says height=9, but its inputs have 6"),
            ("heads", True, "heads must be positive and divide channels, got heads=3 channels=16"),
            ("batch", True, f"EvitMultiScaleAttention cannot take a batch of {2**29}"),
        ],
    )
    def test_faults_are_refused_with_words(
        self, results: dict[str, dict[str, Any]], fault: str, parsed: bool, words: str
    ) -> None:
        result = results[f"fault-{fault}"]
        assert result["parsed"] is parsed
        assert not result["built"]
        assert result["errors"]
        assert result["errors"][0].startswith(words)
        assert result["nodes"] == ([] if parsed else ["attention"])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("op_type", TYPICAL)
    def test_the_ptx_takes_the_arguments_that_are_passed(
        self, results: dict[str, dict[str, Any]], op_type: str, dtype: str
    ) -> None:
        """Inputs and outputs are pointers of 64 bits, extras integers of 32."""
        result = results[f"ptx-{op_type}-{dtype}"]
        operator, case = PLUGIN_OPERATORS[op_type], CASES[op_type]
        launch = operator.launch(operator.read_attributes(case.attributes), case.shapes(), dtype)
        expected = ["64"] * len(launch.inputs) + ["32"] * len(launch.extras) + ["64"] * len(launch.outputs)
        assert result["bits"] == expected
        assert result["target"] == "sm_89"
