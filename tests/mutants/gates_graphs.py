"""Faults of what makes and changes graphs: export, precision, headroom, INT8 and what OpenVINO and ONNX Runtime get."""

from __future__ import annotations

from tests.mutants.table import faults

_ONNX = "evit_deploy/onnx"
_HEADROOM = "evit_deploy/headroom"
_RUNNERS = "evit_deploy/runners"

GRAPH_FAULTS = (
    *faults(
        "simplify",
        f"{_ONNX}/simplify.py",
        "tests/test_simplify.py",
        {
            "not compared": ("            if not equal:\n", "            if not feeds:\n"),
        },
    ),
    *faults(
        "export",
        f"{_ONNX}/export.py",
        "tests/test_onnx_export.py",
        {
            "batch of the example baked in": ("dynamic = batch is None and max_batch > 1", "dynamic = False"),
        },
        "TestBatch",
    ),
    *faults(
        "export",
        f"{_ONNX}/export.py",
        "tests/test_onnx_export.py",
        {
            "channels of pixels not swapped": ("x[:, [2, 1, 0]] if self.swap_channels else x", "x"),
        },
        "TestPreprocessing",
    ),
    *faults(
        "export",
        f"{_ONNX}/export.py",
        "tests/test_onnx_export.py",
        {"another opset than asked for": ("opset_version=opset,", "opset_version=MAX_OPSET,")},
        "TestOpset",
    ),
    *faults(
        "export",
        "evit_deploy/exporting.py",
        "tests/test_export.py",
        {
            "a graph that does not pass is written": (
                '    if report.verdict != "pass":\n',
                '    if report.verdict == "failed":\n',
            )
        },
        "does_not_pass",
    ),
    *faults(
        "export in FP16",
        f"{_ONNX}/precision.py",
        "tests/test_precision.py",
        {
            "means not in FP32": ('frozenset({"ReduceMean", ', "frozenset({"),
        },
        "TestGraph",
    ),
    *faults(
        "module in FP16",
        "evit_deploy/models/precision.py",
        "tests/test_precision.py",
        {
            "an infinite weight is not told": (
                "lost = value.isfinite() & ~low.isfinite()",
                "lost = value.isfinite() & low.isnan()",
            ),
        },
    ),
    *faults(
        "verify",
        "evit_deploy/verifying.py",
        "tests/test_export_precision.py",
        {
            "graph not held to its manifest's precision": (
                'if found not in (promised, "unknown") and not (',
                'if found == "mixed" and not (',
            ),
        },
        "another_precision_than",
    ),
    *faults(
        "headroom",
        f"{_HEADROOM}/limits.py",
        "tests/test_headroom.py",
        {
            "largest FP16 rounded up": ("65504.0", "65536.0"),
        },
    ),
    *faults(
        "headroom",
        f"{_HEADROOM}/rows.py",
        "tests/test_headroom.py",
        {
            "sums do not count": ("return max(self.max_abs, self.max_sum or 0.0)", "return self.max_abs"),
        },
    ),
    *faults(
        "headroom",
        f"{_HEADROOM}/statistics.py",
        "tests/test_headroom.py",
        {
            "last batch only": ("self.max_abs = max(self.max_abs, largest)", "self.max_abs = largest"),
        },
    ),
    *faults(
        "headroom",
        f"{_HEADROOM}/report.py",
        "tests/test_headroom_report.py",
        {
            "no margin asked": ("and row.margin_bits(kind) < self.margin_bits]", "and row.margin_bits(kind) < 0]"),
        },
    ),
    *faults(
        "headroom",
        f"{_HEADROOM}/storage.py",
        "tests/test_headroom_report.py",
        {"its own hash not compared": ("if found != report_hash(document):", "if found is None:")},
    ),
    *faults(
        "quantize",
        f"{_ONNX}/quantize.py",
        "tests/test_quantize_graph.py",
        {
            "one scale for all output channels": (
                "        True,  # one scale per output channel\n",
                "        False,  # one scale per output channel\n",
            ),
        },
    ),
    *faults(
        "quantize",
        "evit_deploy/quantization/thresholds.py",
        "tests/test_quantize_ranges.py",
        {
            "percentile of a percent too few": ("* (PERCENTILE / 100)", "* (PERCENTILE / 101)"),
        },
    ),
    *faults(
        "quantize",
        "evit_deploy/quantization/calibration.py",
        "tests/test_quantize_ranges.py",
        {
            "padding of a batch counted": (
                "value = found[name] if fixed is None else",
                "value = found[name] if True else",
            ),
        },
    ),
    *faults(
        "quantize",
        "evit_deploy/quantization/histogram.py",
        "tests/test_quantize_ranges.py",
        {"infinity accepted": ("if not math.isfinite(highest):", "if math.isnan(highest):")},
    ),
    *faults(
        "quantize",
        "evit_deploy/quantizing.py",
        "tests/test_quantize.py",
        {
            "a graph too far from PyTorch is written": (
                '    if report.verdict != "pass":\n',
                '    if report.verdict == "failed":\n',
            )
        },
        "too_far",
    ),
    *faults(
        "openvino",
        f"{_RUNNERS}/openvino_products.py",
        "tests/test_openvino_products.py",
        {
            "INT8 beyond 127": ("_INT8_MAX = 127", "_INT8_MAX = 128"),
        },
    ),
    *faults(
        "openvino",
        f"{_RUNNERS}/openvino_layout.py",
        "tests/test_openvino_layout.py",
        {
            "factors of a product not exchanged": ("= (right, left)", "= (left, right)"),
        },
    ),
    *faults(
        "openvino",
        f"{_RUNNERS}/openvino_graph.py",
        "tests/test_openvino_graph.py",
        {
            "weights that another convolution reads changed": (
                "{readers[y], readers[convolution.input[1]]} != {1}",
                "readers[y] != 1",
            ),
        },
    ),
    *faults(
        "openvino",
        f"{_RUNNERS}/openvino_lite_mla.py",
        "tests/test_openvino_lite_mla.py",
        {
            "heads of a block mixed": (
                "context = Where (same_head, products, nothing)",
                "context = Identity (products)",
            ),
        },
    ),
    *faults(
        "openvino",
        f"{_RUNNERS}/openvino_mixed.py",
        "tests/test_openvino_mixed.py",
        {
            "gates in BF16": (" | network.gates()", ""),
        },
    ),
    *faults(
        "onnxruntime",
        f"{_RUNNERS}/ort.py",
        "tests/test_backends.py",
        {
            "another provider than asked for accepted": (
                "if session.get_providers()[: len(self._providers)] != list(self._providers):",
                "if not session.get_providers():",
            ),
        },
        "did_not_start",
    ),
    *faults(
        "cost",
        "evit_deploy/cost.py",
        "tests/test_cost.py",
        {"multiply-adds counted twice": ("counter.get_total_flops() // 2", "counter.get_total_flops()")},
    ),
)
