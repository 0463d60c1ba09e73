"""`evit-deploy headroom`: how far a model's values stay from the limits of FP16 and BF16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from evit_deploy.cli.options import BundleArgument, JsonFlag, known_name, open_bundle
from evit_deploy.cli.output import NOTHING, emit, emit_json, format_number, format_pairs, format_table
from evit_deploy.cli.progress import working
from evit_deploy.errors import ParityError

if TYPE_CHECKING:
    from evit_deploy.headroom.limits import FloatType
    from evit_deploy.headroom.report import HeadroomReport
    from evit_deploy.headroom.rows import TensorRow

REQUIRABLE = ("fp16", "bf16")
DEFAULT_ROWS = 10
MAX_NAMED = 3  # tensors named in a line of the summary

# A stored tensor is a value, an inner one is often summed from others.
_STORED_COLUMNS = ("block", "tensor", "largest", "rms", "overflow bits", "underflow bits", "to zero", "image")
_INNER_COLUMNS = (*_STORED_COLUMNS[:3], "largest sum", *_STORED_COLUMNS[3:])


def command(
    images: Annotated[
        Path, typer.Option(metavar="PATH", help="A folder of images with its sub-folders, an image, or a .npy file.")
    ],
    bundle: BundleArgument = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")] = 4,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use the first N images only.", show_default=False)
    ] = None,
    margin_bits: Annotated[
        float, typer.Option(metavar="BITS", min=0.0, help="The margin to both limits that counts as safe.")
    ] = 1.0,
    require: Annotated[
        str | None,
        typer.Option(metavar="fp16|bf16", help="Exit with 3 unless this type is safe.", show_default=False),
    ] = None,
    rows: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tensors per table, the worst ones; 0 prints all.")
    ] = DEFAULT_ROWS,
    as_json: JsonFlag = False,
) -> None:
    """Measure how far values stay from the limits of FP16 and BF16."""
    if require is not None:
        known_name(require, REQUIRABLE, "type")
    with working() as progress:
        from evit_deploy import api

        report = api.headroom(
            open_bundle(bundle), images, batch=batch, margin_bits=margin_bits, limit=limit, progress=progress
        )
    if as_json:
        emit_json(report.to_json())
    else:
        emit(_text(report, rows or None))
    _check_requirement(report, require)


def _check_requirement(report: HeadroomReport, require: str | None) -> None:
    """Raise what `--require` asks for, or return."""
    from evit_deploy.headroom.limits import BF16, FP16

    for kind in (FP16, BF16):
        if require == kind.name and (failing := report.failing(kind)):
            raise ParityError(
                f"{kind.name.upper()} is not safe: {_named(failing)}",
                hint="export with --keep-fp32 auto" if kind is FP16 else "export in FP32",
            )


def _text(report: HeadroomReport, rows: int | None) -> str:
    """The verdict, what to do, and the worst tensors."""
    from evit_deploy.headroom.limits import BF16, FP16
    from evit_deploy.headroom.rows import IN_FP32, STORED
    from evit_deploy.headroom.storage import REPORT_FILE, REPORTS_FOLDER

    spec, images = report.spec, report.images
    asked = _count(report.margin_bits, "bit")
    pairs = [
        ("model", f"{spec.name}, {spec.image_size} px, weights {report.weights_sha256[:16]}"),
        ("measured", f"{_count(images.count, 'image')} of {images.source} in FP32; {asked} of margin asked for"),
        ("FP16", _verdict(report, FP16)),
        ("BF16", _verdict(report, BF16)),
        ("naive FP16", _naive(report)),
        *(("note", note) for note in report.notes),
        ("report", f"{report.bundle}/{REPORTS_FOLDER}/{REPORT_FILE}"),
    ]
    pairs.append(("next", _next_command(report)))
    stored = [row for row in report.rows if row.storage == STORED]
    inner = [row for row in report.rows if row.storage == IN_FP32]
    sections = [
        format_pairs(pairs),
        _section("stored in the low type, margins in FP16, worst first", _STORED_COLUMNS, stored, rows),
        _section("kept in FP32 in every export, margins if they were FP16, worst first", _INNER_COLUMNS, inner, rows),
    ]
    return "\n\n".join(sections)


def _next_command(report: HeadroomReport) -> str:
    """The export that the verdict is about."""
    bundle = Path(report.bundle)
    keep = " --keep-fp32 auto" if report.keep_fp32 else ""
    source, target = (quote(str(path)) for path in (bundle, bundle.with_name(f"{bundle.stem}-fp16{bundle.suffix}")))
    return f"evit-deploy export {source} --precision fp16{keep} --output {target}"


def _verdict(report: HeadroomReport, kind: FloatType) -> str:
    failing = report.failing(kind)
    if not failing:
        least = min(row.margin_bits(kind) for row in report.rows if row.storage == "stored")
        return f"safe: every stored tensor keeps {least:.1f} bits or more to both limits"
    if kind.name != "fp16":
        return f"not safe: {_named(failing)}"
    kept = f"{len(report.keep_fp32)} of {len(report.blocks)} blocks in FP32: {', '.join(report.keep_fp32)}"
    return f"not safe, keep {kept}; because of {_named(failing)}"


def _naive(report: HeadroomReport) -> str:
    """What a conversion would do that keeps nothing in FP32."""
    naive = report.naive
    parts = []
    if naive.overflows:
        parts.append(f"overflow inside operators: {_named(naive.overflows)}")
    if naive.divides_by_zero:
        parts.append(f"divide by zero: {_named(naive.divides_by_zero)}")
    if not parts:
        return "a conversion that keeps nothing in FP32 would not overflow inside operators either"
    return f"a conversion that keeps nothing in FP32 would {', and '.join(parts)}"


def _named(rows: Sequence[TensorRow]) -> str:
    """The first few tensors by name, the rest as a number."""
    names = ", ".join(f"{row.name} ({format_number(row.largest)})" for row in rows[:MAX_NAMED])
    rest = len(rows) - MAX_NAMED
    return f"{names} and {_count(rest, 'other')}" if rest > 0 else names


def _count(number: float, thing: str) -> str:
    return f"{number:g} {thing}" if number == 1 else f"{number:g} {thing}s"


def _section(title: str, columns: Sequence[str], rows: Sequence[TensorRow], limit: int | None) -> str:
    cells = [[_cells(row)[column] for column in columns] for row in rows[:limit]]
    lines = [title, format_table(columns, cells)]
    if len(cells) < len(rows):
        lines.append(f"{_count(len(rows) - len(cells), 'more tensor')} with more room: --rows 0 prints all")
    return "\n".join(lines)


def _cells(row: TensorRow) -> dict[str, str]:
    from evit_deploy.headroom.limits import FP16

    share = row.zeroed_share[FP16.name]
    return {
        "block": row.block,
        "tensor": row.tensor,
        "largest": format_number(row.max_abs),
        "largest sum": format_number(row.max_sum),
        "rms": format_number(row.rms),
        "overflow bits": _bits(row.overflow_bits(FP16)),
        "underflow bits": _bits(row.underflow_bits(FP16)),
        "to zero": "0" if share == 0 else f"{100 * share:.2g} %",
        "image": row.image or NOTHING,
    }


def _bits(bits: float | None) -> str:
    return NOTHING if bits is None else f"{bits:.1f}"
