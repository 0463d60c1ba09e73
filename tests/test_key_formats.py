"""The key maps of the authors' repositories against a second transcription, in both directions."""

from __future__ import annotations

import pytest
import torch

from evit_deploy.checkpoint.key_formats import (
    KeyFormat,
    other_task,
    recognise_key_format,
    strip_wrapper_prefixes,
)
from evit_deploy.models import build_model
from evit_deploy.specs import ModelSpec, variant_names
from tests.checkpoints import official_names

OFFICIAL = {"mit": "mit", "msra": "microsoft"}


def canonical_state(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return build_model(ModelSpec.published(name)).state_dict()


def key_format_of(names: object) -> KeyFormat:
    key_format = recognise_key_format(names)  # type: ignore[arg-type]
    assert key_format is not None
    return key_format


@pytest.mark.parametrize("name", variant_names("mit") + variant_names("msra"))
def test_official_names_become_canonical_and_back(name: str) -> None:
    state = canonical_state(name)
    numbered = {key: torch.tensor(float(i)).expand(value.shape) for i, (key, value) in enumerate(state.items())}
    official = {k: v for k, v in official_names(name, numbered).items() if not k.endswith("attention_bias_idxs")}
    key_format = key_format_of(official)
    family = name.split("-")[0]
    assert (key_format.name, key_format.family) == (OFFICIAL[family], family)
    renamed = {key_format.to_canonical(key): value.flatten()[:1] for key, value in official.items()}
    assert renamed.keys() == state.keys()
    for i, key in enumerate(state):
        assert renamed[key].tolist() in ([], [float(i)]), key
    assert {key_format.to_file(key) for key in state} == set(official)


@pytest.mark.parametrize("name", variant_names())
def test_canonical_names_stay_as_they_are(name: str) -> None:
    state = canonical_state(name)
    key_format = key_format_of(state)
    assert key_format.family == name.split("-")[0]
    assert key_format.name == ("evit-deploy" if name.startswith("msa-") else "timm")
    assert all(key_format.to_canonical(key) == key == key_format.to_file(key) for key in state)


# Written out by hand from the modules of mit-han-lab/efficientvit and microsoft/Cream.
@pytest.mark.parametrize(
    ("model", "official", "canonical"),
    [
        ("mit-b1", "backbone.input_stem.op_list.0.conv.weight", "stem.in_conv.conv.weight"),
        ("mit-b1", "backbone.input_stem.op_list.1.main.depth_conv.norm.bias", "stem.res0.main.depth_conv.norm.bias"),
        (
            "mit-b1",
            "backbone.stages.3.op_list.4.context_module.main.aggreg.0.1.weight",
            "stages.3.blocks.4.context_module.main.aggreg.0.1.weight",
        ),
        ("mit-b1", "head.op_list.0.norm.running_var", "head.in_conv.norm.running_var"),
        ("mit-b1", "head.op_list.2.linear.weight", "head.classifier.0.weight"),
        ("mit-b1", "head.op_list.2.norm.weight", "head.classifier.1.weight"),
        ("mit-b1", "head.op_list.3.linear.bias", "head.classifier.4.bias"),
        ("mit-l2", "backbone.stages.0.op_list.0.conv.weight", "stem.in_conv.conv.weight"),
        ("mit-l2", "backbone.stages.0.op_list.1.main.conv2.conv.weight", "stem.res0.main.conv2.conv.weight"),
        (
            "mit-l2",
            "backbone.stages.1.op_list.2.main.spatial_conv.conv.weight",
            "stages.0.blocks.2.main.spatial_conv.conv.weight",
        ),
        ("msra-m0", "patch_embed.6.c.weight", "patch_embed.conv4.conv.weight"),
        ("msra-m0", "patch_embed.0.bn.running_mean", "patch_embed.conv1.bn.running_mean"),
        ("msra-m0", "blocks1.0.dw0.m.c.weight", "stages.0.blocks.0.dw0.m.conv.weight"),
        ("msra-m0", "blocks2.0.1.m.pw2.bn.weight", "stages.1.downsample.res1.1.m.pw2.bn.weight"),
        ("msra-m0", "blocks2.1.se.fc1.bias", "stages.1.downsample.patchmerge.se.fc1.bias"),
        ("msra-m0", "blocks3.2.0.m.c.weight", "stages.2.downsample.res2.0.m.conv.weight"),
        (
            "msra-m0",
            "blocks3.5.mixer.m.attn.qkvs.3.c.weight",
            "stages.2.blocks.2.mixer.m.attn.qkvs.3.conv.weight",
        ),
        (
            "msra-m0",
            "blocks2.3.mixer.m.attn.attention_biases",
            "stages.1.blocks.0.mixer.m.attn.attention_biases",
        ),
        ("msra-m0", "head.bn.weight", "head.bn.weight"),
        ("msra-m0", "head.l.weight", "head.linear.weight"),
    ],
)
def test_published_names(model: str, official: str, canonical: str) -> None:
    state = canonical_state(model)
    key_format = key_format_of(official_names(model, state))
    assert canonical in state
    assert key_format.to_canonical(official) == canonical
    assert key_format.to_file(canonical) == official


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("mit-b1", "backbone.stem.op_list.0.conv.weight"),
        ("mit-b1", "head.op_list.1.weight"),
        ("mit-b1", "backbone.stages.01.op_list.0.main.point_conv.conv.weight"),
        ("msra-m0", "patch_embed.1.c.weight"),
        ("msra-m0", "blocks4.0.dw0.m.c.weight"),
    ],
)
def test_names_without_a_rule_are_not_guessed(model: str, key: str) -> None:
    assert key_format_of(official_names(model, canonical_state(model))).to_canonical(key) is None


class TestRecognition:
    @pytest.mark.parametrize(
        "names",
        [[], ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], ["stem.in_conv.conv.weight", "a", "b", "c"]],
        ids=["nothing", "resnet", "a-minority"],
    )
    def test_other_networks_are_not_recognised(self, names: list[str]) -> None:
        assert recognise_key_format(names) is None

    @pytest.mark.parametrize(
        ("key", "task"),
        [
            ("head.input_ops.0.op_list.0.conv.weight", "a segmentation model"),
            ("head.output_ops.0.op_list.0.conv.weight", "a segmentation model"),
            ("image_encoder.backbone.stages.0.op_list.0.conv.weight", "a SAM model"),
            ("mask_decoder.iou_token.weight", "a SAM model"),
            ("bbox_head.retina_cls.weight", "a detection model"),
            ("encoder.stages.0.op_list.0.main.conv1.conv.weight", "an autoencoder"),
        ],
    )
    def test_other_tasks_are_named(self, key: str, task: str) -> None:
        assert other_task(["backbone.stages.1.op_list.0.conv.weight", key]) == task

    @pytest.mark.parametrize("name", variant_names())
    def test_classifiers_are_no_other_task(self, name: str) -> None:
        state = canonical_state(name)
        assert other_task(state) is None
        assert name.startswith("msa-") or other_task(official_names(name, state)) is None


class TestWrapperPrefixes:
    @pytest.mark.parametrize(
        "wrapped",
        ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "model.{}", "module.module.{}"],
    )
    def test_prefixes_of_all_keys_go(self, wrapped: str) -> None:
        names = ["stem.a", "head.b"]
        stripped = strip_wrapper_prefixes([wrapped.format(name) for name in names])
        assert list(stripped.values()) == names

    def test_a_compiled_submodule_is_found_at_any_depth(self) -> None:
        assert list(strip_wrapper_prefixes(["stages._orig_mod.0.x", "head.y"]).values()) == ["stages.0.x", "head.y"]

    def test_a_prefix_of_some_keys_stays(self) -> None:
        assert strip_wrapper_prefixes(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}

    def test_two_keys_for_one_weight_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"'a\.x' and 'a\._orig_mod\.x' are the same weight"):
            strip_wrapper_prefixes(["a.x", "a._orig_mod.x"])
