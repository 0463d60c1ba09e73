"""The rows of the result `kernel-floors`: each distinct attention call counted, with its layer and its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evit_kernels.registry import OPERATORS

from benchmarks.attention_layers import AttentionLayer, attention_layers, definition_operations
from benchmarks.deeper_fusion import bytes_per_head_launches, deeper_fusions
from benchmarks.operations import COPIES, POINTWISE, PRODUCTS, total_bytes
from benchmarks.result import SECONDS, Row

QUANTITY = "floor on an H200 (calculated)"


def floor_rows(
    models: Sequence[str],
    batches: Sequence[int],
    image_size: int,
    bandwidth: float,
    matrix_flops_per_s: float,
    exponentials_per_s: float,
) -> list[Row]:
    """A row per distinct size and batch.

    Args:
        models: FAMILY-VARIANT names.
        batches: images in a batch.
        image_size: pixels of the square input.
        bandwidth, matrix_flops_per_s, exponentials_per_s: the ceilings.
    """
    ceilings = (bandwidth, matrix_flops_per_s, exponentials_per_s)
    return [row for layer in attention_layers(models, batches, image_size) for row in _rows(layer, batches, ceilings)]


def _rows(layer: AttentionLayer, batches: Sequence[int], ceilings: tuple[float, float, float]) -> list[Row]:
    sizes = _sizes(layer)
    values = ", ".join(f"{name} {value}" for name, value in sizes.items())
    subject = f"{layer.operator}: {values} ({next(iter(layer.models))})"
    rows = []
    for batch in batches:
        work = OPERATORS[layer.operator].work_of(*layer.calls[batch].arguments)
        floor = work.floor_s(*ceilings)
        details: dict[str, Any] = {
            "operator": layer.operator,
            "models": layer.models,
            "sizes": sizes,
            "bound": floor.bound,
            "read_bytes": work.read_bytes,
            "written_bytes": work.written_bytes,
            "matrix_flops": work.matrix_flops,
            "exponentials": work.exponentials,
            "other_flops": work.other_flops,
            "flops_per_byte": work.flops_per_byte,
            "definition": _definition(layer, batch),
        }
        if layer.operator == "cascaded_attention":
            details["launch_per_head"] = {"bytes": bytes_per_head_launches(layer, batch), "launches": sizes["heads"]}
        if batch == batches[0]:
            details |= _layer(layer, *ceilings[:2])
        rows.append(Row(subject, QUANTITY, SECONDS, floor.seconds, batch, details=details))
    return rows


def _definition(layer: AttentionLayer, batch: int) -> dict[str, int]:
    operations = definition_operations(layer.calls[batch])
    by_kind = {
        f"{kind}_bytes": sum(operation.bytes for operation in operations if operation.kind == kind)
        for kind in (COPIES, PRODUCTS, POINTWISE)
    }
    return {"bytes": total_bytes(operations), "launches": len(operations), **by_kind}


def _layer(layer: AttentionLayer, bandwidth: float, matrix_flops_per_s: float) -> dict[str, Any]:
    """What does not depend on the batch: the layer around the call, for one image."""
    (attention,) = (operation for operation in layer.operations if operation.name == layer.operator)
    return {
        "parameter_bytes": attention.parameter_bytes,
        "programs_per_image": layer.calls[1].launch.programs_per_image,
        "layer": {"bytes": total_bytes(layer.operations), "launches": len(layer.operations)},
        "deeper": [
            {
                "name": fusion.name,
                "saved_bytes": fusion.saved_bytes,
                "reread_bytes": fusion.reread_bytes,
                "extra_flops": fusion.extra_flops,
                "held_bytes": fusion.held_bytes,
                "pays": fusion.pays(bandwidth, matrix_flops_per_s),
            }
            for fusion in deeper_fusions(layer)
        ],
    }


def _sizes(layer: AttentionLayer) -> dict[str, int]:
    if layer.operator in ("multi_scale_attention", "projected_multi_scale_attention"):
        tokens = layer.shapes[2 if layer.operator == "multi_scale_attention" else 0]
        (_, height, width, channels), heads = tokens, layer.shapes[4]
        return {"height": height, "width": width, "heads": heads, "dim": channels // heads}
    if layer.operator == "lite_mla":
        (_, channels, height, width), (_, aggregated_channels, _, _), dim, _ = layer.shapes
        heads = (channels + aggregated_channels) // (3 * dim)
        return {"height": height, "width": width, "heads": heads, "dim": dim}
    (_, channels, height, width), (heads, key_dim, kernel, _) = layer.shapes[0], layer.shapes[3]
    return {
        "height": height,
        "width": width,
        "heads": heads,
        "dim": channels // heads,
        "key_dim": key_dim,
        "kernel": kernel,
        "window": layer.shapes[-1],
    }
