"""Every name of TensorRT's that our code uses exists in the bindings of 10.16, 11.4 and TensorRT for RTX.

Names are read off the source by `tests.trtsim.names`; what only strings name is met by the contract tests and by real
builds.
"""

from __future__ import annotations

import pytest

from evit_deploy.trt.plugin_v3 import _BASES
from tests.trtsim.names import HOLDERS, RTX, missing_names, names_in, used_names
from tests.trtsim.setup import VERSIONS

FLAVORS = (*VERSIONS, RTX)
RTX_ONLY = {  # used where the flavor is known to be RTX
    "ComputeCapability",
    "ComputeCapability.__members__",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}
WITHOUT_RTX = ("evit_deploy/trt/plugin_qdp.py",)  # quickly deployable plugins

PLANTED = """
def build(flavor, config):
    flavor.trt.Builder(flavor.trt.NoSuchThing)
    self._trt.Logger.Severity.NoSuchSeverity
    config.no_such_setting = 1
    other.config().not_an_attribute_of_the_configuration
    flavor.trt.Builder(1).not_looked_at
"""


def names_for(flavor: str) -> set[str]:
    files = {name: names for name, names in used_names().items() if flavor != RTX or name not in WITHOUT_RTX}
    names = set(_BASES).union(*files.values())
    return names if flavor == RTX else names - RTX_ONLY


@pytest.mark.parametrize("flavor", FLAVORS)
def test_every_name_exists(flavor: str) -> None:
    assert missing_names(flavor, names_for(flavor)) == []


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_name_that_does_not_exist_is_found(flavor: str) -> None:
    planted = names_in(PLANTED, {"config": "IBuilderConfig"})
    assert planted == {
        "Builder",
        "NoSuchThing",
        "Logger",
        "Logger.Severity",
        "Logger.Severity.NoSuchSeverity",
        "IBuilderConfig.no_such_setting",
    }
    missing = ["IBuilderConfig.no_such_setting", "Logger.Severity.NoSuchSeverity", "NoSuchThing"]
    assert missing_names(flavor, planted) == missing


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_left_out_for_a_version_is_used_and_missing_there(version: str) -> None:
    assert set().union(*used_names().values()) >= RTX_ONLY
    assert set(missing_names(version, RTX_ONLY)) == RTX_ONLY


def test_names_are_found_wherever_our_code_uses_the_bindings() -> None:
    used = used_names()
    for name, holders in HOLDERS.items():
        for holder in holders.values():
            assert any(found.startswith(f"{holder}.") for found in used[name]), f"{name} uses no {holder}"
    assert {"Builder", "OnnxParser", "Runtime", "TensorIOMode.INPUT", "plugin.aot_impl"} <= set().union(*used.values())
    assert sum(map(len, used.values())) > 60
