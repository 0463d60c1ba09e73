"""The command line when all goes well: help, stdout that is nothing but data, progress on stderr."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import evit_deploy
from evit_deploy.cli import main
from evit_deploy.cli.options import parse_batches, parse_names, read_class_names
from evit_deploy.cli.output import format_bytes, format_number, format_pairs, format_table, json_text, write_text
from evit_deploy.cli.progress import working
from evit_deploy.specs import variant_names
from tests.in_process import cli

if TYPE_CHECKING:
    from conftest import RunCli

    from evit_deploy.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("export", "verify", "bench", "inspect", "models", "doctor", "kernels")
KERNELS_COMMANDS = ("list", "compile", "pack", "unpack")
HEAVY = ("numpy", "onnx", "onnxruntime", "onnxscript", "onnxsim", "rich", "timm", "torch", "triton")


def one_document(stdout: str) -> dict[str, Any]:
    """The only JSON document on stdout; anything beside it makes this fail."""
    document = json.loads(stdout)
    assert document["schema"].startswith("evit-deploy/")
    assert isinstance(document["schema_version"], int)
    return document


# Help


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in COMMANDS),
        *(["kernels", command, "--help"] for command in KERNELS_COMMANDS),
        ["models", "--json"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_for(arguments: list[str]) -> None:
    code = f"""
import sys
from evit_deploy.cli import main
code = main({arguments!r})
found = sorted(set({HEAVY!r}) & set(sys.modules))
sys.stderr.write(f"{{code}} {{found}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "0 []"
    assert done.stdout


@pytest.mark.parametrize(
    ("arguments", "commands"), [([], COMMANDS), (["kernels"], KERNELS_COMMANDS)], ids=["program", "kernels"]
)
def test_help_names_every_command(
    arguments: list[str], commands: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert all(f"  {command} " in help_text for command in commands)
    assert "..." not in help_text.replace("[ARGS]...", ""), "a command's first line is too long for the list"


def test_no_command_shows_the_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"evit-deploy {evit_deploy.__version__}\n"


def test_the_launcher_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "cli.py", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"evit-deploy {evit_deploy.__version__}\n"


# Data on stdout


def test_models_lists_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = one_document(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == list(variant_names())
    assert all(row["parameters"] > 0 and row["multiply_adds"] > 0 for row in rows)


def test_models_of_one_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--family", "msra"]) == 0
    text = capsys.readouterr().out
    assert "msra-m0" in text
    assert "msa-m1" not in text


@pytest.mark.exhaustive
def test_doctor_reports_what_is_there(run_cli: RunCli) -> None:
    done = run_cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in one_document(done.stdout)["rows"]}
    assert rows["torch"]["status"] == "ok"


def test_export_verify_inspect_of_a_trained_model(
    run_cli: RunCli, digits: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """The whole way as a user types it, from an empty folder; each --json is one document and nothing else."""
    with subtests.test("export"):
        done = run_cli("export", digits / "digits.pt", "-o", "digits.evit", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        one_document(done.stdout)
        assert "loading" in done.stderr
    with subtests.test("verify finds the only bundle of the folder"):
        done = run_cli(
            "verify", "--batch", "1,3", "--input", digits / "heldout", "--json", "--junit", "parity.xml", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        document = one_document(done.stdout)
        assert document["verdict"] == "pass"
        assert {row["batch"] for row in document["rows"]} >= {1, 3}
        assert 'failures="0"' in (tmp_path / "parity.xml").read_text(encoding="utf-8")
    with subtests.test("verify as a table"):
        assert cli("verify", tmp_path / "digits.evit", "--batch", "1").out.rstrip().endswith("verdict: pass")
    for target in ("digits.evit", "digits.evit/model.onnx", str(digits / "digits.pt")):
        with subtests.test("inspect", target=target):
            inspected = cli("inspect", tmp_path / target, "--json")
            assert inspected.code == 0, inspected.err
            assert one_document(inspected.out)["kind"] in ("bundle", "onnx", "checkpoint")
            assert cli("inspect", tmp_path / target).out.startswith("kind")
    with subtests.test("nothing else was written"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.evit", "parity.xml"]


@pytest.mark.exhaustive
def test_bench_writes_its_document_to_stdout(run_cli: RunCli, digits_bundle: Bundle) -> None:
    arguments = ("--batch", "1", "--backend", "onnxruntime,torch-eager", "--duration", "20", "--json", "-")
    done = run_cli("bench", digits_bundle.path, *arguments)
    assert done.returncode in (0, 5), done.stderr  # 5: this machine was too busy to tell
    document = one_document(done.stdout)
    assert {row["backend"] for row in document["rows"]} >= {"onnxruntime", "torch-eager"}


def test_an_ascii_terminal_shows_any_class_name(run_cli: RunCli, tmp_path: Path) -> None:
    missing = tmp_path / "modèle.onnx"
    done = run_cli("inspect", missing, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 1
    assert "mod" in done.stderr
    assert "internal error" not in done.stderr


# Progress


PROGRESS_CODE = """
import ctypes, sys, time
from evit_deploy.cli.output import emit
from evit_deploy.cli.progress import working
with working() as progress:
    progress("exporting")
    time.sleep(0.5)
    print("printed by Python")
    ctypes.CDLL(None).printf(b"printed by C, not flushed\\n")
emit("data")
"""


def test_without_a_terminal_each_step_is_a_line_and_stdout_is_data() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRESS_CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "data\n"
    assert "s] exporting\n" in done.stderr
    assert "printed by Python" in done.stderr
    assert "printed by C" in done.stderr
    assert "\x1b" not in done.stderr


def test_on_a_terminal_one_line_ticks_and_goes_away() -> None:
    controller, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRESS_CODE],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=terminal,
            text=True,
            check=True,
        )
        shown = os.read(controller, 65536).decode()
    finally:
        os.close(controller)
        os.close(terminal)
    assert done.stdout == "data\n"
    assert shown.count("s  exporting") >= 2, "it must tick during a long step"
    assert shown.endswith("\r\x1b[K"), "nothing stays on the line"


def test_an_error_ends_the_progress(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with working() as progress:
            progress("half way")
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        work()
    sys.stdout.write("stdout is back\n")
    sys.stdout.flush()
    captured = capfd.readouterr()
    assert captured.out == "stdout is back\n"
    assert "half way" in captured.err


# Output


def test_tables_align_numbers_right_and_words_left() -> None:
    table = format_table(("name", "ms"), [("a", "1.5"), ("long", "-"), ("b", "100.0")])
    assert table.splitlines() == ["name     ms", "a       1.5", "long      -", "b     100.0"]


def test_an_empty_table_is_its_heading() -> None:
    assert format_table(("name", "ms"), []) == "name  ms"


def test_pairs_align_their_values() -> None:
    assert format_pairs([("a", "1"), ("long", "2")]) == "a     1\nlong  2"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (3, "3"),
        (1.23456, "1.23"),
        (123.456, "123"),
        (0.00123, "0.00123"),
        (1.5e-7, "1.50e-07"),
        (2e9, "2.00e+09"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-0.5, "-0.500"),
    ],
)
def test_format_number(value: float | None, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 1024**4, "3072.0 GiB")]
)
def test_format_bytes(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def test_json_has_no_nan() -> None:
    document = {"a": float("nan"), "b": [float("inf"), 1.0], "c": {"d": (1, None)}}
    assert json.loads(json_text(document)) == {"a": None, "b": [None, 1.0], "c": {"d": [1, None]}}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_text(target, "old")
    write_text(target, "new")
    assert target.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_device_is_written_to_and_not_replaced() -> None:
    write_text(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()


# Values


@pytest.mark.parametrize(
    ("text", "batches"), [("1", (1,)), ("1,8,64", (1, 8, 64)), (" 8 , 1 ", (8, 1)), ("3,3,1", (3, 1))]
)
def test_parse_batches(text: str, batches: tuple[int, ...]) -> None:
    assert parse_batches(text) == batches


def test_parse_names() -> None:
    assert parse_names(None) is None
    assert parse_names("onnxruntime, torch-eager,onnxruntime") == ("onnxruntime", "torch-eager")


@pytest.mark.parametrize(("name", "text"), [("n.txt", "cat\n\n  dog \n"), ("n.json", '["cat", "dog"]')])
def test_class_names_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / name) == ("cat", "dog")
