"""The fused kernel of `projected_multi_scale_attention`: projections and three branches, all heads, one launch.

Legend: as in `evit_kernels.multi_scale_attention.triton_tiles`, whose helpers it shares; CHUNK input channels at once.

The programs are those of `multi_scale_attention`, but each takes all heads, one after the other: it gathers the tokens
of its tile and multiplies them with the rows of the weight that belong to its branch and head. `naive.py` is its
definition.
"""

import triton
import triton.language as tl

from evit_kernels.multi_scale_attention.triton_tiles import (
    attend_globally,
    count_tiles,
    softmax_scale,
    window_slots,
    window_weights,
)


@triton.jit
def _project(
    p_x,  # this image's [H * W, C]
    p_weight,  # [7C, C]
    p_bias,  # [7C]
    o_token,
    m_token,
    i_row,
    CHANNELS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows i_row .. i_row + d of the weight applied to tokens, [TOKENS, BD] in the dtype of x; zeros behind d."""
    o_row = i_row + tl.arange(0, BLOCK_DIM)
    m_row = tl.arange(0, BLOCK_DIM) < DIM
    b_sum = tl.zeros([TOKENS, BLOCK_DIM], tl.float32)
    for start in range(0, CHANNELS, CHUNK):
        o_channel = start + tl.arange(0, CHUNK)
        m_channel = o_channel < CHANNELS
        b_x = tl.load(
            p_x + o_token[:, None] * CHANNELS + o_channel[None, :],
            mask=m_token[:, None] & m_channel[None, :],
            other=0.0,
        )  # [TOKENS, CHUNK]
        b_w = tl.load(
            p_weight + o_row[:, None] * CHANNELS + o_channel[None, :],
            mask=m_row[:, None] & m_channel[None, :],
            other=0.0,
        )  # [BD, CHUNK]
        b_sum = tl.dot(b_x, tl.trans(b_w), b_sum, input_precision=PRECISION)  # [TOKENS, CHUNK] @ [CHUNK, BD]
    b_bias = tl.load(p_bias + o_row, mask=m_row, other=0.0).to(tl.float32)
    return (b_sum + b_bias[None, :]).to(p_x.dtype.element_ty)


@triton.jit
def _window_tile(
    p_x,  # this image's [H * W, C]
    p_weight,  # [7C, C]
    p_bias,  # [7C]
    p_out,  # this image's [H * W, 3C]
    i_tile,
    i_head,
    height,
    width,
    scale,
    BRANCH: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one head inside TILE // WINDOW^2 windows."""
    C: tl.constexpr = HEADS * DIM
    i_window, o_token, m_token = window_slots(i_tile, height, width, WINDOW, TILE)
    i_row = BRANCH * 3 * C + i_head * DIM
    b_q = _project(p_x, p_weight, p_bias, o_token, m_token, i_row, C, DIM, BLOCK_DIM, CHUNK, TILE, PRECISION)
    b_k = _project(p_x, p_weight, p_bias, o_token, m_token, i_row + C, C, DIM, BLOCK_DIM, CHUNK, TILE, PRECISION)
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [T, BD] @ [BD, T]
    b_weights, b_sum = window_weights(b_scores, i_window, m_token, scale)
    b_v = _project(p_x, p_weight, p_bias, o_token, m_token, i_row + 2 * C, C, DIM, BLOCK_DIM, CHUNK, TILE, PRECISION)
    b_out = tl.dot(b_weights.to(b_v.dtype), b_v, input_precision=PRECISION) / b_sum[:, None]  # [T, T] @ [T, BD]
    o_dim = tl.arange(0, BLOCK_DIM)
    tl.store(
        p_out + BRANCH * C + i_head * DIM + o_token[:, None] * (3 * C) + o_dim[None, :],
        b_out.to(p_out.dtype.element_ty),
        mask=m_token[:, None] & (o_dim < DIM)[None, :],
    )


@triton.jit
def _global_tile(
    p_x,  # this image's [H * W, C]
    p_weight,  # [7C, C]
    p_bias,  # [7C]
    p_kv,  # this image's [M, 2C]
    p_out,  # this image's [H * W, 3C]
    i_tile,
    i_head,
    n_queries,
    n_keys,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one head from BLOCK_QUERIES queries over all pooled keys."""
    C: tl.constexpr = HEADS * DIM
    o_query = i_tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    m_query = o_query < n_queries
    i_row = 6 * C + i_head * DIM
    b_q = _project(p_x, p_weight, p_bias, o_query, m_query, i_row, C, DIM, BLOCK_DIM, CHUNK, BLOCK_QUERIES, PRECISION)
    b_out = attend_globally(
        b_q, p_kv, i_head, n_keys, scale, HEADS, DIM, BLOCK_DIM, BLOCK_QUERIES, BLOCK_KEYS, PRECISION
    )
    o_dim = tl.arange(0, BLOCK_DIM)
    tl.store(
        p_out + 2 * C + i_head * DIM + o_query[:, None] * (3 * C) + o_dim[None, :],
        b_out.to(p_out.dtype.element_ty),
        mask=m_query[:, None] & (o_dim < DIM)[None, :],
    )


@triton.jit(do_not_specialize=["height", "width"])
def projected_multi_scale_attention_kernel(
    p_x,  # [B, H, W, C]
    p_kv_large,  # [B, ceil(H/2), ceil(W/2), 2C]
    p_weight,  # [7C, C]
    p_bias,  # [7C]
    height,
    width,
    p_out,  # [B, H * W, 3C]
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SMALL_WINDOW: tl.constexpr,
    MEDIUM_WINDOW: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * DIM
    scale = softmax_scale(DIM)
    n_queries = height * width
    n_keys = ((height + 1) // 2) * ((width + 1) // 2)
    n_global, n_small, n_medium = count_tiles(height, width, SMALL_WINDOW, MEDIUM_WINDOW, WINDOW_TILE, BLOCK_QUERIES)
    n_tiles = n_global + n_small + n_medium

    i_program = tl.program_id(0)
    i_tile = i_program % n_tiles
    i_image = (i_program // n_tiles).to(tl.int64)
    p_x += i_image * n_queries * CHANNELS
    p_kv_large += i_image * n_keys * (2 * CHANNELS)
    p_out += i_image * n_queries * (3 * CHANNELS)
    for i_head in tl.range(0, HEADS, disable_licm=True):  # hoisted addresses of three branches would spill
        if i_tile < n_global:
            _global_tile(
                p_x,
                p_weight,
                p_bias,
                p_kv_large,
                p_out,
                i_tile,
                i_head,
                n_queries,
                n_keys,
                scale,
                HEADS,
                DIM,
                BLOCK_DIM,
                CHUNK,
                BLOCK_QUERIES,
                BLOCK_KEYS,
                PRECISION,
            )
        elif i_tile < n_global + n_small:
            _window_tile(
                p_x,
                p_weight,
                p_bias,
                p_out,
                i_tile - n_global,
                i_head,
                height,
                width,
                scale,
                0,
                SMALL_WINDOW,
                HEADS,
                DIM,
                BLOCK_DIM,
                WINDOW_TILE,
                CHUNK,
                PRECISION,
            )
        else:
            _window_tile(
                p_x,
                p_weight,
                p_bias,
                p_out,
                i_tile - n_global - n_small,
                i_head,
                height,
                width,
                scale,
                1,
                MEDIUM_WINDOW,
                HEADS,
                DIM,
                BLOCK_DIM,
                WINDOW_TILE,
                CHUNK,
                PRECISION,
            )
