"""The matrix products of a function's body in the node's own type, scaled so that nothing in them leaves FP16's range.

For builders without a matrix product in FP32 (TensorRT for RTX on sm_75). Each product of FP32 tensors A B becomes

    s_i t_j * (A_ik / s_i) (B_kj / t_j)

with powers of two s_i and t_j, one for each row of A and each column of B: the division and the factor are exact, and
only the product itself is in the low type. They are chosen such that

    max_k |A_ik / s_i| <= BOUND    and    sum_k |B_kj / t_j| <= BOUND

so every term, and every sum of some of them in any order, stays below BOUND^2 = 2^14, whatever the sums' length: a
quarter of FP16's largest value, 65 504. What becomes smaller than FP16's smallest value is below 2^-31 of the largest
in its row, or of its column's sum. The weights of a softmax need no such search: their rows sum to 1.
"""

from __future__ import annotations

import re

BOUND_BITS = 7  # 2^7 * 2^7 = 2^14

_PRODUCT = re.compile(r"(\w+) = MatMul \((\w+), (\w+)\)")
_WEIGHTS = re.compile(r"(\w+_)?weights(_\w+)?")  # what the bodies call a softmax's result, transposed or not

CONSTANTS = f"""
    last_axis = Constant <value_ints: ints = [-1]> ()
    axis_before = Constant <value_ints: ints = [-2]> ()
    two_float = Constant <value_float: float = 2.0> ()
    bits_per_nat = Constant <value_float: float = 1.4426950408889634> ()
    smallest_size = Constant <value_float: float = {2.0**-100!r}> ()
    bound = Constant <value_float: float = {2.0**BOUND_BITS!r}> ()
    bound_reciprocal = Constant <value_float: float = {2.0**-BOUND_BITS!r}> ()
"""


def with_scaled_products(body: str, like: str) -> str:
    """The body with every `name = MatMul (a, b)` in the type of `like`; a, b and name stay FP32.

    Args:
        body: ONNX text, that of a loop or branch included.
        like: an input of the function.
    """

    def scaled(match: re.Match[str]) -> str:
        name, left, right = match.groups()
        a, b = f"{name}_a", f"{name}_b"
        if _WEIGHTS.fullmatch(right):
            operands = _scaled(a, left, "ReduceMax", "last_axis", like) + _scaled_weights(b, right, like)
        elif _WEIGHTS.fullmatch(left):
            operands = _scaled_weights(a, left, like) + _scaled(b, right, "ReduceMax", "axis_before", like)
        else:
            operands = _scaled(a, left, "ReduceMax", "last_axis", like)
            operands += _scaled(b, right, "ReduceSum", "axis_before", like)
        return f"""{operands}
    {name}_low = MatMul ({a}, {b})
    {name}_small = Cast <to = 1> ({name}_low)
    {name}_part = Mul ({name}_small, {a}_scale)
    {name} = Mul ({name}_part, {b}_scale)"""

    return CONSTANTS + _PRODUCT.sub(scaled, body)


def _scaled(name: str, source: str, reduction: str, axis: str, like: str) -> str:
    """`name`, and `{name}_scale`: the power of two that takes the reduced magnitudes to at most BOUND."""
    return f"""
    {name}_size = Abs ({source})
    {name}_found = {reduction} ({name}_size, {axis})
    {name}_reduced = Max ({name}_found, smallest_size)
    {name}_nats = Log ({name}_reduced)
    {name}_bits = Mul ({name}_nats, bits_per_nat)
    {name}_exponent = Ceil ({name}_bits)
    {name}_power = Pow (two_float, {name}_exponent)
    {name}_scale = Mul ({name}_power, bound_reciprocal)
    {name}_wide = Div ({source}, {name}_scale)
    {name} = CastLike ({name}_wide, {like})"""


def _scaled_weights(name: str, source: str, like: str) -> str:
    return f"""
    {name}_scale = Identity (bound_reciprocal)
    {name}_wide = Mul ({source}, bound)
    {name} = CastLike ({name}_wide, {like})"""
