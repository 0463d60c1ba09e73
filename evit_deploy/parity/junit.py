"""A verification as JUnit XML, one test case per row, for the test reports of CI systems."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from evit_deploy.errors import EvitDeployError
from evit_deploy.parity.report import VerifyReport, VerifyRow

# XML 1.0 has no way to write these characters, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(report: VerifyReport) -> str:
    """The report as an XML document: failures as <failure>, unverified rows as <error>, so that CI fails on both."""
    suite = ElementTree.Element("testsuite", name=_text(f"parity {report.reference} -> {report.candidate}"))
    properties = ElementTree.SubElement(suite, "properties")
    facts = {
        "verdict": report.verdict,
        "precision": report.precision,
        "executed_precision": report.executed_precision,
        "tolerance": str(report.tolerance),
        "seed": str(report.seed),
        **{f"subject.{key}": value for key, value in report.subject.items()},
        **{f"version.{key}": value for key, value in report.versions.items()},
        **{f"note.{index}": note for index, note in enumerate(report.notes)},
    }
    if report.first_bad_block:
        facts["first_bad_block"] = report.first_bad_block
    for key, value in facts.items():
        ElementTree.SubElement(properties, "property", name=_text(key), value=_text(value))
    for row in report.rows:
        _add_row(suite, row, report)
    # An empty suite is green in most CI systems, and a comparison of nothing must not be.
    failures = report.failures if report.rows or report.failures else ("nothing was compared",)
    for index, failure in enumerate(failures):
        case = ElementTree.SubElement(suite, "testcase", classname="evit_deploy.verify", name=f"comparison {index}")
        ElementTree.SubElement(case, "failure", message=_text(failure), type="parity").text = _text(failure)
    counts = {
        "tests": len(suite.findall("testcase")),
        "failures": len(suite.findall("testcase/failure")),
        "errors": len(suite.findall("testcase/error")),
        "skipped": 0,
    }
    for element in (suite, root := ElementTree.Element("testsuites")):
        for key, count in counts.items():
            element.set(key, str(count))
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def write_junit(report: VerifyReport, path: str | Path) -> None:
    """Write the XML beside `path` and move it in place, so that a reader sees the whole file or the old one.

    Raises:
        EvitDeployError: the folder is missing or not writable.
    """
    path = Path(path)
    text = junit_xml(report)
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # a temporary file is private; a report is as any other file
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise EvitDeployError(
            f"cannot write {path}: {error.strerror}", hint="give a file in an existing, writable folder"
        ) from error


def _add_row(suite: ElementTree.Element, row: VerifyRow, report: VerifyReport) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=_text(f"evit_deploy.verify.{row.pair}"), name=_text(row.name)
    )
    if row.status != "pass":
        tag, kind = ("failure", "parity") if row.status == "fail" else ("error", "unverified")
        element = ElementTree.SubElement(case, tag, message=_text(row.reason), type=kind)
        element.text = _text(f"{row.reason}\n{_measured(row)}\ntolerance: {report.tolerance}")
    ElementTree.SubElement(case, "system-out").text = _text(_measured(row))


def _measured(row: VerifyRow) -> str:
    if row.worst_row is None:
        return "no row was compared"
    values = {"max_abs": row.max_abs, "max_rel": row.max_rel, "rms_rel": row.rms_rel, "cosine": row.cosine}
    listed = ", ".join(
        f"{key} {'undefined' if value is None else format(value, '.6g')}" for key, value in values.items()
    )
    return f"{row.images} images, worst {row.worst_label}: {listed}, top1 {row.top1}, top5 {row.top5}, nan {row.nan}"


def _text(value: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", value)
