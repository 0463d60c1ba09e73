from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from evit_deploy import doctor
from evit_deploy.doctor import (
    MISSING,
    OK,
    PARTS,
    WARNING,
    Check,
    Part,
    check_part,
    doctor_report,
    import_failures,
    missing_required,
    run_checks,
)

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
PART = Part("thing", ">=1.2.3", True, "the work", "no work", "'thing>=1.2.3'")


def test_report_is_one_json_document() -> None:
    report = json.loads(json.dumps(doctor_report(try_imports=False)))
    assert (report["schema"], report["schema_version"]) == ("evit-deploy/doctor", 1)
    assert report["verdict"] == OK
    names = [row["name"] for row in report["rows"]]
    assert names[:4] == ["python", "cpu", "memory", "gpu"]
    assert {part.name for part in PARTS} <= set(names)


def test_what_tests_run_with_is_ok_and_really_imported() -> None:
    rows = {row.name: row for row in run_checks()}
    for name in ("python", "torch", "timm", "onnx", "onnxruntime", "onnxsim", "onnxscript", "safetensors"):
        assert rows[name].status == OK, rows[name]
        assert not rows[name].how_to_get
    assert rows["torch"].found == metadata.version("torch")
    assert missing_required(rows.values()) == []


@pytest.mark.parametrize("row", run_checks(try_imports=False), ids=lambda row: row.name)
def test_each_row_says_what_is_lost_and_what_to_do(row: Check) -> None:
    assert row.needed_for
    assert row.status in (OK, WARNING, MISSING)
    assert bool(row.without_it) == (row.status != OK)
    if row.status == MISSING:
        assert row.how_to_get


def test_missing_part() -> None:
    row = check_part(PART, None, None)
    assert (row.status, row.found, row.without_it) == (MISSING, None, "no work")
    assert row.how_to_get.endswith("-m pip install 'thing>=1.2.3'")
    assert missing_required([row]) == ["thing"]


@pytest.mark.parametrize(
    ("version", "status"),
    [("1.2.3", OK), ("1.10", OK), ("1.2.3.post1", OK), ("2.0.0+cpu", OK), ("1.2.2", WARNING), ("0.9rc1", WARNING)],
)
def test_version_bound(version: str, status: str) -> None:
    row = check_part(PART, version, None)
    assert row.status == status
    assert missing_required([row]) == []


def test_part_that_cannot_be_imported_is_missing() -> None:
    row = check_part(PART, "2.0", "ImportError: libthing.so: cannot open shared object file")
    assert row.status == MISSING
    assert row.found is not None
    assert "libthing.so" in row.found


def test_torchvision_of_another_torch_is_a_warning() -> None:
    part = next(part for part in PARTS if part.name == "torchvision")
    row = check_part(part, "0.28.0", "RuntimeError: operator torchvision::nms does not exist")
    assert row.status == WARNING
    assert "same index" in row.how_to_get


def test_import_failures_are_told_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fine_one.py").write_text("print('noise on stdout')")
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "deadly_one.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "quitting_one.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["fine_one", "broken_one", "deadly_one", "absent_one", "quitting_one", "json"]
    failures = import_failures(names)
    assert failures == {
        "broken_one": "RuntimeError: operator torchvision::nms does not exist",
        "deadly_one": "its import ends the process with code -11",
        "absent_one": "ModuleNotFoundError: No module named 'absent_one'",
        "quitting_one": "SystemExit: 3",
    }


def test_import_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless_one.py").write_text("while True: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "_IMPORT_TIMEOUT_S", 1)
    assert import_failures(["json", "endless_one"]) == {"endless_one": "its import takes longer than 1 s"}


def test_files_of_the_current_folder_are_not_taken_for_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx.py").write_text("raise RuntimeError('not the package')")
    monkeypatch.chdir(tmp_path)
    assert import_failures(["onnx"]) == {}


def test_version_bounds_are_those_of_the_project() -> None:
    text = PYPROJECT.read_text()
    for part in PARTS:
        if part.requirement:
            assert re.search(rf'"{re.escape(part.name + part.requirement)}( ;.*)?"', text), part.name
    needed = re.search(r'requires-python = ">=([\d.]+)"', text)
    assert needed is not None
    assert needed.group(1) == ".".join(map(str, doctor.MIN_PYTHON))
