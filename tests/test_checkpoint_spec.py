"""Which model a checkpoint is: from its weights, from its own config, and from the caller's arguments."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

from evit_deploy.checkpoint import load_checkpoint
from evit_deploy.errors import CheckpointError, UsageError
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.models.timm_import import import_timm
from evit_deploy.specs import ModelSpec, Preprocessing
from tests.checkpoints import (
    CLASSES,
    SMALL_MSA,
    TOLERANCE,
    images,
    logits_of,
    mit_names,
    random_weights,
    reload,
    rms_relative,
    save_pt,
    save_safetensors,
    small_weights,
    timm_model,
)


class TestDetection:
    def test_custom_mit_widths(self, tmp_path: Path) -> None:
        config = {
            "widths": (8, 16, 24, 32, 48), "depths": (1, 1, 2, 1, 1), "head_dim": 8, "head_widths": (64, 80),
            "attention_eps": 1e-5, "norm_eps": 1e-5,
        }  # fmt: skip
        spec = ModelSpec("mit", "custom", 5, 224, config)
        checkpoint = load_checkpoint(save_pt(tmp_path / "x.pt", random_state_dict(spec, 0)))
        assert checkpoint.spec == spec

    def test_mit_l0_loads_as_a_custom_large_model(self, tmp_path: Path) -> None:
        config = {
            "widths": (8, 16, 32, 64, 128), "depths": (1, 1, 1, 4, 4), "head_dim": 32, "head_widths": (64, 80),
            "large": True, "attention_eps": 1e-15, "norm_eps": 1e-7,
        }  # fmt: skip
        spec = ModelSpec("mit", "custom", 5, 224, config)
        names = mit_names(random_state_dict(replace(spec, image_size=64), 0))
        checkpoint, model = reload(save_pt(tmp_path / "l0.pt", {"state_dict": names}))
        assert checkpoint.spec == spec
        assert type(model).__name__ == "EfficientVitLarge"

    def test_custom_msra_heads(self, tmp_path: Path) -> None:
        config = {
            "embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 2), "kernels": (5, 3, 3),
            "key_dim": (8, 8, 8), "window_size": (7, 7, 7),
        }  # fmt: skip
        spec = ModelSpec("msra", "custom", 5, 224, config)
        assert load_checkpoint(save_pt(tmp_path / "x.pt", random_state_dict(spec, 0))).spec == spec

    def test_another_number_of_msa_heads_is_a_custom_model(self, tmp_path: Path) -> None:
        weights = random_weights("msa-m1", image_size=224)
        config = {"family": "msa", "num_heads": 4}
        spec = load_checkpoint(save_pt(tmp_path / "x.pt", {"model": weights, "config": config})).spec
        assert (spec.variant, spec.config["num_heads"]) == ("custom", 4)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"family": "mit"}, r"x.pt holds family msra \(timm key names\), not mit as the argument says"),
            ({"family": "msa"}, r"x.pt holds family msra \(timm key names\), not msa as the argument says"),
            ({"variant": "m1"}, "x.pt holds msra-m0, not msra-m1"),
            ({"variant": "custom"}, "x.pt holds msra-m0, not msra-custom"),
            ({"variant": "msa-m0x"}, "unknown model 'msa-m0x'"),
        ],
    )
    def test_a_contradiction_says_what_was_found(self, arguments: dict[str, str], words: str, tmp_path: Path) -> None:
        path = save_pt(tmp_path / "x.pt", small_weights("msra-m0"))
        with pytest.raises((CheckpointError, UsageError), match=words):
            load_checkpoint(path, **arguments)

    @pytest.mark.parametrize("arguments", [{"family": "msra"}, {"variant": "m0"}, {"variant": "msra-m0"}])
    def test_agreeing_arguments_change_nothing(self, arguments: dict[str, str], tmp_path: Path) -> None:
        path = save_pt(tmp_path / "x.pt", small_weights("msra-m0"))
        assert load_checkpoint(path, **arguments).spec == load_checkpoint(path).spec

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"family": "mobile"}, "unknown family 'mobile'"),
            ({"family": "mit", "variant": "m3"}, "unknown variant 'm3'"),
            ({"family": "mit", "variant": "msa-m3"}, "contradict"),
            ({"variant": "m9"}, "did you mean"),
            ({"image_size": 8}, "image size 8 is not in 32 to 4096"),
            ({"image_size": 100_000}, "image size 100000 is not in"),
        ],
    )
    def test_mistyped_arguments_are_refused_before_the_file_is_opened(
        self, arguments: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(UsageError, match=words):
            load_checkpoint("/nowhere/x.pt", **arguments)


class TestImageSize:
    @pytest.mark.parametrize(
        ("name", "stored_at", "source", "image_size"),
        [
            ("msra-m0", 224, "default", 224),
            ("msra-m0", 256, "default", 224),  # the same windows of 7, 7, 4 as at 224
            ("msra-m0", 64, "weights", 64),
            ("mit-b0", 256, "default", 224),
        ],
    )
    def test_as_far_as_the_weights_tell(
        self, name: str, stored_at: int, source: str, image_size: int, tmp_path: Path
    ) -> None:
        weights = random_weights(name, image_size=stored_at)
        checkpoint = load_checkpoint(save_pt(tmp_path / "x.pt", weights))
        assert (checkpoint.spec.image_size, checkpoint.origin["image_size_from"]) == (image_size, source)

    def test_weights_of_several_sizes_but_not_224_need_the_argument(self, tmp_path: Path) -> None:
        path = save_pt(tmp_path / "x.pt", random_weights("msra-m0", image_size=512))
        with pytest.raises(CheckpointError, match="attention biases fit 400 to 4096 pixels") as caught:
            load_checkpoint(path)
        assert "--image-size" in caught.value.hint
        checkpoint = load_checkpoint(path, image_size=512)
        assert checkpoint.spec.image_size == 512
        assert checkpoint.origin["notes"] == []

    @pytest.mark.parametrize("image_size", [256, 288, 448])
    def test_msra_at_another_size_is_what_timm_makes_of_it(self, image_size: int, tmp_path: Path) -> None:
        timm_msra = import_timm("timm.models.efficientvit_msra")
        weights = small_weights("msra-m0")
        blank = random_weights("msra-m0", num_classes=CLASSES, image_size=image_size, seed=3)
        oracle = timm_model("msra-m0", blank, num_classes=CLASSES, image_size=image_size)
        oracle.load_state_dict(timm_msra.checkpoint_filter_fn(weights, oracle), strict=True)
        checkpoint, model = reload(save_pt(tmp_path / "m0.pt", weights), image_size=image_size)
        batch = images(image_size)
        assert rms_relative(logits_of(model, batch), logits_of(oracle, batch)) < TOLERANCE
        resized = [] if image_size == 256 else ["attention biases of stage 2 resized"]
        assert [note.split(" from")[0] for note in checkpoint.origin["notes"]] == resized

    def test_msra_takes_multiples_of_its_patch(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="250 is no multiple of 16"):
            load_checkpoint(save_pt(tmp_path / "x.pt", small_weights("msra-m0")), image_size=250)

    def test_msa_says_its_size_and_can_be_given_another(self, tmp_path: Path) -> None:
        path = save_pt(
            tmp_path / "x.pt", {"model": random_state_dict(SMALL_MSA, 0), "config": {"family": "msa", "num_heads": 4}}
        )
        assert load_checkpoint(path).origin["image_size_from"] == "weights"
        checkpoint, model = reload(path, image_size=48)
        assert checkpoint.spec == replace(SMALL_MSA, image_size=48)
        assert checkpoint.state_dict["pos_embed"].shape == (1, 8, 8, 8)
        assert logits_of(model, images(48)).shape == (2, 4)

    def test_msa_with_an_oblong_embedding_needs_the_argument(self, tmp_path: Path) -> None:
        spec = replace(SMALL_MSA, config={**SMALL_MSA.config, "pos_embed_size": (8, 6), "num_heads": 8})
        path = save_pt(tmp_path / "x.pt", random_state_dict(spec, 0))
        with pytest.raises(CheckpointError, match=r"position embedding of \(8, 6\), which is not square"):
            load_checkpoint(path)
        assert load_checkpoint(path, image_size=32).spec == spec


class TestConfigBesideTheWeights:
    CONFIG: ClassVar[dict[str, Any]] = {
        "family": "msa",
        "num_heads": 4,
        "image_size": 48,
        "class_names": ["a", "b", "c", "d"],
    }

    @pytest.mark.parametrize("file_format", ["pt", "safetensors"])
    def test_heads_size_and_class_names(self, file_format: str, tmp_path: Path) -> None:
        weights = random_state_dict(SMALL_MSA, 0)
        if file_format == "pt":
            path = save_pt(tmp_path / "x.pt", {"state_dict": weights, "config": self.CONFIG})
        else:
            path = save_safetensors(tmp_path / "x.safetensors", weights, {"config": json.dumps(self.CONFIG)})
        checkpoint = load_checkpoint(path)
        assert checkpoint.spec == replace(SMALL_MSA, image_size=48)
        assert checkpoint.origin["image_size_from"] == "config"
        assert checkpoint.class_names == ("a", "b", "c", "d")

    def test_without_one_there_are_no_class_names(self, tmp_path: Path) -> None:
        assert load_checkpoint(save_pt(tmp_path / "x.pt", small_weights("mit-b0"))).class_names is None

    def test_preprocessing(self, tmp_path: Path) -> None:
        config = {**self.CONFIG, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.25], "crop_fraction": 1}
        content = {"state_dict": random_state_dict(SMALL_MSA, 0), "config": config}
        expected = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.2, 0.25), "bicubic", 1.0)
        assert load_checkpoint(save_pt(tmp_path / "x.pt", content)).preprocessing == expected

    def test_without_one_there_is_no_preprocessing(self, tmp_path: Path) -> None:
        content = {"state_dict": random_state_dict(SMALL_MSA, 0), "config": self.CONFIG}
        assert load_checkpoint(save_pt(tmp_path / "x.pt", content)).preprocessing is None

    @pytest.mark.parametrize(
        "wrong",
        [
            {"mean": [0.5, 0.5, 0.5]},
            {"mean": [0.5, 0.5], "std": [1, 1, 1]},
            {"mean": [0.5, 0.5, 0.5], "std": [1, 0, 1]},
            {"mean": [0.5, 0.5, float("nan")], "std": [1, 1, 1]},
            {"mean": "0.5", "std": [1, 1, 1]},
            {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "magic"},
            {"mean": [0, 0, 0], "std": [1, 1, 1], "crop_fraction": 0},
        ],
        ids=str,
    )
    def test_wrong_preprocessing(self, wrong: dict[str, object], tmp_path: Path) -> None:
        content = {"state_dict": random_state_dict(SMALL_MSA, 0), "config": {**self.CONFIG, **wrong}}
        with pytest.raises(CheckpointError, match=r"x\.pt has config\["):
            load_checkpoint(save_pt(tmp_path / "x.pt", content))

    def test_the_config_of_a_training_script_is_left_alone(self, tmp_path: Path) -> None:
        content = {"state_dict": small_weights("mit-b0"), "config": {"image_size": [224, 224], "class_names": 3}}
        assert load_checkpoint(save_pt(tmp_path / "x.pt", content)).spec.name == "mit-b0"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"family": "mit"}, "holds family msa .* not mit as its config says"),
            ({"class_names": ["a", "b"]}, "2 class names for 4 classes"),
            ({"class_names": "abcd"}, "'class_names'] that is no list"),
            ({"num_heads": "4"}, r"config\['num_heads'\] = '4', expected an integer"),
            ({"num_heads": 5}, "shapes of no msa model: num_heads must divide"),
            ({"image_size": 7}, "expected an integer from 32 to 4096"),
        ],
    )
    def test_a_wrong_config_is_refused(self, change: dict[str, Any], words: str, tmp_path: Path) -> None:
        content = {"state_dict": random_state_dict(SMALL_MSA, 0), "config": {**self.CONFIG, **change}}
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(save_pt(tmp_path / "x.pt", content))

    def test_an_image_size_that_the_attention_biases_do_not_fit(self, tmp_path: Path) -> None:
        content = {"state_dict": small_weights("msra-m0"), "config": {"family": "msra", "image_size": 512}}
        with pytest.raises(CheckpointError, match="says image size 512, but its attention biases are for 208 to 256"):
            load_checkpoint(save_pt(tmp_path / "x.pt", content))


class TestOurOwnWeightsFile:
    """A bundle's weights.safetensors records its spec."""

    def _save(self, tmp_path: Path, spec: ModelSpec, weights: dict[str, Tensor]) -> Path:
        metadata = {"evit_deploy_spec": json.dumps(spec.to_json())}
        return save_safetensors(tmp_path / "weights.safetensors", weights, metadata)

    @pytest.mark.parametrize("name", ["mit-b0", "msra-m0"])
    def test_the_recorded_spec_is_the_spec(self, name: str, tmp_path: Path) -> None:
        spec = ModelSpec.published(name, num_classes=CLASSES, image_size=256)
        if name == "mit-b0":
            spec = replace(spec, config={**spec.config, "attention_eps": 1e-15})
        checkpoint = load_checkpoint(self._save(tmp_path, spec, small_weights(name)))
        assert checkpoint.spec == spec
        assert checkpoint.origin["key_format"] == "evit-deploy"

    @pytest.mark.parametrize(
        ("recorded", "words"),
        [
            ("not json", "metadata 'evit_deploy_spec' that is not JSON"),
            ("[]", "metadata 'evit_deploy_spec' that is not a JSON object"),
            ("{}", "records a model that cannot be built"),
            (json.dumps({**SMALL_MSA.to_json(), "family": "x"}), "records a model that cannot be built"),
            (json.dumps(ModelSpec.published("msra-m1").to_json()), "does not fit msra-m1"),
            (json.dumps(ModelSpec.published("mit-b1").to_json()), "does not fit mit-b1"),
        ],
    )
    def test_a_wrong_record_is_refused(self, recorded: str, words: str, tmp_path: Path) -> None:
        metadata = {"evit_deploy_spec": recorded}
        path = save_safetensors(tmp_path / "w.safetensors", small_weights("msra-m0"), metadata)
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(path)

    def test_an_argument_that_contradicts_the_record(self, tmp_path: Path) -> None:
        path = self._save(tmp_path, ModelSpec.published("msra-m0", num_classes=CLASSES), small_weights("msra-m0"))
        with pytest.raises(CheckpointError, match="holds msra-m0, not variant 'm1'"):
            load_checkpoint(path, variant="m1")
