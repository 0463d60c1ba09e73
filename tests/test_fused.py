"""The model as it is exported: the same values as the reference, one fused module per attention layer, no BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from evit_deploy.models import build_model, load_model
from evit_deploy.models.fold import fold_batchnorm
from evit_deploy.models.fused import FusedCascadedAttention, FusedLiteMLA, FusedMultiScaleAttention, fused_model
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.specs import ModelSpec, variant_names
from tests.attention_references import draw
from tests.checkpoints import images, logits_of, rms_relative
from tests.tiers import tiered

FUSED = (FusedMultiScaleAttention, FusedLiteMLA, FusedCascadedAttention)
ORIGINALS = ("MultiScaleAttention", "LiteMLA", "LocalWindowAttention")
# Pixels: a map larger than one window, with padding, where the family has windows; both branches of LiteMLA.
MODELS = {
    "msa-m1": 64,
    "mit-b0": 64,
    "mit-b1": 160,
    "mit-l1": 64,
    "msra-m0": 64,
    "msra-m1": 144,
    "msra-m2": 240,
    "msra-m3": 64,
    "msra-m4": 144,
    "msra-m5": 240,
}
FAST_IN_FLOAT64 = ("msa-m1", "mit-b0", "msra-m0")
# Measured, the worst of the models: 3.8e-6 in float32, 7.1e-15 in float64.
FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-12


def attention_layers(spec: ModelSpec) -> int:
    """How many attention layers the hyperparameters ask for."""
    config = spec.config
    if spec.family == "msa":
        return sum(config["depths"])
    if spec.family == "msra":
        return sum(config["depth"])
    return sum(config["depths"][4:] if spec.variant.startswith("l") else config["depths"][3:])


@cache
def reference(name: str) -> tuple[ModelSpec, nn.Module]:
    """A published model of ten classes with random weights in which every tensor matters."""
    spec = ModelSpec.published(name, num_classes=10, image_size=MODELS[name])
    return spec, load_model(spec, random_state_dict(spec, 0))


def count(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference_in_float32(name: str) -> None:
    spec, model = reference(name)
    batch = images(spec.image_size)
    fused = fused_model(model, spec)
    assert rms_relative(logits_of(fused, batch), logits_of(model, batch)) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", tiered(MODELS, FAST_IN_FLOAT64.__contains__))
def test_equals_the_reference_in_float64(name: str) -> None:
    spec, model = reference(name)
    batch = images(spec.image_size, count=3).double()
    # timm's LiteMLA computes in float32 whatever it is given
    exact = load_model(spec, model.state_dict()).double()
    for module in exact.modules():
        if type(module).__name__ == "LiteMLA":
            module._attn = _attention_in_its_own_type.__get__(module)  # type: ignore[assignment]
    fused = fused_model(exact, spec)
    assert rms_relative(logits_of(fused, batch), logits_of(exact, batch)) < FLOAT64_TOLERANCE


def _attention_in_its_own_type(self: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = q @ (k.transpose(-1, -2) @ v)
    return out[..., :-1] / (out[..., -1:] + self.eps)


@pytest.mark.parametrize("name", variant_names())
def test_every_attention_layer_of_every_variant_is_fused(name: str) -> None:
    spec = ModelSpec.published(name)
    with torch.device("meta"):
        fused = fused_model(build_model(spec), spec)
    assert count(fused, FUSED) == attention_layers(spec) > 0
    assert not [type(module).__name__ for module in fused.modules() if type(module).__name__ in ORIGINALS]
    assert count(fused, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)) == 0


@pytest.mark.parametrize("name", ["msa-m1", "mit-b0", "mit-l1", "msra-m0"])
def test_the_argument_is_left_as_it_is(name: str) -> None:
    spec, model = reference(name)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fused_model(model, spec)
    with torch.no_grad():
        for value in fused.state_dict().values():
            value.fill_(float("nan"))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [(name, type(module)) for name, module in model.named_modules()] == modules


@pytest.mark.parametrize("name", ["msa-m1", "mit-b0", "msra-m0"])
def test_a_model_in_training_mode_or_after_a_forward_pass_with_gradients_is_taken(name: str) -> None:
    spec, _ = reference(name)
    model = load_model(spec, random_state_dict(spec, 0))
    batch = images(spec.image_size)
    expected = model(batch).detach()
    model.train()
    fused = fused_model(model, spec)
    assert model.training
    assert not any(module.training for module in fused.modules())
    assert rms_relative(logits_of(fused, batch), expected) < FLOAT32_TOLERANCE


def test_attention_eps_of_the_config_arrives_at_the_operator() -> None:
    spec = ModelSpec.published("mit-b0", num_classes=10, image_size=64)
    spec = replace(spec, config={**spec.config, "attention_eps": 0.5})
    model = load_model(spec, random_state_dict(spec, 0))
    fused = fused_model(model, spec)
    assert {module.eps for module in fused.modules() if isinstance(module, FusedLiteMLA)} == {0.5}
    batch = images(64)
    assert rms_relative(logits_of(fused, batch), logits_of(model, batch)) < FLOAT32_TOLERANCE


class TestFoldBatchNorm:
    def check(self, model: nn.Module, x: Tensor, *, norms_left: int = 0) -> nn.Module:
        """Fold a randomized model and compare before and after; returns the folded one."""
        randomize(model)
        expected = model(x)
        folded = fold_batchnorm(model)
        assert folded is model
        assert count(folded, (nn.BatchNorm1d, nn.BatchNorm2d)) == norms_left
        torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
        return folded

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_a_norm_behind_a_convolution(self, groups: int, bias: bool) -> None:
        convolution = nn.Conv2d(4, 8, 3, 2, padding=1, groups=groups, bias=bias)
        folded = self.check(nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU()), draw(2, 4, 5, 6, seed=1))
        assert isinstance(folded, nn.Sequential)
        assert folded[0].bias is not None
        assert isinstance(folded[1], nn.Identity)

    @pytest.mark.parametrize("bias", [True, False])
    def test_a_norm_before_a_linear(self, bias: bool) -> None:
        self.check(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4, bias=bias)), draw(3, 6, seed=1))

    def test_a_norm_without_weight_and_bias(self) -> None:
        self.check(
            nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, affine=False), nn.ReLU()), draw(2, 4, 5, 6, seed=1)
        )
        self.check(nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 4)), draw(3, 6, seed=1))

    @pytest.mark.parametrize("between", [nn.Dropout, nn.Identity], ids=["dropout", "identity"])
    def test_across_what_does_nothing_in_evaluation_mode(self, between: Callable[[], nn.Module]) -> None:
        self.check(nn.Sequential(nn.Conv2d(4, 8, 1), between(), nn.BatchNorm2d(8)), draw(2, 4, 5, 6, seed=1))
        self.check(nn.Sequential(nn.BatchNorm1d(6), between(), between(), nn.Linear(6, 4)), draw(3, 6, seed=1))

    def test_several_in_a_row_and_nested(self) -> None:
        inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU())
        model = nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), inner, nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2)
        )
        self.check(model, draw(2, 4, 7, 6, seed=1))

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
            nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
            nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)),
        ],
        ids=["before a convolution", "behind an activation", "behind another parent", "behind a transposed one"],
    )
    def test_a_norm_that_nothing_can_take_stays(self, model: nn.Module) -> None:
        self.check(model, draw(2, 4, 5, 6, seed=1), norms_left=1)

    def test_a_norm_before_a_linear_with_an_activation_between_stays(self) -> None:
        self.check(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)), draw(3, 6, seed=1), norms_left=1)

    def test_a_norm_without_running_statistics_stays(self) -> None:
        model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))
        self.check(model, draw(2, 4, 5, 6, seed=1), norms_left=1)
        model = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4))
        self.check(model, draw(3, 6, seed=1), norms_left=1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_computes_in_float64_and_keeps_the_type(self, dtype: torch.dtype) -> None:
        def folded(dtype: torch.dtype) -> nn.Conv2d:
            convolution, norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, eps=1e-7)
            model = nn.Sequential(convolution, norm)
            randomize(model)
            with torch.no_grad():
                norm.running_var.fill_(1e-8)  # 0 in float16, as is eps; the scale is then 1e4 times the weight
                norm.weight.mul_(1e-4)
            convolution.to(dtype)
            fold_batchnorm(model)
            return convolution

        exact, rounded = folded(torch.float64), folded(dtype)
        assert rounded.weight.dtype == rounded.bias.dtype == dtype
        torch.testing.assert_close(rounded.weight.double(), exact.weight, rtol=4 * torch.finfo(dtype).eps, atol=0)


def randomize(model: nn.Module) -> None:
    """Float64, evaluation mode, every tensor drawn, running variances above zero."""
    model.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, dtype=value.dtype, generator=generator)
                value.copy_(0.5 + noise.abs() if name.endswith("running_var") else noise)
