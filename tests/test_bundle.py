from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evit_deploy.bundle import Bundle, hash_file
from evit_deploy.bundle.manifest import encode_manifest
from evit_deploy.errors import EXIT_FAILED, EXIT_USAGE, BundleError, UsageError
from evit_deploy.specs import Preprocessing
from tests.tiny_bundle import TINY_SPEC, onnx_bytes, write_tiny


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny(tmp_path / "m3.evit", seed=5, class_names=["cat", "dog", "bird"])


def rewrite_manifest(bundle: Bundle, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it a hash that fits, as somebody who means it would."""
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    change(manifest)
    (bundle.path / "manifest.json").write_bytes(encode_manifest(manifest))


def test_open_gives_back_what_was_written(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.path)
    assert opened.spec == TINY_SPEC
    assert opened.preprocessing == Preprocessing()
    assert opened.class_names == ["cat", "dog", "bird"]
    assert opened.max_batch == 64
    assert opened.has_random_weights
    assert opened.onnx_sha256 == hashlib.sha256(onnx_bytes(5)).hexdigest() == hash_file(opened.onnx_path)
    assert opened.read_onnx() == onnx_bytes(5)
    state_dict = opened.load_state_dict()
    assert {name: tensor.tolist() for name, tensor in state_dict.items()} == {"head.bias": [5.0] * 50}


def test_trained_weights_are_not_random(tmp_path: Path) -> None:
    assert not write_tiny(tmp_path / "m3.evit", origin={"sha256": "0" * 64}).has_random_weights


def test_onnx_and_weights_lie_in_the_bundle(bundle: Bundle) -> None:
    assert bundle.onnx_path == bundle.path / "model.onnx"
    assert bundle.weights_path == bundle.path / "weights.safetensors"
    assert bundle.onnx_path.is_file()
    assert bundle.weights_path.is_file()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def remove(path: Path) -> None:
    path.unlink()


def link_elsewhere(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "truncated: 100 of"),
        (flip_a_byte, "has changed since the bundle was written: sha256"),
        (append, "bytes instead of"),
        (remove, "is missing"),
        (link_elsewhere, "symbolic link"),
        (make_folder, "not a plain file"),
        (make_pipe, "not a plain file"),
    ],
)
def test_damaged_file_is_refused_by_name(bundle: Bundle, name: str, damage: Callable[[Path], None], words: str) -> None:
    damage(bundle.path / name)
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(bundle.path)
    assert str(bundle.path / name) in caught.value.summary
    assert caught.value.exit_code == EXIT_FAILED


def test_without_hashes_only_a_changed_byte_passes(bundle: Bundle) -> None:
    flip_a_byte(bundle.onnx_path)
    opened = Bundle.open(bundle.path, check_hashes=False)
    with pytest.raises(BundleError, match="has changed"):
        opened.read_onnx()
    truncate(bundle.onnx_path)
    with pytest.raises(BundleError, match="truncated"):
        Bundle.open(bundle.path, check_hashes=False)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"schema": "evit-deploy/man', b"\xff\xfe\x00", b"[" * 100_000],
    ids=["empty", "truncated", "not-text", "nested"],
)
def test_manifest_that_is_no_json(bundle: Bundle, content: bytes) -> None:
    (bundle.path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not readable as JSON"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"schema": "other"}'])
def test_manifest_of_something_else(bundle: Bundle, content: str) -> None:
    (bundle.path / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match="is not a bundle's manifest"):
        Bundle.open(bundle.path)


def test_manifest_of_a_newer_version_is_told_apart_from_a_changed_one(bundle: Bundle) -> None:
    path = bundle.path / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(BundleError, match="newer evit-deploy: schema version 2") as caught:
        Bundle.open(bundle.path)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("version", ["0", "true", '"1"', "null"])
def test_manifest_of_no_valid_version(bundle: Bundle, version: str) -> None:
    path = bundle.path / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', f'"schema_version": {version}'))
    with pytest.raises(BundleError, match="schema_version"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("before", "after"), [('"seed": 5', '"seed": 6'), ('"random_weights": true', '"random_weights": false')]
)
def test_changed_manifest_is_refused(bundle: Bundle, before: str, after: str) -> None:
    path = bundle.path / "manifest.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(BundleError, match=r"manifest\.json has changed"):
        Bundle.open(bundle.path)


def test_no_field_of_the_manifest_can_change_unseen(bundle: Bundle) -> None:
    path = bundle.path / "manifest.json"
    manifest = json.loads(path.read_text())
    told_apart = {"schema", "schema_version"}  # another one is no damage, and has words of its own
    assert manifest.keys() > {*told_apart, "model", "onnx", "files", "manifest_sha256"}
    for field, value in manifest.items():
        rest = {name: other for name, other in manifest.items() if name != field}
        for changed in ({**rest, field: {"was": value}}, rest):
            path.write_text(json.dumps(changed))
            with pytest.raises(BundleError, match=None if field in told_apart else r"manifest\.json has changed"):
                Bundle.open(bundle.path)
    path.write_text(json.dumps({**manifest, "more": 1}))
    with pytest.raises(BundleError, match=r"manifest\.json has changed"):
        Bundle.open(bundle.path)


def test_reformatted_manifest_is_the_same_manifest(bundle: Bundle) -> None:
    path = bundle.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert Bundle.open(bundle.path).spec == TINY_SPEC


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../secret", "a/../../secret", "./model.onnx", "a//b", "..", "", "a\\..\\b", "nul\0"],
)
def test_file_name_that_leads_out_is_refused(bundle: Bundle, name: str) -> None:
    (bundle.path.parent / "secret").write_text("secret")
    record = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size_bytes": 6}
    rewrite_manifest(bundle, lambda manifest: manifest["files"].update({name: record}))
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(bundle.path)


def test_folder_link_that_leads_out_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "labels.txt").write_text("secret")
    (bundle.path / "extra").symlink_to(outside)
    record = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size_bytes": 6}
    rewrite_manifest(bundle, lambda manifest: manifest["files"].update({"extra/labels.txt": record}))
    with pytest.raises(BundleError, match=r"extra/labels\.txt goes through a symbolic link"):
        Bundle.open(bundle.path)


def test_file_in_a_folder_of_the_bundle_is_checked(bundle: Bundle) -> None:
    (bundle.path / "extra").mkdir()
    (bundle.path / "extra" / "labels.txt").write_text("labels")
    record = {"sha256": hashlib.sha256(b"labels").hexdigest(), "size_bytes": 6}
    rewrite_manifest(bundle, lambda manifest: manifest["files"].update({"extra/labels.txt": record}))
    Bundle.open(bundle.path)
    (bundle.path / "extra" / "labels.txt").write_text("lapels")
    with pytest.raises(BundleError, match=r"extra/labels\.txt has changed"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("model"), "'model'"),
        (lambda m: m["model"].pop("config"), "'model'"),
        (lambda m: m["model"].update(family="resnet"), "resnet"),
        (lambda m: m["model"].update(image_size="224"), "image_size"),
        (lambda m: m["model"].update(num_classes=-3), "num_classes"),
        (lambda m: m["preprocessing"].pop("mean"), "preprocessing"),
        (lambda m: m.pop("onnx"), "'onnx'"),
        (lambda m: m.update(origin=[]), "'origin'"),
        (lambda m: m.update(files=[]), "'files'"),
        (lambda m: m["files"].pop("model.onnx"), r"does not list model\.onnx"),
        (lambda m: m["files"].pop("weights.safetensors"), r"does not list weights\.safetensors"),
        (lambda m: m["files"]["model.onnx"].update(sha256="beef"), "no valid sha256"),
        (lambda m: m["files"]["model.onnx"].update(size_bytes=-1), "no valid sha256"),
        (lambda m: m["files"].update({"model.onnx": None}), "no valid sha256"),
        (lambda m: m["files"].update({"manifest.json": {}}), "cannot vouch for"),
        (lambda m: m["files"].update({"engines/a.engine": {}}), "cannot vouch for"),
        (lambda m: m.update(class_names=["one"]), "1 class names for 3 classes"),
        (lambda m: m.update(class_names="abc"), "not a list"),
        (lambda m: m["onnx"].update(max_batch=0), "max_batch"),
    ],
)
def test_malformed_manifest_is_refused(bundle: Bundle, change: Callable[[dict[str, Any]], None], words: str) -> None:
    rewrite_manifest(bundle, change)
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(bundle.path)
    assert "manifest.json" in caught.value.summary


def test_missing_folder_names_the_closest_bundle(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist") as caught:
        Bundle.open(tmp_path / "m2.evit")
    assert f"did you mean {bundle.path}?" in caught.value.hint


def test_missing_folder_without_any_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist") as caught:
        Bundle.open(tmp_path / "m3.evit")
    assert "evit-deploy export" in caught.value.hint


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a bundle: it has no manifest\.json"):
        Bundle.open(tmp_path)


def test_file_inside_a_bundle_names_the_bundle(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="is a file, and a bundle is a folder") as caught:
        Bundle.open(bundle.onnx_path)
    assert str(bundle.path) in caught.value.hint


def test_link_to_a_bundle_is_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "latest.evit").symlink_to(bundle.path)
    assert Bundle.open(tmp_path / "latest.evit").spec == TINY_SPEC


def test_find_takes_the_only_bundle(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".m3.evit.staging-1-00000000").mkdir()
    (tmp_path / ".hidden.evit").mkdir()
    (tmp_path / "a-file.evit").write_text("")
    assert Bundle.find(tmp_path).path == bundle.path
    monkeypatch.chdir(tmp_path)
    assert Bundle.find().path == Path("m3.evit")


def test_find_takes_the_folder_itself(bundle: Bundle) -> None:
    assert Bundle.find(bundle.path).path == bundle.path


def test_find_without_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"no \.evit bundle in the current folder"):
        Bundle.find()


def test_find_lists_several(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "b1.evit")
    with pytest.raises(UsageError, match=r"2 bundles in .*: b1\.evit, m3\.evit") as caught:
        Bundle.find(tmp_path)
    assert caught.value.exit_code == EXIT_USAGE


def test_weights_replaced_after_opening_are_refused(bundle: Bundle) -> None:
    write_tiny(bundle.path, seed=6, force=True)
    with pytest.raises(BundleError, match="replaced after the bundle was opened"):
        bundle.load_state_dict()
    with pytest.raises(BundleError, match="has changed"):
        bundle.read_onnx()


def test_reading_needs_no_torch() -> None:
    code = "import sys, evit_deploy.bundle, evit_deploy.bundle.writer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=child_environment()).returncode == 0


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
