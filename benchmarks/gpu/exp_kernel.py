"""A Triton kernel that does nothing but exponentials, in registers; imports triton at its top."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["repeats"])
def exp2_kernel(p_out, repeats, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """x = 2^-x again and again, which stays between 0.5 and 1; repeats * UNROLL times for each of BLOCK numbers."""
    o_value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = o_value.to(tl.float32) * 1e-9
    for _ in range(repeats):
        for _ in tl.static_range(UNROLL):
            b_x = tl.exp2(-b_x)
    tl.store(p_out + o_value, b_x)
