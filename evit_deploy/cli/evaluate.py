"""`evit-deploy evaluate`: accuracy on labelled images, of the reference and of every backend asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evit_deploy.cli.options import BundleArgument, EngineOption, JsonFlag, ThreadsOption, open_bundle, parse_names
from evit_deploy.cli.output import NOTHING, check_destination, emit, emit_json, format_pairs, format_table
from evit_deploy.cli.progress import working
from evit_deploy.errors import EXIT_PARITY, InputDataError, ParityError

if TYPE_CHECKING:
    from evit_deploy.evaluation import EvaluationReport
    from evit_deploy.evaluation.report import EvaluationRow

DEFAULT_CLASSES = 10
SHOWN_UNREADABLE = 10  # the JSON has all
SHOWN_CHANGED = 5


def command(
    data: Annotated[
        Path, typer.Option(metavar="FOLDER|NPZ", help="Images in one sub-folder a class, or images and labels.")
    ],
    bundle: BundleArgument = None,
    backend: Annotated[
        str, typer.Option(metavar="NAME,...", help="Backends to evaluate beside the reference.")
    ] = "onnxruntime",
    batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Images at a time; 8 or what fits without it.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Use only N images, spread evenly over the data.", show_default=False),
    ] = None,
    max_top1_drop: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="Exit with 3 if a backend loses more top-1 than this.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep answers in a file as they come, and go on from it.", show_default=False
        ),
    ] = None,
    classes: Annotated[
        int, typer.Option(metavar="N", min=0, help="Classes in the table, the worst ones; 0 prints all.")
    ] = DEFAULT_CLASSES,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure accuracy on labelled images."""
    if resume is not None:
        check_destination(resume, "--resume")
    with working() as progress:
        from evit_deploy import api

        report = api.evaluate(
            open_bundle(bundle),
            data,
            backends=parse_names(backend) or (),
            batch=batch,
            limit=limit,
            max_top1_drop=max_top1_drop,
            state=resume,
            engine=engine,
            threads=threads,
            progress=progress,
        )
    if as_json:
        emit_json(report.to_json())
    else:
        emit(_text(report, classes or None))
    _check_verdict(report)


def _check_verdict(report: EvaluationReport) -> None:
    """Raise what the exit code stands for, or return."""
    if report.exit_code == EXIT_PARITY:
        more = len(report.failures) - 1
        raise ParityError(
            f"evaluation failed, {report.failures[0]}{f', and {more} more' if more else ''}",
            hint="do not deploy this; keep more layers in a higher precision, or allow a larger drop",
        )
    if report.data.unreadable:
        name, reason = report.data.unreadable[0]
        raise InputDataError(
            f"{len(report.data.unreadable)} of {report.data.images} images cannot be read, first {name}: {reason}",
            hint="remove or replace them: the figures are without them",
        )


def _text(report: EvaluationReport, classes: int | None) -> str:
    data = report.data
    unread = f", {len(data.unreadable)} more cannot be read" if data.unreadable else ""
    pairs = [
        ("bundle", f"{report.bundle} ({report.precision}), model.onnx sha256 {report.onnx_sha256[:16]}"),
        ("data", f"{data.path}, sha256 {data.sha256[:16]}"),
        ("images", f"{data.read} of {len(report.classes)} classes{unread}"),
    ]
    if report.max_top1_drop is not None:
        pairs.append(("gate", f"top-1 at most {report.max_top1_drop:g} points below the reference"))
    pairs.append(("verdict", f"{report.verdict}: {'; '.join(report.failures)}" if report.failures else report.verdict))
    sections = [format_pairs(pairs), _backends_table(report), _classes_table(report, classes)]
    sections += [text for row in report.rows if (text := _changed(report, row))]
    if data.unreadable:
        sections.append(_unreadable(report))
    notes = [*report.notes, *(f"{row.backend}: {note}" for row in report.rows for note in row.notes)]
    if notes:
        sections.append("\n".join(f"note: {note}" for note in notes))
    return "\n\n".join(sections)


def _backends_table(report: EvaluationReport) -> str:
    columns = ("backend", "computes in", "top-1", f"top-{report.k}", "agreement", "top-1 drop", "no answer")
    rows = [
        (
            row.backend,
            row.precision,
            _percent(row.top1),
            _percent(row.topk),
            _percent(row.agreement),
            NOTHING if row.top1_drop_points is None else f"{row.top1_drop_points:+.2f}",
            str(row.no_answer),
        )
        for row in report.rows
    ]
    return format_table(columns, rows)


def _classes_table(report: EvaluationReport, limit: int | None) -> str:
    shown = report.classes[:limit]
    backends = [row.backend for row in report.rows]
    rows = [
        (report.class_name(row.index), str(row.images), *(_percent(row.top1(backend)) for backend in backends))
        for row in shown
    ]
    lines = ["top-1 by class, worst first", format_table(("class", "images", *backends), rows)]
    rest = len(report.classes) - len(shown)
    if rest:
        lines.append(f"{rest} more class{'es' if rest > 1 else ''}: --classes 0 prints all")
    return "\n".join(lines)


def _changed(report: EvaluationReport, row: EvaluationRow) -> str:
    """The images that a backend answers differently, or nothing."""
    if not row.changed:
        return ""
    count = report.data.read - round((row.agreement or 0.0) * report.data.read)
    cells = [
        (change.image, *(report.class_name(index) for index in (change.label, change.reference, change.answer)))
        for change in row.changed[:SHOWN_CHANGED]
    ]
    first = f", the first {len(cells)}" if count > len(cells) else ""
    title = f"{row.backend} differs from the reference on {count} image{'s' if count > 1 else ''}{first}"
    return f"{title}\n{format_table(('image', 'label', 'reference', row.backend), cells)}"


def _unreadable(report: EvaluationReport) -> str:
    found = report.data.unreadable
    lines = [f"cannot be read, and not counted in any figure: {len(found)} of {report.data.images} images"]
    lines += [f"  {name}: {reason}" for name, reason in found[:SHOWN_UNREADABLE]]
    if len(found) > SHOWN_UNREADABLE:
        lines.append(f"  and {len(found) - SHOWN_UNREADABLE} more: --json lists all")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.2f} %"
