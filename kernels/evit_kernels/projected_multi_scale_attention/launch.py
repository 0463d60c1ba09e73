"""When projections in the launch pay, and how `projected_multi_scale_attention` is launched."""

from __future__ import annotations

from functools import cache

from evit_kernels.launch import MAX_INT32, MIN_DOT, KernelLaunch, ceil_div, next_power_of_2
from evit_kernels.multi_scale_attention.launch import WINDOW_TILE
from evit_kernels.multi_scale_attention.naive import MEDIUM_WINDOW, SMALL_WINDOW

MAX_DIM = 16  # in FP32 more would spill: a program holds query, key, value and scores of a head at once
BLOCK_QUERIES = 64
CHUNK = 16  # input channels at once


def projections_pay(heads: int, dim: int, height: int, width: int) -> bool:
    """Whether the launch saves more bytes of memory than its programs read again; see the operator's README.

    In elements, each side divided by C: the projected windows' maps are written and read no more, 12 N and one reading
    of the input, against the weights and biases that each window tile reads, and the input once more; the projected
    queries 2 N, against what each tile of queries reads.

    Args:
        heads: number of heads.
        dim: head dim; the channels C are heads * dim.
        height: H.
        width: W.
    """
    if why_no_launch(heads, dim, height, width) is not None:
        return False
    tokens, row = height * width, heads * dim + 1
    query_tiles, small_tiles, medium_tiles = _tiles(height, width)
    windows_pay = 13 * tokens > 3 * (small_tiles + medium_tiles) * row + tokens
    return windows_pay and 2 * tokens > query_tiles * row


def why_no_launch(heads: int, dim: int, height: int, width: int) -> str | None:
    """The reason why the kernel cannot run these sizes, or None."""
    if dim > MAX_DIM:
        return f"the kernel takes a head dim of at most {MAX_DIM}, got {dim}"
    if 3 * heads * dim * height * width > MAX_INT32:
        return f"one image of the result must stay below 2^31 elements, got {height}x{width}x{3 * heads * dim}"
    return None


@cache
def launch_projected_multi_scale_attention(heads: int, dim: int, height: int, width: int, dtype: str) -> KernelLaunch:
    """The launch for tokens [B, height, width, heads * dim] of any batch.

    Args:
        heads: number of heads.
        dim: head dim; the channels C are heads * dim.
        height: H.
        width: W.
        dtype: "fp32", "fp16" or "bf16".

    Raises:
        ValueError: sizes that the kernel does not take; see `why_no_launch`.
    """
    reason = why_no_launch(heads, dim, height, width)
    if reason is not None:
        raise ValueError(f"projected_multi_scale_attention: {reason}")
    return KernelLaunch(
        operator="projected_multi_scale_attention",
        kernel="evit_kernels.projected_multi_scale_attention.triton_fwd:projected_multi_scale_attention_kernel",
        inputs=("p_x", "p_kv_large", "p_weight", "p_bias"),
        extras={"height": height, "width": width},
        outputs=("p_out",),
        constants={
            "HEADS": heads,
            "DIM": dim,
            "SMALL_WINDOW": SMALL_WINDOW,
            "MEDIUM_WINDOW": MEDIUM_WINDOW,
            "WINDOW_TILE": WINDOW_TILE,
            "BLOCK_DIM": max(MIN_DOT, next_power_of_2(dim)),
            "CHUNK": CHUNK,
            "BLOCK_QUERIES": BLOCK_QUERIES,
            "BLOCK_KEYS": 32 if dtype == "fp32" else 64,
            "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        },
        dtype=dtype,
        programs_per_image=sum(_tiles(height, width)),
    )


def _tiles(height: int, width: int) -> tuple[int, int, int]:
    """Of an image: tiles of queries, of 3x3 windows, of 7x7 windows."""
    small_windows = ceil_div(height, SMALL_WINDOW) * ceil_div(width, SMALL_WINDOW)
    return (
        ceil_div(height * width, BLOCK_QUERIES),
        ceil_div(small_windows, WINDOW_TILE // SMALL_WINDOW**2),
        ceil_div(height, MEDIUM_WINDOW) * ceil_div(width, MEDIUM_WINDOW),
    )
