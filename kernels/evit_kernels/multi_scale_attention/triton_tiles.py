"""What the kernels of `multi_scale_attention`, with projections inside and without, have in common.

Legend: H x W the map, C = HEADS * DIM channels, d = DIM, M = ceil(H/2) * ceil(W/2) pooled keys, T = TILE slots of a
window tile, BQ = BLOCK_QUERIES, BK = BLOCK_KEYS, BD = BLOCK_DIM >= d. `p_` pointer, `b_` block of values, `o_` offsets,
`m_` mask, `i_` index.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_scale(DIM: tl.constexpr):
    """log2(e) / sqrt(d): the softmax is taken in powers of two."""
    return 1.4426950408889634 / tl.sqrt(DIM * 1.0)


@triton.jit
def count_tiles(
    height,
    width,
    SMALL_WINDOW: tl.constexpr,
    MEDIUM_WINDOW: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """Tiles of an image: of the global branch, of the 3x3 windows (several each), of the 7x7 windows (one each)."""
    SMALL_WINDOWS: tl.constexpr = WINDOW_TILE // (SMALL_WINDOW * SMALL_WINDOW)
    n_global = (height * width + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    n_small_windows = ((height + SMALL_WINDOW - 1) // SMALL_WINDOW) * ((width + SMALL_WINDOW - 1) // SMALL_WINDOW)
    n_small = (n_small_windows + SMALL_WINDOWS - 1) // SMALL_WINDOWS
    n_medium = ((height + MEDIUM_WINDOW - 1) // MEDIUM_WINDOW) * ((width + MEDIUM_WINDOW - 1) // MEDIUM_WINDOW)
    return n_global, n_small, n_medium


@triton.jit
def window_slots(i_tile, height, width, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """For each slot of a tile of TILE // WINDOW^2 windows: its window, its token, and whether that is on the map."""
    WINDOWS: tl.constexpr = TILE // (WINDOW * WINDOW)
    columns = (width + WINDOW - 1) // WINDOW
    o_slot = tl.arange(0, TILE)
    i_window = i_tile * WINDOWS + o_slot // (WINDOW * WINDOW)
    o_y = i_window // columns * WINDOW + o_slot % (WINDOW * WINDOW) // WINDOW
    o_x = i_window % columns * WINDOW + o_slot % WINDOW
    m_token = (o_slot < WINDOWS * WINDOW * WINDOW) & (o_y < height) & (o_x < width)
    return i_window, o_y * width + o_x, m_token


@triton.jit
def window_weights(b_scores, i_window, m_token, scale):
    """Unnormalised weights [T, T] under the block-diagonal mask, and their sums; a row without any key gets zeros."""
    m_scores = (i_window[:, None] == i_window[None, :]) & m_token[None, :]
    b_scores = tl.where(m_scores, b_scores * scale, float("-inf"))
    b_max = tl.max(b_scores, 1)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_weights = tl.exp2(b_scores - b_max[:, None])
    return b_weights, tl.where(m_token, tl.sum(b_weights, 1), 1.0)


@triton.jit
def attend_globally(
    b_q,  # [BQ, BD]
    p_kv,  # this image's [M, 2C]
    i_head,
    n_keys,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one head from BLOCK_QUERIES queries over all pooled keys, by an online softmax; FP32 [BQ, BD]."""
    CHANNELS: tl.constexpr = HEADS * DIM
    o_dim = tl.arange(0, BLOCK_DIM)
    m_dim = o_dim < DIM
    o_head = i_head * DIM + o_dim
    b_max = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    b_out = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    for start in range(0, n_keys, BLOCK_KEYS):  # every step has at least one key, so no maximum stays -inf
        o_key = start + tl.arange(0, BLOCK_KEYS)
        m_key = o_key < n_keys
        m_block = m_key[:, None] & m_dim[None, :]
        o_block = o_key[:, None] * (2 * CHANNELS) + o_head[None, :]
        b_k = tl.load(p_kv + o_block, mask=m_block, other=0.0)  # [BK, BD]
        b_v = tl.load(p_kv + CHANNELS + o_block, mask=m_block, other=0.0)  # [BK, BD]
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BQ, BD] @ [BD, BK]
        b_scores = tl.where(m_key[None, :], b_scores, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * scale)
        b_decay = tl.exp2(b_max - b_new_max)
        b_weights = tl.exp2(b_scores * scale - b_new_max[:, None])  # one multiply-add each
        b_sum = b_sum * b_decay + tl.sum(b_weights, 1)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)  # [BQ, BK] @ [BK, BD]
        b_max = b_new_max
    return b_out / b_sum[:, None]
