"""Faults of the Triton kernels; the comparison with their definitions must find each."""

from __future__ import annotations

from tests.mutants.fault import Fault

FILES = "kernels/evit_kernels"
TESTS = ("tests/test_fused_kernels.py",)


def fault(operator: str, name: str, file: str, right: str, wrong: str) -> Fault:
    """A fault that a test of its operator must catch."""
    # The name of another operator contains that of multi_scale_attention.
    others = " and not projected" if operator == "multi_scale_attention" else ""
    return Fault(f"{operator}: {name}", f"{FILES}/{file}", right, wrong, TESTS, f"interpreter and {operator}{others}")


KERNEL_FAULTS = (
    fault(
        "multi_scale_attention",
        "windows of a tile mixed",
        "multi_scale_attention/triton_tiles.py",
        "(i_window[:, None] == i_window[None, :]) & m_token[None, :]",
        "m_token[None, :]",
    ),
    fault(
        "multi_scale_attention",
        "keys off the map",
        "multi_scale_attention/triton_tiles.py",
        "i_window[None, :]) & m_token[None, :]",
        "i_window[None, :])",
    ),
    fault(
        "multi_scale_attention",
        "another scale",
        "multi_scale_attention/triton_tiles.py",
        "tl.sqrt(DIM * 1.0)",
        "tl.sqrt(DIM * 2.0)",
    ),
    fault(
        "multi_scale_attention",
        "powers of e as powers of two",
        "multi_scale_attention/triton_tiles.py",
        "return 1.4426950408889634 /",
        "return 1.0 /",
    ),
    fault(
        "multi_scale_attention",
        "sum not rescaled",
        "multi_scale_attention/triton_tiles.py",
        "b_sum = b_sum * b_decay +",
        "b_sum = b_sum +",
    ),
    fault(
        "multi_scale_attention",
        "result not rescaled",
        "multi_scale_attention/triton_tiles.py",
        "b_out = b_out * b_decay[:, None]",
        "b_out = b_out",
    ),
    fault(
        "multi_scale_attention",
        "pooled keys behind the last",
        "multi_scale_attention/triton_tiles.py",
        'b_scores = tl.where(m_key[None, :], b_scores, float("-inf"))',
        "b_scores = b_scores",
    ),
    fault(
        "multi_scale_attention",
        "key for value",
        "multi_scale_attention/triton_tiles.py",
        "b_v = tl.load(p_kv + CHANNELS + o_block",
        "b_v = tl.load(p_kv + o_block",
    ),
    fault(
        "multi_scale_attention",
        "sum of the last keys only",
        "multi_scale_attention/triton_tiles.py",
        "b_sum = b_sum * b_decay + tl.sum(b_weights, 1)",
        "b_sum = tl.sum(b_weights, 1)",
    ),
    fault(
        "multi_scale_attention",
        "global branch in the place of another",
        "multi_scale_attention/triton_fwd.py",
        "p_out + 2 * CHANNELS + o_query",
        "p_out + CHANNELS + o_query",
    ),
    fault(
        "projected_multi_scale_attention",
        "first input channels only",
        "projected_multi_scale_attention/triton_fwd.py",
        "in range(0, CHANNELS, CHUNK)",
        "in range(0, CHUNK, CHUNK)",
    ),
    fault(
        "projected_multi_scale_attention",
        "no bias",
        "projected_multi_scale_attention/triton_fwd.py",
        "b_sum + b_bias[None, :]",
        "b_sum",
    ),
    fault(
        "projected_multi_scale_attention",
        "keys of another head",
        "projected_multi_scale_attention/triton_fwd.py",
        "i_row + C, C, DIM",
        "i_row + C - i_head * DIM, C, DIM",
    ),
    fault(
        "projected_multi_scale_attention",
        "values are keys",
        "projected_multi_scale_attention/triton_fwd.py",
        "i_row + 2 * C, C, DIM",
        "i_row + C, C, DIM",
    ),
    fault(
        "projected_multi_scale_attention",
        "the 3x3 windows' weights in both branches",
        "projected_multi_scale_attention/triton_fwd.py",
        "BRANCH * 3 * C + i_head",
        "0 * BRANCH * 3 * C + i_head",
    ),
    fault(
        "projected_multi_scale_attention",
        "values' weights as the global queries'",
        "projected_multi_scale_attention/triton_fwd.py",
        "i_row = 6 * C + i_head",
        "i_row = 5 * C + i_head",
    ),
    fault(
        "projected_multi_scale_attention",
        "windows of a tile mixed",
        "multi_scale_attention/triton_tiles.py",
        "(i_window[:, None] == i_window[None, :]) & m_token[None, :]",
        "m_token[None, :]",
    ),
    fault(
        "projected_multi_scale_attention",
        "keys off the map",
        "multi_scale_attention/triton_tiles.py",
        "i_window[None, :]) & m_token[None, :]",
        "i_window[None, :])",
    ),
    fault(
        "projected_multi_scale_attention",
        "sum not rescaled",
        "multi_scale_attention/triton_tiles.py",
        "b_sum = b_sum * b_decay +",
        "b_sum = b_sum +",
    ),
    fault("lite_mla", "no relu", "lite_mla/triton_fwd.py", "tl.where(b_wide < 0, 0.0, b_wide)", "b_wide"),
    fault("lite_mla", "first map twice", "lite_mla/triton_fwd.py", "tl.where(is_first, p_qkv, p_aggregated)", "p_qkv"),
    fault(
        "lite_mla",
        "keys of the last block only",
        "lite_mla/triton_fwd.py",
        "b_total += tl.sum(b_k.to(tl.float32), 1)",
        "b_total = tl.sum(b_k, 1)",
    ),
    fault(
        "lite_mla",
        "state transposed",
        "lite_mla/triton_fwd.py",
        "tl.dot(b_v, tl.trans(b_k), b_state",
        "tl.dot(b_k, tl.trans(b_v), b_state",
    ),
    fault(
        "lite_mla",
        "every second block of queries",
        "lite_mla/triton_fwd.py",
        "n_tokens, SPLITS * BLOCK_TOKENS)",
        "n_tokens, 2 * SPLITS * BLOCK_TOKENS)",
    ),
    fault(
        "lite_mla",
        "sum over queries",
        "lite_mla/triton_fwd.py",
        "tl.sum(b_weights, 0) + EPS",
        "tl.sum(b_weights, 1) + EPS",
    ),
    fault(
        "lite_mla",
        "no eps",
        "lite_mla/triton_fwd.py",
        "tl.sum(b_total[:, None] * b_q, 0) + EPS",
        "tl.sum(b_total[:, None] * b_q, 0)",
    ),
    fault(
        "lite_mla",
        "no eps in the quadratic order",
        "lite_mla/triton_fwd.py",
        "(tl.sum(b_weights, 0) + EPS)",
        "tl.sum(b_weights, 0)",
    ),
    fault(
        "cascaded_attention",
        "no cascade",
        "cascaded_attention/triton_fwd.py",
        "b_part.to(tl.float32) + b_previous[i].to(tl.float32)",
        "b_part.to(tl.float32)",
    ),
    fault(
        "cascaded_attention", "no relu", "cascaded_attention/triton_fwd.py", "tl.where(b_out < 0, 0.0, b_out)", "b_out"
    ),
    fault(
        "cascaded_attention",
        "relu inside the cascade",
        "cascaded_attention/triton_fwd.py",
        "b_previous += (b_out,)",
        "b_previous += (tl.where(b_out < 0, 0.0, b_out),)",
    ),
    fault(
        "cascaded_attention",
        "no scale",
        "cascaded_attention/triton_fwd.py",
        "input_precision=PRECISION) * scale",
        "input_precision=PRECISION)",
    ),
    fault(
        "cascaded_attention",
        "bias of the first head",
        "cascaded_attention/triton_fwd.py",
        "p_attention_bias + i_head * TOKENS * TOKENS",
        "p_attention_bias",
    ),
    fault(
        "cascaded_attention",
        "slots behind the window",
        "cascaded_attention/triton_fwd.py",
        'tl.where(m_window[None, :], b_scores, float("-inf"))',
        "b_scores",
    ),
    fault(
        "cascaded_attention",
        "no query bias",
        "cascaded_attention/triton_fwd.py",
        "b_q += tl.load(p_query_bias",
        "b_q += 0 * tl.load(p_query_bias",
    ),
    fault(
        "cascaded_attention",
        "last column of the query kernel",
        "cascaded_attention/triton_fwd.py",
        "for dx in range(-radius, radius + 1)",
        "for dx in range(-radius, radius)",
    ),
    fault(
        "cascaded_attention",
        "weights not transposed",
        "cascaded_attention/triton_fwd.py",
        "tl.trans(b_weights.to(dtype))",
        "b_weights.to(dtype)",
    ),
    fault(
        "cascaded_attention",
        "key for query",
        "cascaded_attention/triton_fwd.py",
        "b_q = tl.dot(b_w, b_part, b_q,",
        "b_q = 0.0 * tl.dot(b_w, b_part, b_q,",
    ),
)
