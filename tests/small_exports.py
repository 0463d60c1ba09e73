"""Models of every family that export in two seconds, and their graphs, each made once per run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from evit_deploy.models import load_model
from evit_deploy.models.fused import fused_model
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.onnx.export import export_graph
from evit_deploy.onnx.simplify import Simplification, simplify_graph
from evit_deploy.specs import ModelSpec, Preprocessing, variant_config
from tests.checkpoints import images

MAX_BATCH = 5
BATCHES = (1, 3, MAX_BATCH)

SPECS = {
    "msa": ModelSpec(
        "msa",
        "custom",
        6,
        40,
        {"channels": (8, 36), "depths": (1, 1), "num_heads": 2, "pos_embed_size": (10, 10)},
    ),
    "mit": ModelSpec(
        "mit",
        "custom",
        6,
        80,
        {
            **variant_config("mit", "b0"),
            "widths": (8, 8, 16, 32, 32),
            "depths": (1, 1, 1, 1, 1),
            "head_widths": (32, 64),
        },
    ),
    "msra": ModelSpec(
        "msra",
        "custom",
        6,
        64,
        {
            **variant_config("msra", "m0"),
            "embed_dim": (32, 32, 48),
            "depth": (1, 1, 2),
            "num_heads": (2, 1, 3),
            "window_size": (3, 3, 3),
        },
    ),
    # stem of 11x11, position embedding of 8x8
    "msa-resized": ModelSpec(
        "msa", "custom", 6, 44, {"channels": (8,), "depths": (1,), "num_heads": 2, "pos_embed_size": (8, 8)}
    ),
    # maps of 10x10 and 5x5 at head dim 32: above it and below it, where timm's LiteMLA is always linear
    "mit-quadratic": ModelSpec(
        "mit",
        "custom",
        6,
        160,
        {**variant_config("mit", "b2"), "depths": (1, 1, 1, 1, 1), "head_widths": (32, 64)},
    ),
}
FAMILIES = ("msa", "mit", "msra")
ATTENTION = {
    "msa": ["EvitProjectedMultiScaleAttention", "EvitMultiScaleAttention"],
    "msa-resized": ["EvitProjectedMultiScaleAttention"],
    "mit": ["EvitLiteMLA"] * 2,
    "mit-quadratic": ["EvitLiteMLA"] * 2,
    "msra": ["EvitCascadedAttention2", "EvitCascadedAttention1"] + ["EvitCascadedAttention3"] * 2,
}


@cache
def reference(name: str) -> nn.Module:
    """The reference module of a spec with random weights; do not change it."""
    spec = SPECS[name]
    return load_model(spec, random_state_dict(spec, 0))


def large_image_mit(side: int) -> tuple[ModelSpec, nn.Module, np.ndarray]:
    """A fused `mit` whose sums over the tokens of a large image leave FP16, and one: float32 [1, 3, side, side]."""
    spec = replace(SPECS["mit"], image_size=side)
    state = random_state_dict(spec, 0)
    for name, weight in state.items():
        if name.endswith("main.qkv.conv.weight"):
            weight *= 12
    image = np.random.default_rng(side).standard_normal((1, 3, side, side)).astype(np.float32)
    return spec, fused_model(load_model(spec, state), spec), image


@cache
def exported(
    name: str,
    *,
    opset: int = 20,
    batch: int | None = None,
    max_batch: int = MAX_BATCH,
    preprocessing: Preprocessing | None = None,
    softmax: bool = False,
) -> onnx.ModelProto:
    """The graph of a spec; copy before changing."""
    return export_graph(
        fused_model(reference(name), SPECS[name]),
        SPECS[name],
        opset=opset,
        batch=batch,
        max_batch=max_batch,
        preprocessing=preprocessing,
        softmax=softmax,
        metadata={"one": "1", "two": "zwei"},
    )


@cache
def simplified(name: str) -> tuple[onnx.ModelProto, Simplification]:
    """The simplified graph of a spec; copy before changing."""
    return simplify_graph(exported(name), (1, 3))


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, array: np.ndarray) -> np.ndarray:
    """The first output for an array at the input."""
    result: np.ndarray = session_of(model).run(None, {model.graph.input[0].name: array})[0]
    return result


def input_array(name: str, count: int) -> np.ndarray:
    """float32 [count, 3, S, S]"""
    array: np.ndarray = images(SPECS[name].image_size, count).numpy()
    return array


def expected(name: str, array: np.ndarray) -> np.ndarray:
    """The reference's logits."""
    with torch.no_grad():
        logits: np.ndarray = reference(name)(torch.from_numpy(array)).numpy()
    return logits


def error(candidate: np.ndarray, reference: np.ndarray) -> float:
    """The largest row's RMS-relative error; infinite where the shapes differ."""
    if candidate.shape != reference.shape:
        return float("inf")
    difference = (candidate.astype(np.float64) - reference).reshape(len(reference), -1)
    scale = np.sqrt(np.mean(np.square(reference.astype(np.float64)).reshape(len(reference), -1), axis=1))
    return float(np.max(np.sqrt(np.mean(difference**2, axis=1)) / scale))


def changed(model: onnx.ModelProto, initializer: str, change: Any) -> onnx.ModelProto:
    """A copy with `change` applied to one initializer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (tensor,) = [tensor for tensor in copy.graph.initializer if tensor.name == initializer]
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), initializer))
    return copy
