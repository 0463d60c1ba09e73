"""How `cascaded_attention` is launched: tile sizes, programs per image, compile-time arguments."""

from __future__ import annotations

from functools import cache

from evit_kernels.launch import MAX_INT32, MIN_DOT, KernelLaunch, ceil_div, next_power_of_2

MAX_TOKENS = 64  # a window is one tile
MAX_KEY_DIM = 64
MAX_HEAD_CHANNELS = 128


def why_no_launch(heads: int, key_dim: int, head_channels: int, window: int, height: int, width: int) -> str | None:
    """The reason why the kernel cannot run these sizes, or None."""
    if window**2 > MAX_TOKENS:
        return f"the kernel takes windows of at most {MAX_TOKENS} tokens, got {window}x{window}"
    if key_dim > MAX_KEY_DIM:
        return f"the kernel takes a key dim of at most {MAX_KEY_DIM}, got {key_dim}"
    if head_channels > MAX_HEAD_CHANNELS:
        return f"the kernel takes heads of at most {MAX_HEAD_CHANNELS} channels, got {head_channels}"
    if heads * head_channels * height * width > MAX_INT32:
        return f"one image of x must stay below 2^31 elements, got {heads * head_channels}x{height}x{width}"
    return None


@cache
def launch_cascaded_attention(
    heads: int,
    key_dim: int,
    head_channels: int,
    kernel: int,
    window: int,
    height: int,
    width: int,
    dtype: str,
    channels_last: bool = False,
) -> KernelLaunch:
    """The launch for x [B, heads * head_channels, H, W] of any batch.

    Args:
        heads: number of heads of the cascade.
        key_dim: channels of a head's query and key.
        head_channels: channels of a head's input and value.
        kernel: edge of the zero-padded depthwise kernels.
        window: edge of the windows.
        height: H.
        width: W.
        dtype: "fp32", "fp16" or "bf16".
        channels_last: both maps lie in PyTorch's channels_last memory format.

    Raises:
        ValueError: sizes that the kernel does not take; see `why_no_launch`.
    """
    reason = why_no_launch(heads, key_dim, head_channels, window, height, width)
    if reason is not None:
        raise ValueError(f"cascaded_attention: {reason}")
    block_tokens, chunk, num_warps = _tile(head_channels, window**2, dtype)
    return KernelLaunch(
        operator="cascaded_attention",
        kernel="evit_kernels.cascaded_attention.triton_fwd:cascaded_attention_kernel",
        inputs=("p_x", "p_qkv_weight", "p_qkv_bias", "p_query_weight", "p_query_bias", "p_attention_bias"),
        extras={"n_heads": heads, "height": height, "width": width},
        outputs=("p_out",),
        constants={
            "KEY_DIM": key_dim,
            "HEAD_CHANNELS": head_channels,
            "KERNEL": kernel,
            "WINDOW": window,
            "CHANNELS_LAST": channels_last,
            "BLOCK_KEY_DIM": max(MIN_DOT, next_power_of_2(key_dim)),
            "BLOCK_TOKENS": block_tokens,
            "BLOCK_TAPS": next_power_of_2(kernel**2),
            "CHUNK": chunk,
            "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        },
        dtype=dtype,
        programs_per_image=ceil_div(height, window) * ceil_div(width, window),
        num_warps=num_warps,
    )


def _tile(head_channels: int, tokens: int, dtype: str) -> tuple[int, int, int]:
    """BLOCK_TOKENS, CHUNK and warps: what compiles without a spill for every architecture.

    FP32 products are three in TF32, whose operands take registers: wide heads get more threads and small chunks.
    """
    block_tokens = max(MIN_DOT, next_power_of_2(tokens))
    if head_channels <= MIN_DOT:
        return block_tokens, MIN_DOT, 4
    if dtype != "fp32" or head_channels <= 32:
        return block_tokens, 32, 4
    return max(32, block_tokens), MIN_DOT, 8
