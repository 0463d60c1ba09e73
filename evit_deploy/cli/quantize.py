"""`evit-deploy quantize`: an FP32 bundle becomes a verified INT8 one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evit_deploy.cli.options import BundleArgument, JsonFlag, SeedOption, ThreadsOption, known_name, open_bundle
from evit_deploy.cli.output import emit, emit_json, format_bytes, format_number, format_pairs, format_table
from evit_deploy.cli.progress import working
from evit_deploy.constants import PROJECT_SEED
from evit_deploy.errors import UsageError

if TYPE_CHECKING:
    from evit_deploy.quantization.report import QuantizeResult

METHOD_CHOICES = ("entropy", "percentile", "minmax")
SHOWN_LAYERS = 10  # the report in the bundle has all


def command(
    bundle: BundleArgument = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate", metavar="DIR|NPY", help="Images like those the model will see.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE", help="The bundle to write; NAME-int8.evit without it."),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Activation ranges by entropy, percentile or minmax.")
    ] = "percentile",
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Keep a layer, block or stage in FP32; can be repeated.", show_default=False),
    ] = None,
    include_first_last: Annotated[
        bool, typer.Option("--include-first-last", help="Quantize the first and the last layer too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle, all at once.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch before the bundle is moved in place.")
    ] = True,
    seed: SeedOption = PROJECT_SEED,
    threads: ThreadsOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write an INT8 bundle, calibrated on images."""
    if calibrate is None:
        raise UsageError(
            "no calibration images were named",
            hint="--calibrate FOLDER, or --calibrate IMAGES.npy: some hundred images of the kind the model will see",
        )
    known_name(method, METHOD_CHOICES, "calibration method")
    with working() as progress:
        from evit_deploy import api

        result = api.quantize(
            open_bundle(bundle),
            calibrate,
            output,
            method=method,
            exclude=exclude or (),
            include_first_last=include_first_last,
            verify=verify,
            seed=seed,
            force=force,
            threads=threads,
            progress=progress,
        )
    if as_json:
        emit_json(result.to_json())
    else:
        emit(_text(result))


def _text(result: QuantizeResult) -> str:
    calibration = result.calibration
    verified = "no, --no-verify" if result.verification is None else result.verification.summary()
    pairs = [
        ("bundle", str(result.path)),
        (
            "model.onnx",
            f"{format_bytes(result.source_bytes)} -> {format_bytes(result.onnx_bytes)}, sha256 "
            f"{result.onnx_sha256[:16]}",
        ),
        ("calibrated", f"{calibration['images']} images of {calibration['source']}, {calibration['method']}"),
        ("layers", f"{len(result.quantized)} in INT8, {len(result.kept)} in FP32; softmax and its products in FP32"),
        ("error", f"{format_number(result.error)} rms_rel on {result.sensitivity_images} calibration images"),
        ("verified", verified),
        ("time", ", ".join(f"{step} {format_number(value, 2)} s" for step, value in result.seconds.items())),
    ]
    worst = result.quantized[:SHOWN_LAYERS]
    rows = [
        (
            row.layer.node,
            row.layer.op_type,
            row.layer.module,
            format_number(row.error, 2),
            f"{100 * row.threshold / row.highest:.0f} %",
        )
        for row in worst
    ]
    text = [
        format_pairs(pairs),
        "",
        f"error of the output with one layer alone in INT8, the worst {len(worst)} of {len(result.quantized)}:",
        format_table(("layer", "type", "module", "rms_rel", "range/largest"), rows),
    ]
    if result.kept:
        kept = [(row.layer.node, row.layer.op_type, row.layer.module, row.excluded) for row in result.kept]
        more = [] if len(kept) <= SHOWN_LAYERS else [f"and {len(kept) - SHOWN_LAYERS} more"]
        text += ["", "in FP32:", format_table(("layer", "type", "module", "why"), kept[:SHOWN_LAYERS]), *more]
    text += [f"note: {note}" for note in result.notes]
    return "\n".join(text)
