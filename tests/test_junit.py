from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evit_deploy.errors import EvitDeployError
from evit_deploy.parity import TOLERANCES, VerifyReport, VerifyRow, junit_xml, write_junit
from evit_deploy.parity.gate import Verdict

AWKWARD = "<&>\"' \x00\x1b[31m \ud800 \N{GREEK SMALL LETTER MU} ]]>"


def row(status: Verdict, reason: str = "", **values: object) -> VerifyRow:
    return VerifyRow("torch-fp32 -> onnxruntime", "random, seed 0", 8, False, "logits", status, reason=reason, **values)


def report(*rows: VerifyRow, failures: tuple[str, ...] = (), **values: str) -> VerifyReport:
    return VerifyReport(
        "torch-fp32", "onnxruntime", "fp32", "fp32", TOLERANCES["fp32"], 0, rows,
        failures=failures, versions={"torch": "2.13"}, subject={"bundle": "m3.evit"}, **values,
    )  # fmt: skip


def suite_of(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    suite = root[0]
    assert suite.tag == "testsuite"
    for element in (root, suite):
        assert int(element.get("tests", "")) == len(suite.findall("testcase"))
        assert int(element.get("failures", "")) == len(suite.findall("testcase/failure"))
        assert int(element.get("errors", "")) == len(suite.findall("testcase/error"))
    return suite


def test_a_case_per_row_with_its_outcome():
    suite = suite_of(
        junit_xml(
            report(
                row("pass", images=8, worst_row=2, worst_label="2", rms_rel=1e-6),
                row("fail", "NaN in row 3 of 8", images=8, worst_row=3, worst_label="3", nan=1),
                row("unverified", "could not run: no kernel"),
            )
        )
    )
    passed, failed, unverified = suite.findall("testcase")
    assert passed.find("failure") is None
    assert passed.find("error") is None
    assert "rms_rel 1e-06" in passed.findtext("system-out", "")
    assert failed.find("failure").get("message") == "NaN in row 3 of 8"
    assert "rms_rel undefined" in failed.findtext("failure", "")
    assert "rms_rel <= 2e-05" in failed.findtext("failure", "")
    assert unverified.find("error").get("message") == "could not run: no kernel"
    assert passed.get("name") == "logits, random, seed 0, batch 8"


def test_properties_hold_tolerance_versions_and_subject():
    suite = suite_of(junit_xml(report(row("pass"), first_bad_block="stages.2.blocks.0")))
    properties = {entry.get("name"): entry.get("value") for entry in suite.iter("property")}
    assert properties["tolerance"] == "rms_rel <= 2e-05, max_rel <= 0.0001 (fp32)"
    assert properties["version.torch"] == "2.13"
    assert properties["subject.bundle"] == "m3.evit"
    assert properties["verdict"] == "pass"
    assert properties["first_bad_block"] == "stages.2.blocks.0"


def test_nothing_compared_is_a_failed_case_of_its_own():
    suite = suite_of(junit_xml(report(failures=("nothing was compared",))))
    assert suite.find("testcase/failure").get("message") == "nothing was compared"


def test_a_report_without_rows_is_never_an_empty_suite():
    assert report().verdict == "fail"
    assert suite_of(junit_xml(report())).findall("testcase/failure")


def test_awkward_characters_survive_or_are_replaced():
    suite = suite_of(junit_xml(report(row("fail", AWKWARD), failures=(AWKWARD,))))
    message = suite.find("testcase/failure").get("message")
    assert message.startswith("<&>\"' ")
    assert message.endswith("\N{GREEK SMALL LETTER MU} ]]>")
    assert "\x00" not in message


def test_written_whole_and_readable(tmp_path: Path):
    path = tmp_path / "report.xml"
    path.write_text("old")
    write_junit(report(row("pass")), path)
    assert ElementTree.parse(path).getroot().tag == "testsuites"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.xml"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("target", ["absent/report.xml", "folder"])
def test_a_place_that_cannot_be_written(tmp_path: Path, target: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(EvitDeployError, match="cannot write"):
        write_junit(report(row("pass")), tmp_path / target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
