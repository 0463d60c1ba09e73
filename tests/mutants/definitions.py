"""Faults of the operators' definitions, their ONNX functions and the scaled products in these, as tables.

A table has a fault's name, the text that is right and what stands there instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.mutants.fault import Fault
from tests.mutants.table import Table, faults

DEFINITIONS: Mapping[str, Table] = {
    "multi_scale_attention": {
        "no mask": ("masked_fill(~inside", "masked_fill(~inside & False"),
        "mask of the transposed map": ("permute(0, 2, 1, 3).reshape(rows", "permute(0, 2, 3, 1).reshape(rows"),
        "query and key swapped": ("permute(5, 0, 1, 3, 6, 2, 4, 7)", "permute(5, 0, 1, 3, 6, 2, 4, 7)[[1, 0, 2]]"),
        "no scale in windows": ("scores = (q @ k.transpose(-1, -2)) * dim**-0.5", "scores = q @ k.transpose(-1, -2)"),
        "no scale in the global branch": ("((q @ k.transpose(-1, -2)) * dim**-0.5).softmax", "(q @ k.mT).softmax"),
        "scale of all channels": ("* dim**-0.5  #", "* (dim * heads)**-0.5  #"),
        "softmax over queries": ('float("-inf")).softmax(dim=-1)', 'float("-inf")).softmax(dim=-2)'),
        "windows put together transposed": ("permute(0, 1, 4, 2, 5, 3, 6)", "permute(0, 1, 5, 2, 4, 3, 6)"),
        "padding on the left": (
            "padding = (0, columns * window - width, 0, rows * window - height)",
            "padding = (columns * window - width, 0, 0, rows * window - height)",
        ),
        "branches in another order": ("(qkv_small.to(dtype), heads", "(qkv_medium.to(dtype), heads"),
        "another window": ("MEDIUM_WINDOW = 7", "MEDIUM_WINDOW = 6"),
        "key and value swapped": ("k, v = keys_values", "v, k = keys_values"),
    },
    "projected_multi_scale_attention": {
        "no bias": ("F.linear(x.to(dtype), rows, constants)", "F.linear(x.to(dtype), rows)"),
        "the 3x3 windows twice": ("small, medium, queries, kv_large", "small, small, queries, kv_large"),
        "branches in another order": ("small, medium, queries =", "medium, small, queries ="),
        "weight of input by output": (
            "weight.to(dtype).split(sizes)",
            "weight.to(dtype).view(channels, -1).t().split(sizes)",
        ),
    },
    "lite_mla": {
        "query and key swapped": ("q, k, v = F.relu", "k, q, v = F.relu"),
        "no eps": ("(denominator + eps)", "denominator"),
        "no relu of the query": ("q, k, v = F.relu(x[:, :, :dim])", "q, k, v = (x[:, :, :dim])"),
        "no relu of the key": ("F.relu(x[:, :, dim : 2 * dim])", "x[:, :, dim : 2 * dim]"),
        "relu of the value": (", x[:, :, 2 * dim :]", ", F.relu(x[:, :, 2 * dim :])"),
        "mean instead of sum": ("k.sum(dim=-1, keepdim=True)", "k.mean(dim=-1, keepdim=True)"),
        "sum over queries": ("weights.sum(dim=-2, keepdim=True)", "weights.sum(dim=-1, keepdim=True)"),
        "maps swapped": ("torch.cat([qkv, aggregated], dim=1)", "torch.cat([aggregated, qkv], dim=1)"),
        "value transposed": ("(v @ k.transpose(-1, -2)) @ q", "(k @ v.transpose(-1, -2)) @ q"),
    },
    "cascaded_attention": {
        "no cascade": ("parts[i] + outputs[-1] if outputs else parts[i]", "parts[i]"),
        "query and key swapped": ("q, k, v = qkv.split", "k, q, v = qkv.split"),
        "no scale": (" * key_dim**-0.5", ""),
        "no attention bias": (" + attention_bias[i]", ""),
        "attention bias of the first head": ("+ attention_bias[i]", "+ attention_bias[0]"),
        "no query convolution": ("q = F.conv2d(q, query_weight", "_ = F.conv2d(q, query_weight"),
        "no query bias": ("query_bias[i], padding", "None, padding"),
        "no relu of the result": ("F.relu(torch.cat(outputs, dim=1))", "torch.cat(outputs, dim=1)"),
        "relu inside the cascade": (".view_as(v))", ".view_as(v).relu())"),
        "no projection bias": (", qkv_bias[i])", ")"),
        "padding on the left": ("(0, columns * window - width, 0,", "(columns * window - width, 0, 0,"),
        "softmax over queries": ("scores.softmax(dim=-1)", "scores.softmax(dim=-2)"),
        "windows put together transposed": ("permute(0, 3, 1, 4, 2, 5)", "permute(0, 3, 2, 4, 1, 5)"),
    },
}

FUNCTIONS: Mapping[str, Table] = {
    "EvitMultiScaleAttention": {
        "no mask": ("masked_{w} = Add ({w}_scores, mask)", "masked_{w} = Identity ({w}_scores)"),
        "no scale in windows": ("{w}_q = Mul ({w}_q_raw, scale)", "{w}_q = Identity ({w}_q_raw)"),
        "no scale in the global branch": (
            'q_scaled = Mul ({wide["q_large"]}, scale)',
            'q_scaled = Identity ({wide["q_large"]})',
        ),
        "query and key swapped": ("{w}_q_tiles, {w}_k_tiles, {w}_v_tiles =", "{w}_k_tiles, {w}_q_tiles, {w}_v_tiles ="),
        "key and value swapped": ("k_tokens, v_tokens = Split", "v_tokens, k_tokens = Split"),
        "padding at the top": (
            "(zero, zero, zero, zero, zero, {w}_bottom, {w}_right, zero)",
            "(zero, {w}_bottom, {w}_right, zero, zero, zero, zero, zero)",
        ),
        "mask only where rows are padded": ("Add ({w}_bottom, {w}_right)", "Add ({w}_bottom, zero)"),
        "another window": ("medium = Constant <value_ints: ints = [7]>", "medium = Constant <value_ints: ints = [6]>"),
        "branches in another order": ("(small_out, medium_out, large_out)", "(medium_out, small_out, large_out)"),
        "keys of all blocks side by side": (
            "(one, query_blocks, one, one, one, one)",
            "(query_blocks, one, one, one, one, one)",
        ),
    },
    "EvitProjectedMultiScaleAttention": {
        "weight of input by output": ("Gemm <transB = 1> (x_rows", "Gemm <transB = 0> (x_rows"),
        "no bias": ("{part}_weight, {part}_bias)", "{part}_weight)"),
        "branches in another order": (
            'parts = {"qkv_small": "channels_qkv", "qkv_medium"',
            'parts = {"qkv_medium": "channels_qkv", "qkv_small"',
        ),
    },
    "EvitLiteMLA": {
        "no eps": ("denominator = Add (weight_sum, epsilon)", "denominator = Identity (weight_sum)"),
        "no relu of the query": ("q = Relu (q_raw)", "q = Identity (q_raw)"),
        "no relu of the key": ("k = Relu (k_raw)", "k = Identity (k_raw)"),
        "query and key swapped": ("q_raw, k_raw, v = Split", "k_raw, q_raw, v = Split"),
        "value and key swapped": ("context = MatMul (v, k_t)", "context = MatMul (k, k_t)"),
        "mean instead of sum": ("ReduceSum (k, rest)", "ReduceMean (k, rest)"),
    },
    "EvitCascadedAttention": {
        "no cascade": ("Add (part_{i}, head_out_{i - 1})", "Identity (part_{i})"),
        "no attention bias": ("Add (scores_{i}, attention_bias_{i})", "Identity (scores_{i})"),
        "no scale": ("scores_{i} = Mul (products_{i}, scale)", "scores_{i} = Identity (products_{i})"),
        "query and key swapped": ("q_raw_{i}, k_map_{i}, v_map_{i} =", "k_map_{i}, q_raw_{i}, v_map_{i} ="),
        "no query padding": ('auto_pad = "SAME_UPPER"', 'auto_pad = "VALID"'),
        "padding at the top": (
            "(zero, zero, zero, zero, zero, zero, window_bottom, window_right)",
            "(zero, zero, window_bottom, window_right, zero, zero, zero, zero)",
        ),
        "no relu of the result": ("joined = Relu (heads_out)", "joined = Identity (heads_out)"),
        "one window wherever the height fits": ("And (fits_height, fits_width)", "And (fits_height, fits_height)"),
        "one window wherever there is one": (
            "one_window_1d = And (fits_height, fits_width)",
            "window_count = Mul (window_rows, window_columns)\n    one_window_1d = Equal (window_count, one)",
        ),
        "windows put together transposed": ("<perm = [0, 3, 1, 4, 2, 5]>", "<perm = [0, 3, 2, 4, 1, 5]>"),
    },
}

SCALED: Table = {
    "no scale of the left": ("{name}_part = Mul ({name}_small, {a}_scale)", "{name}_part = Identity ({name}_small)"),
    "no scale of the right": ("{name} = Mul ({name}_part, {b}_scale)", "{name} = Identity ({name}_part)"),
    "largest value where the sum counts": ('right, "ReduceSum"', 'right, "ReduceMax"'),
    "a bound without room": ("BOUND_BITS = 7 ", "BOUND_BITS = 9 "),
    "rounded down": ("= Ceil (", "= Floor ("),
    "another base": ("1.4426950408889634", "2.302585092994046"),
    "weights as they are": ("{name}_wide = Mul ({source}, bound)", "{name}_wide = Identity ({source})"),
    "negative values ignored": ("{name}_size = Abs ({source})", "{name}_size = Identity ({source})"),
    "zeros divided by zero": (
        "{name}_reduced = Max ({name}_found, smallest_size)",
        "{name}_reduced = Identity ({name}_found)",
    ),
    "smallest value of a row where the largest counts": (
        'left, "ReduceMax", "last_axis", like)\n',
        'left, "ReduceMin", "last_axis", like)\n',
    ),
    "scale of columns where the rows have theirs, before weights": (
        '"last_axis", like) + _scaled_weights',
        '"axis_before", like) + _scaled_weights',
    ),
}


def _of_definition(operator: str) -> tuple[Fault, ...]:
    others = " and not projected" if operator == "multi_scale_attention" else ""  # the other's name contains this one
    select = f"definition_matches and {operator}{others}"
    file = f"kernels/evit_kernels/{operator}/naive.py"
    return faults(f"{operator} definition", file, "tests/test_kernels.py", DEFINITIONS[operator], select)


def _of_function(operator: str) -> tuple[Fault, ...]:
    select = f"test_onnx_runtime_gives and {operator}"
    file = "evit_deploy/onnx/functions.py"
    return faults(operator, file, "tests/test_onnx_functions.py", FUNCTIONS[operator], select)


DEFINITION_FAULTS = (
    *(fault for operator in DEFINITIONS for fault in _of_definition(operator)),
    *(fault for operator in FUNCTIONS for fault in _of_function(operator)),
    *faults(
        "scaled products",
        "evit_deploy/onnx/scaled.py",
        "tests/test_onnx_functions_half.py",
        SCALED,
        "breaks_plain_products or stays_in_range or all_zero_maps",
    ),
)
