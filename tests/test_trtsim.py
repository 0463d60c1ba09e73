"""The simulated TensorRT that the contract tests stand on: its choices, its arithmetic, and that it hides nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import process_environment
from tests.trtsim import builder, parser, plugin_layers, registry, setup, structures
from tests.trtsim.expressions import OPERATIONS, evaluate
from tests.trtsim.setup import VERSIONS, bindings_folder

Results = dict[str, Any]


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    asked: str = request.param
    return asked


@pytest.fixture(scope="module")
def results(version: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    path = tmp_path_factory.mktemp("example") / "results.json"
    environment = process_environment()
    folder = str(bindings_folder(version))
    environment["PYTHONPATH"] = os.pathsep.join([folder, environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "tests.trtsim.example", version, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: Results = json.loads(path.read_text(encoding="utf-8"))
    return found


# The parser


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("asked", "plugin"),
        ("not-asked", "function"),
        ("overridden", "function"),  # the flag asks for a plugin without a namespace, and ours has one
        ("other-version", "function"),
        ("other-namespace", "function"),
        ("no-function", "plugin"),  # by the node's domain
    ],
)
def test_the_choice_between_plugin_and_function(name: str, choice: str, results: Results) -> None:
    assert results[name]["choices"] == [["Example", choice]]
    assert len(results[name]["plan"]["plugins"]) == (choice == "plugin")


def test_a_built_in_operator_is_taken_whatever_its_domain(results: Results) -> None:
    assert results["built-in"]["choices"] == [["Relu", "built-in"]]


def test_an_operator_that_nobody_knows_is_an_error(results: Results) -> None:
    assert results["nothing"]["parsed"] is False
    assert "no importer registered for op Nothing" in results["nothing"]["errors"][0]
    assert any("no importer registered for op Nothing" in line for line in results["nothing"]["log"])


def test_a_missing_attribute_is_a_warning_and_then_a_failure(results: Results) -> None:
    assert results["missing-attribute"]["warnings"] == ["Example has no attribute dims"]
    assert results["missing-attribute"]["plan"] is None


# The builder


def test_launches_are_evaluated_over_the_profile_for_each_tactic(results: Results) -> None:
    variants = results["asked"]["plan"]["plugins"][0]["variants"]
    assert [variant["tactic"] for variant in variants] == [1, 2]
    grids = [[variant["launch"][at]["GridX"] for at in ("min", "opt", "max")] for variant in variants]
    assert grids == [[1, 5, 40], [1, 3, 20]]  # 40, 320 and 2560 elements by 64 and by 128, rounded up
    extras = [list(variants[0]["extras"][at].values()) for at in ("min", "opt", "max")]
    assert extras == [[1, 2], [8, 2], [64, 2]]
    assert (variants[0]["kernel"], variants[0]["code"]) == ("example", ".visible .entry example(){ret;}")


def test_a_strongly_typed_network_takes_only_its_types(results: Results) -> None:
    for name, dtype in (("asked", 0), ("half", 1)):
        assert [variant["types"] for variant in results[name]["plan"]["plugins"][0]["variants"]] == [[dtype] * 2] * 2
    assert results["bfloat16"]["plan"] is None, "the plugin offers FP32 and FP16"
    assert any("no combination of types and formats fits" in line for line in results["bfloat16"]["log"])


def test_a_failing_plugin_fails_the_build(results: Results) -> None:
    assert results["failing"]["parsed"] is True
    assert results["failing"]["plan"] is None
    assert any("getLaunchParams failed" in line or "getKernel failed" in line for line in results["failing"]["log"])


def test_the_simulation_has_the_bindings_numbers(results: Results, version: str) -> None:
    ours = {**vars(structures), **vars(parser), **vars(builder), **vars(plugin_layers), **vars(registry)}
    ours |= {f"prefer-{form}": bit for form, bit in parser.PREFERENCES[int(version.partition(".")[0])].items()}
    ours |= {f"operation-{name}": number for number, name in enumerate(OPERATIONS)}
    constants = results["constants"]
    assert {name: ours[name] for name in constants} == constants


def test_nothing_is_answered_by_chance(results: Results) -> None:
    assert results["faults"] == []
    assert results["unknown"] == []
    assert [interface for interface, _ in results["unknown-after"]] == ["VNetworkDefinition"]


@pytest.mark.parametrize(
    ("tree", "value"),
    [
        (7, 7),
        (["dim", "x", 1], 5),
        (["PROD", ["dim", "x", 0], 4], 12),
        (["CEIL_DIV", ["SUM", ["dim", "x", 0], ["dim", "x", 1]], 3], 3),
        (["FLOOR_DIV", ["dim", "x", 1], 3], 1),
        (["SUB", ["MAX", 2, 9], ["MIN", 2, 9]], 7),
        (["SUM", ["EQUAL", 3, 3], ["LESS", 3, 3]], 1),
    ],
)
def test_expressions(tree: Any, value: int) -> None:
    assert evaluate(tree, {"x": (3, 5)}) == value


# Setting up


def test_what_is_not_set_up_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run \.venv/bin/python tests/trtsim/setup\.py"):
        bindings_folder(VERSIONS[0])


def test_setting_up_again_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be downloaded or compiled"))
    setup.main()


def test_an_interrupted_set_up_leaves_nothing_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.main()
    assert list(tmp_path.iterdir()) == []


def test_without_a_c_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "FOLDER", tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(SystemExit, match="no C compiler 'no-such-compiler'"):
        setup.main()


def test_a_changed_stub_is_set_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = tmp_path / "stubs.c"
    stubs.write_text("int other;")
    monkeypatch.setattr(setup, "_STUBS", stubs)
    with pytest.raises(FileNotFoundError):
        bindings_folder(VERSIONS[0])
