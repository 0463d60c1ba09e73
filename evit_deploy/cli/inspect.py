"""`evit-deploy inspect`: what a checkpoint, an ONNX file or a bundle is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from evit_deploy.cli.options import JsonFlag
from evit_deploy.cli.output import emit, emit_json, format_bytes, format_pairs
from evit_deploy.cli.progress import working

MAX_LISTED_OPERATORS = 8
RANDOM_WEIGHTS = "RANDOM WEIGHTS"


def command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, an ONNX file or a bundle.")],
    as_json: JsonFlag = False,
) -> None:
    """Say what a file or bundle is."""
    with working() as progress:
        from evit_deploy.inspection import inspect_path

        progress(f"reading {path}")
        document = inspect_path(path)
    if as_json:
        emit_json(document)
    else:
        emit(inspect_text(document))


def inspect_text(document: dict[str, Any]) -> str:
    """The facts of an inspect document, one a line."""
    pairs = [("kind", document["kind"]), ("path", document["path"])]
    if "model" in document:
        pairs += _model_pairs(document)
    if document["kind"] == "bundle":
        pairs += _bundle_pairs(document)
    if document["kind"] == "checkpoint":
        origin = document["origin"]
        wrapper = f", in {origin['wrapper']!r}" if origin.get("wrapper") else ""
        if document["random_weights"]:
            pairs.append(("weights of", RANDOM_WEIGHTS))
        pairs.append(("format", f"{origin['file_format']}, keys of {origin['key_format']}{wrapper}"))
        pairs.append(("tensors", f"{document['tensors']} ({_counts(document['dtypes'])})"))
        pairs.append(("size", format_bytes(document["size_bytes"])))
        pairs.append(("sha256", str(document["sha256"])))
    pairs += _onnx_pairs(document["onnx"] if document["kind"] == "bundle" else document)
    if document["kind"] == "onnx":
        if document["metadata"].get("evit_deploy.random_weights") == "true":
            pairs.append(("weights of", RANDOM_WEIGHTS))
        pairs.append(("sha256", document["sha256"]))
    return format_pairs(pairs)


def _model_pairs(document: dict[str, Any]) -> list[tuple[str, str]]:
    model = document["model"]
    pairs = [
        ("model", f"{document['name']}, {document['title']}"),
        ("input", f"{model['image_size']} px, {model['num_classes']} classes"),
    ]
    if document["parameters"] is not None:
        cost = f"{document['parameters']:,} parameters, {document['multiply_adds']:,} multiply-adds per image"
        pairs.append(("cost", cost))
    return pairs


def _bundle_pairs(document: dict[str, Any]) -> list[tuple[str, str]]:
    origin = document["origin"]
    source = RANDOM_WEIGHTS if document["random_weights"] else f"{origin.get('path')}, sha256 {origin.get('sha256')}"
    verification = document["verification"] or {}
    preprocessing = document["preprocessing"]
    pairs = [
        ("weights of", source),
        ("verified", str(verification.get("verdict", "no"))),
        ("mean, std", f"{_numbers(preprocessing['mean'])}; {_numbers(preprocessing['std'])}"),
        ("created", f"{document['created']} by evit-deploy {document['tool_version']}"),
    ]
    pairs += [
        (name, f"{format_bytes(file['size_bytes'])}, sha256 {file['sha256']}")
        for name, file in sorted(document["files"].items())
    ]
    if document["engines"]:
        pairs.append(("engines", ", ".join(document["engines"])))
    return pairs


def _onnx_pairs(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "operators" not in facts:
        return []
    pairs = [("opset", ", ".join(f"{domain} {version}" for domain, version in facts["opset"].items()))]
    pairs += [("graph input", _value(value)) for value in facts["inputs"]]
    pairs += [("graph output", _value(value)) for value in facts["outputs"]]
    pairs.append(("precision", ", ".join(facts["precision"]) or "no floating-point weights"))
    pairs.append(("nodes", str(facts["nodes"])))
    for domain, counts in facts["operators"].items():
        pairs.append((f"  {domain}", _counts(counts)))
    return pairs


def _value(value: dict[str, Any]) -> str:
    shape = (
        "of unknown rank" if value["shape"] is None else "[" + ", ".join(str(d or "?") for d in value["shape"]) + "]"
    )
    return f"{value['name']} {value['dtype']} {shape}"


def _counts(counts: dict[str, int]) -> str:
    """The most frequent first, and how many kinds more there are."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {count}" for name, count in ordered[:MAX_LISTED_OPERATORS])
    more = len(ordered) - MAX_LISTED_OPERATORS
    return f"{listed}, {more} kinds more" if more > 0 else listed


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
