"""`evit-deploy build-trt`: a bundle's graph becomes a TensorRT engine inside the bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evit_deploy.cli.options import BundleArgument, JsonFlag, open_bundle, parse_names
from evit_deploy.cli.output import emit, emit_json, format_bytes, format_number, format_pairs
from evit_deploy.cli.progress import working
from evit_deploy.errors import UsageError

if TYPE_CHECKING:
    from evit_deploy.trt.plan import BuildPlan
    from evit_deploy.trt.record import EngineRecord

MIB = 1024**2
MAX_WORKSPACE_MIB = 1024**2
SHOWN_WARNINGS = 3


def command(
    bundle: BundleArgument = None,
    flavor: Annotated[
        str,
        typer.Option(metavar="auto|tensorrt|rtx", help="Which TensorRT; rtx builds without a GPU."),
    ] = "auto",
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN:OPT:MAX", help="A profile, or one number; repeatable; 1:8:MAX without it.", show_default=False
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="sm80,sm89,...", help="GPUs of an rtx engine; its default without it.", show_default=False
        ),
    ] = None,
    plugin: Annotated[
        str | None,
        typer.Option(metavar="aot|jit", help="Form of the plugin; the flavor's own without it.", show_default=False),
    ] = None,
    no_plugin: Annotated[bool, typer.Option("--no-plugin", help="Build with TensorRT's own layers only.")] = False,
    require_plugin: Annotated[
        bool, typer.Option("--require-plugin", help="An engine without the plugin is an error.")
    ] = False,
    require_headroom: Annotated[
        bool, typer.Option("--require-headroom", help="Refuse an FP16 bundle whose headroom is unknown or too small.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build although the same engine is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and build nothing.")] = False,
    workspace_mib: Annotated[
        int | None,
        typer.Option(metavar="MIB", min=1, max=MAX_WORKSPACE_MIB, help="The most that a layer may use."),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(metavar="0..5", min=0, max=5, help="TensorRT's own without it.")
    ] = None,
    timing_cache: Annotated[
        bool, typer.Option("--timing-cache/--no-timing-cache", help="Keep timings for later builds on this GPU.")
    ] = True,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Loadable by later versions (flavor tensorrt).")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="For every GPU since Ampere (flavor tensorrt).")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced (flavor tensorrt).")] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave weights out, to be refitted (flavor tensorrt).")
    ] = False,
    trt_progress: Annotated[bool, typer.Option("--trt-progress", help="Show TensorRT's own steps.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Build a TensorRT engine into a bundle."""
    from evit_deploy.trt.profiles import parse_profiles

    profiles = parse_profiles(batch or ())
    form = _plugin_choice(plugin, no_plugin)
    with working() as progress:
        from evit_deploy.building import build_bundle_engine
        from evit_deploy.trt.build import BuildOptions, build_document, plan_build, plan_notes

        options = BuildOptions(
            flavor=flavor,
            profiles=profiles,
            targets=parse_names(targets) or (),
            plugin=form,
            require_plugin=require_plugin,
            require_headroom=require_headroom,
            force=force,
            workspace_bytes=None if workspace_mib is None else workspace_mib * MIB,
            optimization_level=optimization_level,
            timing_cache=timing_cache,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            refit=refit,
            strip_weights=strip_weights,
            trt_progress=trt_progress,
        )
        progress("opening the bundle")
        opened = open_bundle(bundle)
        if dry_run:
            plan = plan_build(opened, options)
            document, text = build_document(plan, None, False, plan_notes(plan)), _plan_text(plan)
        else:
            result = build_bundle_engine(opened, options, progress)
            document, text = result.to_json(), _text(result.plan, result.record, result.reused)
        notes = document["notes"]
    if as_json:
        emit_json(document)
    else:
        emit("\n".join([text, *(f"note: {note}" for note in notes)]))


def _plugin_choice(plugin: str | None, no_plugin: bool) -> str:
    if no_plugin and plugin is not None:
        raise UsageError(f"--no-plugin and --plugin {plugin} contradict each other", hint="give one of the two")
    if plugin is not None and plugin not in ("aot", "jit"):
        raise UsageError(f"unknown form of plugin {plugin!r}", hint="known: aot, jit; --no-plugin builds without")
    return "off" if no_plugin else plugin or "auto"


def _text(plan: BuildPlan, record: EngineRecord, reused: bool) -> str:
    """What was built, where, for what, and whether the plugin is in it."""
    seconds = f"{format_number(record.build_seconds, 2)} s"
    pairs = [
        ("engine", f"{record.engine_path}{', was there already' if reused else ''}"),
        *_common_pairs(plan),
        ("size", f"{format_bytes(record.size_bytes)}, sha256 {record.engine_sha256[:16]}"),
        ("built in", f"{seconds}, {format_bytes(record.peak_memory_bytes)} of memory at its peak"),
        ("layers", record.layers_note or f"{len(record.layers or ())}, see {record.path.name}"),
    ]
    warnings = record.warnings[:SHOWN_WARNINGS]
    more = len(record.warnings) - len(warnings)
    pairs += [("warning", warning) for warning in warnings]
    if more > 0:
        pairs.append(("warning", f"and {more} more in {record.path.name}"))
    return format_pairs(pairs)


def _plan_text(plan: BuildPlan) -> str:
    """What would be built."""
    record, damaged = plan.find()
    kernels = plan.plugin.kernels()
    state = "would be built"
    if record is not None:
        state = "would be built again" if plan.options.force else "is there already and would be reused"
    elif damaged:
        state = f"would be built again: {damaged}"
    pairs = [("engine", f"{plan.name}, {state}"), *_common_pairs(plan)]
    if plan.plugin.form is not None:
        pairs.append(("kernels", f"{kernels['cached']} in the cache, {kernels['absent']} to compile"))
    return format_pairs([*pairs, ("key", plan.key)])


def _common_pairs(plan: BuildPlan) -> list[tuple[str, str]]:
    if plan.plugin.form is None:
        plugin = f"no: {plan.plugin.reason}"
    else:
        plugin = f"{plan.plugin.form}, {len(plan.plugin.layers)} layers, kernels {plan.plugin.kernel_hash[:12]}"
    return [
        ("flavor", f"{plan.flavor.title}: {plan.flavor_reason}"),
        ("targets", ", ".join(plan.targets) or plan.targets_note),
        ("batch", ", ".join(map(str, plan.profiles))),
        ("plugin", plugin),
        ("attention", plan.attention),
    ]
