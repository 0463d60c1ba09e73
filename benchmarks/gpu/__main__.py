"""`python -m benchmarks.gpu [NAME ...]`: the tests that need a GPU, then the benchmarks, within a time budget."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.gate import Checks, run_checks
from benchmarks.gpu.settings import CEILINGS, DEFAULT_BUDGET_S, KERNELS, KEY_MODELS, MODELS, NAMES, PTX
from benchmarks.result import RESULTS, Result, Row, write_result
from benchmarks.settings import WEIGHT_SEED
from evit_deploy.errors import EXIT_LIMIT, EXIT_OK, EXIT_PARITY, EvitDeployError, ParityError, UsageError
from evit_deploy.specs import split_name, variant_names

if TYPE_CHECKING:
    from benchmarks.gpu.device import Device
    from benchmarks.gpu.kernels import Bench

EPILOG = (
    f"Exit codes: 0 every goal is reached, {EXIT_LIMIT} one is not, {EXIT_PARITY} a check failed and nothing (or that "
    "case) was measured, 4 there is no GPU."
)
UNVERIFIED = "This program was written without a GPU at hand: read its first results with suspicion."


def main(argv: Sequence[str] | None = None, checks: Callable[[float], Checks] | None = None) -> int:
    """Do what the arguments say; returns the exit code.

    Args:
        argv: words of the command line.
        checks: runs the tests within some seconds; None stands for those of this checkout.
    """
    options = _parser().parse_args(argv)
    try:
        return _run(options, checks or (lambda timeout_s: run_checks(timeout_s=timeout_s)))
    except EvitDeployError as error:
        print("\n".join([f"benchmarks.gpu: {error}", *(f"  {line}" for line in error.details)]), file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace, checks: Callable[[float], Checks]) -> int:
    from benchmarks.gpu.device import find_device

    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        raise UsageError(f"unknown benchmark {unknown[0]!r}", hint=f"known: {', '.join(NAMES)}")
    smoke = options.device == "cpu"
    folder = options.results or RESULTS
    if smoke and folder.resolve() == RESULTS:
        raise UsageError("figures of a CPU mean nothing", hint="name a folder for them: --results FOLDER")
    device = find_device(options.device)
    started = time.monotonic()
    say = _stderr_progress(started)
    say(UNVERIFIED)
    say("running the tests that need a GPU")
    checked = checks(options.budget_s)
    say(f"{checked.passed} passed, {checked.failed} failed, {checked.skipped} skipped in {checked.seconds:.0f} s")
    if not checked.green:
        summary = "the tests that need a GPU are not green: nothing is measured"
        raise ParityError(summary, details=[checked.last_line], hint=checked.command)
    return _measure(options, device, checked, folder, started, say)


def _measure(
    options: argparse.Namespace,
    device: Device,
    checked: Checks,
    folder: Path,
    started: float,
    say: Callable[[str], None],
) -> int:
    from benchmarks.gpu import ceilings, kernels, models, ptx
    from benchmarks.gpu.budget import Budget, Task, run_tasks
    from benchmarks.gpu.plan import plan
    from benchmarks.gpu.timing import SMOKE, Effort

    effort = Effort() if device.is_gpu else SMOKE
    clocks = device.facts()
    say("ceilings")
    limits, ceiling_rows = ceilings.measure_ceilings(device, effort)
    bench = kernels.Bench(device, lambda: limits, effort, compiled=device.is_gpu)
    rows: dict[str, list[Row]] = {CEILINGS: ceiling_rows}
    left_out: list[str] = []
    modules: Mapping[str, Any] = {CEILINGS: ceilings, KERNELS: kernels, PTX: ptx, MODELS: models}

    def write(name: str) -> dict[str, Any]:
        protocol = _protocol(options, device, bench, checked, clocks, [x for x in left_out if x.startswith(f"{name}:")])
        module = modules[name]
        document = Result(name, module.TITLE, module.GOAL, _command(options), protocol, rows[name]).to_json()
        write_result(document, folder)
        return document

    def done(task: Task, found: list[Row]) -> None:
        rows.setdefault(task.benchmark, []).extend(found)
        for row in found:
            say(_line(row))
        write(task.benchmark)  # a run that is killed leaves what it had

    for row in ceiling_rows:
        say(_line(row))
    write(CEILINGS)
    wanted = [task for task in plan(bench, options.models) if task.benchmark in (options.names or NAMES)]
    left_out += run_tasks(wanted, Budget(options.budget_s, started), say, done)
    documents = [write(name) for name in rows]
    _print(documents, left_out)
    withheld = [row for found in rows.values() for row in found if row.value is None and "withheld" in row.reason]
    missed = [row for found in rows.values() for row in found if row.reached is False]
    return EXIT_PARITY if withheld else EXIT_LIMIT if missed else EXIT_OK


def _protocol(
    options: argparse.Namespace,
    device: Device,
    bench: Bench,
    checked: Checks,
    at_start: Mapping[str, Any],
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Every setting, and what the GPU was before and is now."""
    return {
        "quick": not device.is_gpu,
        "gpu": {**at_start, "at_the_end": {k: v for k, v in device.facts().items() if at_start.get(k) != v}},
        "checks": checked.to_json(),
        "budget_s": options.budget_s,
        "left_out": list(left_out),
        "rounds": bench.effort.rounds,
        "processes": 1,
        "weights": f"random, seed {WEIGHT_SEED}",
        "order": "arms shuffled in every round",
        "interval": "95 %, bootstrap over rounds of one process: what differs between processes is not in it",
        "kernels": "a CUDA graph of calls on rotating inputs, CUDA events around it; partition and reversal included",
        "models": "one call at a time, waited for, inputs and outputs on the GPU in the model's precision",
        "float32": "TF32 off",
    }


def _command(options: argparse.Namespace) -> str:
    words = ["python -m benchmarks.gpu", *options.names]
    if options.models != KEY_MODELS:
        words.append(f"--models {','.join(options.models)}")
    if options.budget_s != DEFAULT_BUDGET_S:
        words.append(f"--budget-s {options.budget_s:g}")
    if options.device != "cuda":
        words.append(f"--device {options.device}")
    return " ".join(words)


def _print(documents: Sequence[Mapping[str, Any]], left_out: Sequence[str]) -> None:
    for document in documents:
        print(f"{document['benchmark']}: {document['title']}")
        for row in document["rows"]:
            value = "-" if row["value"] is None else f"{row['value']:.3g} {row['unit']}"
            verdict = {True: ", goal reached", False: ", goal missed", None: ""}[row["reached"]]
            batch = f" batch {row['batch']}" if row["batch"] else ""
            print(f"  {row['subject']}{batch}: {row['quantity']}: {value}{verdict}{_reason(row['reason'])}")
    gpu = documents[0]["protocol"]["gpu"]
    print(f"{gpu['name']}, driver {gpu.get('driver_version')}, torch {documents[0]['versions'].get('torch')}")
    if left_out:
        print("\n".join(["left out:", *(f"  {line}" for line in left_out)]))


def _line(row: Row) -> str:
    value = "-" if row.value is None else f"{row.value:.3g} {row.unit}"
    return f"  {row.quantity}: {value}{_reason(row.reason)}"


def _reason(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _stderr_progress(started: float) -> Callable[[str], None]:
    return lambda line: print(f"[{time.monotonic() - started:6.1f} s] {line}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, epilog=EPILOG)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all of them without")
    parser.add_argument("--models", type=_models, default=KEY_MODELS, metavar="NAME,...", help="FAMILY-VARIANT, or all")
    parser.add_argument("--budget-s", type=float, default=DEFAULT_BUDGET_S, help="for everything, the tests included")
    parser.add_argument("--device", default="cuda", help="cuda; cpu only shows that the program works")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where the JSON goes")
    return parser


def _models(text: str) -> tuple[str, ...]:
    if text == "all":
        return variant_names()
    names = tuple(text.split(","))
    for name in names:
        try:
            split_name(name)
        except EvitDeployError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return names


if __name__ == "__main__":
    raise SystemExit(main())
