"""Every failure of the command line ends in one line on stderr and the documented exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from evit_deploy import inspection
from evit_deploy.cli import main
from evit_deploy.errors import EvitDeployError, LimitError
from tests.in_process import cli

if TYPE_CHECKING:
    from conftest import RunCli

    from evit_deploy.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent
PROGRESS_LINE = re.compile(r"^\[ *\d+\.\d s\] ")


def the_error(stderr: str) -> str:
    """The one line of the error; progress lines before it do not count, anything else does."""
    lines = [line for line in stderr.splitlines() if not PROGRESS_LINE.match(line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("evit-deploy: error: "), stderr
    return lines[0].removeprefix("evit-deploy: error: ")


USAGE = [
    ("exprot m3.pt", "Did you mean 'export'"),
    ("export m3.pt --no-fused-operator", "did you mean --no-fused-operators?"),
    ("bench --bach 1", "did you mean --batch?"),
    ("export", "no checkpoint was named"),
    ("export m3.pt --random-weights msra-m0", "both a checkpoint"),
    ("export --random-weights msra-m9", "did you mean 'msra-m"),
    ("export --random-weights msra-m0 --family mit", "leave --family out"),
    ("export m3.pt --family mti", "did you mean 'mit'?"),
    ("export m3.pt --weights emma", "did you mean 'ema'?"),
    ("export m3.pt --opset 7", "--opset"),
    ("export m3.pt --batch 0", "--batch"),
    ("export m3.pt --image-size 99999", "--image-size"),
    ("export m3.pt --mean 0.5,0.5,0.5", "--mean and --std belong together"),
    ("export m3.pt --mean 0.5 --std 1,1,1", "three numbers"),
    ("export m3.pt --mean nan,0,0 --std 1,1,1", "three numbers"),
    ("export m3.pt --mean 0,0,0 --std 1,0,1", "not above zero"),
    ("export a.pt b.pt", "see evit-deploy export --help"),
    ("inspect", "see evit-deploy inspect --help"),
    ("verify --batch 1,x", "'x'"),
    ("verify --batch ,", "''"),
    ("verify --batch 0", "'0'"),
    ("verify --batch 1,-3", "'-3'"),
    ("verify --batch 99999999999999999999", "whole numbers"),
    ("verify --threads 0", "--threads"),
    ("verify --seed -1", "--seed"),
    ("verify --junit no/such/folder/parity.xml", "no folder"),
    ("verify --junit .", "is a folder"),
    ("bench --duration nan", "--duration"),
    ("bench --duration 0", "--duration"),
    ("bench --backend onnxruntime,,torch-eager", "empty name"),
    ("bench --json no/such/folder/bench.json", "no folder"),
    ("models --family msrra", "did you mean 'msra'?"),
    ("kernels lst", "Did you mean 'list'"),
    ("kernels compile --archs 80", "did you mean --arch?"),
    ("kernels compile --arch 81 --model mit-b0", "unknown architecture '81': did you mean '8"),
    ("kernels list --arch 80,,90", "empty name"),
    ("kernels list --dtype fp61", "did you mean 'fp16'?"),
    ("kernels list --model mit-b9", "did you mean 'mit-b"),
    ("kernels list --image-size 8", "--image-size"),
    ("kernels list a.evit --model mit-b0", "leave --model out"),
    ("kernels compile a.evit --image-size 224", "leave --image-size out"),
    ("kernels pack -o no/such/folder/k.zip", "no folder"),
    ("kernels unpack", "see evit-deploy kernels unpack --help"),
]


@pytest.mark.parametrize(("line", "words"), USAGE, ids=[line for line, _ in USAGE])
def test_usage(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert words in the_error(captured.err)
    assert captured.out == ""


@pytest.mark.parametrize(
    "line",
    [
        "export no.pt",
        "verify no.evit",
        "bench no.evit",
        "inspect no.onnx",
        "verify",
        "export m.pt --class-names no",
        "kernels list no.evit",
        "kernels unpack no.zip",
    ],
)
def test_what_is_not_there(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*line.split())
    assert done.code == 1
    assert ": " in the_error(done.err), "a hint belongs behind the summary"
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_says_the_same(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("inspect", "no.onnx", cwd=tmp_path)
    assert done.returncode == 1
    assert ": " in the_error(done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize("line", ["verify --backend onnxruntim", "bench --backend onnxruntim", "bench --baseline tch"])
def test_an_unknown_backend(line: str, digits_bundle: Bundle) -> None:
    command, *rest = line.split()
    done = cli(command, digits_bundle.path, *rest)
    assert done.code == 2, done.err
    assert re.search("did you mean|known", the_error(done.err))


@pytest.mark.parametrize("value", ["1", "nan", "-0.1"])
def test_a_tolerance_that_everything_passes(value: str, digits_bundle: Bundle) -> None:
    done = cli("verify", digits_bundle.path, "--tolerance", value)
    assert done.code == 2
    the_error(done.err)


def test_parity_that_fails(digits_bundle: Bundle, tmp_path: Path) -> None:
    """A tolerance of zero is one that real rounding cannot keep."""
    junit = tmp_path / "parity.xml"
    done = cli("verify", digits_bundle.path, "--tolerance", "0", "--batch", "3", "--junit", junit)
    assert done.code == 3
    assert "parity failed" in the_error(done.err)
    assert "verdict: fail" in done.out
    assert "<failure" in junit.read_text(encoding="utf-8")


def test_several_bundles_and_none_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.evit", "b.evit"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}", encoding="utf-8")
    done = cli("verify")
    assert done.code == 2
    assert "a.evit, b.evit" in the_error(done.err)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (EvitDeployError("it broke", hint="mend it"), 1, "it broke: mend it"),
        (EvitDeployError("it broke\nover two lines"), 1, "it broke over two lines"),
        (LimitError("too slow", hint="wait"), 5, "too slow: wait"),
        (
            ModuleNotFoundError("No module named 'timm'", name="timm"),
            4,
            "timm is not installed: see evit-deploy doctor",
        ),
        (MemoryError(), 5, "out of memory"),
        (OSError(28, "No space left on device", "x.json"), 1, "No space left on device (x.json)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("of ours"), 1, "internal error, ZeroDivisionError: of ours: set EVIT_DEPLOY_DEBUG=1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_comes_up_from_below(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.delenv("EVIT_DEPLOY_DEBUG", raising=False)
    monkeypatch.setattr(inspection, "list_models", fail)
    assert main(["models"]) == code
    assert words in the_error(capsys.readouterr().err)


def test_details_stand_below_the_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise EvitDeployError("keys differ", details=("a.weight", "b.weight"), hint="compare them")

    monkeypatch.setattr(inspection, "list_models", fail)
    assert main(["models"]) == 1
    expected = ["evit-deploy: error: keys differ: compare them", "  a.weight", "  b.weight"]
    assert capsys.readouterr().err.splitlines() == expected


def test_a_traceback_only_for_debugging(run_cli: RunCli) -> None:
    for value, expected in (("1", True), ("0", False), ("", False)):
        done = run_cli("inspect", "no.onnx", env={"EVIT_DEPLOY_DEBUG": value})
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) is expected, value


def test_a_package_that_is_not_installed(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """None in sys.modules makes the import fail as an absent package does."""
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08")
    code = (
        "import sys; sys.modules['onnx'] = None; from evit_deploy import cli; sys.exit(cli.main(['inspect', 'm.onnx']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=child_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "onnx is not installed" in the_error(done.stderr)


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As `evit-deploy models | head -1`; here the pipe has no reader from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "evit_deploy", "models"]
        done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


def test_a_closed_stdout_is_one_line(tmp_path: Path) -> None:
    script = f"{sys.executable} -m evit_deploy models >&-"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """A limit on the size of files stands for the full disk."""
    code = """
import resource, sys
from pathlib import Path
from evit_deploy.cli.output import write_text
from evit_deploy.errors import EvitDeployError
write_text(Path("report.json"), "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path("report.json"), "x" * 100_000)
except EvitDeployError as error:
    sys.stdout.write(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=child_environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("cannot write report.json, File too large")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_unwinds_an_export(
    number: int, code: int, digits_checkpoint: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """The signal comes when the export has begun; staging folder and lock are gone afterwards."""
    command = [sys.executable, "-m", "evit_deploy", "export", str(digits_checkpoint), "-o", "out.evit"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=child_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "exporting" in line:
            process.send_signal(number)
            break
    stdout, stderr = process.communicate()
    assert process.returncode == code, "".join(seen) + stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    leftovers = [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
    assert leftovers == []
