"""Family `msa` in plain PyTorch: sizes, strides, position embedding, and its attention against slow references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_deploy.models import build_model
from evit_deploy.models.blocks import block_names, block_outputs
from evit_deploy.models.msa import (
    Block,
    EfficientViTMSA,
    MultiScaleAttention,
    build_msa,
    pool_tokens,
    transition_stride,
    window_attention,
)
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.specs import ModelSpec
from tests import attention_references as references
from tests.attention_references import draw, rms_relative
from tests.checkpoints import SMALL_MSA, images

PARAMETERS = {
    "msa-m1": 3_371_528,
    "msa-m2": 5_375_080,
    "msa-m3": 13_989_624,
    "msa-m4": 23_716_712,
    "msa-m5": 58_114_760,
}
FIVE_STAGES = replace(SMALL_MSA, config={**SMALL_MSA.config, "channels": (8, 8, 16, 16, 24), "depths": (1, 0, 1, 1, 1)})


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and evaluation mode with normal numbers in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(0.3 * torch.randn(value.shape, dtype=torch.float64, generator=generator))
    return module


def loaded(spec: ModelSpec) -> EfficientViTMSA:
    model = build_msa(spec)
    model.load_state_dict(random_state_dict(spec, 0), strict=True)
    return model


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameter_counts_are_those_of_the_definition(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build_model(ModelSpec.published(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", PARAMETERS)
def test_blocks_and_channels_are_those_of_the_spec(name: str) -> None:
    spec = ModelSpec.published(name)
    with torch.device("meta"):
        model = build_model(spec)
    assert isinstance(model, EfficientViTMSA)
    assert tuple(len(stage.blocks) for stage in model.stages) == spec.config["depths"]
    widths = [{block.attn.dim for block in stage.blocks} for stage in model.stages]
    assert widths == [{channels} for channels in spec.config["channels"]]
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [model.stem[1], model.stem[4]]
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        (32, (8, 4, 2, 1, 1)),
        (33, (9, 5, 3, 2, 2)),
        (52, (13, 7, 4, 2, 2)),
        (70, (18, 9, 5, 3, 3)),
        (224, (56, 28, 14, 7, 7)),
    ],
)
def test_stages_run_at_strides_4_8_16_32_32(size: int, sides: tuple[int, ...]) -> None:
    model = build_msa(FIVE_STAGES)
    stages: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: stages.append(tuple(output.shape)))
    with torch.no_grad():
        logits = model(torch.zeros(2, 3, size, size))
    assert stages == [(2, width, side, side) for width, side in zip((8, 8, 16, 16, 24), sides, strict=True)]
    assert logits.shape == (2, SMALL_MSA.num_classes)


def test_strides_of_the_transitions() -> None:
    assert [transition_stride(i) for i in range(1, 6)] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("size", [32, 47, 61])
def test_every_tensor_and_every_image_matters(size: int) -> None:
    model = loaded(replace(SMALL_MSA, image_size=size))
    batch = images(size)
    logits = model(batch)
    assert rms_relative(logits[0].detach(), logits[1].detach()) > 0.01
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_rows_of_a_batch_do_not_mix() -> None:
    model = loaded(SMALL_MSA).double()
    batch = images(32, count=3).double()
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]), rtol=1e-12, atol=1e-12)


class TestPositionEmbedding:
    def test_is_taken_as_it_is_at_its_own_size(self) -> None:
        model = loaded(SMALL_MSA)
        assert model.position_embedding(8, 8) is model.pos_embed

    @pytest.mark.parametrize("size", [(9, 9), (4, 4), (16, 5)])
    def test_is_resized_bicubically_to_another_map(self, size: tuple[int, int]) -> None:
        model = loaded(SMALL_MSA)
        resized = model.position_embedding(*size)
        assert resized.shape == (1, 8, *size)
        expected = F.interpolate(model.pos_embed, size, mode="bicubic", align_corners=False)
        torch.testing.assert_close(resized, expected)

    def test_resizing_is_the_cubic_convolution_of_pixel_centres(self) -> None:
        def weight(distance: float) -> float:
            x, a = abs(distance), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            return near if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

        model = loaded(SMALL_MSA)
        row = draw(8, seed=5)
        with torch.no_grad():
            model.pos_embed[:, 1] = row
        expected = torch.zeros(12, dtype=torch.float64)
        for i in range(12):
            centre = (i + 0.5) * 8 / 12 - 0.5
            for source in range(-3, 12):
                expected[i] += weight(source - centre) * row[min(max(source, 0), 7)]
        resized = model.position_embedding(5, 12)[0, 1].double()
        torch.testing.assert_close(resized, expected.expand(5, 12), rtol=1e-5, atol=1e-5)

    def test_is_added_to_the_stem(self) -> None:
        model = loaded(SMALL_MSA)
        batch = images(32)
        inputs: list[Tensor] = []
        model.stages.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        with torch.no_grad():
            model(batch)
            torch.testing.assert_close(inputs[0], model.stem(batch) + model.pos_embed)

    @pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
    def test_the_grid_comes_from_the_config(self, grid: tuple[int, int]) -> None:
        model = build_msa(replace(SMALL_MSA, config={**SMALL_MSA.config, "pos_embed_size": grid}))
        assert model.pos_embed.shape == (1, 8, *grid)


@pytest.mark.parametrize(
    ("channels", "depths", "heads", "words"),
    [
        ((8, 16), (1,), 4, r"one entry per stage, got channels=\(8, 16\) depths=\(1,\)"),
        ((), (), 4, r"one entry per stage"),
        ((8, 18), (1, 1), 4, r"num_heads must divide every channel count, got channels=\(8, 18\) num_heads=4"),
        ((8, 16), (1, 1), 0, r"num_heads must divide every channel count, .*num_heads=0"),
        ((8, 0), (1, 1), 4, r"num_heads must divide every channel count"),
        ((9, 18), (1, 1), 3, r"the first channel count must be even"),
    ],
    ids=["lengths", "no-stages", "heads", "no-heads", "no-channels", "odd-first"],
)
def test_configs_that_make_no_model(channels: tuple[int, ...], depths: tuple[int, ...], heads: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EfficientViTMSA(channels, depths, heads)


@pytest.mark.parametrize("window", [3, 7])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6), (8, 15), (21, 7)], ids=str)
def test_window_attention_is_attention_of_the_tokens_in_the_window(size: tuple[int, int], window: int) -> None:
    qkv = draw(2, *size, 3 * 12, seed=1)
    expected = torch.stack([torch.from_numpy(references.window_attention(x.numpy(), 3, window)) for x in qkv])
    assert rms_relative(window_attention(qkv, 3, window), expected) < 1e-14


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 2), (6, 6), (7, 9)], ids=str)
def test_pooling_averages_the_tokens_that_exist(size: tuple[int, int]) -> None:
    x = draw(2, *size, 3, seed=2)
    pooled = pool_tokens(x)
    height, width = size
    assert pooled.shape == (2, -(-height // 2), -(-width // 2), 3)
    for row in range(pooled.shape[1]):
        for column in range(pooled.shape[2]):
            cell = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, -1, 3)
            torch.testing.assert_close(pooled[:, row, column], cell.mean(dim=1))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 8), (9, 7)], ids=str)
def test_attention_is_the_operator_between_its_projections(size: tuple[int, int]) -> None:
    attention = randomized(MultiScaleAttention(12, 3))
    assert isinstance(attention, MultiScaleAttention)
    x = draw(2, *size, 12, seed=3)
    q, k, v = attention.large(x).split(12, dim=-1)
    pooled_kv = torch.cat([pool_tokens(k), pool_tokens(v)], dim=-1)  # pooling and projecting commute
    out = references.multi_scale_attention(
        attention.small(x).detach(), attention.medium(x).detach(), q.detach(), pooled_kv.detach(), 3
    )
    expected = attention.fusion(out).view(x.shape)
    assert rms_relative(attention(x).detach(), expected.detach()) < 1e-13


def test_a_block_is_local_then_attention_then_feed_forward() -> None:
    block = randomized(Block(12, 3))
    assert isinstance(block, Block)
    x = draw(2, 12, 5, 4, seed=4)
    local = block.local
    hidden = F.gelu(F.conv2d(F.gelu(local.expand(x)), local.depthwise.weight, local.depthwise.bias, 1, 1, 1, 48))
    x_local = x + local.project(hidden)
    tokens = x_local.permute(0, 2, 3, 1)
    tokens = tokens + block.attn(F.layer_norm(tokens, (12,), block.norm1.weight, block.norm1.bias))
    wide = block.ffn.expand(F.layer_norm(tokens, (12,), block.norm2.weight, block.norm2.bias))
    wide = F.gelu(block.ffn.depthwise(wide.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    expected = (tokens + block.ffn.project(wide)).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_blocks_have_names_in_the_order_of_execution() -> None:
    model = loaded(SMALL_MSA)
    names = [
        "stem",
        "stages.0.blocks.0",
        "stages.1.transition",
        "stages.1.blocks.0",
        "stages.2.transition",
        "stages.2.blocks.0",
        "stages.2.blocks.1",
    ]
    outputs = block_outputs(model, images(32))
    assert block_names(model) == names == list(outputs)
    assert [tuple(x.shape) for x in outputs.values()] == [
        (2, 8, 8, 8),
        (2, 8, 8, 8),
        (2, 16, 4, 4),
        (2, 16, 4, 4),
        (2, 24, 2, 2),
        (2, 24, 2, 2),
        (2, 24, 2, 2),
    ]
    assert not any(module._forward_hooks for module in model.modules())
