"""Tables of the result `kernel-floors`, which the operators' READMEs and docs/performance.md quote.

KB and MB are thousands and millions of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from evit_deploy.specs import split_name

Document = Mapping[str, Any]
_ORDER = ("msa", "mit", "msra")


def floors_table(document: Document, operator: str) -> str:
    """A row per size: what a call has to do for one image, its floor, and what its definition moves."""
    batches = _batches(document)
    sizes = _by_size(document, operator)
    has_kernels, has_softmax = operator == "cascaded_attention", operator != "lite_mla"
    has_parameters = has_kernels or operator == "projected_multi_scale_attention"
    header = ["layers", "map", "heads x dim"]
    header += ["key dim, kernel"] * has_kernels + ["programs", "KB"] + ["of them parameters"] * has_parameters
    header += ["MFLOP"] + ["M exp"] * has_softmax + ["FLOP/B"]
    header += [f"floor at {batch}, us" for batch in batches]
    header += ["bound by", "definition: bytes", "launches"]
    lines = []
    for rows in sizes:
        first, size = rows[0]["details"], rows[0]["details"]["sizes"]
        images = rows[0]["batch"]
        cells = [_layers(first["models"]), _map(size), f"{size['heads']} x {size['dim']}"]
        if has_kernels:
            cells.append(f"{size['key_dim']}, {size['kernel']}")
        cells += [str(first["programs_per_image"]), _kilo(_bytes(first) / images)]
        cells += [_kilo(first["parameter_bytes"])] * has_parameters
        cells.append(f"{first['matrix_flops'] / images / 1e6:.2f}")
        cells += [f"{first['exponentials'] / images / 1e6:.3f}"] * has_softmax
        cells += [f"{first['flops_per_byte']:.1f}", *(_micro(row["value"]) for row in rows)]
        cells.append(" / ".join(dict.fromkeys(row["details"]["bound"] for row in rows)))
        ratios = [row["details"]["definition"]["bytes"] / _bytes(row["details"]) for row in rows]
        cells += [" / ".join(f"{ratio:.1f}x" for ratio in ratios), str(first["definition"]["launches"])]
        lines.append(cells)
    return _table(header, lines)


def deeper_table(document: Document, operator: str) -> str:
    """A row per size: what further steps in the launch would save and read again, for one image."""
    sizes = _by_size(document, operator)
    names = [fusion["name"] for fusion in sizes[0][0]["details"]["deeper"]]
    header = ["map", "heads x dim", "layer now: KB, launches", *names]
    lines = []
    for rows in sizes:
        details = rows[0]["details"]
        size = details["sizes"]
        cells = [_map(size), f"{size['heads']} x {size['dim']}"]
        cells += [f"{_kilo(details['layer']['bytes'])}, {details['layer']['launches']}"]
        lines.append(cells + [_fusion(fusion) for fusion in details["deeper"]])
    return _table(header, lines)


def cascade_table(document: Document) -> str:
    """A row per size of the cascade: one launch against one launch per head."""
    batches = _batches(document)
    header = ["map", "heads x dim", "launches: whole cascade", "one per head"]
    header += [f"bytes at batch {batch}: one per head over whole cascade" for batch in batches]
    lines = []
    for rows in _by_size(document, "cascaded_attention"):
        size = rows[0]["details"]["sizes"]
        cells = [_map(size), f"{size['heads']} x {size['dim']}", "1"]
        cells += [str(rows[0]["details"]["launch_per_head"]["launches"])]
        cells += [f"{row['details']['launch_per_head']['bytes'] / _bytes(row['details']):.2f}x" for row in rows]
        lines.append(cells)
    return _table(header, lines)


def models_table(document: Document) -> str:
    """A row per model: its attention calls together."""
    batches = _batches(document)
    header = ["model", "attention calls", "MB per image", "definition, MB", "definition, launches"]
    header += [f"floor at batch {batch}, us" for batch in batches]
    sizes = [rows for operator in OPERATORS for rows in _by_size(document, operator)]
    names = list(dict.fromkeys(name for rows in sizes for name in rows[0]["details"]["models"]))
    lines = []
    for name in sorted(names, key=lambda name: (_ORDER.index(split_name(name)[0]), name)):
        here = [(rows, rows[0]["details"]["models"][name]) for rows in sizes if name in rows[0]["details"]["models"]]

        def total(value: Callable[[Document], float], index: int, here: Any = here) -> float:
            return float(sum(layers * value(rows[index]) for rows, layers in here))

        images = batches[-1]
        lines.append(
            [
                f"`{name}`",
                f"{sum(layers for _, layers in here)}",
                f"{total(lambda row: _bytes(row['details']), -1) / images / 1e6:.2f}",
                f"{total(lambda row: row['details']['definition']['bytes'], -1) / images / 1e6:.1f}",
                f"{total(lambda row: row['details']['definition']['launches'], -1):.0f}",
                *(_micro(total(lambda row: row["value"], i)) for i in range(len(batches))),
            ]
        )
    return _table(header, lines)


OPERATORS = ("multi_scale_attention", "projected_multi_scale_attention", "lite_mla", "cascaded_attention")
# What the documents call the tables.
SECTIONS: dict[str, Callable[[Document], str]] = {"floors models": models_table, "floors per head": cascade_table}
for _operator in OPERATORS:
    SECTIONS[f"floors {_operator.replace('_', '-')}"] = partial(floors_table, operator=_operator)
    SECTIONS[f"deeper {_operator.replace('_', '-')}"] = partial(deeper_table, operator=_operator)


def _by_size(document: Document, operator: str) -> list[list[Document]]:
    """The rows of each size, one per batch."""
    sizes: dict[str, list[Document]] = {}
    for row in document["rows"]:
        if row["details"].get("operator") == operator:
            sizes.setdefault(row["subject"], []).append(row)
    return list(sizes.values())


def _batches(document: Document) -> list[int]:
    return list(dict.fromkeys(row["batch"] for row in document["rows"]))


def _bytes(details: Document) -> int:
    return int(details["read_bytes"] + details["written_bytes"])


def _layers(models: Mapping[str, int]) -> str:
    return ", ".join(f"{split_name(name)[1]} {layers}" for name, layers in models.items())


def _fusion(fusion: Document) -> str:
    text = f"{_kilo(fusion['saved_bytes'])} / {_kilo(fusion['reread_bytes'])}"
    if fusion["extra_flops"]:
        text += f", {fusion['extra_flops'] / 1e6:.0f} MFLOP"
    if fusion["held_bytes"]:
        text += f", {fusion['held_bytes'] / 1024:.0f} KiB"
    return f"**{text}**" if fusion["pays"] else text


def _map(size: Mapping[str, int]) -> str:
    return f"{size['height']}x{size['width']}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def _kilo(value: float) -> str:
    return f"{value / 1e3:.0f}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
