"""The families table: parameters and multiply-adds as counted here, beside what the design document says."""

from __future__ import annotations

from evit_deploy.cost import published_costs
from evit_deploy.specs import variant_names

# The design document's table of its own M1..M5 (section 4.1): parameters in millions, "FLOPs" in billions.
DOCUMENT = {
    "msa-m1": (3.9, 0.4),
    "msa-m2": (7.3, 0.9),
    "msa-m3": (13.7, 2.0),
    "msa-m4": (24.2, 3.9),
    "msa-m5": (43.0, 8.0),
}


def families_table() -> str:
    """Markdown, one row per published model, at 224 px and 1000 classes."""
    lines = [
        "| model | parameters, M | document | multiply-adds, G | document's FLOPs, G |",
        "|---|---|---|---|---|",
    ]
    costs = published_costs()
    for name in variant_names():
        cost = costs[name]
        parameters, flops = DOCUMENT.get(name, ("-", "-"))
        lines.append(
            f"| `{name}` | {cost.parameters / 1e6:.2f} | {parameters} | {cost.multiply_adds / 1e9:.2f} | {flops} |"
        )
    return "\n".join(lines)
