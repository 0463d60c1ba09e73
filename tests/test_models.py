"""The reference modules of `mit` and `msra`, and random weights."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from evit_deploy.models import build_model, load_model
from evit_deploy.models.msra import attention_windows, bias_indices, resize_attention_biases, stage_resolutions
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.models.timm_import import import_timm
from evit_deploy.specs import ModelSpec, split_name, variant_names
from tests.checkpoints import images, logits_of, random_weights, rms_relative

ROOT = Path(__file__).parents[1]
TIMM_MODELS = (*variant_names("mit"), *variant_names("msra"))
SMALL_MODELS = ("mit-b0", "mit-l1", "msra-m0", "msa-m1")


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_canonical_names_are_those_of_timms_registered_model(name: str) -> None:
    timm = import_timm()
    with torch.device("meta"):
        ours = build_model(ModelSpec.published(name)).state_dict()
        theirs = timm.create_model(f"efficientvit_{split_name(name)[1]}").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(("name", "norm_eps"), [("mit-b0", 1e-5), ("mit-l1", 1e-7)])
def test_mit_takes_both_eps_from_the_config(name: str, norm_eps: float) -> None:
    spec = ModelSpec.published(name)
    assert spec.config["norm_eps"] == norm_eps
    with torch.device("meta"):
        model = build_model(replace(spec, config={**spec.config, "attention_eps": 1e-15}))
    attention = [m.eps for m in model.modules() if type(m).__name__ == "LiteMLA"]
    norms = [m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    assert attention == [1e-15] * sum(spec.config["depths"][3 if name == "mit-b0" else 4 :])
    assert set(norms) == {norm_eps}


@pytest.mark.parametrize("name", ["mit-b0", "msra-m0"])
def test_build_model_is_in_evaluation_mode_with_the_asked_classes(name: str) -> None:
    model = build_model(ModelSpec.published(name, num_classes=7, image_size=96))
    assert not any(module.training for module in model.modules())
    assert logits_of(model, images(96, count=1)).shape == (1, 7)


def test_an_unknown_family_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="no such family"):
        build_model(ModelSpec("mobile", "m1", 10, 224))


@pytest.mark.parametrize("change", ["missing", "unused", "reshaped"])
def test_load_model_is_strict(change: str) -> None:
    spec = ModelSpec.published("mit-b0", num_classes=10, image_size=64)
    weights = random_state_dict(spec, 0)
    if change == "missing":
        del weights["stem.in_conv.conv.weight"]
    elif change == "unused":
        weights["stem.extra"] = torch.zeros(1)
    else:
        weights["stem.in_conv.conv.weight"] = weights["stem.in_conv.conv.weight"][:, :1]
    with pytest.raises(RuntimeError, match=r"stem\."):
        load_model(spec, weights)


def test_load_model_copies_the_weights() -> None:
    spec = ModelSpec.published("msra-m0", num_classes=10, image_size=64)
    weights = random_state_dict(spec, 0)
    model = load_model(spec, weights)
    with torch.no_grad():
        model.state_dict()["head.linear.bias"].zero_()
    assert weights["head.linear.bias"].abs().sum() > 0


class TestMsraWindows:
    @pytest.mark.parametrize(
        ("image_size", "resolutions", "windows"),
        [
            (64, (4, 2, 1), (4, 2, 1)),
            (224, (14, 7, 4), (7, 7, 4)),
            (256, (16, 8, 4), (7, 7, 4)),
            (512, (32, 16, 8), (7, 7, 7)),
        ],
    )
    def test_windows_follow_the_image_size_as_in_timm(
        self, image_size: int, resolutions: tuple[int, ...], windows: tuple[int, ...]
    ) -> None:
        assert stage_resolutions(image_size, 3) == resolutions
        assert attention_windows(image_size, (7, 7, 7)) == windows
        model = build_model(ModelSpec.published("msra-m0", image_size=image_size))
        shapes = [model.state_dict()[f"stages.{i}.blocks.0.mixer.m.attn.attention_biases"].shape for i in range(3)]
        assert shapes == [(4, window**2) for window in windows]

    @pytest.mark.parametrize("window", [1, 2, 4, 7])
    def test_bias_indices_are_those_of_timms_module(self, window: int) -> None:
        attention = import_timm("timm.models.efficientvit_msra").CascadedGroupAttention(16, 4, 2, resolution=window)
        assert torch.equal(bias_indices(window), attention.attention_bias_idxs)

    def test_resizing_is_what_timm_does_for_another_input_size(self) -> None:
        timm_msra = import_timm("timm.models.efficientvit_msra")
        weights = random_weights("msra-m0", image_size=224)
        name = "stages.2.blocks.0.mixer.m.attn.attention_biases"
        model = build_model(ModelSpec.published("msra-m0", num_classes=10, image_size=448))
        expected = timm_msra.checkpoint_filter_fn(weights, model)[name]
        assert expected.shape == (4, 49)
        assert torch.equal(resize_attention_biases(weights[name], 7), expected)


class TestRandomWeights:
    def test_same_seed_same_weights_and_the_global_generator_is_left_alone(self) -> None:
        spec = ModelSpec.published("msra-m0", num_classes=10, image_size=64)
        before = torch.random.get_rng_state()
        first, second, other = (random_state_dict(spec, seed) for seed in (3, 3, 4))
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["head.linear.weight"], other["head.linear.weight"])

    @pytest.mark.parametrize("name", SMALL_MODELS)
    def test_logits_are_of_order_one_and_differ_between_images(self, name: str) -> None:
        weights = random_weights(name, num_classes=100, image_size=64)
        model = load_model(ModelSpec.published(name, num_classes=100, image_size=64), weights)
        logits = logits_of(model, images(64, count=8))
        assert 0.2 < logits.std(dim=1).mean() < 5.0
        assert logits.std(dim=0).mean() > 0.1 * logits.std()

    # msra at 128 px: at 64 its last map has one token, and the attention of one token has no use for its query.
    @pytest.mark.parametrize(("name", "image_size"), [("mit-b0", 64), ("msra-m0", 128), ("msa-m1", 64)])
    def test_every_tensor_has_a_part_in_the_logits(self, name: str, image_size: int) -> None:
        spec = ModelSpec.published(name, num_classes=10, image_size=image_size)
        weights = random_state_dict(spec, 0)
        model = load_model(spec, weights)
        batch = images(image_size)
        reference = logits_of(model, batch)
        generator = torch.Generator().manual_seed(0)
        state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
        for key in list(state)[:: max(1, len(state) // 60)]:
            original = state[key].clone()
            with torch.no_grad():
                state[key].copy_(original[torch.randperm(len(original), generator=generator)] + 0.05)
            _forget_cached_biases(model)
            assert rms_relative(logits_of(model, batch), reference) > 1e-5, key
            state[key].copy_(original)
        _forget_cached_biases(model)
        assert torch.equal(logits_of(model, batch), reference)


def _forget_cached_biases(model: nn.Module) -> None:
    """timm keeps the gathered attention biases after the first inference."""
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            module.attention_bias_cache = {}


class TestTimmImport:
    """In a fresh process, with a torchvision and a timm that behave as the real ones do at import."""

    def _import(self, tmp_path: Path, torchvision: str, script: str) -> subprocess.CompletedProcess[str]:
        for package, source in (("torchvision", torchvision), ("timm", "import torchvision")):
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.py").write_text(source)
        return subprocess.run(
            [sys.executable, "-c", "import logging; logging.basicConfig(level='INFO')\n" + script],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_a_torchvision_of_another_torch_is_made_to_import(self, tmp_path: Path) -> None:
        torchvision = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *args: None)"
        script = "from evit_deploy.models.timm_import import import_timm; print(import_timm().__name__)"
        result = self._import(tmp_path, torchvision, script)
        assert result.stdout == "timm\n", result.stderr
        assert "INFO:evit_deploy.models.timm_import:torchvision does not fit this torch" in result.stderr

    def test_a_torchvision_that_imports_is_left_alone(self, tmp_path: Path) -> None:
        script = (
            "from evit_deploy.models import timm_import; timm_import.import_timm(); print(len(timm_import._declared))"
        )
        result = self._import(tmp_path, "", script)
        assert result.stdout == "0\n", result.stderr
        assert "torchvision" not in result.stderr

    @pytest.mark.parametrize(
        ("torchvision", "words"),
        [
            ("raise RuntimeError('operator torchvision::nms is odd')", "timm cannot be imported: operator"),
            ("raise ImportError('libcudart.so not found')", "timm cannot be imported: libcudart.so not found"),
        ],
        ids=["another-runtime-error", "import-error"],
    )
    def test_any_other_failure_is_reported_as_it_is(self, tmp_path: Path, torchvision: str, words: str) -> None:
        result = self._import(tmp_path, torchvision, _REPORT_MISSING)
        assert words in result.stdout, result.stderr
        assert "declaring" not in result.stderr

    def test_missing_timm_says_how_to_get_it(self, tmp_path: Path) -> None:
        result = self._import(tmp_path, "", "import sys; sys.modules['timm'] = None\n" + _REPORT_MISSING)
        assert "timm is not installed" in result.stdout, result.stderr
        assert "pip install 'timm>=1.0.20'" in result.stdout


_REPORT_MISSING = """
from evit_deploy.errors import MissingDependencyError
from evit_deploy.models.timm_import import import_timm
try:
    import_timm()
except MissingDependencyError as error:
    print(error, error.exit_code)
"""
