"""What a model costs, counted: parameters, and multiply-adds of one forward pass at batch 1.

Counted on PyTorch's meta device, so that no memory is filled and nothing is computed: every convolution and matrix
product that the reference module runs, attention included, padded tokens of windows included. Additions of biases,
norms, activations and softmax are not counted, as usual.

The published models' costs are shipped as `data/model_costs.json`, so that a list of them needs no PyTorch.
`python -m evit_deploy.cost --write` makes the file again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evit_deploy.specs import ModelSpec, variant_names

COSTS_FILE = Path(__file__).parent / "data" / "model_costs.json"
COSTS_SCHEMA = "evit-deploy/model-costs"
COSTS_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Cost:
    """Parameters (trained numbers; no buffers) and multiply-adds of one image."""

    parameters: int
    multiply_adds: int


def count_cost(spec: ModelSpec) -> Cost:
    """Count a model's parameters and multiply-adds, without allocating it.

    Raises:
        MissingDependencyError: the family's module cannot be built here.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from evit_deploy.models import build_model

    # On the meta device PyTorch takes attention apart into matrix products; its CPU operator would not be counted.
    with torch.device("meta"), torch.no_grad():
        model = build_model(spec).eval()
        image = torch.empty(1, *spec.input_shape)
        with FlopCounterMode(display=False) as counter:
            model(image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)


def published_costs() -> dict[str, Cost]:
    """The shipped table: FAMILY-VARIANT to its cost at 224 px and 1000 classes."""
    document = json.loads(COSTS_FILE.read_text(encoding="utf-8"))
    return {row["name"]: Cost(row["parameters"], row["multiply_adds"]) for row in document["rows"]}


def cost_rows() -> list[dict[str, Any]]:
    """The rows of the shipped table, counted now."""
    rows = []
    for name in variant_names():
        spec = ModelSpec.published(name)
        cost = count_cost(spec)
        rows.append(
            {
                "name": name,
                "image_size": spec.image_size,
                "num_classes": spec.num_classes,
                "parameters": cost.parameters,
                "multiply_adds": cost.multiply_adds,
            }
        )
    return rows


def costs_text() -> str:
    """The content of `data/model_costs.json`, counted now."""
    document = {"schema": COSTS_SCHEMA, "schema_version": COSTS_SCHEMA_VERSION, "rows": cost_rows()}
    return json.dumps(document, indent=2) + "\n"


def main(arguments: list[str]) -> int:
    """Write the table to stdout, or with --write to its file."""
    if arguments not in ([], ["--write"]):
        sys.stderr.write("usage: python -m evit_deploy.cost [--write]\n")
        return 2
    text = costs_text()
    if arguments:
        COSTS_FILE.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
