"""Every JSON document that a command prints against its JSON Schema, and what the schemas refuse."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from evit_kernels import cache
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from evit_deploy.cli import main
from tests.made_up_kernels import TRITON, kernel_of, replace_compiler

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schemas"
SCHEMAS: dict[str, dict[str, Any]] = {
    path.name.removesuffix(".schema.json"): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.glob("*.schema.json"))
}
REGISTRY: Registry[Any] = Registry().with_resources(
    (schema["$id"], Resource.from_contents(schema)) for schema in SCHEMAS.values()
)
DOCUMENTS = (
    "export",
    "export-random",
    "verify",
    "bench",
    "quantize",
    "inspect-bundle",
    "inspect-int8",
    "inspect-onnx",
    "inspect-checkpoint",
    "models",
    "doctor",
    "kernels-list",
    "kernels-compile",
    "kernels-pack",
    "kernels-unpack",
    "manifest",
    "build_trt",
    "build_trt-plugin",
    "build_trt-dry",
    "engine",
    "headroom",
    "evaluate",
)


def schema_name(document: str) -> str:
    return document.partition("-")[0]


def check(document: dict[str, Any]) -> None:
    """Validate a document against the schema it names itself."""
    name = document["schema"].removeprefix("evit-deploy/")
    Draft202012Validator(SCHEMAS[name], registry=REGISTRY).validate(document)


def strict_json(text: str) -> Any:
    """One JSON document and nothing else; NaN, Infinity and duplicate keys are none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), f"a key stands twice: {[key for key, _ in pairs]}"
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def run(*arguments: str | Path) -> tuple[int, str]:
    """Exit code, and everything that reached file descriptor 1 while the command ran, native code included."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as captured:
            os.dup2(captured.fileno(), 1)
            with open(1, "w", encoding="utf-8", closefd=False) as stdout, contextlib.redirect_stdout(stdout):
                code = main([str(argument) for argument in arguments])
            captured.seek(0)
            return code, captured.read()
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def made_up_compiler(folder: Path) -> Iterator[None]:
    """A kernel cache in a folder, filled without Triton, which is an interpreter in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVIT_DEPLOY_KERNEL_CACHE", str(folder))
        replace_compiler(patch, kernel_of)
        patch.setattr(cache, "installed_triton", lambda: TRITON)
        for module in ("kernels.compiling", "trt.plugin_kernels"):
            patch.setattr(f"evit_deploy.{module}.interpreting", lambda: False)
        yield


@pytest.fixture(scope="module")
def printed(digits: Path, digits_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The text of a document as a user's script reads it from stdout; each command runs once."""
    folder = tmp_path_factory.mktemp("schemas")
    kernels = ("--model", "mit-b0", "--arch", "80,90", "--dtype", "fp16", "--json")
    bundle = digits_bundle.path
    random_export = ("export", "--random-weights", "msra-m0", "--image-size", "64", "--no-verify", "--json")
    trt = ("--flavor", "rtx", "--batch", "1:2:4", "--batch", "8", "--json")
    commands: dict[str, tuple[str | Path, ...]] = {
        "export": ("export", digits / "digits.pt", "--output", folder / "digits.evit", "--batch", "2", "--json"),
        "export-random": (*random_export, "--output", folder / "random.evit", "--no-simplify"),
        "verify": ("verify", bundle, "--batch", "1,3", "--input", digits / "heldout", "--json"),
        "bench": ("bench", bundle, "--batch", "1", "--backend", "onnxruntime", "--duration", "10", "--json", "-"),
        "headroom": ("headroom", folder / "measured.evit", "--images", digits / "heldout", "--limit", "5", "--json"),
        "evaluate": ("evaluate", bundle, "--data", digits / "heldout.npz", "--limit", "20", "--json"),
        "quantize": (
            *("quantize", bundle, "--calibrate", digits / "calibration.npy", "--exclude", "stages.0"),
            *("--exclude", "stages.1", "--output", folder / "int8.evit", "--json"),
        ),
        "inspect-bundle": ("inspect", bundle, "--json"),
        "inspect-int8": ("inspect", folder / "int8.evit", "--json"),
        "inspect-onnx": ("inspect", bundle / "model.onnx", "--json"),
        "inspect-checkpoint": ("inspect", digits / "digits.pt", "--json"),
        "models": ("models", "--json"),
        "doctor": ("doctor", "--json"),
        "build_trt": ("build-trt", folder / "built.evit", *trt, "--no-plugin"),
        "build_trt-plugin": ("build-trt", folder / "built.evit", *trt, "--targets", "sm80,sm89"),
        "build_trt-dry": ("build-trt", bundle, *trt, "--dry-run"),
        "kernels-list": ("kernels", "list", *kernels),
        "kernels-compile": ("kernels", "compile", *kernels),
        "kernels-pack": ("kernels", "pack", *kernels, "--output", folder / "kernels.zip"),
        "kernels-unpack": ("kernels", "unpack", folder / "kernels.zip", "--json"),
    }
    texts = {"manifest": (bundle / "manifest.json").read_text(encoding="utf-8")}

    def get(name: str) -> str:
        if name not in texts and name == "engine":
            texts[name] = json.dumps(strict_json(get("build_trt"))["engine"])
        if name not in texts:
            if name == "build_trt":
                shutil.copytree(bundle, folder / "built.evit")
            if name == "headroom":
                shutil.copytree(bundle, folder / "measured.evit")
            if name == "build_trt-plugin":
                get("build_trt")
            if name == "inspect-int8":
                get("quantize")
            if name == "kernels-unpack":
                get("kernels-pack")
            with made_up_compiler(folder / "cache"):
                code, texts[name] = run(*commands[name])
            assert code in ((0, 5) if name == "bench" else (0,))  # 5: this machine was too busy to tell
        return texts[name]

    return get


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one(name: str) -> None:
    schema = SCHEMAS[name]
    Draft202012Validator.check_schema(schema)
    assert schema["$id"].endswith(f"/{name}.schema.json")
    assert schema["properties"]["schema"] == {"const": f"evit-deploy/{name}"}
    assert schema["properties"]["schema_version"] == {"const": 1}
    assert schema.get("additionalProperties", schema.get("unevaluatedProperties")) is False


def test_every_schema_has_its_document() -> None:
    assert {schema_name(document) for document in DOCUMENTS} == set(SCHEMAS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_printed_fits_its_schema(name: str, printed: Callable[[str], str]) -> None:
    document = strict_json(printed(name))
    assert document["schema"] == f"evit-deploy/{schema_name(name)}"
    assert document["schema_version"] == 1
    check(document)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_schema_refuses_what_lacks_a_part_or_has_one_too_many(name: str, printed: Callable[[str], str]) -> None:
    document = strict_json(printed(name))
    for key in document.keys() - {"schema"}:
        with pytest.raises(ValidationError):
            check({name: value for name, value in document.items() if name != key})
    for change in ({"surplus": 1}, {"schema_version": 2}):
        with pytest.raises(ValidationError):
            check({**document, **change})


def at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Put a value at a dotted path; a number is a position in a list."""

    def change(document: Any) -> None:
        *parents, last = path.split("/")
        for part in parents:
            document = document[int(part) if isinstance(document, list) else part]
        document[int(last) if isinstance(document, list) else last] = value

    return change


WRONG: list[tuple[str, str, Any]] = [
    ("export", "model/family", "resnet"),
    ("export", "model/config", {}),
    ("export", "onnx_sha256", "unknown"),
    ("export", "onnx/batch", None),
    ("export", "onnx/dynamic_batch", True),
    ("export", "onnx/operators", {}),
    ("export", "onnx/simplified/checks", 0),
    ("export", "onnx/simplified/applied", False),
    ("export", "seconds/verify", -1.0),
    ("export", "verification/verdict", "fail"),
    ("export", "verification/rows/0/max_abs", "small"),
    ("export", "origin/random_weights", False),
    ("export-random", "origin/random_weights", False),
    ("export-random", "origin/path", "m0.pt"),
    ("verify", "verdict", "passed"),
    ("verify", "rows/0/passed", False),
    ("verify", "rows/0/nan", 1),
    ("verify", "rows/0/rms_rel", None),
    ("bench", "rows/0/latency_ms/p50", 0),
    ("bench", "onnx_sha256", None),
    ("quantize", "layers", []),
    ("quantize", "layers/0/quantized", False),
    ("quantize", "layers/0/threshold", 0),
    ("quantize", "layers/0/error", None),
    ("quantize", "layers/0/excluded", "first or last layer"),
    ("quantize", "layers/0/op_type", "Softmax"),
    ("quantize", "calibration/images", 0),
    ("quantize", "calibration/method", "mean"),
    ("quantize", "calibration/digest", "unknown"),
    ("quantize", "verification/verdict", "fail"),
    ("quantize", "seconds/surplus", 1.0),
    ("quantize", "error", -1.0),
    ("inspect-int8", "calibration/quantized", 0),
    ("inspect-int8", "calibration/excluded", {"node_conv2d": ""}),
    ("inspect-bundle", "calibration", {}),
    ("inspect-bundle", "verification/verdict", "fail"),
    ("inspect-bundle", "hashes_checked", False),
    ("inspect-bundle", "onnx/surplus", 1),
    ("inspect-bundle", "files/model.onnx/sha256", "0" * 63),
    ("inspect-bundle", "random_weights", None),
    ("inspect-onnx", "kind", "graph"),
    ("inspect-onnx", "kind", "checkpoint"),
    ("inspect-onnx", "inputs/0/shape", "any"),
    ("inspect-onnx", "tensors", 3),
    ("inspect-checkpoint", "origin/key_format", "huggingface"),
    ("inspect-checkpoint", "tensors", 0),
    ("models", "rows", []),
    ("models", "rows/0/parameters", "3.4 M"),
    ("models", "rows/0/name", "m1"),
    ("doctor", "rows/0/status", "missing"),
    ("doctor", "rows/0/without_it", "nothing works"),
    ("doctor", "verdict", "missing"),
    ("doctor", "environment/cpu/usable_cores", 0),
    ("kernels-list", "command", "unpack"),
    ("kernels-list", "rows", []),
    ("kernels-list", "rows/0/registers", 40),
    ("kernels-list", "rows/0/state", "compiled"),
    ("kernels-list", "rows/0/model", None),
    ("kernels-list", "pack", {}),
    ("kernels-compile", "rows/0/registers", None),
    ("kernels-compile", "rows/0/registers", 256),
    ("kernels-compile", "rows/0/spill_bytes", 4),
    ("kernels-compile", "rows/0/shared_bytes", 49153),
    ("kernels-compile", "rows/0/target", "80"),
    ("kernels-compile", "rows/0/state", "refused"),
    ("kernels-compile", "rows/0/state", "failed"),
    ("kernels-compile", "rows/0/reason", "none"),
    ("kernels-compile", "rows/0/key", "0" * 63),
    ("kernels-compile", "rows/0/size", "large"),
    ("kernels-compile", "triton", 3.7),
    ("kernels-pack", "pack/sha256", "unknown"),
    ("kernels-pack", "pack/kernels", 0),
    ("kernels-unpack", "pack", None),
    ("kernels-unpack", "rows/0/state", "absent"),
    ("kernels-unpack", "rows/0/model", "mit-b0"),
    ("manifest", "model/image_size", 0),
    ("manifest", "preprocessing/std/1", 0),
    ("manifest", "verification", {"verdict": "pass"}),
    ("manifest", "verification", {"verdict": "skipped", "worst_rms_rel": 0.0}),
    ("manifest", "created", "yesterday"),
    ("manifest", "files", {}),
    ("manifest", "class_names", []),
    ("build_trt", "dry_run", True),
    ("build_trt", "engine", None),
    ("build_trt", "engine/plugin/used", True),
    ("build_trt", "plan/exists", False),
    ("build_trt-dry", "dry_run", False),
    ("build_trt-dry", "plan/profiles", []),
    ("build_trt-dry", "plan/plugin/kernel_hash", None),
    ("engine", "name", "my.engine"),
    ("engine", "key", "unknown"),
    ("engine", "key_parts/options/surplus", 1),
    ("engine", "flavor", "auto"),
    ("engine", "targets", ["ampere"]),
    ("engine", "profiles/0/min", 0),
    ("engine", "io/0/shape/0", 0),
    ("engine", "io/0/mode", "both"),
    ("engine", "plugin/reason", ""),
    ("engine", "plugin/layers", 1),
    ("engine", "layers", []),
    ("engine", "layers_note", ""),
    ("engine", "size_bytes", 0),
    ("engine", "created", "yesterday"),
    ("engine", "record_sha256", None),
    ("evaluate", "verdict", "fail"),
    ("evaluate", "verdict", "incomplete"),
    ("evaluate", "failures", ["onnxruntime: NaN or Inf for 1 of 20 images"]),
    ("evaluate", "data/unreadable", [{"image": "row 1", "reason": "holds NaN or Inf"}]),
    ("evaluate", "data/read", 0),
    ("evaluate", "data/kind", "npy"),
    ("evaluate", "k", 6),
    ("evaluate", "max_top1_drop", -0.5),
    ("evaluate", "rows/0/backend", "onnxruntime"),
    ("evaluate", "rows/0/agreement", 1.0),
    ("evaluate", "rows/0/surplus", 1),
    ("evaluate", "rows/1/agreement", None),
    ("evaluate", "rows/1/top1", 99.4),
    ("evaluate", "rows/1/changed", [{"image": "row 1"}]),
    ("evaluate", "classes", []),
    ("evaluate", "classes/0/top1", {"onnxruntime": 1.0}),
    ("evaluate", "onnx_sha256", None),
    ("headroom", "verdict", "safe"),
    ("headroom", "verdict", "keep"),
    ("headroom", "keep_fp32", ["stem"]),
    ("headroom", "images/count", 0),
    ("headroom", "weights_sha256", "unknown"),
    ("headroom", "rows", []),
    ("headroom", "rows/0/storage", "fp16"),
    ("headroom", "rows/0/kind", "sum"),
    ("headroom", "rows/0/fp16/zeroed_share", 2),
    ("headroom", "rows/0/fp16/overflow_bits", "many"),
    ("headroom", "rows/0/max_sum", -1),
    ("headroom", "created", "today"),
    ("headroom", "naive_half/breaks", None),
]


@pytest.mark.parametrize(("name", "path", "value"), WRONG, ids=[f"{n}-{p}-{v}" for n, p, v in WRONG])
def test_a_schema_refuses_a_wrong_value(name: str, path: str, value: Any, printed: Callable[[str], str]) -> None:
    document = copy.deepcopy(strict_json(printed(name)))
    at(path, value)(document)
    with pytest.raises(ValidationError):
        check(document)


def test_a_bundle_of_random_weights_says_so_in_every_document(printed: Callable[[str], str]) -> None:
    document = strict_json(printed("export-random"))
    assert document["origin"]["random_weights"] is True
    assert document["verification"] is None
    assert "random weights" in document["notes"][0]


def test_models_of_one_family_fit_the_schema_too() -> None:
    document = strict_json(run("models", "--family", "mit", "--json")[1])
    check(document)
    assert {row["family"] for row in document["rows"]} == {"mit"}


def test_an_engine_with_the_plugin_fits_the_schema_too(printed: Callable[[str], str]) -> None:
    document = strict_json(printed("build_trt-plugin"))
    assert document["engine"]["plugin"]["used"] is True
