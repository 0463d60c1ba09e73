"""`evit-deploy inspect`: what a checkpoint, an ONNX file, a bundle or an engine is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from evit_deploy.cli.options import JsonFlag
from evit_deploy.cli.output import NOTHING, emit, emit_json, format_bytes, format_pairs, format_table
from evit_deploy.cli.progress import working

MAX_LISTED_OPERATORS = 8
RANDOM_WEIGHTS = "RANDOM WEIGHTS"


def command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, an ONNX file, a bundle or an engine.")],
    as_json: JsonFlag = False,
) -> None:
    """Say what a file, bundle or engine is."""
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
    if document["kind"] == "engine":
        return _engine_text(document, pairs)
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
        *_calibration_pairs(document["calibration"]),
        ("mean, std", f"{_numbers(preprocessing['mean'])}; {_numbers(preprocessing['std'])}"),
        ("created", f"{document['created']} by evit-deploy {document['tool_version']}"),
    ]
    pairs += [
        (name, f"{format_bytes(file['size_bytes'])}, sha256 {file['sha256']}")
        for name, file in sorted(document["files"].items())
    ]
    pairs += [("engine", _engine_line(engine)) for engine in document["engines"]]
    return pairs


def _calibration_pairs(calibration: dict[str, Any] | None) -> list[tuple[str, str]]:
    if calibration is None:
        return []
    facts = (
        f"{calibration['images']} images of {calibration['source']}",
        calibration["method"],
        f"{calibration['quantized']} layers in int8",
        f"{len(calibration['excluded'])} left in FP32",
    )
    return [("calibrated", ", ".join(facts))]


def _engine_line(engine: dict[str, Any]) -> str:
    if engine["problem"] is not None:
        return f"{engine['name']}: unusable, {engine['problem']}"
    facts = (
        f"{engine['flavor']} {engine['tensorrt_version']}",
        engine["precision"],
        f"batch {_profiles(engine)}",
        _targets(engine),
        _plugin(engine["plugin"]),
        format_bytes(engine["size_bytes"]),
    )
    return f"{engine['name']}: {', '.join(facts)}"


def _engine_text(document: dict[str, Any], pairs: list[tuple[str, str]]) -> str:
    plugin, model = document["plugin"], document["model"]
    pairs += [
        ("name", document["name"]),
        ("model", f"{model['family']}-{model['variant']}, {model['image_size']} px, {model['num_classes']} classes"),
        ("built with", f"TensorRT, flavor {document['flavor']}, {document['tensorrt_version']}"),
        ("precision", document["precision"]),
        ("batch", f"{_profiles(document)} (smallest:tuned:largest)"),
        ("for", _targets(document)),
        ("plugin", _plugin(plugin)),
        ("attention", document["attention"]),
    ]
    pairs += [(tensor["mode"], _value(tensor)) for tensor in document["io"]]
    peak = document["peak_memory_bytes"]
    cost = f"{document['build_seconds']:.1f} s" + (f", {format_bytes(peak)} of memory" if peak is not None else "")
    pairs += [
        ("built", f"{document['created']} by evit-deploy {document['tool_version']}, {cost}"),
        ("size", format_bytes(document["size_bytes"])),
        ("sha256", document["engine_sha256"]),
        ("of model.onnx", document["onnx_sha256"]),
        ("key", document["key"]),
        ("runs here", "it can be tried" if document["runs_here"] else f"no, {document['why_not_here']}"),
    ]
    pairs += [("warning", warning) for warning in document["warnings"]]
    layers = document["layers"]
    if layers is None:
        pairs.append(("layers", document["layers_note"]))
        return format_pairs(pairs)
    pairs.append(("layers", str(len(layers))))
    rows = [(layer["name"], layer["type"] or NOTHING, layer["precision"] or NOTHING) for layer in layers]
    return f"{format_pairs(pairs)}\n\n{format_table(('layer', 'type', 'precision'), rows)}"


def _profiles(engine: dict[str, Any]) -> str:
    return ", ".join(f"{p['min']}:{p['opt']}:{p['max']}" for p in engine["profiles"])


def _targets(engine: dict[str, Any]) -> str:
    words = [", ".join(engine["targets"]), engine["targets_note"], engine["gpu"] or ""]
    return "; ".join(word for word in words if word)


def _plugin(plugin: dict[str, Any]) -> str:
    if not plugin["used"]:
        return f"no plugin ({plugin['reason']})" if plugin["reason"] else "no plugin"
    where = "inside the engine" if plugin["form"] == "aot" else "registered where it runs"
    return f"{plugin['layers']} plugin layers, {where}"


def _onnx_pairs(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "operators" not in facts:
        return []
    pairs = [("opset", ", ".join(f"{domain} {version}" for domain, version in facts["opset"].items()))]
    pairs += [("graph input", _value(value)) for value in facts["inputs"]]
    pairs += [("graph output", _value(value)) for value in facts["outputs"]]
    pairs.append(("precision", ", ".join(facts["precision"]) or "no weights"))
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
