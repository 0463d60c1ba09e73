"""Small Triton kernels for the tests of the ahead-of-time compiler: a good one, and faults it must refuse.

None is ever launched. Compiling one needs a process without the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def good_kernel(p_x, n_rows, p_out, SIZE: tl.constexpr):
    o = tl.program_id(0) * n_rows + tl.arange(0, SIZE)
    tl.store(p_out + o, tl.load(p_x + o) * 2)


@triton.jit
def squares_kernel(p_x, n_rows, p_out, SIZE: tl.constexpr):
    """The sum of squared tiles: few warps spill its accumulator, deep pipelines need much shared memory."""
    o = tl.arange(0, SIZE)
    b_out = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(n_rows):
        b_x = tl.load(p_x + i * SIZE * SIZE + o[:, None] * SIZE + o[None, :])
        b_out = tl.dot(b_x, b_x, b_out)
    tl.store(p_out + o[:, None] * SIZE + o[None, :], b_out.to(p_out.dtype.element_ty))


@triton.jit
def scratch_kernel(p_x, n_rows, p_out, SIZE: tl.constexpr):
    """A descriptor made in the kernel lies in memory that only Triton's own launcher allocates."""
    descriptor = tl.make_tensor_descriptor(p_x, [n_rows, SIZE], [SIZE, 1], [SIZE, SIZE])
    o = tl.arange(0, SIZE)
    tl.store(p_out + o[:, None] * SIZE + o[None, :], descriptor.load([tl.program_id(0) * SIZE, 0]))


@triton.jit
def reordered_kernel(p_out, n_rows, p_x, SIZE: tl.constexpr):
    """Its output comes first."""
    o = tl.program_id(0) * n_rows + tl.arange(0, SIZE)
    tl.store(p_out + o, tl.load(p_x + o) * 2)


@triton.jit
def broken_kernel(p_x, n_rows, p_out, SIZE: tl.constexpr):
    """A range that is no power of two."""
    o = tl.arange(0, SIZE + 1)
    tl.store(p_out + o, tl.load(p_x + o))
