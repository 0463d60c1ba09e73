"""Small models of every family whose values were pushed beyond FP16's range in known places, and bundles of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.checkpoint.load import SPEC_METADATA_KEY
from evit_deploy.headroom.rows import TensorRow
from evit_deploy.headroom.watch import Watch
from evit_deploy.models import load_model
from evit_deploy.models.fused import fused_model
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.specs import ModelSpec
from tests.checkpoints import images
from tests.small_exports import SPECS
from tests.tiny_bundle import onnx_bytes, tiny_manifest

FAR = 2.0**16  # values of order one come to lie beyond 65504
StateDict = dict[str, Tensor]

# Where a pair of scales goes that leaves the function as it is and makes what lies between them too large: the block,
# tensors to multiply, tensors to divide. `msa`: between two linear layers; `msra`: with a ReLU between them; `mit`: the
# values of an attention, which it is linear in.
PLANTED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "msa": ("stages.1.blocks.0", ("ffn.expand.weight", "ffn.expand.bias"), ("ffn.depthwise.weight",)),
    "mit": ("stages.3.blocks.1", ("context_module.main.qkv.conv.weight",), ("context_module.main.proj.conv.weight",)),
    "msra": ("stages.2.blocks.0", ("ffn0.m.pw1.bn.weight", "ffn0.m.pw1.bn.bias"), ("ffn0.m.pw2.conv.weight",)),
}


@cache
def weights_of(name: str, seed: int = 0) -> StateDict:
    """Random weights, made once; copy before changing."""
    return random_state_dict(SPECS[name], seed)


def scaled(state_dict: Mapping[str, Tensor], factors: Mapping[str, float | Tensor]) -> StateDict:
    """A copy with some tensors multiplied."""
    assert factors.keys() <= state_dict.keys(), sorted(factors.keys() - state_dict.keys())
    return {name: value * factors[name] if name in factors else value for name, value in state_dict.items()}


def planted(name: str, factor: float = FAR) -> tuple[str, StateDict]:
    """The block, and weights that give nearly the same logits with values too large for FP16 in it."""
    block, larger, smaller = PLANTED[name]
    factors: dict[str, float | Tensor] = {f"{block}.{key}": factor for key in larger}
    factors |= {f"{block}.{key}": 1 / factor for key in smaller}
    state_dict = weights_of(name)
    if name == "mit":  # of the channels of a head, the last third are its values
        key = f"{block}.{larger[0]}"
        dim = SPECS[name].config["head_dim"]
        value = torch.arange(len(state_dict[key])) % (3 * dim) >= 2 * dim
        factors[key] = torch.where(value, factor, 1.0)[:, None, None, None]
    return block, scaled(state_dict, factors)


def fused_of(spec: ModelSpec, state_dict: Mapping[str, Tensor]) -> torch.nn.Module:
    return fused_model(load_model(spec, state_dict), spec)


def measured(model: torch.nn.Module, batch: Tensor) -> dict[tuple[str, str], TensorRow]:
    """Rows by block and tensor, from one batch."""
    watch = Watch(model)
    watch.measure(batch, [f"image {i}" for i in range(len(batch))])
    return {(row.block, row.tensor): row for row in watch.rows()}


def write_bundle(
    target: Path,
    name: str,
    state_dict: Mapping[str, Tensor],
    *,
    spec: ModelSpec | None = None,
    random_weights: bool = False,
) -> Bundle:
    """A bundle with these weights; its graph is none, nobody looks at it."""
    manifest = tiny_manifest(model=(spec or SPECS[name]).to_json(), origin={"random_weights": random_weights})
    with BundleWriter(target) as writer:
        (writer.path / "model.onnx").write_bytes(onnx_bytes(0))
        tensors = {key: value.contiguous() for key, value in state_dict.items()}
        save_file(tensors, writer.path / "weights.safetensors", {SPEC_METADATA_KEY: json.dumps(manifest["model"])})
        return writer.commit(manifest)


def write_images(path: Path, name: str, count: int = 6, seed: int = 7) -> Path:
    """float32 [count, 3, S, S] as a .npy file."""
    np.save(path, images(SPECS[name].image_size, count, seed).numpy())
    return path
