"""`evit-deploy verify`: the bundle against PyTorch in FP32."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evit_deploy.cli.options import (
    BundleArgument,
    EngineOption,
    JsonFlag,
    SeedOption,
    ThreadsOption,
    open_bundle,
    parse_batches,
)
from evit_deploy.cli.output import check_destination, emit, emit_json
from evit_deploy.cli.progress import working
from evit_deploy.constants import PROJECT_SEED
from evit_deploy.errors import EXIT_OK, MissingDependencyError, ParityError


def command(
    bundle: BundleArgument = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="1,3,8", help="Batch sizes; smallest, an odd one and the largest without it."),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option("--input", metavar="PATH", help="Also compare on a .npy file, an image, or a folder of images."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="X", help="RMS-relative error allowed; the precision's own without it."),
    ] = None,
    seed: SeedOption = PROJECT_SEED,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The runtime; without it onnxruntime, and torch-half for FP16 and BF16 graphs."
        ),
    ] = None,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
    as_json: JsonFlag = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a JUnit XML report, for CI.", show_default=False)
    ] = None,
) -> None:
    """Compare a bundle with PyTorch in FP32."""
    batches = None if batch is None else parse_batches(batch)
    if junit is not None:
        check_destination(junit, "--junit")
    with working() as progress:
        from evit_deploy import api
        from evit_deploy.parity.junit import write_junit

        report = api.verify(
            open_bundle(bundle),
            batches=batches,
            inputs=inputs,
            tolerance=tolerance,
            seed=seed,
            backend=backend,
            engine=engine,
            threads=threads,
            progress=progress,
        )
        if junit is not None:
            write_junit(report, junit)
    if as_json:
        emit_json(report.to_json())
    else:
        emit(report.table())
    if report.verdict == "fail":
        raise ParityError(
            f"parity failed, {report.summary().removeprefix('fail: ')}",
            hint="do not deploy this bundle; docs/ci.md has what to look at",
        )
    if report.exit_code != EXIT_OK:
        raise MissingDependencyError(
            f"nothing was proved, {report.summary().removeprefix('unverified: ')}",
            hint="evit-deploy doctor says what is missing",
        )
