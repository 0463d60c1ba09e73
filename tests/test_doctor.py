from __future__ import annotations

import json
import re
from dataclasses import replace
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
    check_building,
    check_part,
    check_rtx_libraries,
    check_running,
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
    assert names[:5] == ["python", "cpu", "memory", "gpu", "driver"]
    assert names[5:-2] == [part.name for part in PARTS]
    assert names[-2:] == ["builds engines", "runs engines"]


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


def found(name: str, version: str | None = "1.7.1.116") -> Check:
    if version is None:
        return Check(name, None, "engines", MISSING, False, "no engines", f"pip install {name}")
    return Check(name, version, "engines", OK, False)


@pytest.mark.parametrize(
    ("libraries", "status", "words"),
    [
        ("1.7.1.116", OK, "1.7.1.116"),
        ("1.6.0.9", WARNING, "1.7.1.116, and libraries 1.6.0.9"),
        (None, WARNING, "1.7.1.116, libraries from elsewhere"),
    ],
)
def test_tensorrt_for_rtx_is_two_packages(libraries: str | None, status: str, words: str) -> None:
    row = check_rtx_libraries(found("tensorrt_rtx"), libraries)
    assert (row.status, row.found) == (status, words)
    assert bool(row.without_it) == (status != OK)


def test_libraries_of_absent_bindings_change_nothing() -> None:
    absent = found("tensorrt_rtx", None)
    assert check_rtx_libraries(absent, "1.7.1.116") == absent
    broken = replace(found("tensorrt_rtx"), status=MISSING)
    assert check_rtx_libraries(broken, None) == broken


NAMES = ("tensorrt", "tensorrt_rtx", "pycuda", "cuda.bindings")


def parts(*there: str) -> dict[str, Check]:
    return {name: found(name, "1.0" if name in there else None) for name in NAMES}


GPU, NO_GPU = found("gpu", "H100"), found("gpu", None)


@pytest.mark.parametrize(
    ("there", "gpu", "status", "words"),
    [
        (("tensorrt_rtx",), NO_GPU, OK, "flavor rtx, for any RTX GPU"),
        (("tensorrt", "tensorrt_rtx"), GPU, OK, "flavor tensorrt, for the GPU here; flavor rtx, for any RTX GPU"),
        (("tensorrt", "tensorrt_rtx"), NO_GPU, OK, "flavor rtx, for any RTX GPU"),
        (("tensorrt",), NO_GPU, MISSING, "flavor tensorrt needs a GPU, and flavor rtx is not installed"),
        ((), GPU, MISSING, "no engine is built here"),
    ],
)
def test_what_builds_here(there: tuple[str, ...], gpu: Check, status: str, words: str) -> None:
    row = check_building(parts(*there), gpu)
    assert (row.name, row.status, row.required) == ("builds engines", status, False)
    assert words in (row.found or row.without_it)
    assert bool(row.how_to_get) == (status == MISSING)


@pytest.mark.parametrize(
    ("there", "gpu", "status", "words"),
    [
        (NAMES, GPU, OK, "flavor tensorrt and rtx; never tried on a GPU by this version"),
        (("tensorrt_rtx", "pycuda"), GPU, WARNING, "without CUDA graphs"),
        (NAMES, NO_GPU, MISSING, "engines are built, not run: no GPU"),
        (("pycuda",), GPU, MISSING, "engines are built, not run: no TensorRT"),
        (("tensorrt",), NO_GPU, MISSING, "engines are built, not run: no GPU, no PyCUDA"),
    ],
)
def test_what_runs_here(there: tuple[str, ...], gpu: Check, status: str, words: str) -> None:
    row = check_running(parts(*there), gpu)
    assert (row.name, row.status, row.required) == ("runs engines", status, False)
    assert words in (row.without_it or row.found or "")


def test_pycuda_that_is_installed_and_does_not_work() -> None:
    rows = {**parts("tensorrt_rtx"), "pycuda": replace(found("pycuda"), status=MISSING)}
    assert check_running(rows, GPU).without_it == "engines are built, not run: PyCUDA cannot be imported"


def test_the_driver_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, status in (("580.65.06", OK), (None, MISSING)):
        monkeypatch.setattr(doctor, "driver_version", lambda version=version: version)
        row = next(row for row in run_checks(try_imports=False) if row.name == "driver")
        assert (row.found, row.status, row.required) == (version, status, False)


def test_version_bounds_are_those_of_the_project() -> None:
    text = PYPROJECT.read_text()
    for part in PARTS:
        if part.requirement:
            assert re.search(rf'"{re.escape(part.name + part.requirement)}( ;.*)?"', text), part.name
    needed = re.search(r'requires-python = ">=([\d.]+)"', text)
    assert needed is not None
    assert needed.group(1) == ".".join(map(str, doctor.MIN_PYTHON))
