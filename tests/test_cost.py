from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from evit_deploy.cost import COSTS_FILE, Cost, costs_text, count_cost, published_costs
from evit_deploy.models import build_model
from evit_deploy.specs import ModelSpec, variant_names
from tests.tiny_bundle import TINY_SPEC


def test_shipped_table_is_what_is_counted() -> None:
    assert COSTS_FILE.read_text() == costs_text(), "run `python -m evit_deploy.cost --write`"
    assert tuple(published_costs()) == variant_names()


# Published by the authors: multiply-adds in units of 1e9 and parameters in units of 1e6, as their tables round them.
# Source: the model tables of mit-han-lab/efficientvit (B, L) and of microsoft/Cream EfficientViT (M).
@pytest.mark.parametrize(
    ("name", "multiply_adds_g", "parameters_m"),
    [
        ("mit-b1", 0.52, 9.1),
        ("mit-b2", 1.6, 24),
        ("mit-b3", 4.0, 49),
        ("mit-l1", 5.3, 53),
        ("mit-l2", 6.9, 64),
        ("msra-m0", 0.079, 2.3),
        ("msra-m1", 0.167, 3.0),
        ("msra-m2", 0.201, 4.2),
        ("msra-m3", 0.263, 6.9),
        ("msra-m4", 0.299, 8.8),
        ("msra-m5", 0.522, 12.4),
    ],
)
def test_published_numbers(name: str, multiply_adds_g: float, parameters_m: float) -> None:
    cost = published_costs()[name]
    assert cost.multiply_adds / 1e9 == pytest.approx(multiply_adds_g, rel=0.03)
    assert cost.parameters / 1e6 == pytest.approx(parameters_m, rel=0.03)


def msa_multiply_adds(spec: ModelSpec) -> int:
    """The cost of an `msa` model from its definition, layer by layer."""
    channels = spec.config["channels"]
    side = spec.image_size // 2
    total = side**2 * channels[0] // 2 * 3 * 9
    side //= 2
    total += side**2 * channels[0] * channels[0] // 2 * 9
    previous = None
    for stage, (dim, depth) in enumerate(zip(channels, spec.config["depths"], strict=True)):
        if previous is not None:
            side = -(-side // (2 if stage <= 3 else 1))
            total += side**2 * dim * previous * 9
        tokens, pooled = side**2, (-(-side // 2)) ** 2
        local = tokens * (4 * dim * dim + 4 * dim * 9 + 4 * dim * dim)
        feed_forward = tokens * (2 * dim * dim + 2 * dim * 9 + 2 * dim * dim)
        projections = tokens * dim * (3 * dim + 3 * dim + dim) + pooled * dim * 2 * dim + tokens * 3 * dim * dim
        attention = 2 * tokens * pooled * dim
        for window in (3, 7):
            padded = (-(-side // window) * window) ** 2
            attention += 2 * padded * window**2 * dim
        total += depth * (local + feed_forward + projections + attention)
        previous = dim
    return total + channels[-1] * spec.num_classes


@pytest.mark.parametrize("spec", [TINY_SPEC, ModelSpec.published("msa-m1"), ModelSpec.published("msa-m3")])
def test_msa_is_counted_as_defined(spec: ModelSpec) -> None:
    assert count_cost(spec).multiply_adds == msa_multiply_adds(spec)


def test_parameters_are_those_of_the_module() -> None:
    module = build_model(TINY_SPEC)
    assert count_cost(TINY_SPEC).parameters == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["mit-b0", "msra-m0"])
def test_image_size_and_classes_count(name: str) -> None:
    small = count_cost(ModelSpec.published(name, num_classes=10, image_size=224))
    large = count_cost(ModelSpec.published(name, num_classes=10, image_size=448))
    assert 3.5 < large.multiply_adds / small.multiply_adds < 4.5
    assert small.parameters < published_costs()[name].parameters


def test_table_needs_no_torch() -> None:
    code = (
        "import sys; from evit_deploy.cost import published_costs; published_costs(); sys.exit('torch' in sys.modules)"
    )
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    done = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0


def test_table_is_a_document() -> None:
    document = json.loads(COSTS_FILE.read_text())
    assert (document["schema"], document["schema_version"]) == ("evit-deploy/model-costs", 1)
    assert all(row["image_size"] == 224 and row["num_classes"] == 1000 for row in document["rows"])
    assert isinstance(published_costs()["msa-m3"], Cost)
