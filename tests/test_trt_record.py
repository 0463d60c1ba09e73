"""An engine's JSON: what a changed, cut, foreign or half-copied one is refused for, before TensorRT sees the engine."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evit_deploy.bundle import Bundle
from evit_deploy.errors import BundleError
from evit_deploy.trt import EngineRecord, check_runnable, engines_of, open_engine
from evit_deploy.trt.record import HASH_FIELD, _digest, engine_key, engine_name
from tests.fake_trt_child import ENGINE
from tests.tiny_bundle import write_tiny
from tests.trt_builds import fake_build

VERSION = "1.7.1.116"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one engine; read it, and change only copies."""
    target = tmp_path_factory.mktemp("record") / "tiny.evit"
    write_tiny(target)
    fake_build(target, targets=("sm89",))
    return target


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Bundle:
    """A copy that a test may change."""
    return Bundle.open(shutil.copytree(built, tmp_path / "tiny.evit"))


def record_of(bundle: Bundle) -> EngineRecord:
    (record,) = engines_of(bundle)
    return record


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of an engine's JSON and give it the hash of what it then says."""
    document = {**json.loads(path.read_text()), **changes}
    del document[HASH_FIELD]
    path.write_text(json.dumps({**document, HASH_FIELD: _digest(document)}))


def test_an_engine_is_found_by_its_file_its_json_and_its_name(bundle: Bundle) -> None:
    record = record_of(bundle)
    for path in (record.engine_path, record.path, record.name, f"{record.name}.engine", str(record.path)):
        assert open_engine(path, bundle=bundle) == record
    assert open_engine(record.engine_path) == record
    assert json.loads(record.path.read_bytes()) == record.json_dict
    assert record.encode() == record.path.read_bytes()
    assert record.batch_profiles[0].max == 64
    assert record.name == f"rtx-fp32-b1-8-64-no-plugin-{record.key[:8]}"


def _cut(record: EngineRecord) -> None:
    record.engine_path.write_bytes(ENGINE[:-1])


def _grow(record: EngineRecord) -> None:
    record.engine_path.write_bytes(ENGINE + b"!")


def _flip(record: EngineRecord) -> None:
    record.engine_path.write_bytes(b"A" + ENGINE[1:])


def _remove_engine(record: EngineRecord) -> None:
    record.engine_path.unlink()


def _remove_json(record: EngineRecord) -> None:
    record.path.unlink()


def _remove_both(record: EngineRecord) -> None:
    record.path.unlink()
    record.engine_path.unlink()


def _half_json(record: EngineRecord) -> None:
    record.path.write_bytes(record.encode()[:500])


def _edit_json(record: EngineRecord) -> None:
    record.path.write_text(record.path.read_text().replace('"fp32"', '"fp16"'))


def _nan_json(record: EngineRecord) -> None:
    record.path.write_text(record.path.read_text().replace('"build_seconds": 0.5', '"build_seconds": NaN'))


def _other_schema(record: EngineRecord) -> None:
    record.path.write_text('{"schema": "evit-deploy/manifest"}')


def _no_object(record: EngineRecord) -> None:
    record.path.write_text("[]")


def _newer(record: EngineRecord) -> None:
    rewrite(record.path, schema_version=2)


def _no_version(record: EngineRecord) -> None:
    rewrite(record.path, schema_version="1")


def _malformed(record: EngineRecord) -> None:
    rewrite(record.path, size_bytes=True)


def _other_key(record: EngineRecord) -> None:
    rewrite(record.path, tensorrt_version="1.6.0.0")


def _huge_json(record: EngineRecord) -> None:
    with record.path.open("ab") as file:
        file.truncate(64 * 1024**2 + 1)


def _link_engine(record: EngineRecord) -> None:
    record.engine_path.rename(record.engine_path.with_name("other"))
    record.engine_path.symlink_to("other")


def _link_json(record: EngineRecord) -> None:
    record.path.rename(record.path.with_name("other"))
    record.path.symlink_to("other")


def _folder(record: EngineRecord) -> None:
    record.engine_path.unlink()
    record.engine_path.mkdir()


DAMAGE: list[tuple[Callable[[EngineRecord], None], str]] = [
    (_cut, "is truncated: 4999 of 5000 bytes"),
    (_grow, "has changed: 5001 bytes instead of 5000"),
    (_flip, "has changed since it was built"),
    (_remove_engine, "is missing, and"),
    (_remove_json, "its build was interrupted, or only one of the two was copied"),
    (_remove_both, "does not exist; there: none"),
    (_half_json, "is not readable as JSON"),
    (_edit_json, "has changed since the engine was built"),
    (_nan_json, "no JSON"),
    (_other_schema, "is not an engine's JSON: its schema is 'evit-deploy/manifest'"),
    (_no_object, "is not an engine's JSON: its schema is 'list'"),
    (_newer, "has schema version 2, this evit-deploy reads 1"),
    (_no_version, "has schema version '1'"),
    (_malformed, "'size_bytes' is missing or malformed"),
    (_other_key, "the key is not that of what the engine was built from"),
    (_huge_json, "no engine's JSON is"),
    (_link_engine, "cannot be read: it is a symbolic link"),
    (_link_json, "cannot be read: it is a symbolic link"),
    (_folder, "is not a plain file"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=[damage.__name__[1:] for damage, _ in DAMAGE])
def test_a_damaged_engine_is_refused_in_one_line(
    damage: Callable[[EngineRecord], None], said: str, bundle: Bundle
) -> None:
    record = record_of(bundle)
    damage(record)
    with pytest.raises(BundleError) as raised:
        open_engine(record.name, bundle=bundle)
    assert said in raised.value.summary
    assert raised.value.hint
    assert "\n" not in str(raised.value)


def test_without_the_hash_only_the_size_is_compared(bundle: Bundle) -> None:
    record = record_of(bundle)
    _flip(record)
    assert open_engine(record.path, bundle=bundle, check_hash=False) == record
    _cut(record)
    with pytest.raises(BundleError, match="truncated"):
        open_engine(record.path, check_hash=False)


def test_a_renamed_engine_is_refused(bundle: Bundle) -> None:
    record = record_of(bundle)
    for path in (record.path, record.engine_path):
        path.rename(path.with_name(f"mine{path.suffix}"))
    with pytest.raises(BundleError, match="an engine keeps its name"):
        open_engine(record.path.with_name("mine.engine"))


def test_an_engine_of_another_graph_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.evit", seed=5)
    with pytest.raises(BundleError, match="was built from another ONNX file than"):
        open_engine(record_of(bundle).path, bundle=other)


def test_a_damaged_engine_in_the_bundle_is_built_again(bundle: Bundle) -> None:
    _flip(record_of(bundle))
    result = fake_build(bundle.path, targets=("sm89",))
    assert not result.reused
    assert any(note.startswith("the engine that was there is replaced: ") for note in result.notes)
    assert open_engine(result.record.path, bundle=bundle) == result.record


def test_a_bundle_without_engines_has_none(tmp_path: Path) -> None:
    assert engines_of(write_tiny(tmp_path / "none.evit")) == []


def test_the_key_depends_on_every_part(bundle: Bundle) -> None:
    record = record_of(bundle)
    parts = record.key_parts
    assert set(parts) == {
        "onnx_sha256",
        "flavor",
        "tensorrt_version",
        "precision",
        "attention",
        "profiles",
        "targets",
        "gpu",
        "plugin",
        "options",
    }
    keys = {engine_key({**parts, name: "another"}) for name in parts} | {record.key}
    assert len(keys) == len(parts) + 1
    with_plugin = {**parts, "plugin": {"form": "jit", "op_types": {"EvitLiteMLA": 2}, "kernel_hash": "0" * 64}}
    assert "no-plugin" not in engine_name(with_plugin)
    two = {**parts, "profiles": [{"min": 1, "opt": 1, "max": 1}, {"min": 2, "opt": 8, "max": 64}]}
    assert engine_name(two).startswith("rtx-fp32-b1-1-1_b2-8-64-no-plugin-")


JIT = {"used": True, "layers": 2, "form": "jit", "kernel_hash": "a" * 64, "reason": "", "op_types": {}, "arches": [89]}
AOT = {**JIT, "form": "aot"}


@pytest.mark.parametrize(
    ("changes", "here", "said"),
    [
        pytest.param({}, ("rtx", VERSION, 89, None), None, id="same"),
        pytest.param({}, ("rtx", VERSION, None, None), None, id="gpu-unknown"),
        pytest.param({}, ("tensorrt", VERSION, 89, None), "was built with flavor rtx", id="flavor"),
        pytest.param({}, ("rtx", "1.8.0.1", 89, None), "was built with TensorRT 1.7.1.116, and 1.8.0.1", id="version"),
        pytest.param(
            {"options": {"version_compatible": True}}, ("rtx", "1.8.0.1", 89, None), None, id="version-compatible"
        ),
        pytest.param(
            {"options": {"version_compatible": True}}, ("rtx", "2.0.0.1", 89, None), "was built with", id="next-major"
        ),
        pytest.param({}, ("rtx", VERSION, 90, None), "the GPU here, which is sm90: it was built for sm89", id="gpu"),
        pytest.param({"targets": []}, ("rtx", VERSION, 90, None), None, id="default-targets"),
        pytest.param({"targets": []}, ("rtx", VERSION, 75, None), "sm80 and later", id="default-targets-turing"),
        pytest.param({"options": {"hardware_compatible": True}}, ("rtx", VERSION, 90, None), None, id="ampere-plus"),
        pytest.param(
            {"options": {"hardware_compatible": True}}, ("rtx", VERSION, 75, None), "sm80 and later", id="below-ampere"
        ),
        pytest.param({"plugin": JIT}, ("rtx", VERSION, 89, "a" * 64), None, id="plugin"),
        pytest.param(
            {"plugin": JIT}, ("rtx", VERSION, 89, "b" * 64), "those here are bbbbbbbbbbbb", id="other-kernels"
        ),
        pytest.param({"plugin": JIT}, ("rtx", VERSION, 89, None), "none are registered here", id="no-plugin-here"),
        pytest.param(
            {"plugin": JIT, "targets": []},
            ("rtx", VERSION, 121, "a" * 64),
            "its plugin has kernels for sm89",
            id="plugin-without-kernel-for-the-gpu",
        ),
        pytest.param({"plugin": AOT}, ("rtx", VERSION, 89, None), None, id="kernel-inside"),
    ],
)
def test_what_cannot_run_here_is_refused(
    changes: dict[str, Any], here: tuple[str, str, int | None, str | None], said: str | None, bundle: Bundle
) -> None:
    record = dataclasses.replace(record_of(bundle), **changes)
    if said is None:
        check_runnable(record, *here)
        return
    with pytest.raises(BundleError) as raised:
        check_runnable(record, *here)
    assert said in raised.value.summary
    assert "build-trt" in raised.value.hint
