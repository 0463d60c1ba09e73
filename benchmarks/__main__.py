"""`python -m benchmarks [NAME]`: measure, print the table, write the result; without a name, all that measure."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    against_eager,
    build_trt,
    digits_precision,
    export_cost,
    export_speed,
    help_time,
    kernel_floors,
    kernels,
    precision_error,
    readme,
    selection,
    suite,
    tour,
)
from benchmarks.result import RESULTS, Result, read_results, write_result
from benchmarks.settings import DEFAULT_IMAGE_SIZE_PX, DEFAULT_THREADS, Settings
from benchmarks.table import markdown
from benchmarks.workspace import Workspace, workspace
from evit_deploy.errors import EXIT_LIMIT, EXIT_OK, EvitDeployError, MissingDependencyError
from evit_deploy.specs import split_name

ALL = "all"
TABLE = "table"
README = "readme"
MODULES = (
    export_speed,
    against_eager,
    help_time,
    export_cost,
    build_trt,
    digits_precision,
    precision_error,
    selection,
    kernel_floors,
    tour,
    kernels,
    suite,
)
SPEED = tuple(m.NAME for m in (export_speed, against_eager, help_time, export_cost))  # what the table of speeds shows
ON_REQUEST = (kernels, suite)  # they take long, and the first measures nothing
IN_ALL = tuple(module.NAME for module in MODULES if module not in ON_REQUEST)
BENCHMARKS: dict[str, Callable[[Settings, Workspace], Result]] = {module.NAME: module.run for module in MODULES}
EPILOG = f"Exit codes: 0 every goal is reached, {EXIT_LIMIT} one is not, others as evit-deploy's own."


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        if options.benchmark == TABLE:
            return _print_table(options.results or RESULTS)
        return _fill_documents(options.results or RESULTS) if options.benchmark == README else _run(options)
    except EvitDeployError as error:
        print("\n".join([f"benchmarks: {error}", *(f"  {line}" for line in error.details)]), file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    settings = Settings(
        threads=options.threads,
        duration_s=options.duration,
        models=options.models,
        batches=options.batch,
        image_size=options.image_size,
        quick=options.quick,
    )
    # Quick figures mean nothing: they go into a folder only where one is named.
    folder = options.results or (None if options.quick else RESULTS)
    documents = []
    with workspace(_stderr_progress()) as space:
        for name in IN_ALL if options.benchmark == ALL else [options.benchmark]:
            document = BENCHMARKS[name](settings, space).to_json()
            documents.append(document)
            if folder is not None:
                path = write_result(document, folder)
                space.progress(f"wrote {path}")
    print(markdown(documents))
    missed = [row for document in documents for row in document["rows"] if row["reached"] is False]
    return EXIT_LIMIT if missed else EXIT_OK


def _print_table(folder: Path) -> int:
    found = read_results(folder)
    if not found:
        raise MissingDependencyError(f"there is no result in {folder}", hint="python -m benchmarks measures them")
    print(markdown([found[name] for name in BENCHMARKS if name in found]))
    return EXIT_OK


def _fill_documents(folder: Path) -> int:
    changed = readme.write_documents(SPEED, results=folder)
    print(f"rewrote {', '.join(changed)}" if changed else "nothing to rewrite")
    return EXIT_OK


def _stderr_progress() -> Callable[[str], None]:
    started = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - started:6.1f} s] {line}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog=EPILOG)
    summaries = {module.NAME: module.TITLE for module in MODULES}
    left_out = " and ".join(module.NAME for module in ON_REQUEST)
    summaries |= {ALL: f"all of them but {left_out}, one after the other (about three quarters of an hour)"}
    summaries |= {TABLE: "print the results that are there as a Markdown table"}
    summaries |= {README: "write the results that are there into README and docs"}
    parser.add_argument(
        "benchmark",
        nargs="?",
        default=ALL,
        choices=list(summaries),
        help="; ".join(f"{name}: {title}" for name, title in summaries.items()),
        metavar="NAME",
    )
    parser.add_argument("--models", type=_models, metavar="NAME,...", help="FAMILY-VARIANT; the promised ones without")
    parser.add_argument("--batch", type=_batches, metavar="1,8", help="batch sizes of the comparisons")
    parser.add_argument("--image-size", type=int, default=DEFAULT_IMAGE_SIZE_PX, metavar="PIXELS")
    parser.add_argument("--threads", type=int, default=DEFAULT_THREADS, metavar="N", help="of each runtime compared")
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="budget of one comparison of one model")
    parser.add_argument("--quick", action="store_true", help="only to see that it works; the figures mean nothing")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="where the JSON goes; with --quick nowhere without it"
    )
    return parser


def _models(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        try:
            split_name(name)
        except EvitDeployError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return names


def _batches(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
