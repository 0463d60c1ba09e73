"""What it would save to take more of the attention layer into the operator's launch, counted in bytes.

Saved are bytes of maps that would no longer be written to memory and read back. The price is what the programs of the
larger launch would read again, from the L2 cache at best: each reads the weights it needs, and maps that its neighbours
read too; and what each would have to hold beside what it holds today. Where programs share an output they would have to
add to it in FP32: the sums are zeroed, written and read once more.

Legend: N = H * W tokens, M pooled keys, C channels, h heads, d head dim, e bytes of an element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evit_kernels.launch import MAX_SHARED_BYTES, ceil_div, next_power_of_2
from evit_kernels.multi_scale_attention.naive import MEDIUM_WINDOW, SMALL_WINDOW

from benchmarks.attention_layers import AttentionLayer
from benchmarks.operations import Operation, fused_bytes, total_bytes

TILE = 64  # tokens of a program
SUM_BYTES = 4  # of an FP32 sum in memory
HELD_ELEMENT_BYTES = 4  # a kernel takes FP32 too, and has to fit in it
_SUM_PASSES = 3  # zeroed, written at the end, read to be rounded

# The operations of each layer, in order; the names on the right are ours.
STEPS = {
    "multi_scale_attention": (
        ("avg_pool2d", "pooling"),
        ("addmm", "keys and values"),
        ("addmm", "3x3 projection"),
        ("addmm", "7x7 projection"),
        ("addmm", "queries"),
        ("multi_scale_attention", "attention"),
        ("addmm", "closing"),
    ),
    "projected_multi_scale_attention": (
        ("avg_pool2d", "pooling"),
        ("addmm", "keys and values"),
        ("projected_multi_scale_attention", "attention"),
        ("addmm", "closing"),
    ),
    "lite_mla": (
        ("convolution", "projection"),
        ("convolution", "depthwise"),
        ("convolution", "pointwise"),
        ("lite_mla", "attention"),
        ("convolution", "closing"),
    ),
    "cascaded_attention": (
        ("cascaded_attention", "attention"),
        ("convolution", "closing"),
    ),
}


@dataclass(frozen=True)
class DeeperFusion:
    """One further step in the launch, per image.

    Attributes:
        name: what is taken in.
        saved_bytes: of memory; below zero where the launch would move more.
        reread_bytes: read again by programs, at best from the L2 cache.
        extra_flops: computed again by programs.
        held_bytes: what a program holds beside what it holds today.
    """

    name: str
    saved_bytes: int
    reread_bytes: int
    extra_flops: int
    held_bytes: int

    def pays(self, bandwidth: float, matrix_flops_per_s: float) -> bool:
        """Whether it saves more than it reads again, and more time than it computes again, and fits 48 KiB.

        The first is a cautious rule: the L2 cache is faster than memory, by how much was not measured here.
        """
        return (
            self.saved_bytes > self.reread_bytes
            and self.saved_bytes / bandwidth > self.extra_flops / matrix_flops_per_s
            and self.held_bytes <= MAX_SHARED_BYTES
        )


def deeper_fusions(layer: AttentionLayer) -> list[DeeperFusion]:
    """Every further fusion of a layer, each for itself unless its name says otherwise.

    Raises:
        ValueError: the layer does not consist of the operations that are known here.
    """
    names = tuple(operation.name for operation in layer.operations)
    expected = STEPS[layer.operator]
    if names != tuple(name for name, _ in expected):
        raise ValueError(f"unknown layer around {layer.operator}: {names}")
    steps = dict(zip((step for _, step in expected), layer.operations, strict=True))
    return _FUSIONS[layer.operator](layer, _Account(steps))


class _Account:
    def __init__(self, steps: dict[str, Operation]) -> None:
        self.steps = steps

    def saved(self, *group: str) -> int:
        """Bytes that the attention and these steps move less in one launch than one by one."""
        operations = [self.steps[name] for name in (*group, "attention")]
        return total_bytes(operations) - fused_bytes(operations, list(self.steps.values()))

    def weights(self, *group: str) -> int:
        return sum(self.steps[name].parameter_bytes for name in group)


def _multi_scale_attention(layer: AttentionLayer, account: _Account) -> list[DeeperFusion]:
    _, height, width, channels = layer.shapes[2]
    heads, element, tokens = layer.shapes[4], _element_bytes(layer), height * width
    tiles = ceil_div(tokens, TILE)
    small = ceil_div(_windows(height, width, SMALL_WINDOW), TILE // SMALL_WINDOW**2)
    medium = _windows(height, width, MEDIUM_WINDOW)
    # A tile of the layer's input for all heads, and a block of 32 rows of one head's query, key and value weights.
    held = (TILE * channels + 32 * 3 * next_power_of_2(channels // heads)) * HELD_ELEMENT_BYTES
    return [
        DeeperFusion(
            "3x3 and 7x7 projections",
            account.saved("3x3 projection", "7x7 projection"),
            small * account.weights("3x3 projection")
            + medium * account.weights("7x7 projection")
            + tokens * channels * element,  # the layer's input, once for each branch
            0,
            held,
        ),
        DeeperFusion(
            "projection of the queries", account.saved("queries"), tiles * account.weights("queries"), 0, held
        ),
        *_around_the_attention(layer, account, height, width, channels, held),
    ]


def _projected_multi_scale_attention(layer: AttentionLayer, account: _Account) -> list[DeeperFusion]:
    (_, height, width, channels), heads = layer.shapes[0], layer.shapes[4]
    held = (TILE * channels + 32 * 3 * next_power_of_2(channels // heads)) * HELD_ELEMENT_BYTES
    return _around_the_attention(layer, account, height, width, channels, held)


def _around_the_attention(
    layer: AttentionLayer, account: _Account, height: int, width: int, channels: int, held: int
) -> list[DeeperFusion]:
    """What neither operator of `msa` does."""
    element, tokens, keys = _element_bytes(layer), height * width, ceil_div(height, 2) * ceil_div(width, 2)
    tiles = ceil_div(tokens, TILE)
    small = ceil_div(_windows(height, width, SMALL_WINDOW), TILE // SMALL_WINDOW**2)
    medium = _windows(height, width, MEDIUM_WINDOW)
    return [
        DeeperFusion(
            "pooling and projection of keys and values",
            account.saved("pooling", "keys and values"),
            tiles * account.weights("keys and values") + (tiles - 1) * tokens * channels * element,
            (tiles - 1) * 2 * keys * channels * 2 * channels,
            held,
        ),
        DeeperFusion(
            "closing Linear",
            account.saved("closing") - _SUM_PASSES * SUM_BYTES * tokens * channels,
            (tiles + small + medium) * account.weights("closing") // 3 + 3 * SUM_BYTES * tokens * channels,
            0,
            TILE * channels * HELD_ELEMENT_BYTES,
        ),
    ]


def _lite_mla(layer: AttentionLayer, account: _Account) -> list[DeeperFusion]:
    (_, channels3, height, width), _, dim, _ = layer.shapes
    element, tokens = _element_bytes(layer), height * width
    channels = channels3 // 3  # of the layer
    aggregation = ("projection", "depthwise", "pointwise")
    tile = next_power_of_2(tokens)
    sums = SUM_BYTES * tokens * channels
    return [
        DeeperFusion(
            "projection and aggregation",
            account.saved(*aggregation),
            account.weights(*aggregation) + (channels // dim - 1) * tokens * channels * element,
            0,
            # Query, key and value of one head for the whole map, and blocks of 32 channels of the map and the weights.
            (3 * dim * tile + 32 * (tile + 3 * dim)) * HELD_ELEMENT_BYTES,
        ),
        DeeperFusion(
            "closing convolution",
            account.saved("closing") - _SUM_PASSES * sums,
            account.weights("closing") + 2 * (channels // dim) * sums,
            0,
            dim * TILE * HELD_ELEMENT_BYTES,
        ),
    ]


def _cascaded_attention(layer: AttentionLayer, account: _Account) -> list[DeeperFusion]:
    (_, channels, height, width), window = layer.shapes[0], layer.shapes[-1]
    windows = _windows(height, width, window)
    held = channels * next_power_of_2(window**2) * SUM_BYTES  # the sums over the heads
    weights = windows * account.weights("closing")
    return [DeeperFusion("closing convolution", account.saved("closing"), weights, 0, held)]


_FUSIONS: dict[str, Callable[[AttentionLayer, _Account], list[DeeperFusion]]] = {
    "multi_scale_attention": _multi_scale_attention,
    "projected_multi_scale_attention": _projected_multi_scale_attention,
    "lite_mla": _lite_mla,
    "cascaded_attention": _cascaded_attention,
}


def bytes_per_head_launches(layer: AttentionLayer, batch: int) -> int:
    """Bytes of a cascade with one launch per head: each reads its channels and the previous output, writes its own.

    The output of padded tokens, which the next head needs, is not counted: it would need memory of its own.
    """
    x, *parameters = layer.calls[batch].arguments[:-1]
    heads = layer.shapes[1][0]
    weights = sum(p.numel() for p in parameters)
    return x.element_size() * (x.numel() * (3 * heads - 1) // heads + weights)


def _windows(height: int, width: int, window: int) -> int:
    return ceil_div(height, window) * ceil_div(width, window)


def _element_bytes(layer: AttentionLayer) -> int:
    return int(layer.calls[1].arguments[0].element_size())
