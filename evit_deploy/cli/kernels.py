"""`evit-deploy kernels`: the compiled attention kernels: which are needed, which are there, and packs of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evit_deploy.cli.options import JsonFlag, known_name, open_bundle, parse_names
from evit_deploy.cli.output import NOTHING, check_destination, emit, emit_json, format_bytes, format_table
from evit_deploy.cli.progress import working
from evit_deploy.constants import MAX_IMAGE_SIZE_PX, MIN_IMAGE_SIZE_PX
from evit_deploy.errors import EXIT_USAGE, EvitDeployError, LimitError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from evit_deploy.kernels import KernelRow, NeededKernel

SCHEMA = "evit-deploy/kernels"
SCHEMA_VERSION = 1
DEFAULT_PACK = Path("evit-kernels.zip")
KEY_CHARS = 12  # of the 64 in the table; --json has them all
MAX_REASONS = 20

app = typer.Typer(help="Compile, list and pack the attention kernels.", rich_markup_mode=None)

ModelsBundleArgument = Annotated[
    Path | None,
    typer.Argument(metavar="BUNDLE", help="Only what this bundle's model needs.", show_default=False),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="FAMILY-VARIANT", help="Only what this model needs; repeatable.", show_default=False
    ),
]
ArchOption = Annotated[
    str | None,
    typer.Option(metavar="80,90,...", help="Compute capabilities times ten; all without it.", show_default=False),
]
DtypeOption = Annotated[
    str | None, typer.Option(metavar="fp32,fp16,bf16", help="Only these; all without it.", show_default=False)
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        min=MIN_IMAGE_SIZE_PX,
        max=MAX_IMAGE_SIZE_PX,
        help="Side of the square input of the models; 224 without it.",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USAGE)


@app.command("list")
def list_command(
    bundle: ModelsBundleArgument = None,
    model: ModelOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = None,
    image_size: ImageSizeOption = None,
    as_json: JsonFlag = False,
) -> None:
    """List the kernels that models need, and which are in the cache."""
    with working() as progress:
        from evit_deploy.kernels import list_kernels

        needed, arches = _chosen(bundle, model, arch, dtype, image_size, progress)
        rows = list_kernels(needed, arches)
    _show("list", rows, None, as_json)


@app.command("compile")
def compile_command(
    bundle: ModelsBundleArgument = None,
    model: ModelOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = None,
    image_size: ImageSizeOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Compile the kernels that are not in the cache."""
    with working() as progress:
        from evit_deploy.kernels import compile_kernels

        needed, arches = _chosen(bundle, model, arch, dtype, image_size, progress)
        rows = compile_kernels(needed, arches, progress=progress)
    _raise_if_failed(rows)
    _show("compile", rows, None, as_json)
    _raise_unless_complete(rows)


@app.command("pack")
def pack_command(
    bundle: ModelsBundleArgument = None,
    model: ModelOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = None,
    image_size: ImageSizeOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The pack to write; replaced if it is there.")
    ] = DEFAULT_PACK,
    as_json: JsonFlag = False,
) -> None:
    """Compile, and write a pack for a machine without Triton."""
    check_destination(output, "--output")
    with working() as progress:
        from evit_deploy.kernels import CACHED, COMPILED, compile_kernels, pack_kernels

        needed, arches = _chosen(bundle, model, arch, dtype, image_size, progress)
        rows = compile_kernels(needed, arches, progress=progress)
        _raise_if_failed(rows)
        complete = all(row.state in (CACHED, COMPILED) for row in rows)
        pack = pack_kernels(rows, output) if complete else None
    _show("pack", rows, pack, as_json)
    _raise_unless_complete(rows)


@app.command("unpack")
def unpack_command(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="What kernels pack wrote.")],
    as_json: JsonFlag = False,
) -> None:
    """Put the kernels of a pack into the cache of this machine."""
    with working() as progress:
        from evit_deploy.kernels import unpack_kernels

        progress(f"checking {pack}")
        facts, rows = unpack_kernels(pack)
    _show("unpack", rows, facts, as_json)


def _chosen(
    bundle: Path | None,
    models: list[str] | None,
    arch: str | None,
    dtype: str | None,
    image_size: int | None,
    progress: Callable[[str], None],
) -> tuple[list[NeededKernel], tuple[int, ...]]:
    """What the options name: kernels, and architectures."""
    if bundle is not None and (models or image_size is not None):
        surplus = "--model" if models else "--image-size"
        raise UsageError(f"both a bundle ({bundle}) and {surplus} were given", hint=f"leave {surplus} out")
    from evit_kernels.aot import ARCHES

    from evit_deploy.kernels import DTYPES, needed_kernels
    from evit_deploy.specs import ModelSpec, variant_names

    words = parse_names(arch) or tuple(map(str, ARCHES))
    arches = tuple(int(known_name(word.removeprefix("sm_"), map(str, ARCHES), "architecture")) for word in words)
    dtypes = tuple(known_name(word, DTYPES, "dtype") for word in parse_names(dtype) or DTYPES)
    if bundle is not None:
        specs = [open_bundle(bundle).spec]
    else:
        size = {} if image_size is None else {"image_size": image_size}
        specs = [ModelSpec.published(name, **size) for name in dict.fromkeys(models or variant_names())]
    return needed_kernels(specs, dtypes, progress), arches


def _show(command: str, rows: list[KernelRow], pack: dict[str, Any] | None, as_json: bool) -> None:
    from evit_kernels.cache import installed_triton

    from evit_deploy.kernels.compiling import cache_folder

    if not as_json:
        emit(kernels_text(rows, pack, str(cache_folder())))
        return
    emit_json(
        {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "command": command,
            "cache": str(cache_folder()),
            "triton": installed_triton(),
            "pack": pack,
            "rows": [row.to_json() for row in rows],
        }
    )


def kernels_text(rows: list[KernelRow], pack: dict[str, Any] | None, cache: str) -> str:
    """A row per kernel, then what there is of them, where, and what is in the pack."""
    columns = ("kernel", "as in", "dtype", "sm", "state", "regs", "spill B", "shared B", "threads", "key")
    lines = [format_table(columns, [_cells(row) for row in rows])]
    if any(row.size for row in rows):
        lines.append("HxW heads x head dim; w: window, k: query kernels, cl: channels_last")
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    lines.append(f"{_kernels(len(rows))}: {states}; cache {cache}")
    if any(row.registers is not None for row in rows):
        lines.append("registers, spills and shared memory as ptxas and Triton report them; unverified on a GPU")
    if pack is not None:
        lines.append(f"{pack['path']}: {_kernels(pack['kernels'])}, {format_bytes(pack['size_bytes'])}")
        lines.append(f"made by evit-deploy {pack['tool_version']}, sha256 {pack['sha256']}")
    return "\n".join(lines)


def _cells(row: KernelRow) -> tuple[str, ...]:
    counts = (row.registers, row.spill_bytes, row.shared_bytes, row.threads)
    return (
        " ".join(filter(None, (row.operator, row.size, "cl" if row.channels_last else None))),
        NOTHING if row.model is None else f"{row.model} {row.image_size} px",
        row.dtype,
        str(row.arch),
        row.state,
        *(NOTHING if count is None else str(count) for count in counts),
        row.key[:KEY_CHARS],
    )


def _kernels(count: int) -> str:
    return "1 kernel" if count == 1 else f"{count} kernels"


def _raise_if_failed(rows: list[KernelRow]) -> None:
    from evit_deploy.kernels import FAILED

    reasons = [f"{row}: {row.reason}" for row in rows if row.state == FAILED]
    if reasons:
        raise EvitDeployError(
            f"{len(reasons)} of {_kernels(len(rows))} cannot be compiled",
            _first(reasons),
            hint="try the Triton version that constraints.txt names, and report it; the others are in the cache",
        )


def _raise_unless_complete(rows: list[KernelRow]) -> None:
    """The error for kernels that were refused, or that nothing here can compile."""
    from evit_deploy.kernels import ABSENT, REFUSED

    refused = [row.reason for row in rows if row.state == REFUSED]
    if refused:
        raise LimitError(
            f"{len(refused)} of {_kernels(len(rows))} spill, use scratch memory or need over 48 KiB of shared memory",
            _first(refused),
            hint="nothing launches them; the others are in the cache",
        )
    absent = sum(row.state == ABSENT for row in rows)
    if absent:
        raise MissingDependencyError(
            f"Triton is not installed, and of {_kernels(len(rows))} the cache lacks {absent}",
            hint="pip install 'evit-deploy[kernels]', or run evit-deploy kernels pack where it is and unpack that here",
        )


def _first(reasons: list[str]) -> list[str]:
    more = len(reasons) - MAX_REASONS
    return reasons[:MAX_REASONS] + ([f"and {more} more"] if more > 0 else [])
