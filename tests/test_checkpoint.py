"""Checkpoints of every published form load, and to the original's logits."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from evit_deploy.checkpoint import load_checkpoint
from evit_deploy.checkpoint.file import read_checkpoint_file
from evit_deploy.checkpoint.weights import WEIGHTS_CHOICES
from evit_deploy.errors import CheckpointError, UsageError
from evit_deploy.models import load_model
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.specs import ModelSpec, variant_names
from tests.checkpoints import (
    CLASSES,
    SMALL_MSA,
    TOLERANCE,
    images,
    logits_of,
    microsoft_names,
    mit_names,
    official_names,
    random_weights,
    reload,
    rms_relative,
    save_pt,
    save_safetensors,
    set_attention_eps,
    size_of,
    small_weights,
    timm_model,
)
from tests.tiers import tiered

# Of mit: blocks of B and of L; of msra: the cascades of four, two and three heads, kernels of 5 and of 7.
ONE_OF_EACH_KIND = ("mit-b0", "mit-l1", "msra-m0", "msra-m1")


class TestLogitsEqualTheOriginal:
    """timm's registered model is the oracle; with MIT's eps where the file has MIT's names."""

    @pytest.mark.parametrize(
        "name", tiered(variant_names("mit") + variant_names("msra"), ONE_OF_EACH_KIND.__contains__)
    )
    def test_timm_and_authors_names(self, name: str, tmp_path: Path) -> None:
        family, image_size = name.split("-")[0], size_of(name)
        weights = random_weights(name, num_classes=CLASSES, image_size=image_size)
        oracle = timm_model(name, weights, num_classes=CLASSES)
        batch = images(image_size)
        wrapper, authors = {"mit": ("state_dict", "mit"), "msra": ("model", "microsoft")}[family]
        files = [
            (save_safetensors(tmp_path / "timm.safetensors", weights), "timm", 1e-5),
            (save_pt(tmp_path / "authors.pt", {wrapper: official_names(name, weights)}), authors, 1e-15),
        ]
        for path, key_format, attention_eps in files:
            checkpoint, model = reload(path)
            path.unlink()
            assert (checkpoint.spec.name, checkpoint.origin["key_format"]) == (name, key_format)
            assert checkpoint.spec.num_classes == CLASSES
            expected = ModelSpec.published(name, num_classes=CLASSES)
            assert checkpoint.spec == replace(
                expected,
                config={**expected.config, **({"attention_eps": attention_eps} if family == "mit" else {})},
            )
            reference = logits_of(set_attention_eps(oracle, attention_eps), batch)
            assert rms_relative(logits_of(model, batch), reference) < TOLERANCE

    @pytest.mark.parametrize(
        "spec", [SMALL_MSA, ModelSpec.published("msa-m1", num_classes=CLASSES)], ids=lambda s: s.name
    )
    def test_msa(self, spec: ModelSpec, tmp_path: Path) -> None:
        weights = random_state_dict(spec, 0)
        original = load_model(spec, weights)
        config = {"family": "msa", "num_heads": spec.config["num_heads"]}
        checkpoint, model = reload(save_pt(tmp_path / "msa.pt", {"state_dict": weights, "config": config}))
        assert checkpoint.spec == spec
        assert checkpoint.origin["key_format"] == "evit-deploy"
        batch = images(spec.image_size)
        assert torch.equal(logits_of(model, batch), logits_of(original, batch))

    def test_mit_names_bring_mits_eps(self, tmp_path: Path) -> None:
        """With small queries and keys the eps decides, and the two key formats of the same weights differ."""
        weights = dict(small_weights("mit-b0"))
        for key in weights:
            if key.endswith("context_module.main.qkv.conv.weight"):
                weights[key] = weights[key] * 1e-3
        oracle = timm_model("mit-b0", weights, num_classes=CLASSES)
        batch = images(64)
        logits = {eps: logits_of(set_attention_eps(oracle, eps), batch) for eps in (1e-15, 1e-5)}
        assert rms_relative(logits[1e-15], logits[1e-5]) > 10 * TOLERANCE
        for eps, names in ((1e-15, mit_names(weights)), (1e-5, weights)):
            _, model = reload(save_pt(tmp_path / "b0.pt", names))
            assert rms_relative(logits_of(model, batch), logits[eps]) < TOLERANCE

    @pytest.mark.parametrize("name", ["mit-b0", "msra-m0"])
    def test_two_swapped_tensors_of_one_shape_are_seen(self, name: str, tmp_path: Path) -> None:
        """The comparison above would catch a key map that confuses two tensors."""
        weights, batch = small_weights(name), images(size_of(name))
        reference = logits_of(timm_model(name, weights, num_classes=CLASSES), batch)
        alike: dict[tuple[str, torch.Size], list[str]] = {}
        for key, value in weights.items():
            if value.is_floating_point():
                alike.setdefault((key.rpartition(".")[2], value.shape), []).append(key)
        chooser = random.Random(0)
        groups = [keys for keys in alike.values() if len(keys) > 1]
        for keys in chooser.sample(groups, 12):
            first, second = chooser.sample(keys, 2)
            swapped = {**weights, first: weights[second], second: weights[first]}
            _, model = reload(save_pt(tmp_path / "swapped.pt", swapped))
            assert rms_relative(logits_of(model, batch), reference) > TOLERANCE, (first, second)


class TestFileForms:
    """All with the same weights, so that what is read can be compared bit by bit."""

    WRAPPINGS: ClassVar[dict[str, tuple[Callable[[dict[str, Tensor]], Any], str | None, str]]] = {
        "bare": (lambda w: w, None, "model"),
        "state_dict": (lambda w: {"state_dict": w, "epoch": 3}, "state_dict", "model"),
        "model": (lambda w: {"model": w, "optimizer": {"state": {}}}, "model", "model"),
        "model_state_dict": (lambda w: {"model_state_dict": w}, "model_state_dict", "model"),
        "model_ema": (lambda w: {"model_ema": w}, "model_ema", "ema"),
        "ema": (lambda w: {"ema": w, "state_dict": None}, "ema", "ema"),
        "ema-state_dict": (lambda w: {"ema": {"state_dict": w, "decay": 0.9}}, "ema", "ema"),
        "ema-by-decay": (lambda w: {"ema": {0.9998: w}}, "ema", "ema"),
        "state_dict_ema": (lambda w: {"state_dict_ema": w}, "state_dict_ema", "ema"),
        "parallel": (lambda w: {"module." + k: v for k, v in w.items()}, None, "model"),
        "compiled": (lambda w: {"_orig_mod." + k: v for k, v in w.items()}, None, "model"),
        "compiled-parallel": (
            lambda w: {"model": {"module._orig_mod." + k: v for k, v in w.items()}},
            "model",
            "model",
        ),
        "averaged": (
            lambda w: {"n_averaged": torch.tensor(5), **{"module." + k: v for k, v in w.items()}},
            None,
            "model",
        ),
        "parameters": (
            lambda w: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in w.items()},
            None,
            "model",
        ),
        "with-arguments": (
            lambda w: {"model": w, "args": argparse.Namespace(lr=1e-3, model="m0"), "epoch": 300},
            "model",
            "model",
        ),
    }

    @pytest.mark.parametrize("wrapping", WRAPPINGS)
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    def test_pt(self, wrapping: str, legacy: bool, tmp_path: Path) -> None:
        wrap, wrapper, kind = self.WRAPPINGS[wrapping]
        weights = small_weights("msra-m0")
        path = tmp_path / "m0.pth"
        torch.save(wrap(weights), path, _use_new_zipfile_serialization=not legacy)
        checkpoint = load_checkpoint(path)
        assert (checkpoint.origin["wrapper"], checkpoint.origin["weights"]) == (wrapper, kind)
        assert checkpoint.origin["file_format"] == "pt"
        assert list(checkpoint.state_dict) == list(weights)
        assert all(torch.equal(checkpoint.state_dict[key], weights[key]) for key in weights)

    def test_the_suffix_does_not_matter(self, tmp_path: Path) -> None:
        path = save_safetensors(tmp_path / "m0.bin", small_weights("msra-m0"))
        assert load_checkpoint(path).origin["file_format"] == "safetensors"
        path = save_pt(tmp_path / "m5-of-mine.tar", small_weights("msra-m0"))
        assert load_checkpoint(path).spec.name == "msra-m0"

    @pytest.mark.parametrize("header_bytes", [0x280, 0x480, 0x4B50], ids=hex)
    def test_a_safetensors_header_whose_length_looks_like_another_format(
        self, header_bytes: int, tmp_path: Path
    ) -> None:
        header = b'{"x.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(header_bytes)
        path = tmp_path / "x.bin"
        path.write_bytes(struct.pack("<Q", header_bytes) + header + bytes(4))
        file = read_checkpoint_file(path)
        assert (file.file_format, list(file.content)) == ("safetensors", ["x.weight"])

    def test_the_weights_outlive_the_file(self, tmp_path: Path) -> None:
        weights = small_weights("msra-m0")
        path = save_pt(tmp_path / "m0.pt", weights)
        checkpoint = load_checkpoint(path)
        path.write_bytes(b"\0" * path.stat().st_size)
        assert torch.equal(checkpoint.state_dict["head.linear.weight"], weights["head.linear.weight"])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("file_format", ["pt", "safetensors"])
    def test_other_float_types_become_float32(self, dtype: torch.dtype, file_format: str, tmp_path: Path) -> None:
        weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in small_weights("msra-m0").items()}
        save = save_pt if file_format == "pt" else save_safetensors
        checkpoint = load_checkpoint(save(tmp_path / "m0", weights))
        floats = sum(v.is_floating_point() for v in weights.values())
        assert checkpoint.origin["dtypes"] == {
            str(dtype).removeprefix("torch."): floats,
            "int64": len(weights) - floats,
        }
        assert {v.dtype for v in checkpoint.state_dict.values()} == {torch.float32, torch.int64}
        assert torch.equal(checkpoint.state_dict["head.linear.weight"], weights["head.linear.weight"].float())

    def test_origin_is_json_and_identifies_the_file(self, tmp_path: Path) -> None:
        path = save_pt(tmp_path / "m0.pt", small_weights("msra-m0"))
        origin = load_checkpoint(path).origin
        assert json.loads(json.dumps(origin)) == origin
        assert origin["path"] == "m0.pt"
        assert origin["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert origin["size_bytes"] == path.stat().st_size
        assert origin["notes"] == []

    def test_batchnorm_counters_may_be_missing(self, tmp_path: Path) -> None:
        weights = {k: v for k, v in small_weights("mit-b0").items() if not k.endswith("num_batches_tracked")}
        checkpoint = load_checkpoint(save_pt(tmp_path / "b0.pt", weights))
        assert list(checkpoint.state_dict) == list(small_weights("mit-b0"))
        assert checkpoint.state_dict["stem.in_conv.norm.num_batches_tracked"].dtype == torch.int64

    def test_microsofts_convolutions_may_be_matrices(self, tmp_path: Path) -> None:
        """Microsoft's own loader takes them so."""
        weights = microsoft_names(small_weights("msra-m0"))
        key = "blocks2.1.se.fc1.weight"
        flat = {**weights, key: weights[key][:, :, 0, 0]}
        checkpoint = load_checkpoint(save_pt(tmp_path / "m0.pth", {"model": flat}))
        loaded = checkpoint.state_dict["stages.1.downsample.patchmerge.se.fc1.weight"]
        assert torch.equal(loaded, weights[key])

    def test_a_strided_view_is_made_contiguous(self, tmp_path: Path) -> None:
        weights = dict(small_weights("msra-m0"))
        weights["head.linear.weight"] = weights["head.linear.weight"].t().contiguous().t()
        loaded = load_checkpoint(save_pt(tmp_path / "m0.pt", weights)).state_dict["head.linear.weight"]
        assert loaded.is_contiguous()
        assert torch.equal(loaded, weights["head.linear.weight"])


class TestWhichWeights:
    @pytest.fixture
    def both(self, tmp_path: Path) -> Path:
        other = random_weights("msra-m0", image_size=224, seed=2)
        return save_pt(tmp_path / "both.pt", {"model": small_weights("msra-m0"), "model_ema": other, "epoch": 1})

    @pytest.mark.parametrize(("wanted", "wrapper"), [(None, "model_ema"), ("ema", "model_ema"), ("model", "model")])
    def test_ema_unless_the_model_is_asked_for(self, both: Path, wanted: str | None, wrapper: str) -> None:
        checkpoint = load_checkpoint(both, weights=wanted)
        assert checkpoint.origin["wrapper"] == wrapper
        expected = torch.load(both)[wrapper]["head.linear.weight"]
        assert torch.equal(checkpoint.state_dict["head.linear.weight"], expected)
        other = "model" if wrapper == "model_ema" else "model_ema"
        assert checkpoint.origin["notes"] == [
            f"used the {checkpoint.origin['weights']} weights {wrapper!r}; the file also holds {other!r}"
        ]

    @pytest.mark.parametrize(
        ("content", "wanted", "words"),
        [
            ("bare", "ema", "is a bare state dict without EMA weights"),
            ("model", "ema", "holds no ema weights, only 'model'"),
            ("model_ema", "model", "holds no model weights, only 'model_ema'"),
        ],
    )
    def test_weights_that_are_not_there(self, content: str, wanted: str, words: str, tmp_path: Path) -> None:
        weights = small_weights("msra-m0")
        path = save_pt(tmp_path / "x.pt", weights if content == "bare" else {content: weights})
        with pytest.raises(CheckpointError, match=f"x.pt {words}"):
            load_checkpoint(path, weights=wanted)

    def test_unknown_kind(self, both: Path) -> None:
        with pytest.raises(UsageError, match=f"known: {', '.join(WEIGHTS_CHOICES)}"):
            load_checkpoint(both, weights="best")
