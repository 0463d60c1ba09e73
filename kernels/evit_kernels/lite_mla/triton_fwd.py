"""The fused kernel of `lite_mla`: one launch, two packed maps in, one map out; `naive.py` is its definition.

Legend: h1 and h2 heads of the two maps, n tokens, d head dim, BD = BLOCK_DIM >= d, BV = BLOCK_VALUE rows of v, BT =
BLOCK_TOKENS. `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask, `i_` index of a program or block.

A program takes one head, BV of its value rows and one of SPLITS shares of its queries. It first sums v k^T and k over
all tokens, then streams its queries. Sums, denominators and both products accumulate in FP32.
"""

import triton
import triton.language as tl


@triton.jit
def _relu(b_x):
    b_wide = b_x.to(tl.float32)
    return tl.where(b_wide < 0, 0.0, b_wide).to(b_x.dtype)  # unlike maximum, this passes NaN on


@triton.jit(do_not_specialize=["n_heads", "n_aggregated_heads", "n_tokens"])
def lite_mla_kernel(
    p_qkv,  # [B, h1 * 3 * d, n]
    p_aggregated,  # [B, h2 * 3 * d, n]
    n_heads,
    n_aggregated_heads,
    n_tokens,
    p_out,  # [B, (h1 + h2) * d, n]
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    QUADRATIC: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_tokens = n_tokens // ALIGN * ALIGN  # the same, and known to be a multiple: rows are read ALIGN elements at a time
    VALUE_BLOCKS: tl.constexpr = (DIM + BLOCK_VALUE - 1) // BLOCK_VALUE
    i_program = tl.program_id(0)
    i_split = i_program % SPLITS
    i_value = i_program // SPLITS % VALUE_BLOCKS
    n_all_heads = n_heads + n_aggregated_heads
    i_head = i_program // (SPLITS * VALUE_BLOCKS) % n_all_heads
    i_image = (i_program // (SPLITS * VALUE_BLOCKS) // n_all_heads).to(tl.int64)
    is_first = i_head < n_heads
    p_map = tl.where(is_first, p_qkv, p_aggregated)
    n_map_heads = tl.where(is_first, n_heads, n_aggregated_heads)
    i_map_head = tl.where(is_first, i_head, i_head - n_heads)

    if CHANNELS_LAST:
        stride_channel_in = 1
        stride_token_in = n_map_heads * (3 * DIM)
        stride_channel_out = 1
        stride_token_out = n_all_heads * DIM
    else:
        stride_channel_in = n_tokens
        stride_token_in = 1
        stride_channel_out = n_tokens
        stride_token_out = 1
    p_q = p_map + i_image * n_tokens * (n_map_heads * (3 * DIM)) + i_map_head * 3 * DIM * stride_channel_in
    p_k = p_q + DIM * stride_channel_in
    p_v = p_k + DIM * stride_channel_in
    p_o = p_out + i_image * n_tokens * (n_all_heads * DIM) + i_head * DIM * stride_channel_out

    o_dim = tl.arange(0, BLOCK_DIM)
    m_dim = o_dim < DIM
    o_value = i_value * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    m_value = o_value < DIM
    o_block = tl.arange(0, BLOCK_TOKENS)

    if QUADRATIC:
        m_token = o_block < n_tokens
        o_key = o_dim[:, None] * stride_channel_in + o_block[None, :] * stride_token_in
        m_key = m_dim[:, None] & m_token[None, :]
        b_q = _relu(tl.load(p_q + o_key, mask=m_key, other=0.0))  # [BD, BT]
        b_k = _relu(tl.load(p_k + o_key, mask=m_key, other=0.0))  # [BD, BT]
        b_v = tl.load(
            p_v + o_value[:, None] * stride_channel_in + o_block[None, :] * stride_token_in,
            mask=m_value[:, None] & m_token[None, :],
            other=0.0,
        )  # [BV, BT]
        b_weights = tl.dot(tl.trans(b_k), b_q, input_precision=PRECISION)  # [BT, BD] @ [BD, BT] -> keys by queries
        b_numerator = tl.dot(b_v.to(tl.float32), b_weights, input_precision=PRECISION)  # [BV, BT] @ [BT, BT]
        b_out = b_numerator / (tl.sum(b_weights, 0) + EPS)[None, :]
        tl.store(
            p_o + o_value[:, None] * stride_channel_out + o_block[None, :] * stride_token_out,
            b_out.to(p_out.dtype.element_ty),
            mask=m_value[:, None] & m_token[None, :],
        )
    else:
        b_state = tl.zeros([BLOCK_VALUE, BLOCK_DIM], tl.float32)
        b_total = tl.zeros([BLOCK_DIM], tl.float32)
        for start in range(0, n_tokens, BLOCK_TOKENS):
            o_token = start + o_block
            m_token = o_token < n_tokens
            b_k = tl.load(
                p_k + o_dim[:, None] * stride_channel_in + o_token[None, :] * stride_token_in,
                mask=m_dim[:, None] & m_token[None, :],
                other=0.0,
            )  # [BD, BT]
            b_v = tl.load(
                p_v + o_value[:, None] * stride_channel_in + o_token[None, :] * stride_token_in,
                mask=m_value[:, None] & m_token[None, :],
                other=0.0,
            )  # [BV, BT]
            b_k = _relu(b_k)
            b_state = tl.dot(b_v, tl.trans(b_k), b_state, input_precision=PRECISION)  # [BV, BT] @ [BT, BD]
            b_total += tl.sum(b_k.to(tl.float32), 1)
        for start in range(i_split * BLOCK_TOKENS, n_tokens, SPLITS * BLOCK_TOKENS):
            o_token = start + o_block
            m_token = o_token < n_tokens
            b_q = tl.load(
                p_q + o_dim[:, None] * stride_channel_in + o_token[None, :] * stride_token_in,
                mask=m_dim[:, None] & m_token[None, :],
                other=0.0,
            )  # [BD, BT]
            b_q = _relu(b_q).to(tl.float32)
            b_numerator = tl.dot(b_state, b_q, input_precision=PRECISION)  # [BV, BD] @ [BD, BT]
            b_denominator = tl.sum(b_total[:, None] * b_q, 0) + EPS  # [BT]
            b_out = b_numerator / b_denominator[None, :]
            tl.store(
                p_o + o_value[:, None] * stride_channel_out + o_token[None, :] * stride_token_out,
                b_out.to(p_out.dtype.element_ty),
                mask=m_value[:, None] & m_token[None, :],
            )
