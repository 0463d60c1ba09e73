"""The fused kernel of `multi_scale_attention`: three branches, all heads, one launch; `naive.py` is its definition.

Legend: H x W the map, C = HEADS * DIM channels, d = DIM, M = ceil(H/2) * ceil(W/2) pooled keys, T = WINDOW_TILE tokens,
BQ = BLOCK_QUERIES, BK = BLOCK_KEYS, BD = BLOCK_DIM >= d, CHUNK channels at once. `p_` pointer, `b_` block of values,
`o_` offsets, `m_` mask, `i_` index.

The programs of an image are, longest first: tiles of the global branch, tiles of several 3x3 windows under a
block-diagonal mask, tiles of one 7x7 window. Each reads its rows of the projected maps where they lie and writes its
third of the output's channels. Scores, softmax and products accumulate in FP32; the global branch is an online softmax.
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
def _window_tile(
    p_qkv,  # this image's [H, W, 3C]
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
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one head inside TILE // WINDOW^2 windows."""
    CHANNELS: tl.constexpr = HEADS * DIM
    i_window, o_token, m_token = window_slots(i_tile, height, width, WINDOW, TILE)
    o_row = o_token * (3 * CHANNELS) + i_head * DIM  # the output's rows are as long as those of qkv

    b_scores = tl.zeros([TILE, TILE], tl.float32)
    for start in tl.static_range(0, DIM, CHUNK):
        o_dim = start + tl.arange(0, CHUNK)
        m_block = m_token[:, None] & (o_dim < DIM)[None, :]
        b_q = tl.load(p_qkv + o_row[:, None] + o_dim[None, :], mask=m_block, other=0.0)  # [T, CHUNK]
        b_k = tl.load(p_qkv + CHANNELS + o_row[:, None] + o_dim[None, :], mask=m_block, other=0.0)  # [T, CHUNK]
        b_scores = tl.dot(b_q, tl.trans(b_k), b_scores, input_precision=PRECISION)  # [T, CHUNK] @ [CHUNK, T]
    b_weights, b_sum = window_weights(b_scores, i_window, m_token, scale)
    for start in tl.static_range(0, DIM, CHUNK):
        o_dim = start + tl.arange(0, CHUNK)
        m_block = m_token[:, None] & (o_dim < DIM)[None, :]
        b_v = tl.load(p_qkv + 2 * CHANNELS + o_row[:, None] + o_dim[None, :], mask=m_block, other=0.0)  # [T, CHUNK]
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, input_precision=PRECISION) / b_sum[:, None]  # [T, T] @ [T, CHUNK]
        tl.store(
            p_out + BRANCH * CHANNELS + o_row[:, None] + o_dim[None, :],
            b_out.to(p_out.dtype.element_ty),
            mask=m_block,
        )


@triton.jit
def _global_tile(
    p_q,  # this image's [H * W, C]
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
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one head from BLOCK_QUERIES queries over all pooled keys."""
    CHANNELS: tl.constexpr = HEADS * DIM
    o_query = i_tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    o_dim = tl.arange(0, BLOCK_DIM)
    m_dim = o_dim < DIM
    m_query = (o_query < n_queries)[:, None] & m_dim[None, :]
    o_head = i_head * DIM + o_dim
    b_q = tl.load(p_q + o_query[:, None] * CHANNELS + o_head[None, :], mask=m_query, other=0.0)  # [BQ, BD]
    b_out = attend_globally(
        b_q, p_kv, i_head, n_keys, scale, HEADS, DIM, BLOCK_DIM, BLOCK_QUERIES, BLOCK_KEYS, PRECISION
    )
    tl.store(
        p_out + 2 * CHANNELS + o_query[:, None] * (3 * CHANNELS) + o_head[None, :],
        b_out.to(p_out.dtype.element_ty),
        mask=m_query,
    )


@triton.jit(do_not_specialize=["height", "width"])
def multi_scale_attention_kernel(
    p_qkv_small,  # [B, H, W, 3C]
    p_qkv_medium,  # [B, H, W, 3C]
    p_q_large,  # [B, H, W, C]
    p_kv_large,  # [B, ceil(H/2), ceil(W/2), 2C]
    height,
    width,
    p_out,  # [B, H * W, 3C]
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
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
    GROUPS: tl.constexpr = HEADS // HEADS_PER_PROGRAM
    scale = softmax_scale(DIM)
    n_queries = height * width
    n_keys = ((height + 1) // 2) * ((width + 1) // 2)
    n_global, n_small, n_medium = count_tiles(height, width, SMALL_WINDOW, MEDIUM_WINDOW, WINDOW_TILE, BLOCK_QUERIES)
    n_tiles = n_global + n_small + n_medium

    i_program = tl.program_id(0)
    i_group = i_program % GROUPS
    i_tile = i_program // GROUPS % n_tiles
    i_image = (i_program // GROUPS // n_tiles).to(tl.int64)
    p_out += i_image * n_queries * (3 * CHANNELS)
    for i in tl.range(0, HEADS_PER_PROGRAM, disable_licm=True):  # hoisted addresses of three branches would spill
        i_head = i_group * HEADS_PER_PROGRAM + i
        if i_tile < n_global:
            _global_tile(
                p_q_large + i_image * n_queries * CHANNELS,
                p_kv_large + i_image * n_keys * (2 * CHANNELS),
                p_out,
                i_tile,
                i_head,
                n_queries,
                n_keys,
                scale,
                HEADS,
                DIM,
                BLOCK_DIM,
                BLOCK_QUERIES,
                BLOCK_KEYS,
                PRECISION,
            )
        elif i_tile < n_global + n_small:
            _window_tile(
                p_qkv_small + i_image * n_queries * (3 * CHANNELS),
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
                WINDOW_TILE,
                CHUNK,
                PRECISION,
            )
        else:
            _window_tile(
                p_qkv_medium + i_image * n_queries * (3 * CHANNELS),
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
                WINDOW_TILE,
                CHUNK,
                PRECISION,
            )
