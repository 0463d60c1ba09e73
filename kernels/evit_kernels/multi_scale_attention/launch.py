"""How `multi_scale_attention` is launched: tile sizes, programs per image, compile-time arguments."""

from __future__ import annotations

from functools import cache

from evit_kernels.launch import ELEMENT_BYTES, MAX_INT32, MIN_DOT, KernelLaunch, ceil_div, next_power_of_2
from evit_kernels.multi_scale_attention.naive import MEDIUM_WINDOW, SMALL_WINDOW

MAX_DIM = 128  # the global branch keeps a whole head dim of accumulators
WINDOW_TILE = 64  # tokens of a window program: seven 3x3 windows, or one 7x7 window
HEAD_BYTES = 32  # neighbouring heads share a program until their rows fill a sector of memory


def why_no_launch(heads: int, dim: int, height: int, width: int) -> str | None:
    """The reason why the kernel cannot run these sizes, or None."""
    if dim > MAX_DIM:
        return f"the kernel takes a head dim of at most {MAX_DIM}, got {dim}"
    if 3 * heads * dim * height * width > MAX_INT32:
        return f"one image of qkv must stay below 2^31 elements, got {height}x{width}x{3 * heads * dim}"
    return None


@cache
def launch_multi_scale_attention(heads: int, dim: int, height: int, width: int, dtype: str) -> KernelLaunch:
    """The launch for maps [B, height, width, ...] of any batch.

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
        raise ValueError(f"multi_scale_attention: {reason}")
    small_windows = ceil_div(height, SMALL_WINDOW) * ceil_div(width, SMALL_WINDOW)
    windows_per_tile = WINDOW_TILE // SMALL_WINDOW**2
    medium_windows = ceil_div(height, MEDIUM_WINDOW) * ceil_div(width, MEDIUM_WINDOW)
    block_dim = max(MIN_DOT, next_power_of_2(dim))
    block_queries, block_keys = _global_tile(block_dim, dtype)
    tiles = ceil_div(height * width, block_queries) + ceil_div(small_windows, windows_per_tile) + medium_windows
    heads_per_program = _heads_per_program(heads, dim * ELEMENT_BYTES[dtype])
    return KernelLaunch(
        operator="multi_scale_attention",
        kernel="evit_kernels.multi_scale_attention.triton_fwd:multi_scale_attention_kernel",
        inputs=("p_qkv_small", "p_qkv_medium", "p_q_large", "p_kv_large"),
        extras={"height": height, "width": width},
        outputs=("p_out",),
        constants={
            "HEADS": heads,
            "DIM": dim,
            "HEADS_PER_PROGRAM": heads_per_program,
            "SMALL_WINDOW": SMALL_WINDOW,
            "MEDIUM_WINDOW": MEDIUM_WINDOW,
            "WINDOW_TILE": WINDOW_TILE,
            "BLOCK_DIM": block_dim,
            "CHUNK": _window_chunk(dim),
            "BLOCK_QUERIES": block_queries,
            "BLOCK_KEYS": block_keys,
            "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        },
        dtype=dtype,
        programs_per_image=tiles * (heads // heads_per_program),
        num_warps=8 if dtype == "fp32" and block_dim >= 64 else 4,
    )


def _global_tile(block_dim: int, dtype: str) -> tuple[int, int]:
    """Queries and keys of a step of the global branch: no spill, at most 48 KiB of shared memory."""
    if dtype == "fp32":
        return (64, 32) if block_dim <= 32 else (32, 32) if block_dim == 64 else (16, 16)
    return (64, 64) if block_dim <= 32 else (64, 32) if block_dim == 64 else (32, 32)


def _window_chunk(dim: int) -> int:
    """Channels that a window program takes at once: 16 where 32 would be padded by 16 or more."""
    return 32 if -dim % 32 < 16 else 16


def _heads_per_program(heads: int, head_bytes: int) -> int:
    """The smallest divisor of `heads` whose rows fill HEAD_BYTES, or all heads."""
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (n * head_bytes >= HEAD_BYTES or n == heads))
