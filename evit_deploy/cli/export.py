"""`evit-deploy export`: a checkpoint becomes a verified bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evit_deploy.cli.options import (
    MAX_BATCH,
    JsonFlag,
    SeedOption,
    check_exists,
    check_family,
    known_name,
    parse_names,
    parse_rgb,
    read_class_names,
)
from evit_deploy.cli.output import emit, emit_json, format_bytes, format_number, format_pairs
from evit_deploy.cli.progress import working
from evit_deploy.constants import (
    DEFAULT_MAX_BATCH,
    DEFAULT_OPSET,
    MAX_IMAGE_SIZE_PX,
    MAX_OPSET,
    MIN_OPSET,
    PROJECT_SEED,
)
from evit_deploy.errors import UsageError
from evit_deploy.specs import Preprocessing, split_name

if TYPE_CHECKING:
    from evit_deploy.api import ExportResult

WEIGHT_CHOICES = ("ema", "model")


def _check_source(checkpoint: Path | None, random_weights: str | None, overrides: dict[str, object]) -> None:
    """Exactly one of a checkpoint and --random-weights, which has nothing to override."""
    if random_weights is None:
        if checkpoint is None:
            raise UsageError("no checkpoint was named", hint="evit-deploy export CKPT, or --random-weights msra-m0")
        return
    split_name(random_weights)
    if checkpoint is not None:
        raise UsageError(
            f"both a checkpoint ({checkpoint}) and --random-weights were given", hint="give one of the two"
        )
    surplus = [option for option, value in overrides.items() if value is not None]
    if surplus:
        raise UsageError(
            f"{surplus[0]} is about a checkpoint, and --random-weights has none",
            hint=f"leave {surplus[0]} out",
        )


def _preprocessing(mean: str | None, std: str | None) -> Preprocessing | None:
    """What --mean and --std say, or None for what the checkpoint and the family say."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UsageError("--mean and --std belong together", hint="give both, in units of pixel values scaled to 0..1")
    deviations = parse_rgb(std, "--std")
    if min(deviations) <= 0:
        raise UsageError(f"--std {std} has a value that is not above zero", hint="for example --std 0.229,0.224,0.225")
    return Preprocessing(mean=parse_rgb(mean, "--mean"), std=deviations)


def command(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CKPT", help="A .pt, .pth or .safetensors file of any family.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE", help="The bundle to write; CKPT.evit without it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle, all at once.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch before the bundle is moved in place.")
    ] = True,
    as_json: JsonFlag = False,
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="No checkpoint: random weights of a published model, for example msra-m0."),
    ] = None,
    seed: SeedOption = PROJECT_SEED,
    family: Annotated[str | None, typer.Option(metavar="NAME", help="msa, mit or msra; detected without it.")] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="For example m3 or b1; detected without it.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="ema|model", help="Which weights of a checkpoint that has both."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", min=1, max=MAX_IMAGE_SIZE_PX, help="Side of the square input; detected without it."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=MAX_BATCH, help="Fix the batch; dynamic without it."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_BATCH, help="Largest batch of a dynamic graph.")
    ] = DEFAULT_MAX_BATCH,
    opset: Annotated[
        int | None,
        typer.Option(metavar="N", min=MIN_OPSET, max=MAX_OPSET, help=f"ONNX opset; {DEFAULT_OPSET}, or 22 for BF16."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(metavar="fp32|fp16|bf16", help="Of weights and activations; sums and attention stay in FP32."),
    ] = "fp32",
    io: Annotated[str, typer.Option(metavar="fp32|fp16", help="Type of images and output.")] = "fp32",
    keep_fp32: Annotated[
        str | None,
        typer.Option(metavar="auto|BLOCK,...", help="Blocks that stay in FP32; auto: those a headroom report names."),
    ] = None,
    headroom: Annotated[
        Path | None,
        typer.Option(metavar="FILE|BUNDLE", help="The headroom report; without it that of the bundle exported."),
    ] = None,
    fused_operators: Annotated[
        bool,
        typer.Option(
            "--fused-operators/--no-fused-operators", help="One node per attention layer, or plain operators."
        ),
    ] = True,
    simplify: Annotated[bool, typer.Option("--simplify/--no-simplify", help="Run onnxsim, compared.")] = True,
    with_preprocess: Annotated[
        bool,
        typer.Option("--with-preprocess", help="Take uint8 images [N, H, W, 3]; scale, mean, std in the graph."),
    ] = False,
    with_softmax: Annotated[
        bool,
        typer.Option("--with-softmax", help="Give probabilities instead of logits."),
    ] = False,
    class_names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Class names, one a line, or a JSON list."),
    ] = None,
    mean: Annotated[str | None, typer.Option(metavar="R,G,B", help="Pixel mean, on 0..1.")] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Pixel deviation, on 0..1.")] = None,
) -> None:
    """Write a verified bundle from a checkpoint."""
    overrides = {"--family": family, "--variant": variant, "--weights": weights}
    _check_source(checkpoint, random_weights, dict(overrides))
    check_family(family)
    if weights is not None:
        known_name(weights, WEIGHT_CHOICES, "set of weights")
    preprocessing = _preprocessing(mean, std)
    if checkpoint is not None:
        check_exists(checkpoint)
    names = None if class_names is None else read_class_names(class_names)
    with working() as progress:
        from evit_deploy import api

        result = api.export(
            checkpoint,
            output,
            random_weights=random_weights,
            seed=seed,
            family=family,
            variant=variant,
            image_size=image_size,
            weights=weights,
            batch=batch,
            max_batch=max_batch,
            opset=opset,
            precision=precision,
            io=io,
            keep_fp32=parse_names(keep_fp32) or (),
            headroom=headroom,
            fused_operators=fused_operators,
            simplify=simplify,
            verify=verify,
            with_preprocess=with_preprocess,
            with_softmax=with_softmax,
            class_names=names,
            preprocessing=preprocessing,
            force=force,
            progress=progress,
        )
    if as_json:
        emit_json(result.to_json())
    else:
        emit(_text(result))


def _precision(facts: dict[str, Any]) -> str:
    """The types of a graph's nodes, with what stays in FP32 where that is not everything."""
    nodes = ", ".join(f"{count} {name}" for name, count in facts["nodes_by_type"].items())
    kept = f"; in FP32: {', '.join(facts['keep_fp32'])}" if facts["keep_fp32"] else ""
    return f"{facts['precision']}, nodes: {nodes}, {facts['casts']} casts{kept}"


def _text(result: ExportResult) -> str:
    """What was written, where, and how long each step took."""
    bundle = result.bundle
    spec = bundle.spec
    steps = ", ".join(f"{name} {format_number(seconds, 2)} s" for name, seconds in result.seconds.items())
    pairs = [
        ("bundle", str(bundle.path)),
        ("model", f"{spec.name}, {spec.image_size} px, {spec.num_classes} classes"),
        ("precision", _precision(bundle.manifest["onnx"])),
        ("model.onnx", f"{format_bytes(bundle.onnx_path.stat().st_size)}, sha256 {bundle.onnx_sha256[:16]}"),
        ("verified", "no, --no-verify" if result.verification is None else result.verification.summary()),
        ("time", steps),
    ]
    return format_pairs([*pairs, *(("note", note) for note in result.notes)])
