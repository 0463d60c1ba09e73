"""How `lite_mla` is launched: tile sizes, programs per image, compile-time arguments."""

from __future__ import annotations

from functools import cache

from evit_kernels.launch import MAX_INT32, MIN_DOT, KernelLaunch, ceil_div, next_power_of_2

MAX_DIM = 128  # a tile of keys holds the whole head dim
MAX_VALUE_ROWS = 32  # more rows of v k^T in one program spill, or pass 48 KiB in FP32
TOKENS_PER_SPLIT = 1024  # programs of one head share its queries; each reads all keys and values again, from the L2


def why_no_launch(heads: int, dim: int, height: int, width: int) -> str | None:
    """The reason why the kernel cannot run these sizes, or None; `heads` are those of the larger map."""
    if dim > MAX_DIM:
        return f"the kernel takes a head dim of at most {MAX_DIM}, got {dim}"
    if 3 * heads * dim * height * width > MAX_INT32:
        return f"one image of qkv must stay below 2^31 elements, got {3 * heads * dim}x{height}x{width}"
    return None


@cache
def launch_lite_mla(
    heads: int,
    aggregated_heads: int,
    dim: int,
    height: int,
    width: int,
    eps: float,
    dtype: str,
    channels_last: bool = False,
) -> KernelLaunch:
    """The launch for qkv [B, heads*3*dim, H, W] and aggregated [B, aggregated_heads*3*dim, H, W] of any batch.

    Args:
        heads: heads of the first map.
        aggregated_heads: heads of the second.
        dim: head dim.
        height: H.
        width: W.
        eps: added to the denominator.
        dtype: "fp32", "fp16" or "bf16".
        channels_last: all maps lie in PyTorch's channels_last memory format.

    Raises:
        ValueError: sizes that the kernel does not take; see `why_no_launch`.
    """
    reason = why_no_launch(max(heads, aggregated_heads), dim, height, width)
    if reason is not None:
        raise ValueError(f"lite_mla: {reason}")
    tokens = height * width
    quadratic = tokens <= dim
    block_dim = max(MIN_DOT, next_power_of_2(dim))
    block_value = min(block_dim, MAX_VALUE_ROWS)
    value_blocks = ceil_div(dim, block_value)
    block_tokens = 64 if block_dim <= 16 or (block_dim <= 32 and dtype != "fp32") else 32  # no spill
    if quadratic:
        block_tokens = max(MIN_DOT, next_power_of_2(tokens))
    splits = 1 if quadratic else ceil_div(tokens, TOKENS_PER_SPLIT)
    return KernelLaunch(
        operator="lite_mla",
        kernel="evit_kernels.lite_mla.triton_fwd:lite_mla_kernel",
        inputs=("p_qkv", "p_aggregated"),
        extras={"n_heads": heads, "n_aggregated_heads": aggregated_heads, "n_tokens": tokens},
        outputs=("p_out",),
        constants={
            "DIM": dim,
            "EPS": eps,
            "ALIGN": next(elements for elements in (8, 4, 2, 1) if tokens % elements == 0),
            "CHANNELS_LAST": channels_last,
            "QUADRATIC": quadratic,
            "SPLITS": splits,
            "BLOCK_DIM": block_dim,
            "BLOCK_VALUE": block_value,
            "BLOCK_TOKENS": block_tokens,
            "PRECISION": "tf32x3",
        },
        dtype=dtype,
        programs_per_image=(heads + aggregated_heads) * value_blocks * splits,
    )
