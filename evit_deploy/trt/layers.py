"""The layers and precisions of a built engine, as TensorRT's inspector gives them; or why there are none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NO_GPU_NOTE = "not readable without a GPU"


def engine_layers(trt: Any, plan: bytes, logger: Any, *, has_gpu: bool) -> tuple[list[dict[str, Any]] | None, str]:
    """Name, type and precision of each layer of an engine.

    Args:
        trt: the bindings.
        plan: the engine; plugins that it needs must be registered.
        logger: for the runtime.
        has_gpu: without one nothing is tried.

    Returns:
        The layers and "", or None and the reason.
    """
    if not has_gpu:
        return None, NO_GPU_NOTE
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return None, "not readable: TensorRT did not load the engine here"
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return layers_from_inspector(text), ""
    except (ValueError, TypeError, AttributeError) as error:
        return None, f"not readable: the inspector's answer has another form than known ({type(error).__name__})"


def layers_from_inspector(text: str) -> list[dict[str, Any]]:
    """The layers in the inspector's JSON, whose form differs between versions.

    Args:
        text: {"Layers": [{"Name", "LayerType", "Inputs": [{"Format/Datatype": ...}], ...}, ...]} with detailed
            profiling, {"Layers": ["NAME", ...]} without.

    Raises:
        ValueError: it is no such JSON.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or not isinstance(document.get("Layers"), list):
        raise ValueError("no list of layers")
    return [_layer(entry) for entry in document["Layers"]]


def count_plugins(layers: list[dict[str, Any]]) -> int:
    """How many of an engine's layers are plugins."""
    return sum("plugin" in (layer["type"] or "").lower() for layer in layers)


def _layer(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"name": entry, "type": None, "precision": None}
    kind = entry.get("LayerType") or entry.get("ParameterType")
    return {"name": str(entry["Name"]), "type": None if kind is None else str(kind), "precision": _precision(entry)}


def _precision(entry: Mapping[str, Any]) -> str | None:
    """What a layer's outputs are made of, "Half" or "Float" for example, as the inspector says it."""
    for tensor in (*entry.get("Outputs", ()), *entry.get("Inputs", ())):
        for field in ("Format/Datatype", "Datatype", "DataType"):
            if tensor.get(field):
                return str(tensor[field])
    return None
