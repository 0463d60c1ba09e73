"""`evit-deploy bench`: latency and parity of each backend in one row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evit_deploy.cli.options import (
    BundleArgument,
    EngineOption,
    SeedOption,
    ThreadsOption,
    check_positive,
    open_bundle,
    parse_batches,
    parse_names,
)
from evit_deploy.cli.output import check_destination, emit, emit_json, json_text, write_text
from evit_deploy.cli.progress import working
from evit_deploy.constants import PROJECT_SEED
from evit_deploy.errors import (
    EXIT_LIMIT,
    EXIT_MISSING,
    EXIT_PARITY,
    LimitError,
    MissingDependencyError,
    ParityError,
)

if TYPE_CHECKING:
    from evit_deploy.bench.report import BenchReport

DEFAULT_DURATION_S = 60.0
STDOUT = Path("-")


def command(
    bundle: BundleArgument = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="1,8,64", help="Batch sizes; those of 1, 8 and 64 that the bundle takes without it."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="The backends to measure; all without it.", show_default=False),
    ] = None,
    engine: EngineOption = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="The backend that ratios are against.", show_default=False)
    ] = None,
    duration: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time budget of all measurements together.")
    ] = DEFAULT_DURATION_S,
    threads: ThreadsOption = None,
    inputs: Annotated[
        Path | None,
        typer.Option("--input", metavar="PATH", help="Run on a .npy file, an image, or a folder of images."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="X", help="RMS-relative error allowed; each precision's own without it."),
    ] = None,
    select: Annotated[
        bool, typer.Option("--select", help="Name the fastest backend within --tolerance, and why not the others.")
    ] = False,
    seed: SeedOption = PROJECT_SEED,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write a JSON document; - prints it instead of the table."),
    ] = None,
) -> None:
    """Measure each backend's latency and parity."""
    batches = None if batch is None else parse_batches(batch)
    backends = parse_names(backend)
    check_positive(duration, "--duration")
    if json_file is not None and json_file != STDOUT:
        check_destination(json_file, "--json")
    with working() as progress:
        from evit_deploy import api

        report = api.bench(
            open_bundle(bundle),
            batches=batches,
            backends=backends,
            engine=engine,
            baseline=baseline,
            duration_s=duration,
            threads=threads,
            inputs=inputs,
            tolerance=tolerance,
            select=select,
            seed=seed,
            progress=progress,
        )
    document = report.to_json()
    if json_file == STDOUT:
        emit_json(document)
    else:
        if json_file is not None:
            write_text(json_file, json_text(document) + "\n")
        emit(report.to_text())
    _raise_unless_done(report)


def _raise_unless_done(report: BenchReport) -> None:
    """The error that the report's exit code stands for, or nothing."""
    if report.exit_code == EXIT_PARITY and report.selection is not None:
        raise ParityError(
            f"no backend stays within {report.selection.tolerance_rms_rel:g} at every batch size",
            hint="the selection says why; give a wider --tolerance or name more backends",
        )
    if report.exit_code == EXIT_PARITY:
        raise ParityError("parity failed in a row of the table", hint="its speed means nothing; run evit-deploy verify")
    if report.exit_code == EXIT_MISSING:
        raise MissingDependencyError("not every row could be measured and verified", hint="the rows say why")
    if report.exit_code == EXIT_LIMIT:
        raise LimitError(
            "a comparison was unstable or the time did not suffice",
            hint="close other programs, name fewer batches and backends, or give a longer --duration",
        )
