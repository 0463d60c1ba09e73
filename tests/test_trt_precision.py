"""Real builds with TensorRT for RTX, without a GPU, of bundles in FP16, BF16 and INT8, with the plugin and without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from evit_deploy import api
from evit_deploy.bundle import Bundle
from evit_deploy.errors import EngineError
from evit_deploy.models.blocks import block_names
from evit_deploy.models.fused import fused_model
from evit_deploy.trt import BuildOptions, build_engine, plan_build
from evit_deploy.trt.range_check import range_doubt
from tests.in_process import cli
from tests.small_exports import SPECS, reference
from tests.tiers import tiered

if TYPE_CHECKING:
    from conftest import RunCli

IMAGE_SIZE = {"msa-m1": 96, "mit-b0": 64, "msra-m0": 224}
FAST_HALF = (("mit-b0", "bf16"),)
HALF = [(name, precision) for precision in ("fp16", "bf16") for name in IMAGE_SIZE]


@pytest.fixture(scope="module")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A kernel cache of this file's own; the environment that names it."""
    return {"EVIT_DEPLOY_KERNEL_CACHE": str(tmp_path_factory.mktemp("kernels"))}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A published model's bundle with random weights in a precision, not verified; its engines are the tests'."""
    done: dict[tuple[str, str], Path] = {}

    def get(name: str, precision: str) -> Path:
        if (name, precision) not in done:
            path = tmp_path_factory.mktemp("exported") / f"{name}-{precision}.evit"
            api.export(
                None,
                path,
                random_weights=name,
                image_size=IMAGE_SIZE[name],
                precision=precision,
                verify=False,
                simplify=False,
            )
            done[name, precision] = path
        return done[name, precision]

    return get


def with_plugin(run_cli: RunCli, path: Path, kernel_cache: dict[str, str]) -> dict[str, Any]:
    run = run_cli("build-trt", path, "--targets", "sm89", "--json", "--require-plugin", env=kernel_cache)
    assert run.returncode == 0, run.stderr
    engine: dict[str, Any] = json.loads(run.stdout)["engine"]
    return engine


@pytest.mark.parametrize(("name", "precision"), tiered(HALF, lambda *case: case in FAST_HALF))
def test_half_precision_builds(
    name: str,
    precision: str,
    exported: Callable[[str, str], Path],
    run_cli: RunCli,
    kernel_cache: dict[str, str],
) -> None:
    path = exported(name, precision)
    operators = Bundle.open(path).manifest["onnx"]["operators"]
    engine = with_plugin(run_cli, path, kernel_cache)
    assert engine["precision"] == precision
    assert engine["plugin"]["op_types"] == operators
    assert engine["plugin"]["layers"] == sum(operators.values())
    plain = api.build_trt(path, flavor="rtx", targets=("sm89",), plugin="off").record
    assert (plain.precision, plain.plugin["layers"]) == (precision, 0)
    assert {tensor["dtype"] for tensor in plain.io} == {"float32"}
    assert (engine["attention"], plain.attention) == ("plugin", "fp32-accumulation")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(IMAGE_SIZE))
def test_int8_builds(
    name: str,
    exported: Callable[[str, str], Path],
    run_cli: RunCli,
    kernel_cache: dict[str, str],
    tmp_path: Path,
) -> None:
    side = IMAGE_SIZE[name]
    np.save(tmp_path / "images.npy", np.random.default_rng(0).standard_normal((4, 3, side, side)).astype(np.float32))
    path = tmp_path / "int8.evit"
    api.quantize(exported(name, "fp32"), tmp_path / "images.npy", path, verify=False)
    bundle = Bundle.open(path)
    operators = bundle.manifest["onnx"]["operators"]
    assert sum(node.op_type == "DequantizeLinear" for node in onnx.load(bundle.onnx_path).graph.node) > 20
    engine = with_plugin(run_cli, path, kernel_cache)
    assert engine["precision"] == "int8"
    assert engine["plugin"]["op_types"] == operators
    assert engine["plugin"]["layers"] == sum(operators.values()) > 2
    assert api.build_trt(path, flavor="rtx", targets=("sm89",), plugin="off").record.plugin["layers"] == 0


@pytest.mark.exhaustive
def test_attention_in_both_types_builds(run_cli: RunCli, kernel_cache: dict[str, str], tmp_path: Path) -> None:
    """Kept blocks have an FP32 plugin beside the FP16 ones."""
    from safetensors.torch import save_file

    from evit_deploy.checkpoint import SPEC_METADATA_KEY

    spec = SPECS["msra"]
    metadata = {SPEC_METADATA_KEY: json.dumps(spec.to_json(), sort_keys=True)}
    save_file(
        {k: v.contiguous() for k, v in reference("msra").state_dict().items()}, tmp_path / "m.safetensors", metadata
    )
    last = block_names(fused_model(reference("msra"), spec))[-1]
    path = tmp_path / "m.evit"
    api.export(tmp_path / "m.safetensors", path, precision="fp16", keep_fp32=(last,), verify=False)
    engine = with_plugin(run_cli, path, kernel_cache)
    assert engine["plugin"]["layers"] == 4
    assert api.build_trt(path, flavor="rtx", targets=("sm89",), plugin="off").record.plugin["layers"] == 0


class TestSm75:
    """No kernel of ours, no FP32 matrix product of TensorRT for RTX: the attention's products are FP16, scaled."""

    @pytest.mark.parametrize("name", tiered(["msa-m1", "mit-b0", "msra-m0"], "mit-b0".__eq__))
    def test_half_precision_builds(self, name: str, exported: Callable[[str, str], Path]) -> None:
        path = exported(name, "fp16")
        before = Bundle.open(path).onnx_sha256
        result = api.build_trt(path, flavor="rtx", targets=("sm75",))
        assert result.record.attention == "scaled"
        assert result.record.key_parts["attention"] == "scaled"
        assert result.record.onnx_sha256 == before == Bundle.open(path).onnx_sha256
        assert any("FP32 matrix products for sm75" in note for note in result.notes)
        assert not list((path / "engines").glob("*.onnx"))
        assert not list((path / "engines").glob(".staging*"))
        assert api.build_trt(path, flavor="rtx", targets=("sm75",)).reused

    @pytest.mark.exhaustive
    def test_an_image_so_small_that_there_is_a_single_key(self, tmp_path: Path) -> None:
        """Maps of 2x2 tokens: the compiler fails at products with one key, and is given it twice."""
        path = tmp_path / "m.evit"
        api.export(None, path, random_weights="msa-m1", image_size=64, precision="fp16", verify=False)
        assert api.build_trt(path, flavor="rtx", targets=("sm75",)).record.attention == "scaled"

    @pytest.mark.parametrize(
        ("precision", "targets", "plugin", "attention"),
        [
            ("fp16", ("sm75",), "auto", "scaled"),
            ("fp16", ("sm75", "sm89"), "off", "scaled"),
            ("fp16", ("sm89",), "off", "fp32-accumulation"),
            ("fp16", (), "off", "fp32-accumulation"),
            ("fp16", ("sm89",), "auto", "plugin"),
            ("fp32", ("sm75",), "off", "fp32"),
        ],
    )
    def test_the_form_is_decided_beforehand(
        self,
        precision: str,
        targets: tuple[str, ...],
        plugin: str,
        attention: str,
        exported: Callable[[str, str], Path],
    ) -> None:
        bundle = Bundle.open(exported("mit-b0", precision))
        plan = plan_build(bundle, BuildOptions(flavor="rtx", targets=targets, plugin=plugin))
        assert plan.attention == plan.key_parts["attention"] == plan.to_json()["attention"] == attention

    @pytest.mark.parametrize(
        ("precision", "lacking", "words"),
        [
            ("fp32", "FP32 matrix products", "FP32 GEMM is not supported"),
            ("bf16", "BF16", "HW-specific datatypes: b16"),
        ],
    )
    def test_what_it_lacks_is_said(
        self, precision: str, lacking: str, words: str, exported: Callable[[str, str], Path]
    ) -> None:
        path = exported("mit-b0", precision)
        with pytest.raises(EngineError) as info:
            api.build_trt(path, flavor="rtx", targets=("sm75",), plugin="off")
        assert info.value.summary.endswith(f"has no {lacking} for sm75, and this graph is {precision}")
        assert any(words in line for line in info.value.details)
        assert "--precision fp16" in info.value.hint

    @pytest.mark.exhaustive
    def test_kept_blocks_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "kept.evit"
        api.export(
            None,
            path,
            random_weights="mit-b0",
            image_size=64,
            precision="fp16",
            keep_fp32=("stages.2.blocks.1",),
            verify=False,
            simplify=False,
        )
        with pytest.raises(EngineError, match=r"this graph is fp16 with stages\.2\.blocks\.1 in FP32"):
            api.build_trt(path, flavor="rtx", targets=("sm75",), plugin="off")

    def test_the_scaled_graph_is_never_left_out(self, exported: Callable[[str, str], Path]) -> None:
        bundle = Bundle.open(exported("mit-b0", "fp16"))
        with pytest.raises(ValueError, match="needs scaled_graph"):
            build_engine(bundle, BuildOptions(flavor="rtx", targets=("sm75",), plugin="off", force=True))


class TestHeadroom:
    """FP16 whose range nobody measured is said to be so, and refused on request."""

    @pytest.fixture
    def digits_half(self, digits_bundle: Bundle, tmp_path: Path) -> Path:
        return api.export(digits_bundle.path, tmp_path / "half.evit", precision="fp16", verify=False).bundle.path

    def test_never_measured(self, digits_half: Path) -> None:
        done = cli("build-trt", digits_half, "--flavor", "rtx", "--dry-run", "--no-plugin")
        assert done.code == 0, done.err
        assert "note: FP16: its headroom was never measured" in done.out
        refused = cli("build-trt", digits_half, "--flavor", "rtx", "--no-plugin", "--require-headroom")
        assert refused.code == 1
        assert "its headroom was never measured" in refused.error
        assert not (digits_half / "engines").exists()

    @pytest.mark.exhaustive
    def test_measured_later(self, digits_half: Path, digits: Path) -> None:
        api.headroom(digits_half, digits / "heldout", limit=2)
        done = cli("build-trt", digits_half, "--flavor", "rtx", "--dry-run", "--no-plugin", "--require-headroom")
        assert done.code == 0, done.err
        assert "headroom" not in done.out

    @pytest.mark.exhaustive
    def test_measured_before_the_export(self, digits_bundle: Bundle, digits: Path, tmp_path: Path) -> None:
        source = shutil.copytree(digits_bundle.path, tmp_path / "source.evit")
        api.headroom(source, digits / "heldout", limit=2)
        half = api.export(source, tmp_path / "half.evit", precision="fp16", verify=False).bundle
        assert range_doubt(half) == ""

    @pytest.mark.exhaustive
    def test_a_report_that_asks_for_more_fp32(self, digits_half: Path) -> None:
        half = Bundle.open(digits_half)
        summary = {"verdict": "keep", "images": 2, "keep_fp32": ["stem", "head"], "report_sha256": "0" * 64}
        facts = {**half.manifest["onnx"], "keep_fp32": ["stem"]}
        asked = Bundle(half.path, {**half.manifest, "headroom": summary, "onnx": facts}, {})
        assert "asks for FP32 in head:" in range_doubt(asked)

    def test_other_precisions_need_none(self, digits_bundle: Bundle) -> None:
        assert range_doubt(digits_bundle) == ""
