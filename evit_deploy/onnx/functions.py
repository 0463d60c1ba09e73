"""The fused operators as ONNX model-local functions of domain `evit`: bodies of standard operators, in ONNX text.

Any runtime inlines the bodies; a TensorRT plugin of the same name replaces them. The sizes a body needs come as
attributes: a runtime folds arithmetic on constants, but not on the shape of a tensor whose batch is dynamic.
`plugin_namespace` and `plugin_version` are for TensorRT's parser.

Legend: B batch, H x W map, N = H * W tokens, C channels, h heads, d head dim, M pooled tokens, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import onnx
import onnx.parser

from evit_deploy.constants import OPERATOR_DOMAIN
from evit_deploy.models.operators import (
    CASCADED_ATTENTION,
    LITE_MLA,
    MULTI_SCALE_ATTENTION,
    PROJECTED_MULTI_SCALE_ATTENTION,
    split_op_type,
)
from evit_deploy.onnx.scaled import with_scaled_products

PLUGIN_ATTRIBUTES = "plugin_namespace, plugin_version"

Form = Literal["fp32", "fp32-accumulation", "scaled"]


def operator_functions(op_types: Iterable[str], opset: int, form: Form = "fp32") -> list[onnx.FunctionProto]:
    """The model-local functions for the given operator types.

    Args:
        op_types: types of domain `evit` as they stand in a graph.
        opset: version of the standard operator set the bodies are written in.
        form: "fp32" for graphs that are FP32 throughout; the bodies of "fp32-accumulation" take any floating type, keep
            convolutions and projections in it, and compute the attention itself in FP32; those of "scaled" are the same
            but for the attention's matrix products, which are in the node's type, see `evit_deploy.onnx.scaled`.

    Raises:
        ValueError: an op_type that is no operator of ours.
    """
    return [_function(op_type, opset, form) for op_type in sorted(set(op_types))]


def replace_functions(model: onnx.ModelProto, form: Form) -> onnx.ModelProto:
    """A copy of a finished graph whose fused operators compute in another form; all else stays as it is."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    others = [function for function in model.functions if function.domain != OPERATOR_DOMAIN]
    names = [function.name for function in model.functions if function.domain == OPERATOR_DOMAIN]
    del changed.functions[:]
    changed.functions.extend([*others, *operator_functions(names, opset, form)])
    return changed


def _function(op_type: str, opset: int, form: Form) -> onnx.FunctionProto:
    name, count = split_op_type(op_type)
    if name == LITE_MLA and count is None:
        signature, body = _lite_mla(form)
    elif name == MULTI_SCALE_ATTENTION and count is None:
        signature, body = _multi_scale_attention(form)
    elif name == PROJECTED_MULTI_SCALE_ATTENTION and count is None:
        signature, body = _projected_multi_scale_attention(form)
    elif name == CASCADED_ATTENTION and count:
        signature, body = _cascaded_attention(count, form)
    else:
        known = (MULTI_SCALE_ATTENTION, PROJECTED_MULTI_SCALE_ATTENTION, LITE_MLA, f"{CASCADED_ATTENTION}<heads>")
        raise ValueError(f"unknown fused operator, got {op_type=}, known: {', '.join(known)}")
    if form == "scaled":
        inputs = signature[signature.index("(") + 1 : signature.index(")")]
        body = with_scaled_products(body, inputs.split(",")[0])
    header = f'<opset_import: ["" : {opset}], domain: "{OPERATOR_DOMAIN}">'
    return onnx.parser.parse_function(f"{header}\n{op_type} {signature}\n{{{body}}}")


def _widened(form: Form, name: str, expression: str) -> str:
    """`name = expression`, where the expression has the node's type and the name is to be FP32."""
    if form == "fp32":
        return f"{name} = {expression}"
    return f"""{name}_low = {expression}
    {name} = Cast <to = 1> ({name}_low)"""


def _narrowed(form: Form, name: str, expression: str, like: str) -> str:
    """`name = expression`, where the expression is FP32 and the name is to have the type of `like`."""
    if form == "fp32":
        return f"{name} = {expression}"
    return f"""{name}_wide = {expression}
    {name} = CastLike ({name}_wide, {like})"""


def _integers(*names: str) -> str:
    """Each named INT attribute as a tensor of one element of the same name."""
    return "".join(
        f"""
    {name}_scalar = Constant <value_int: int = @{name}> ()
    {name} = Reshape ({name}_scalar, one)"""
        for name in names
    )


_SMALL_INTEGERS = """
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    three = Constant <value_ints: ints = [3]> ()
    rest = Constant <value_ints: ints = [-1]> ()
"""


def _windows(window: str) -> str:
    """Rows and columns of windows, and the padding at the bottom and on the right, for `height` and `width`."""
    return f"""
    {window}_up = Sub ({window}, one)
    {window}_height = Add (height, {window}_up)
    {window}_rows = Div ({window}_height, {window})
    {window}_width = Add (width, {window}_up)
    {window}_columns = Div ({window}_width, {window})
    {window}_padded_height = Mul ({window}_rows, {window})
    {window}_padded_width = Mul ({window}_columns, {window})
    {window}_bottom = Sub ({window}_padded_height, height)
    {window}_right = Sub ({window}_padded_width, width)
    """


def _window_branch(qkv: str, window: str) -> str:
    """Attention inside windows of [B, H, W, 3C]; `{window}_out` is [B, N, C]."""
    w = window
    return f"""
    {_windows(w)}
    {w}_pads = Concat <axis = 0> (zero, zero, zero, zero, zero, {w}_bottom, {w}_right, zero)
    {w}_padded = Pad ({qkv}, {w}_pads)
    {w}_split = Concat <axis = 0> (zero, {w}_rows, {w}, {w}_columns, {w}, three, heads, head_dim)
    {w}_tiles = Reshape ({w}_padded, {w}_split)
    {w}_area = Mul ({w}, {w})
    {w}_tokens = Concat <axis = 0> (zero, rest, heads, {w}_area, head_dim)
    {w}_q_tiles, {w}_k_tiles, {w}_v_tiles = Split <axis = 5, num_outputs = 3> ({w}_tiles)
    {w}_q_windows = Transpose <perm = [0, 1, 3, 5, 6, 2, 4, 7]> ({w}_q_tiles)
    {w}_k_windows = Transpose <perm = [0, 1, 3, 5, 6, 2, 4, 7]> ({w}_k_tiles)
    {w}_v_windows = Transpose <perm = [0, 1, 3, 5, 6, 2, 4, 7]> ({w}_v_tiles)
    {w}_q_raw = Reshape ({w}_q_windows, {w}_tokens)
    {w}_q = Mul ({w}_q_raw, scale)
    {w}_k = Reshape ({w}_k_windows, {w}_tokens)
    {w}_v = Reshape ({w}_v_windows, {w}_tokens)
    {w}_k_t = Transpose <perm = [0, 1, 2, 4, 3]> ({w}_k)
    {w}_scores = MatMul ({w}_q, {w}_k_t)
    {w}_map_size = Concat <axis = 0> (height, width)
    {w}_padding_1d = Add ({w}_bottom, {w}_right)
    {w}_padding = Squeeze ({w}_padding_1d, zero)
    {w}_is_padded = Cast <to = 9> ({w}_padding)
    {w}_masked = If ({w}_is_padded) <
        then_branch = mask_{w} () => (float[?, ?, ?, ?, ?] masked_{w}) {{
            inside = ConstantOfShape <value = float[1] {{0}}> ({w}_map_size)
            mask_pads = Concat <axis = 0> (zero, zero, {w}_bottom, {w}_right)
            mask_map = Pad (inside, mask_pads, minus_infinity)
            mask_split = Concat <axis = 0> ({w}_rows, {w}, {w}_columns, {w})
            mask_tiles = Reshape (mask_map, mask_split)
            mask_windows = Transpose <perm = [0, 2, 1, 3]> (mask_tiles)
            mask_shape = Concat <axis = 0> (rest, one, one, {w}_area)
            mask = Reshape (mask_windows, mask_shape)
            masked_{w} = Add ({w}_scores, mask)
        }},
        else_branch = keep_{w} () => (float[?, ?, ?, ?, ?] kept_{w}) {{ kept_{w} = Identity ({w}_scores) }}>
    {w}_weights = Softmax <axis = -1> ({w}_masked)
    {w}_values = MatMul ({w}_weights, {w}_v)
    {w}_join = Concat <axis = 0> (zero, {w}_rows, {w}_columns, heads, {w}, {w}, head_dim)
    {w}_out_tiles = Reshape ({w}_values, {w}_join)
    {w}_out_rows = Transpose <perm = [0, 1, 4, 2, 5, 3, 6]> ({w}_out_tiles)
    {w}_out_shape = Concat <axis = 0> (zero, {w}_padded_height, {w}_padded_width, channels)
    {w}_out_padded = Reshape ({w}_out_rows, {w}_out_shape)
    {w}_starts = Concat <axis = 0> (zero, zero)
    {w}_axes = Constant <value_ints: ints = [1, 2]> ()
    {w}_out_map = Slice ({w}_out_padded, {w}_starts, {w}_map_size, {w}_axes)
    {w}_out = Reshape ({w}_out_map, tokens_shape)
    """


_MAPS = ("qkv_small", "qkv_medium", "q_large", "kv_large")
_MULTI_SCALE_ATTRIBUTES = f"heads, head_dim, height, width, query_blocks, {PLUGIN_ATTRIBUTES}"


def _projected_multi_scale_attention(form: Form) -> tuple[str, str]:
    """Three products with the parts of the weight, which a runtime folds; then as `multi_scale_attention`."""
    parts = {"qkv_small": "channels_qkv", "qkv_medium": "channels_qkv", "q_large": "channels"}
    weights, biases = (", ".join(f"{part}_{name}" for part in parts) for name in ("weight", "bias"))
    products = "".join(
        f"""
    {part}_rows = Gemm <transB = 1> (x_rows, {part}_weight, {part}_bias)
    {part}_shape = Concat <axis = 0> (rest, height, width, {size})
    {_widened(form, part, f"Reshape ({part}_rows, {part}_shape)")}"""
        for part, size in parts.items()
    )
    projections = f"""
    channels_qkv = Mul (three, channels)
    part_sizes = Concat <axis = 0> (channels_qkv, channels_qkv, channels)
    {weights} = Split <axis = 0> (weight, part_sizes)
    {biases} = Split <axis = 0> (bias, part_sizes)
    x_rows_shape = Concat <axis = 0> (rest, channels)
    x_rows = Reshape (x, x_rows_shape)
    {products}
    """
    signature = f"<{_MULTI_SCALE_ATTRIBUTES}> (x, kv_large, weight, bias) => (out)"
    return signature, _multi_scale_body(form, ("kv_large",), projections)


def _multi_scale_attention(form: Form) -> tuple[str, str]:
    signature = f"<{_MULTI_SCALE_ATTRIBUTES}> (qkv_small, qkv_medium, q_large, kv_large) => (out)"
    return signature, _multi_scale_body(form, ("qkv_small", "qkv_medium", "q_large", "kv_large"))


def _multi_scale_body(form: Form, maps: tuple[str, ...], projections: str = "") -> str:
    """Windows by reshape and transpose; the global branch scans over images and equal blocks of their queries.

    softmax(q k^T / sqrt(d)) v is exact for every block of queries on its own, and a block's scores stay in a CPU's
    cache, whatever the batch, where the whole [B, h, N, M] tensor does not. `step` carries nothing: TensorRT's parser
    refuses a Scan without a state.

    Args:
        maps: those of the four maps that are inputs of the function; `projections` makes the others.
    """
    wide = {name: f"{name}_map" if form != "fp32" and name in maps else name for name in _MAPS}
    casts = "".join(f"{wide[name]} = Cast <to = 1> ({name})\n" for name in maps if wide[name] != name)
    keys, key_count = _keys(form, wide["kv_large"])
    return f"""
    {_SMALL_INTEGERS}
    two = Constant <value_ints: ints = [2]> ()
    small = Constant <value_ints: ints = [3]> ()
    medium = Constant <value_ints: ints = [7]> ()
    minus_infinity = Constant <value_float: float = -inf> ()
    {_integers("height", "width", "heads", "head_dim", "query_blocks")}
    channels = Mul (heads, head_dim)
    head_dim_float = Cast <to = 1> (head_dim)
    head_dim_root = Sqrt (head_dim_float)
    scale = Reciprocal (head_dim_root)
    token_count = Mul (height, width)
    tokens_shape = Concat <axis = 0> (rest, token_count, channels)
    {projections}
    {casts}
    {_window_branch(wide["qkv_small"], "small")}
    {_window_branch(wide["qkv_medium"], "medium")}
    block_tokens = Div (token_count, query_blocks)
    q_scaled = Mul ({wide["q_large"]}, scale)
    q_shape = Concat <axis = 0> (rest, block_tokens, heads, head_dim)
    q_blocks = Reshape (q_scaled, q_shape)
    q = Transpose <perm = [0, 2, 1, 3]> (q_blocks)
    height_up = Add (height, one)
    width_up = Add (width, one)
    kv_height = Div (height_up, two)
    kv_width = Div (width_up, two)
    kv_count = Mul (kv_height, kv_width)
    kv_shape = Concat <axis = 0> (rest, one, kv_count, two, heads, head_dim)
    {keys}
    k_tokens, v_tokens = Split <axis = 3, num_outputs = 2> (kv_tokens)
    k_once = Transpose <perm = [0, 1, 3, 4, 5, 2]> (k_tokens)
    v_once = Transpose <perm = [0, 1, 3, 4, 2, 5]> (v_tokens)
    repeats = Concat <axis = 0> (one, query_blocks, one, one, one, one)
    k_repeated = Expand (k_once, repeats)
    v_repeated = Expand (v_once, repeats)
    k_shape = Concat <axis = 0> (rest, heads, head_dim, {key_count})
    v_shape = Concat <axis = 0> (rest, heads, {key_count}, head_dim)
    k = Reshape (k_repeated, k_shape)
    v = Reshape (v_repeated, v_shape)
    step = Constant <value_float: float = 0.0> ()
    last_step, large_blocks = Scan <num_scan_inputs = 3, body = attend
        (float before, float[?, ?, ?] q_block, float[?, ?, ?] k_block, float[?, ?, ?] v_block)
        => (float after, float[?, ?, ?] block_out) {{
            after = Identity (before)
            scores = MatMul (q_block, k_block)
            weights = Softmax <axis = -1> (scores)
            block_out = MatMul (weights, v_block)
        }}> (step, q, k, v)
    large_tokens = Transpose <perm = [0, 2, 1, 3]> (large_blocks)
    large_out = Reshape (large_tokens, tokens_shape)
    {_narrowed(form, "out", "Concat <axis = 2> (small_out, medium_out, large_out)", maps[-1])}
    """


def _keys(form: Form, kv_large: str) -> tuple[str, str]:
    """`kv_tokens`, and what their number is called.

    The only key of a map of up to 2x2 tokens is there twice in the scaled form, since TensorRT for RTX fails at one key
    for sm_75. Equal keys have equal weights, so that the result stays the same.
    """
    if form != "scaled":
        return f"kv_tokens = Reshape ({kv_large}, kv_shape)", "kv_count"
    text = f"""kv_given = Reshape ({kv_large}, kv_shape)
    single = Div (one, kv_count)
    times = Add (one, single)
    key_repeats = Concat <axis = 0> (one, one, times, one, one, one)
    kv_tokens = Expand (kv_given, key_repeats)
    key_count = Mul (kv_count, times)"""
    return text, "key_count"


def _lite_mla(form: Form) -> tuple[str, str]:
    """Channel-first throughout: v k^T, then its product with q; no transpose of a whole map, no padding of v."""
    signature = f"<dim, eps, height, width, {PLUGIN_ATTRIBUTES}> (qkv, aggregated) => (out)"
    body = f"""
    {_SMALL_INTEGERS}
    {_integers("height", "width", "dim")}
    head_channels = Mul (dim, three)
    epsilon = Constant <value_float: float = @eps> ()
    token_count = Mul (height, width)
    heads_shape = Concat <axis = 0> (zero, rest, head_channels, token_count)
    {_widened(form, "scales", "Concat <axis = 1> (qkv, aggregated)")}
    heads = Reshape (scales, heads_shape)
    q_raw, k_raw, v = Split <axis = 2, num_outputs = 3> (heads)
    q = Relu (q_raw)
    k = Relu (k_raw)
    k_t = Transpose <perm = [0, 1, 3, 2]> (k)
    context = MatMul (v, k_t)
    numerator = MatMul (context, q)
    k_sum = ReduceSum (k, rest)
    {_channel_sum(form)}
    denominator = Add (weight_sum, epsilon)
    ratio = Div (numerator, denominator)
    out_shape = Concat <axis = 0> (zero, rest, height, width)
    {_narrowed(form, "out", "Reshape (ratio, out_shape)", "qkv")}
    """
    return signature, body


def _channel_sum(form: Form) -> str:
    """`weight_sum`, q summed over its channels with the weights `k_sum`; the denominator is never in the low type."""
    if form == "scaled":
        return """channel_weights = Mul (k_sum, q)
    weight_sum = ReduceSum (channel_weights, axis_before)"""
    return """k_sum_t = Transpose <perm = [0, 1, 3, 2]> (k_sum)
    weight_sum = MatMul (k_sum_t, q)"""


def _cascaded_attention(heads: int, form: Form) -> tuple[str, str]:
    """The cascade unrolled over `heads`; all heads' parameters come stacked, in the layout of the definition.

    `kernels` has the edge of each head's depthwise kernel without the zeros around it, which would cost time.
    """
    signature = (
        f"<window, key_dim, kernels, height, width, {PLUGIN_ATTRIBUTES}> "
        "(x, qkv_weight, qkv_bias, query_weight, query_bias, attention_bias) => (out)"
    )

    def each(name: str) -> str:
        return ", ".join(f"{name}_{i}" for i in range(heads))

    steps = "".join(_cascade_step(i, form) for i in range(heads))
    biases = "attention_bias" if form == "fp32" else "attention_biases"
    map_type = "float[?, ?, ?, ?] " if form == "fp32" else ""  # else whatever type `x` has
    body = f"""
    {_SMALL_INTEGERS}
    heads = Constant <value_ints: ints = [{heads}]> ()
    {_integers("height", "width", "window", "key_dim")}
    key_dim_float = Cast <to = 1> (key_dim)
    key_dim_root = Sqrt (key_dim_float)
    scale = Reciprocal (key_dim_root)
    head_channels = Shape <start = 2, end = 3> (qkv_weight)
    channels = Mul (heads, head_channels)
    {_windows("window")}
    window_overlap = Add (window_bottom, window_right)
    has_whole_windows_1d = Equal (window_overlap, zero)
    has_whole_windows = Squeeze (has_whole_windows_1d, zero)
    fits_height = Equal (height, window)
    fits_width = Equal (width, window)
    one_window_1d = And (fits_height, fits_width)
    one_window = Squeeze (one_window_1d, zero)
    windows = If (one_window) <
        then_branch = take_map () => ({map_type}taken) {{ taken = Identity (x) }},
        else_branch = cut_windows () => ({map_type}cut) {{
            padded = If (has_whole_windows) <
                then_branch = keep () => ({map_type}kept) {{ kept = Identity (x) }},
                else_branch = pad () => ({map_type}extended) {{
                    pads = Concat <axis = 0> (zero, zero, zero, zero, zero, zero, window_bottom, window_right)
                    extended = Pad (x, pads)
                }}>
            tile_shape = Concat <axis = 0> (zero, channels, window_rows, window, window_columns, window)
            tiles = Reshape (padded, tile_shape)
            tiles_first = Transpose <perm = [0, 2, 4, 1, 3, 5]> (tiles)
            window_shape = Concat <axis = 0> (rest, channels, window, window)
            cut = Reshape (tiles_first, window_shape)
        }}>
    {each("part")} = Split <axis = 1, num_outputs = {heads}> (windows)
    {each("qkv_weight")} = Split <axis = 0, num_outputs = {heads}> (qkv_weight)
    {each("qkv_bias")} = Split <axis = 0, num_outputs = {heads}> (qkv_bias)
    {each("query_weight")} = Split <axis = 0, num_outputs = {heads}> (query_weight)
    {each("query_bias")} = Split <axis = 0, num_outputs = {heads}> (query_bias)
    {"" if form == "fp32" else f"{biases} = Cast <to = 1> (attention_bias)"}
    {each("attention_bias")} = Split <axis = 0, num_outputs = {heads}> ({biases})
    map_axes = Constant <value_ints: ints = [2, 3]> ()
    value_shape = Concat <axis = 0> (zero, head_channels, window, window)
    flat_shape = Concat <axis = 0> (zero, zero, rest)
    split_sizes = Concat <axis = 0> (key_dim, key_dim, head_channels)
    two = Constant <value_ints: ints = [2]> ()
    padded_kernel = Shape <start = 3, end = 4> (query_weight)
    kernels = Constant <value_ints: ints = @kernels> ()
    {each("kernel")} = Split <axis = 0, num_outputs = {heads}> (kernels)
    {steps}
    heads_out = Concat <axis = 1> ({each("head_out")})
    joined = Relu (heads_out)
    out = If (one_window) <
        then_branch = give_map () => ({map_type}given) {{ given = Identity (joined) }},
        else_branch = join_windows () => ({map_type}rejoined) {{
            join_shape = Concat <axis = 0> (rest, window_rows, window_columns, channels, window, window)
            out_tiles = Reshape (joined, join_shape)
            out_rows = Transpose <perm = [0, 3, 1, 4, 2, 5]> (out_tiles)
            padded_shape = Concat <axis = 0> (zero, channels, window_padded_height, window_padded_width)
            out_padded = Reshape (out_rows, padded_shape)
            rejoined = If (has_whole_windows) <
                then_branch = leave () => ({map_type}left) {{ left = Identity (out_padded) }},
                else_branch = crop () => ({map_type}cropped) {{
                    starts = Concat <axis = 0> (zero, zero)
                    ends = Concat <axis = 0> (height, width)
                    cropped = Slice (out_padded, starts, ends, map_axes)
                }}>
        }}>
    """
    return signature, body


def _cascade_step(i: int, form: Form) -> str:
    """Head `i`: projection, depthwise query convolution, attention; from `part_{i}` to `head_out_{i}`."""
    source = f"part_{i}" if i == 0 else f"cascade_{i}"
    add = "" if i == 0 else f"cascade_{i} = Add (part_{i}, head_out_{i - 1})"
    return f"""
    {add}
    kernel_qkv_map_{i} = Squeeze (qkv_weight_{i}, zero)
    kernel_qkv_{i} = Unsqueeze (kernel_qkv_map_{i}, map_axes)
    bias_qkv_{i} = Squeeze (qkv_bias_{i}, zero)
    qkv_{i} = Conv ({source}, kernel_qkv_{i}, bias_qkv_{i})
    q_raw_{i}, k_map_{i}, v_map_{i} = Split <axis = 1> (qkv_{i}, split_sizes)
    kernel_query_map_{i} = Squeeze (query_weight_{i}, zero)
    kernel_query_padded_{i} = Unsqueeze (kernel_query_map_{i}, one)
    kernel_zeros_{i} = Sub (padded_kernel, kernel_{i})
    kernel_begin_{i} = Div (kernel_zeros_{i}, two)
    kernel_end_{i} = Add (kernel_begin_{i}, kernel_{i})
    kernel_begins_{i} = Concat <axis = 0> (kernel_begin_{i}, kernel_begin_{i})
    kernel_ends_{i} = Concat <axis = 0> (kernel_end_{i}, kernel_end_{i})
    kernel_query_{i} = Slice (kernel_query_padded_{i}, kernel_begins_{i}, kernel_ends_{i}, map_axes)
    bias_query_{i} = Squeeze (query_bias_{i}, zero)
    q_map_{i} = Conv <group: int = @key_dim, auto_pad = "SAME_UPPER"> (q_raw_{i}, kernel_query_{i}, bias_query_{i})
    {_widened(form, f"q_{i}", f"Reshape (q_map_{i}, flat_shape)")}
    {_widened(form, f"k_{i}", f"Reshape (k_map_{i}, flat_shape)")}
    {_widened(form, f"v_{i}", f"Reshape (v_map_{i}, flat_shape)")}
    q_t_{i} = Transpose <perm = [0, 2, 1]> (q_{i})
    products_{i} = MatMul (q_t_{i}, k_{i})
    scores_{i} = Mul (products_{i}, scale)
    biased_{i} = Add (scores_{i}, attention_bias_{i})
    weights_{i} = Softmax <axis = -1> (biased_{i})
    weights_t_{i} = Transpose <perm = [0, 2, 1]> (weights_{i})
    values_{i} = MatMul (v_{i}, weights_t_{i})
    {_narrowed(form, f"head_out_{i}", f"Reshape (values_{i}, value_shape)", "x")}
    """
