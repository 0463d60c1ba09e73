"""The fused operators a second time, in NumPy float64, one window, head and token at a time; and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evit_deploy.models.timm_import import import_timm

Array = np.ndarray
Arguments = dict[str, Any]


def attend(queries: Array, keys: Array, values: Array) -> Array:
    """softmax(q k^T / sqrt(d)) v for queries [N, d], keys [M, d] and values [M, d], one query after the other."""
    out = np.empty((len(queries), values.shape[1]))
    for i, query in enumerate(queries):
        scores = np.array([query @ key for key in keys]) / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        out[i] = sum(weight * value for weight, value in zip(weights / weights.sum(), values, strict=True))
    return out


def window_attention(qkv: Array, heads: int, window: int) -> Array:
    """[H, W, 3C] to [H, W, C]: every window that begins on the map, with the tokens that lie on the map only."""
    height, width, channels3 = qkv.shape
    channels = channels3 // 3
    dim = channels // heads
    out = np.full((height, width, channels), np.nan)
    for top in range(0, height, window):
        for left in range(0, width, window):
            tokens = qkv[top : top + window, left : left + window]
            flat = tokens.reshape(-1, channels3)
            for head in range(heads):
                q, k, v = (flat[:, part * channels + head * dim :][:, :dim] for part in range(3))
                result = attend(q, k, v).reshape(*tokens.shape[:2], dim)
                out[top : top + window, left : left + window, head * dim : (head + 1) * dim] = result
    return out


def multi_scale_attention(
    qkv_small: Tensor, qkv_medium: Tensor, q_large: Tensor, kv_large: Tensor, heads: int
) -> Tensor:
    """[B, H*W, 3C]"""
    small, medium, queries, keys_values = (x.double().numpy() for x in (qkv_small, qkv_medium, q_large, kv_large))
    batch, height, width, channels = queries.shape
    dim = channels // heads
    out = np.full((batch, height * width, 3 * channels), np.nan)
    for b in range(batch):
        out[b, :, :channels] = window_attention(small[b], heads, 3).reshape(-1, channels)
        out[b, :, channels : 2 * channels] = window_attention(medium[b], heads, 7).reshape(-1, channels)
        for head in range(heads):
            here = slice(head * dim, (head + 1) * dim)
            q = queries[b].reshape(-1, channels)[:, here]
            k, v = (keys_values[b, ..., part * channels : (part + 1) * channels] for part in range(2))
            k, v = k.reshape(-1, channels)[:, here], v.reshape(-1, channels)[:, here]
            out[b, :, 2 * channels :][:, here] = attend(q, k, v)
    return torch.from_numpy(out)


def projected_multi_scale_attention(x: Tensor, kv_large: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """[B, H*W, 3C]; every output of a projection is one row of the weight times the tokens."""
    channels = x.shape[-1]
    tokens, rows = x.double().numpy(), zip(weight.double().numpy(), bias.double().numpy(), strict=True)
    maps = torch.from_numpy(np.stack([tokens @ row + constant for row, constant in rows], axis=-1))
    small, medium, queries = maps.split((3 * channels, 3 * channels, channels), dim=-1)
    return multi_scale_attention(small, medium, queries, kv_large, heads)


def lite_mla(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    """[B, h*d, H, W]; timm's `LiteMLA._attn`: the values get a column of ones, whose result is the denominator."""
    packed = np.concatenate([qkv.double().numpy(), aggregated.double().numpy()], axis=1)
    batch, channels3, height, width = packed.shape
    out = np.full((batch, channels3 // 3, height, width), np.nan)
    for b in range(batch):
        for head in range(channels3 // (3 * dim)):
            tokens = packed[b, head * 3 * dim : (head + 1) * 3 * dim].reshape(3 * dim, -1).T
            q, k = np.maximum(tokens[:, :dim], 0), np.maximum(tokens[:, dim : 2 * dim], 0)
            v = np.concatenate([tokens[:, 2 * dim :], np.ones((len(tokens), 1))], axis=1)
            kv = sum(np.outer(key, value) for key, value in zip(k, v, strict=True))
            rows = np.stack([query @ kv for query in q])
            result = rows[:, :-1] / (rows[:, -1:] + eps)
            out[b, head * dim : (head + 1) * dim] = result.T.reshape(dim, height, width)
    return torch.from_numpy(out)


def cascaded_module(
    heads: int, key_dim: int, head_channels: int, window: int, kernels: tuple[int, ...], seed: int
) -> nn.Module:
    """timm's `LocalWindowAttention` in float64 with every tensor drawn; of its closing projection, the ReLU is left."""
    msra = import_timm("timm.models.efficientvit_msra")
    module: nn.Module = msra.LocalWindowAttention(
        heads * head_channels,
        key_dim,
        heads,
        attn_ratio=head_channels / key_dim,
        resolution=window,
        window_resolution=window,
        kernels=kernels,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(1 + 0.2 * noise.abs() if name.endswith("running_var") else 0.6 * noise)
    module.attn.proj = nn.ReLU()  # type: ignore[union-attr]
    return module.double().eval()


def cascaded_arguments(module: Any, x: Tensor) -> Arguments:
    """What `cascaded_attention` takes for that module: batch normalisation folded, kernels padded to the widest."""
    attention = module.attn
    heads, widest = attention.num_heads, max(head.conv.kernel_size[0] for head in attention.dws)
    folded: dict[str, list[Tensor]] = {"qkv_weight": [], "qkv_bias": [], "query_weight": [], "query_bias": []}
    for name, convolutions in (("qkv", attention.qkvs), ("query", attention.dws)):
        for pair in convolutions:
            norm = pair.bn
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            folded[f"{name}_weight"].append(pair.conv.weight * scale.view(-1, 1, 1, 1))
            folded[f"{name}_bias"].append(norm.bias - norm.running_mean * scale)
    query = torch.zeros(heads, attention.key_dim, widest, widest, dtype=torch.float64)
    for i, kernel in enumerate(folded.pop("query_weight")):
        margin = (widest - kernel.shape[-1]) // 2
        query[i, :, margin : widest - margin, margin : widest - margin] = kernel[:, 0]
    stacked = {name: torch.stack(values) for name, values in folded.items()}
    side = attention.resolution
    bias = torch.empty(heads, side**2, side**2, dtype=torch.float64)
    for i in range(side**2):
        for j in range(side**2):
            rows, columns = abs(i // side - j // side), abs(i % side - j % side)
            bias[:, i, j] = attention.attention_biases[:, rows * side + columns]
    return {
        "x": x,
        "qkv_weight": stacked["qkv_weight"][..., 0, 0],
        "qkv_bias": stacked["qkv_bias"],
        "query_weight": query,
        "query_bias": stacked["query_bias"],
        "attention_bias": bias,
        "window": side,
    }


def draw(*shape: int, seed: int, gain: float = 1.0) -> Tensor:
    """Normal float64 numbers."""
    return gain * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def multi_scale_arguments(batch: int, height: int, width: int, heads: int, dim: int, seed: int = 0) -> Arguments:
    channels = heads * dim
    return {
        "qkv_small": draw(batch, height, width, 3 * channels, seed=seed, gain=1.5),
        "qkv_medium": draw(batch, height, width, 3 * channels, seed=seed + 1, gain=1.5),
        "q_large": draw(batch, height, width, channels, seed=seed + 2, gain=1.5),
        "kv_large": draw(batch, -(-height // 2), -(-width // 2), 2 * channels, seed=seed + 3, gain=1.5),
        "heads": heads,
    }


def projected_multi_scale_arguments(
    batch: int, height: int, width: int, heads: int, dim: int, seed: int = 0
) -> Arguments:
    """Tokens and weights whose projections are about as large as those of `multi_scale_arguments`."""
    channels = heads * dim
    return {
        "x": draw(batch, height, width, channels, seed=seed),
        "kv_large": draw(batch, -(-height // 2), -(-width // 2), 2 * channels, seed=seed + 3, gain=1.5),
        "weight": draw(7 * channels, channels, seed=seed + 1, gain=1.4 * channels**-0.5),
        "bias": draw(7 * channels, seed=seed + 2, gain=0.5),
        "heads": heads,
    }


def lite_mla_arguments(
    batch: int, height: int, width: int, heads: int, dim: int, eps: float = 1e-5, seed: int = 0
) -> Arguments:
    """Two maps of together `heads` heads; of an odd number, the first map has the one more."""
    qkv = draw(batch, heads * 3 * dim, height, width, seed=seed)
    if height * width == 1:
        qkv = qkv.abs()  # one token whose query or key is zero after ReLU would leave nothing to compare
    first = (heads + 1) // 2 * 3 * dim
    return {
        "qkv": qkv[:, :first].contiguous(),
        "aggregated": qkv[:, first:].contiguous(),
        "dim": dim,
        "eps": eps,
    }


def cascaded_case(
    batch: int,
    height: int,
    width: int,
    heads: int,
    key_dim: int,
    head_channels: int,
    window: int,
    kernels: tuple[int, ...],
    seed: int = 0,
) -> tuple[Arguments, Tensor]:
    """Arguments, and what timm's module gives for them."""
    module = cascaded_module(heads, key_dim, head_channels, window, kernels, seed)
    x = draw(batch, heads * head_channels, height, width, seed=seed + 1)
    with torch.no_grad():
        return cascaded_arguments(module, x), module(x)


def cast(arguments: Mapping[str, Any], dtype: torch.dtype) -> Arguments:
    """The same arguments with every tensor in another type."""
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def rms_relative(candidate: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference; NaN where either is, infinite if shapes differ."""
    if candidate.shape != reference.shape:
        return float("inf")
    difference = (candidate.double() - reference.double()).square().mean().sqrt()
    return float(difference / reference.double().square().mean().sqrt())


Reference = Callable[..., Tensor]

MULTI_SCALE_SHAPES = {
    # batch, height, width, heads, head dim
    "one-token": (1, 1, 1, 1, 2),
    "one-column": (2, 5, 1, 2, 3),
    "one-row": (1, 1, 8, 2, 4),
    "below-small-window": (2, 2, 2, 1, 5),
    "small-window-exactly": (1, 3, 3, 2, 16),
    "odd": (2, 5, 4, 3, 6),
    "medium-window-exactly": (1, 7, 7, 2, 10),
    "padded-by-one": (1, 8, 6, 8, 2),
    "padded-both": (3, 10, 13, 2, 7),
    "padded-right-only": (2, 7, 9, 2, 4),
    "padded-bottom-only": (1, 9, 7, 2, 4),
    "no-padding": (1, 21, 21, 1, 4),
    "head-dim-48": (2, 4, 9, 2, 48),
}
# The kernel that projects takes head dims of at most 16.
PROJECTED_SHAPES = {name: shape for name, shape in MULTI_SCALE_SHAPES.items() if shape[-1] <= 16}
LITE_MLA_SHAPES = {
    "one-token": (1, 1, 1, 4, 2),
    "row-below-dim": (2, 1, 7, 3, 16),
    "tokens-equal-dim": (1, 4, 4, 2, 16),
    "tokens-above-dim-by-one": (1, 17, 1, 2, 16),
    "odd": (3, 5, 7, 4, 8),
    "head-dim-2": (2, 3, 5, 5, 2),
    "head-dim-3": (1, 9, 11, 2, 3),
    "head-dim-48-quadratic": (2, 5, 6, 2, 48),
    "head-dim-48-linear": (1, 14, 14, 2, 48),
    "quadratic-32": (2, 5, 5, 2, 32),
}
CASCADED_SHAPES: dict[str, tuple[int, int, int, int, int, int, int, tuple[int, ...]]] = {
    # batch, height, width, heads, key dim, channels of a head, window, kernels
    "one-token": (1, 1, 1, 1, 2, 2, 1, (1,)),
    "one-head": (2, 4, 4, 1, 3, 5, 4, (3,)),
    "window-exactly": (1, 7, 7, 2, 4, 8, 7, (5, 3)),
    "four-windows": (2, 4, 6, 3, 2, 6, 2, (5, 3, 1)),
    "padded-right": (1, 4, 5, 2, 4, 4, 4, (3, 3)),
    "padded-bottom": (2, 5, 3, 2, 3, 6, 3, (3, 5)),
    "padded-both": (1, 9, 8, 2, 16, 12, 7, (7, 5)),
    "map-below-window": (2, 3, 2, 3, 4, 4, 5, (5, 3, 3)),
    "one-dimension-below-window": (1, 2, 9, 2, 4, 4, 4, (3, 3)),
    "kernel-above-window": (1, 4, 4, 2, 2, 3, 2, (7, 3)),
    "four-heads": (2, 6, 6, 4, 16, 16, 3, (5, 5, 5, 5)),
    "key-dim-48": (1, 3, 4, 2, 48, 24, 3, (3, 3)),
}
SHAPES: dict[str, dict[str, tuple[Any, ...]]] = {
    "multi_scale_attention": MULTI_SCALE_SHAPES,
    "projected_multi_scale_attention": PROJECTED_SHAPES,
    "lite_mla": LITE_MLA_SHAPES,
    "cascaded_attention": CASCADED_SHAPES,
}


def arguments_from(operator: str, numbers: tuple[Any, ...]) -> Arguments:
    """Arguments of an operator in float64, drawn from numbers as the tables above have them."""
    if operator == "cascaded_attention":
        arguments, _ = cascaded_case(*numbers)
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    make: dict[str, Callable[..., Arguments]] = {
        "multi_scale_attention": multi_scale_arguments,
        "projected_multi_scale_attention": projected_multi_scale_arguments,
        "lite_mla": lite_mla_arguments,
    }
    return make[operator](*numbers)


def arguments_of(operator: str, shape: str) -> Arguments:
    """Those of one of the shapes above."""
    return arguments_from(operator, SHAPES[operator][shape])
