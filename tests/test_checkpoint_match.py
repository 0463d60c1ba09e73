"""Weights that are not exactly one model's are refused, and the first offender is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evit_deploy.checkpoint import load_checkpoint
from evit_deploy.constants import MAX_CHECKPOINT_BYTES
from evit_deploy.errors import CheckpointError
from evit_deploy.models.random_weights import random_state_dict
from tests.checkpoints import (
    SMALL_MSA,
    microsoft_names,
    mit_names,
    official_names,
    save_pt,
    small_weights,
)


def change(weights: dict[str, Tensor], **changes: Tensor) -> dict[str, Tensor]:
    return {**weights, **changes}


class TestWeightsThatDoNotFit:
    KEY = "stages.1.blocks.0.ffn0.m.pw1.conv.weight"

    def _refused(self, content: Any, words: str, tmp_path: Path) -> CheckpointError:
        path = save_pt(tmp_path / "bad.pt", content)
        with pytest.raises(CheckpointError, match=words) as caught:
            load_checkpoint(path)
        assert "bad.pt" in caught.value.summary
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1
        return caught.value

    def test_missing_keys(self, tmp_path: Path) -> None:
        weights = {k: v for k, v in small_weights("msra-m0").items() if k not in (self.KEY, "head.bn.weight")}
        error = self._refused(weights, f"does not fit msra-m0: 2 of 693 tensors missing, first '{self.KEY}'", tmp_path)
        assert error.details == (f"missing '{self.KEY}'", "missing 'head.bn.weight'")

    def test_surplus_keys(self, tmp_path: Path) -> None:
        weights = change(small_weights("msra-m0"), **{"aux.weight": torch.zeros(3), "head.bn.extra": torch.zeros(3)})
        self._refused(weights, "does not fit msra-m0: 2 unused, first 'aux.weight'", tmp_path)

    @pytest.mark.parametrize("name", ["mit-b0", "msra-m0"])
    def test_a_surplus_key_that_no_rule_of_the_file_names_knows(self, name: str, tmp_path: Path) -> None:
        weights = change(official_names(name, small_weights(name)), **{"aux.weight": torch.zeros(3)})
        error = self._refused(weights, f"does not fit {name}: 1 unused, first 'aux.weight'", tmp_path)
        assert error.details == ("unused 'aux.weight'",)

    def test_wrong_shape(self, tmp_path: Path) -> None:
        weights = change(small_weights("msra-m0"), **{self.KEY: torch.zeros(3, 4, 1, 1)})
        self._refused(
            weights,
            rf"does not fit msra-m0: 1 of another shape, first '{self.KEY}' has shape \[3, 4, 1, 1\], expected "
            r"\[256, 128, 1, 1\]",
            tmp_path,
        )

    def test_all_three_at_once(self, tmp_path: Path) -> None:
        weights = change(small_weights("msra-m0"), **{self.KEY: torch.zeros(3), "aux": torch.zeros(3)})
        del weights["head.bn.bias"]
        self._refused(weights, "1 of 693 tensors missing.*; 1 unused.*; 1 of another shape", tmp_path)

    @pytest.mark.parametrize(
        ("name", "key", "official"),
        [
            (
                "mit-b0",
                "stages.2.blocks.0.main.point_conv.conv.weight",
                "backbone.stages.2.op_list.0.main.point_conv.conv.weight",
            ),
            ("mit-b0", "head.classifier.4.weight", "head.op_list.3.linear.weight"),
            ("mit-b0", "stem.in_conv.conv.weight", "backbone.input_stem.op_list.0.conv.weight"),
            ("msra-m0", "stages.1.blocks.0.dw0.m.conv.weight", "blocks2.3.dw0.m.c.weight"),
            ("msra-m0", "stages.0.blocks.0.mixer.m.attn.attention_biases", "blocks1.0.mixer.m.attn.attention_biases"),
        ],
    )
    def test_a_missing_tensor_is_named_as_the_file_would_name_it(
        self, name: str, key: str, official: str, tmp_path: Path
    ) -> None:
        """Also when it is one of those that show the variant: the closest one is compared with."""
        weights = {k: v for k, v in small_weights(name).items() if k != key}
        names = official_names(name, weights)
        self._refused(names, rf"does not fit {name}: 1 of \d+ tensors missing, first '{official}'", tmp_path)

    @pytest.mark.parametrize(
        "key", ["stages.2.blocks.0.main.point_conv.conv.weight", "head.classifier.4.weight", "stem.in_conv.conv.weight"]
    )
    def test_a_wrong_shape_where_the_variant_shows(self, key: str, tmp_path: Path) -> None:
        weights = small_weights("mit-b0")
        self._refused(
            change(weights, **{key: weights[key][:-1]}), "does not fit mit-(b0|custom): .*another shape", tmp_path
        )
        self._refused(change(weights, **{key: weights[key][..., None]}), f"1 of another shape, first '{key}'", tmp_path)

    def test_a_backbone_without_a_block(self, tmp_path: Path) -> None:
        weights = {k: v for k, v in small_weights("mit-b0").items() if not k.startswith("stages.3.blocks.1.")}
        self._refused(weights, "does not fit mit-b0: .* tensors missing, first 'stages.3.blocks.1.", tmp_path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_values_that_are_not_finite(self, value: float, dtype: torch.dtype, tmp_path: Path) -> None:
        weights = small_weights("msra-m0")
        poisoned = weights[self.KEY].clone()
        poisoned.view(-1)[7] = value
        error = self._refused(
            change(weights, **{self.KEY: poisoned.to(dtype)}), f"not finite: .* in '{self.KEY}'", tmp_path
        )
        assert ("1 NaN and 0 Inf" if value != value else "0 NaN and 1 Inf") in error.summary

    def test_values_beyond_float32(self, tmp_path: Path) -> None:
        weights = small_weights("msra-m0")
        large = weights[self.KEY].double() + 1e300
        self._refused(change(weights, **{self.KEY: large}), f"not finite: .* in '{self.KEY}'", tmp_path)

    def test_large_but_finite_values_are_taken(self, tmp_path: Path) -> None:
        weights = small_weights("msra-m0")
        large = torch.full_like(weights[self.KEY], 3e38)
        checkpoint = load_checkpoint(save_pt(tmp_path / "x.pt", change(weights, **{self.KEY: large})))
        assert torch.equal(checkpoint.state_dict[self.KEY], large)

    def test_negative_variance(self, tmp_path: Path) -> None:
        weights = small_weights("msra-m0")
        self._refused(
            change(weights, **{"head.bn.running_var": -weights["head.bn.running_var"]}),
            "negative variance in 'head.bn.running_var'",
            tmp_path,
        )

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (torch.zeros(256, 128, 1, 1, dtype=torch.int8), "integers where floats are expected \\(torch.int8\\)"),
            (torch.zeros(256, 128, 1, 1, dtype=torch.bool), "integers where floats are expected \\(torch.bool\\)"),
            (torch.zeros(256, 128, 1, 1, dtype=torch.complex64), "a complex tensor"),
            (torch.zeros(256, 128).to_sparse(), "a sparse or nested tensor"),
            (torch.qint8, "a quantized tensor"),
            (torch.zeros(256, 128).to(torch.float8_e4m3fn), "a quantized tensor"),
            (torch.zeros(256, 128, device="meta"), "a tensor without data"),
            ("a string", "a str among its weights"),
        ],
        ids=["int8", "bool", "complex", "sparse", "quantized", "float8", "meta", "string"],
    )
    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
    def test_anything_but_dense_floats(self, value: Any, words: str, tmp_path: Path) -> None:
        if value is torch.qint8:
            value = torch.quantize_per_tensor(torch.zeros(256, 128), 0.1, 0, torch.qint8)
        error = self._refused({**small_weights("msra-m0"), self.KEY: value}, words, tmp_path)
        assert f"'{self.KEY}'" in error.summary

    def test_a_view_that_claims_a_size_the_file_has_not(self, tmp_path: Path) -> None:
        huge = torch.zeros(1).expand(MAX_CHECKPOINT_BYTES // 4, 2)
        error = self._refused(change(small_weights("msra-m0"), aux=huge), "claims weights of more than", tmp_path)
        assert "'aux'" in error.summary

    def test_a_fitting_view_that_claims_too_many_heads(self, tmp_path: Path) -> None:
        biases = torch.zeros(1).expand(10_000_000, 49)
        key = "stages.0.blocks.0.mixer.m.attn.attention_biases"
        self._refused(change(small_weights("msra-m0"), **{key: biases}), f"1 of another shape, first '{key}'", tmp_path)

    def test_a_wrong_index_table(self, tmp_path: Path) -> None:
        names = microsoft_names(small_weights("msra-m0"))
        key = "blocks1.0.mixer.m.attn.attention_bias_idxs"
        self._refused({**names, key: names[key].flip(0)}, f"index table .* '{key}'", tmp_path)

    def test_a_weight_named_twice(self, tmp_path: Path) -> None:
        weights = small_weights("msra-m0")
        self._refused({**weights, "_orig_mod.head.bn.bias": weights["head.bn.bias"]}, "names a weight twice", tmp_path)

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            (
                ["head.middle.op_list.0.main.inverted_conv.conv.weight"],
                "is a segmentation model, and only classification",
            ),
            (["image_encoder.norm.weight", "prompt_encoder.pe"], "is a SAM model, and only classification"),
            (["bbox_head.retina_cls.weight"], "is a detection model, and only classification"),
        ],
        ids=["segmentation", "sam", "detection"],
    )
    def test_other_tasks(self, keys: list[str], words: str, tmp_path: Path) -> None:
        names = {k: v for k, v in mit_names(small_weights("mit-b0")).items() if k.startswith("backbone.")}
        self._refused({"state_dict": {**names, **{key: torch.zeros(2) for key in keys}}}, words, tmp_path)

    def test_a_backbone_alone(self, tmp_path: Path) -> None:
        names = {k: v for k, v in mit_names(small_weights("mit-b0")).items() if k.startswith("backbone.")}
        self._refused(names, "is a backbone without a head, and only classification", tmp_path)

    def test_a_distilled_pair_of_heads(self, tmp_path: Path) -> None:
        names = microsoft_names(small_weights("msra-m0"))
        names.update({k.replace("head.", "head_dist."): v for k, v in names.items() if k.startswith("head.")})
        self._refused({"model": names}, "distillation head 'head_dist'", tmp_path)

    def test_another_network(self, tmp_path: Path) -> None:
        weights = {"conv1.weight": torch.zeros(2), "bn1.weight": torch.zeros(2)}
        self._refused(
            weights,
            "is no EfficientViT of the families msa, mit, msra: its weights begin with 'conv1.weight'",
            tmp_path,
        )

    def test_no_msa_heads_divide_the_channels(self, tmp_path: Path) -> None:
        spec = replace(SMALL_MSA, config={**SMALL_MSA.config, "channels": (4, 12, 12)})
        error = self._refused(random_state_dict(spec, 0), "shapes of no msa model: num_heads must divide", tmp_path)
        assert "num_heads" in error.hint

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({}, "holds no state dict with tensors; its keys are nothing"),
            ({"epoch": 3, "best": 0.5}, "holds no state dict with tensors; its keys are 'epoch', 'best'"),
            ({"state_dict": {}}, "holds no state dict with tensors; its keys are 'state_dict'"),
            ([1, 2], "holds a list, not a state dict"),
            (torch.zeros(3), "holds a Tensor, not a state dict"),
            ({1: torch.zeros(1)}, "a weight without a name, its key is 1"),
        ],
        ids=["empty-dict", "no-tensors", "empty-state-dict", "list", "tensor", "number-as-key"],
    )
    def test_no_state_dict(self, content: Any, words: str, tmp_path: Path) -> None:
        self._refused(content, words, tmp_path)
