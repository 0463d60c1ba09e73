"""The fused kernel of `cascaded_attention`: every head of a window in one launch; `naive.py` is its definition.

Legend: D = HEAD_CHANNELS, k = KEY_DIM, T = WINDOW^2 tokens, BT = BLOCK_TOKENS >= T, BK = BLOCK_KEY_DIM >= k, CHUNK
channels at once. `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask, `i_` index.

A program takes one window through the whole cascade. The previous head's output stays in registers, as a tuple of
chunks, because tokens outside the map have no place in the output and still take part. The depthwise convolution
gathers the query along its tokens, over the part of the kernel that is not zero. Projections, convolution, softmax and
products accumulate in FP32; the operands of a product, and each head's output, are rounded to the tensors' dtype.
"""

import triton
import triton.language as tl


@triton.jit
def _query_convolution(
    b_q,  # [BK, BT]
    p_weight,  # this head's [k, KERNEL, KERNEL]
    KEY_DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    """The depthwise convolution inside the window, zeros around it."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    MIDDLE: tl.constexpr = KERNEL // 2
    o_key = tl.arange(0, BLOCK_KEY_DIM)
    m_key = o_key < KEY_DIM
    o_token = tl.arange(0, BLOCK_TOKENS)
    o_y = o_token // WINDOW
    o_x = o_token % WINDOW

    o_tap = tl.arange(0, BLOCK_TAPS)
    b_taps = tl.load(
        p_weight + o_key[:, None] * TAPS + o_tap[None, :], mask=m_key[:, None] & (o_tap < TAPS)[None, :], other=0.0
    ).to(tl.float32)
    b_distance = tl.maximum(tl.abs(o_tap // KERNEL - MIDDLE), tl.abs(o_tap % KERNEL - MIDDLE))
    radius = tl.max(tl.max(tl.where(b_taps != 0, b_distance[None, :], 0), 1), 0)

    b_out = tl.zeros([BLOCK_KEY_DIM, BLOCK_TOKENS], tl.float32)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            m_token = (o_y + dy >= 0) & (o_y + dy < WINDOW) & (o_x + dx >= 0) & (o_x + dx < WINDOW)
            o_source = tl.where(m_token, o_token + dy * WINDOW + dx, 0)
            o_source = tl.broadcast_to(o_source[None, :], [BLOCK_KEY_DIM, BLOCK_TOKENS])
            b_shifted = tl.where(m_token[None, :], tl.gather(b_q, o_source, 1), 0.0)
            o_weight = o_key * TAPS + (dy + MIDDLE) * KERNEL + dx + MIDDLE
            b_weight = tl.load(p_weight + o_weight, mask=m_key, other=0.0).to(tl.float32)
            b_out += b_weight[:, None] * b_shifted
    return b_out


@triton.jit(do_not_specialize=["n_heads", "height", "width"])
def cascaded_attention_kernel(
    p_x,  # [B, C, H, W]
    p_qkv_weight,  # [h, 2k + D, D]
    p_qkv_bias,  # [h, 2k + D]
    p_query_weight,  # [h, k, KERNEL, KERNEL]
    p_query_bias,  # [h, k]
    p_attention_bias,  # [h, T, T]
    n_heads,
    height,
    width,
    p_out,  # [B, C, H, W]
    KEY_DIM: tl.constexpr,
    HEAD_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHUNKS: tl.constexpr = (HEAD_CHANNELS + CHUNK - 1) // CHUNK
    ROWS: tl.constexpr = 2 * KEY_DIM + HEAD_CHANNELS
    TOKENS: tl.constexpr = WINDOW * WINDOW
    dtype: tl.constexpr = p_x.dtype.element_ty
    columns = (width + WINDOW - 1) // WINDOW
    windows = (height + WINDOW - 1) // WINDOW * columns
    i_program = tl.program_id(0)
    i_window = i_program % windows
    i_image = (i_program // windows).to(tl.int64)

    o_token = tl.arange(0, BLOCK_TOKENS)
    o_y = i_window // columns * WINDOW + o_token // WINDOW
    o_x = i_window % columns * WINDOW + o_token % WINDOW
    m_window = o_token < TOKENS
    m_map = m_window & (o_y < height) & (o_x < width)
    if CHANNELS_LAST:
        stride_channel = 1
        stride_token = n_heads * HEAD_CHANNELS
    else:
        stride_channel = height * width
        stride_token = 1
    o_position = (o_y * width + o_x) * stride_token
    p_x += i_image * height * width * (n_heads * HEAD_CHANNELS)
    p_out += i_image * height * width * (n_heads * HEAD_CHANNELS)

    o_chunk = tl.arange(0, CHUNK)
    o_key = tl.arange(0, BLOCK_KEY_DIM)
    m_key = o_key < KEY_DIM
    scale = 1.0 / tl.sqrt(KEY_DIM * 1.0)

    b_previous = ()
    for _ in tl.static_range(CHUNKS):
        b_previous += (tl.zeros([CHUNK, BLOCK_TOKENS], dtype),)
    for i_head in tl.range(0, n_heads, disable_licm=True):  # hoisted weight addresses would spill
        p_w = p_qkv_weight + i_head * ROWS * HEAD_CHANNELS
        p_b = p_qkv_bias + i_head * ROWS

        b_q = tl.zeros([BLOCK_KEY_DIM, BLOCK_TOKENS], tl.float32)
        b_k = tl.zeros([BLOCK_KEY_DIM, BLOCK_TOKENS], tl.float32)
        b_parts = ()
        for i in tl.static_range(CHUNKS):
            o_channel = i * CHUNK + o_chunk
            m_channel = o_channel < HEAD_CHANNELS
            b_part = tl.load(
                p_x + (i_head * HEAD_CHANNELS + o_channel)[:, None] * stride_channel + o_position[None, :],
                mask=m_channel[:, None] & m_map[None, :],
                other=0.0,
            )  # [CHUNK, BT]
            b_part = (b_part.to(tl.float32) + b_previous[i].to(tl.float32)).to(dtype)
            b_parts += (b_part,)
            o_weight = o_key[:, None] * HEAD_CHANNELS + o_channel[None, :]
            m_weight = m_key[:, None] & m_channel[None, :]
            b_w = tl.load(p_w + o_weight, mask=m_weight, other=0.0)  # [BK, CHUNK]
            b_q = tl.dot(b_w, b_part, b_q, input_precision=PRECISION)  # [BK, CHUNK] @ [CHUNK, BT]
            b_w = tl.load(p_w + KEY_DIM * HEAD_CHANNELS + o_weight, mask=m_weight, other=0.0)
            b_k = tl.dot(b_w, b_part, b_k, input_precision=PRECISION)
        b_q += tl.load(p_b + o_key, mask=m_key, other=0.0).to(tl.float32)[:, None]
        b_k += tl.load(p_b + KEY_DIM + o_key, mask=m_key, other=0.0).to(tl.float32)[:, None]
        b_q = _query_convolution(
            b_q,
            p_query_weight + i_head * (KEY_DIM * KERNEL * KERNEL),
            KEY_DIM,
            KERNEL,
            WINDOW,
            BLOCK_KEY_DIM,
            BLOCK_TOKENS,
            BLOCK_TAPS,
        )
        b_q += tl.load(p_query_bias + i_head * KEY_DIM + o_key, mask=m_key, other=0.0).to(tl.float32)[:, None]

        b_scores = tl.dot(tl.trans(b_q.to(dtype)), b_k.to(dtype), input_precision=PRECISION) * scale  # queries by keys
        b_scores += tl.load(
            p_attention_bias + i_head * TOKENS * TOKENS + o_token[:, None] * TOKENS + o_token[None, :],
            mask=m_window[:, None] & m_window[None, :],
            other=0.0,
        ).to(tl.float32)
        b_scores = tl.where(m_window[None, :], b_scores, float("-inf"))
        b_weights = tl.exp(b_scores - tl.max(b_scores, 1)[:, None])
        b_weights = b_weights / tl.sum(b_weights, 1)[:, None]
        b_weights = tl.trans(b_weights.to(dtype))  # [BT, BT], keys by queries

        b_previous = ()
        for i in tl.static_range(CHUNKS):
            o_channel = i * CHUNK + o_chunk
            m_channel = o_channel < HEAD_CHANNELS
            b_v = tl.zeros([CHUNK, BLOCK_TOKENS], tl.float32)
            for j in tl.static_range(CHUNKS):
                o_inner = j * CHUNK + o_chunk
                b_w = tl.load(
                    p_w + (2 * KEY_DIM + o_channel)[:, None] * HEAD_CHANNELS + o_inner[None, :],
                    mask=m_channel[:, None] & (o_inner < HEAD_CHANNELS)[None, :],
                    other=0.0,
                )  # [CHUNK, CHUNK]
                b_v = tl.dot(b_w, b_parts[j], b_v, input_precision=PRECISION)  # [CHUNK, CHUNK] @ [CHUNK, BT]
            b_v += tl.load(p_b + 2 * KEY_DIM + o_channel, mask=m_channel, other=0.0).to(tl.float32)[:, None]
            b_out = tl.dot(b_v.to(dtype), b_weights, input_precision=PRECISION)  # [CHUNK, BT] @ [BT, BT]
            # Slots behind the last token carry nothing on: what grows there would meet a weight of zero as infinity.
            b_out = tl.where(m_channel[:, None] & m_window[None, :], b_out, 0.0).to(dtype)
            tl.store(
                p_out + (i_head * HEAD_CHANNELS + o_channel)[:, None] * stride_channel + o_position[None, :],
                tl.where(b_out < 0, 0.0, b_out),  # unlike maximum, this passes NaN on
                mask=m_channel[:, None] & m_map[None, :],
            )
            b_previous += (b_out,)
