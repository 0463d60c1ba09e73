"""The comparison of the Triton kernels with their definitions can fail: it finds each of these planted faults."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from evit_kernels import availability
from evit_kernels.launch import KernelLaunch
from evit_kernels.registry import OPERATORS

from tests import attention_references as references
from tests.attention_references import Arguments, cast, rms_relative
from tests.test_fused_kernels import TOLERANCES, arguments_of

pytest.importorskip("triton", reason="Triton is needed to run kernels")  # published for Linux only

KERNELS = Path(availability.__file__).parent
TILES = "multi_scale_attention/triton_tiles.py"  # helpers of two kernels
TILES_MODULE = "evit_kernels.multi_scale_attention.triton_tiles"
DTYPE = torch.float32
SHAPES = {
    "multi_scale_attention": ("padded-by-one", "odd", "no-padding"),
    "projected_multi_scale_attention": ("padded-by-one", "odd", "several-chunks", "no-padding"),
    "lite_mla": ("odd", "head-dim-48-linear", "quadratic-32", "several-splits"),
    "cascaded_attention": ("padded-both", "four-windows", "four-heads"),
}
MUTANTS = {
    "multi_scale_attention": {
        "windows of a tile mixed": ("(i_window[:, None] == i_window[None, :]) & m_token[None, :]", "m_token[None, :]"),
        "keys off the map": ("i_window[None, :]) & m_token[None, :]", "i_window[None, :])"),
        "another scale": ("tl.sqrt(DIM * 1.0)", "tl.sqrt(DIM * 2.0)"),
        "powers of e as powers of two": ("return 1.4426950408889634 /", "return 1.0 /"),
        "sum not rescaled": ("b_sum = b_sum * b_decay +", "b_sum = b_sum +"),
        "result not rescaled": ("b_out = b_out * b_decay[:, None]", "b_out = b_out"),
        "pooled keys behind the last": (
            'b_scores = tl.where(m_key[None, :], b_scores, float("-inf"))',
            "b_scores = b_scores",
        ),
        "key for value": ("b_v = tl.load(p_kv + CHANNELS + o_block", "b_v = tl.load(p_kv + o_block"),
        "sum of the last keys only": ("b_sum = b_sum * b_decay + tl.sum(b_weights, 1)", "b_sum = tl.sum(b_weights, 1)"),
        "global branch in the place of another": ("p_out + 2 * CHANNELS + o_query", "p_out + CHANNELS + o_query"),
    },
    "projected_multi_scale_attention": {
        "first input channels only": ("in range(0, CHANNELS, CHUNK)", "in range(0, CHUNK, CHUNK)"),
        "no bias": ("b_sum + b_bias[None, :]", "b_sum"),
        "keys of another head": ("i_row + C, C, DIM", "i_row + C - i_head * DIM, C, DIM"),
        "values are keys": ("i_row + 2 * C, C, DIM", "i_row + C, C, DIM"),
        "the 3x3 windows' weights in both branches": ("BRANCH * 3 * C + i_head", "0 * BRANCH * 3 * C + i_head"),
        "values' weights as the global queries'": ("i_row = 6 * C + i_head", "i_row = 5 * C + i_head"),
        "windows of a tile mixed": ("(i_window[:, None] == i_window[None, :]) & m_token[None, :]", "m_token[None, :]"),
        "keys off the map": ("i_window[None, :]) & m_token[None, :]", "i_window[None, :])"),
        "sum not rescaled": ("b_sum = b_sum * b_decay +", "b_sum = b_sum +"),
    },
    "lite_mla": {
        "no relu": ("tl.where(b_wide < 0, 0.0, b_wide)", "b_wide"),
        "first map twice": ("tl.where(is_first, p_qkv, p_aggregated)", "p_qkv"),
        "keys of the last block only": ("b_total += tl.sum(b_k.to(tl.float32), 1)", "b_total = tl.sum(b_k, 1)"),
        "state transposed": ("tl.dot(b_v, tl.trans(b_k), b_state", "tl.dot(b_k, tl.trans(b_v), b_state"),
        "every second block of queries": ("n_tokens, SPLITS * BLOCK_TOKENS)", "n_tokens, 2 * SPLITS * BLOCK_TOKENS)"),
        "sum over queries": ("tl.sum(b_weights, 0) + EPS", "tl.sum(b_weights, 1) + EPS"),
        "no eps": ("tl.sum(b_total[:, None] * b_q, 0) + EPS", "tl.sum(b_total[:, None] * b_q, 0)"),
        "no eps in the quadratic order": ("(tl.sum(b_weights, 0) + EPS)", "tl.sum(b_weights, 0)"),
    },
    "cascaded_attention": {
        "no cascade": ("b_part.to(tl.float32) + b_previous[i].to(tl.float32)", "b_part.to(tl.float32)"),
        "no relu": ("tl.where(b_out < 0, 0.0, b_out)", "b_out"),
        "relu inside the cascade": ("b_previous += (b_out,)", "b_previous += (tl.where(b_out < 0, 0.0, b_out),)"),
        "no scale": ("input_precision=PRECISION) * scale", "input_precision=PRECISION)"),
        "bias of the first head": ("p_attention_bias + i_head * TOKENS * TOKENS", "p_attention_bias"),
        "slots behind the window": ('tl.where(m_window[None, :], b_scores, float("-inf"))', "b_scores"),
        "no query bias": ("b_q += tl.load(p_query_bias", "b_q += 0 * tl.load(p_query_bias"),
        "last column of the query kernel": ("for dx in range(-radius, radius + 1)", "for dx in range(-radius, radius)"),
        "weights not transposed": ("tl.trans(b_weights.to(dtype))", "b_weights.to(dtype)"),
        "key for query": ("b_q = tl.dot(b_w, b_part, b_q,", "b_q = 0.0 * tl.dot(b_w, b_part, b_q,"),
    },
}


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Only where kernels are interpreted; tensors to be filled are full of NaN."""
    if not availability.interpreting():
        pytest.skip("a GPU compiles kernels, and the faults are those of the text")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def kernel_module(operator: str, source: str, folder: Path) -> ModuleType:
    """A kernel's module of another text; Triton reads the text from its file."""
    path = folder / f"{operator}_{len(list(folder.iterdir()))}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def cases(operator: str) -> Iterator[Arguments]:
    for shape in SHAPES[operator]:
        yield cast(arguments_of(operator, shape), DTYPE)
    if operator == "lite_mla":
        for height, width in ((3, 4), (7, 9)):  # the smaller one is taken in the quadratic order
            arguments = references.lite_mla_arguments(1, height, width, heads=2, dim=16)
            arguments["qkv"][:, :16, 0, 0] = -1.0  # a query of zeros: 0 / 0 without eps
            yield cast(arguments, DTYPE)


def finds_a_fault(operator: str) -> bool:
    for arguments in cases(operator):
        expected = OPERATORS[operator].definition(**cast(arguments, torch.float64))
        if not rms_relative(OPERATORS[operator].fused(**arguments), expected) <= TOLERANCES[operator][DTYPE]:
            return True
    return False


@pytest.mark.parametrize(
    ("operator", "fault"),
    [(operator, fault) for operator, faults in MUTANTS.items() for fault in ("none", *faults)],
)
def test_the_comparison_finds_a_wrong_kernel(
    operator: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tiles = ((KERNELS / path).read_text(encoding="utf-8") for path in (f"{operator}/triton_fwd.py", TILES))
    right, wrong = MUTANTS[operator].get(fault, ("", ""))
    uses_tiles = TILES_MODULE in source
    assert fault == "none" or source.count(right) + uses_tiles * tiles.count(right) == 1
    if right and right not in source:
        name = kernel_module("triton_tiles", tiles.replace(right, wrong), tmp_path).__name__
        source = source.replace(TILES_MODULE, name)
    module = kernel_module(operator, source.replace(right, wrong) if right else source, tmp_path)
    monkeypatch.setattr(KernelLaunch, "load_kernel", lambda launch: getattr(module, launch.kernel.split(":")[1]))
    assert finds_a_fault(operator) == (fault != "none")
