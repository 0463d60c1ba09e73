"""The verdict and the report: what follows from the rows, the file in the bundle, the images that make it."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evit_deploy import api
from evit_deploy.bundle import Bundle
from evit_deploy.cli import main
from evit_deploy.errors import BundleError, InputDataError, ParityError, UsageError
from evit_deploy.headroom import measure, storage
from evit_deploy.headroom.digest import weights_digest
from evit_deploy.headroom.limits import BF16, FP16
from evit_deploy.headroom.report import HeadroomReport, MeasuredImages, report_hash
from evit_deploy.headroom.rows import ACTIVATION, IN_FP32, INNER, STORED, TensorRow
from evit_deploy.headroom.storage import load_report, prepare_storage, store_report
from evit_deploy.images.sources import InputBatch, InputSource
from evit_deploy.models.precision import in_precision
from tests.checkpoints import images, rms_relative
from tests.headroom_models import fused_of, planted, scaled, weights_of, write_bundle, write_images
from tests.in_process import cli
from tests.small_exports import SPECS

SPEC = SPECS["msa"]
SIZE = SPEC.image_size
BLOCKS = ("stem", "one", "two", "head")
NO_ZEROS = {"fp16": 0.0, "bf16": 0.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second one, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(block: str, max_abs: float, **changes: Any) -> TensorRow:
    plain = TensorRow(block, "add", ACTIVATION, "add", STORED, max_abs, None, max_abs, NO_ZEROS, "0")
    return dataclasses.replace(plain, **changes)


def inner_row(block: str, max_abs: float, **changes: Any) -> TensorRow:
    return row(block, max_abs, **{"tensor": "context", "kind": INNER, "storage": IN_FP32, **changes})


def report_of(*rows: TensorRow, margin_bits: float = 1.0) -> HeadroomReport:
    return HeadroomReport(
        bundle="small.evit",
        model=SPEC.to_json(),
        weights_sha256="0" * 64,
        images=MeasuredImages("folder/", 20, "1" * 64),
        margin_bits=margin_bits,
        blocks=BLOCKS,
        rows=tuple(sorted(rows, key=lambda row: row.margin_bits(FP16))),
        notes=(),
        created="2024-01-01T00:00:00+00:00",
        versions={},
    )


# Verdict


def test_safe_up_to_the_margin_and_not_beyond() -> None:
    assert report_of(row("one", 65504 / 2)).verdict == "fp16"
    beyond = report_of(row("one", 65504 / 2 * 1.001))
    assert (beyond.verdict, beyond.keep_fp32, beyond.bf16_safe) == ("keep", ("one",), True)
    assert report_of(row("one", 65504), margin_bits=0.0).verdict == "fp16"
    assert report_of(row("one", 65504 * 1.001), margin_bits=0.0).verdict == "keep"
    assert report_of(row("one", 2.0**-13)).verdict == "fp16"
    assert report_of(row("one", 2.0**-13 * 0.999)).verdict == "keep"
    assert report_of(row("one", 0.0, rms=0.0)).verdict == "fp16"


def test_blocks_to_keep_come_in_their_order_and_once() -> None:
    report = report_of(row("head", 1e9), row("stem", 1e5), row("two", 1.0), row("stem", 1e7, tensor="conv"))
    assert report.keep_fp32 == ("stem", "head")
    assert [row.block for row in report.failing(FP16)] == ["head", "stem", "stem"]


def test_what_stays_in_fp32_anyway_is_no_reason_to_keep_a_block() -> None:
    report = report_of(row("one", 1.0), inner_row("one", 1.0, max_sum=1e6), inner_row("two", 1e5))
    assert report.verdict == "fp16"
    assert report.naive.breaks
    assert [row.block for row in report.naive.overflows] == ["one", "two"]
    assert report.naive.divides_by_zero == ()
    assert not report_of(row("one", 1e9), inner_row("one", 60000.0)).naive.breaks


def test_a_denominator_that_vanishes_in_fp16_is_named() -> None:
    vanishing = inner_row("one", 3.0, tensor="attn.denominator", zeroed_share={"fp16": 0.01, "bf16": 0.0})
    naive = report_of(vanishing, inner_row("two", 3.0, zeroed_share={"fp16": 0.5, "bf16": 0.0})).naive
    assert naive.divides_by_zero == (vanishing,)
    assert naive.breaks


def test_bf16_has_limits_too() -> None:
    report = report_of(row("one", 3e38))
    assert not report.bf16_safe
    assert report.failing(BF16)[0].margin_bits(BF16) < 1


# Which model


def test_a_report_is_of_one_model_at_one_size_with_its_weights() -> None:
    report = report_of(row("one", 1.0))
    assert report.matches(SPEC, "0" * 64)
    assert report.spec == SPEC
    assert "other weights" in report.mismatch(SPEC, "2" * 64)
    assert "40 px, not 80 px" in report.mismatch(dataclasses.replace(SPEC, image_size=80), "0" * 64)
    other = dataclasses.replace(SPEC, config={**SPEC.config, "num_heads": 1})
    assert "configuration" in report.mismatch(other, "0" * 64)
    assert not report.matches(other, "0" * 64)


def test_the_digest_is_of_names_types_shapes_and_bytes() -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.int64)}
    digest = weights_digest(tensors)
    assert len(digest) == 64
    assert digest == weights_digest({"a": tensors["a"], "b": tensors["b"].t().contiguous().t()})
    for changed in (
        {"c": tensors["b"], "a": tensors["a"]},
        {"b": tensors["b"].reshape(3, 2), "a": tensors["a"]},
        {"b": tensors["b"], "a": tensors["a"].view(torch.float64)},
        {"b": tensors["b"] + torch.tensor([0.0, 0.0, 1e-6]), "a": tensors["a"]},
        {"b": tensors["b"]},
    ):
        assert weights_digest(changed) != digest


# A bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "small.evit", "msa", weights_of("msa"))


@pytest.fixture
def array(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images.npy", "msa")


def test_the_report_is_in_the_bundle_and_reads_back_equal(bundle: Bundle, array: Path) -> None:
    report = api.headroom(bundle.path, array)
    assert report.verdict == "fp16"
    assert report.bf16_safe
    assert report.images.count == 6
    assert load_report(bundle) == load_report(bundle.path) == report
    assert load_report(bundle.path / "reports" / "headroom.json") == report
    assert report.matches(bundle.spec, weights_digest(weights_of("msa")))
    assert [entry.name for entry in (bundle.path / "reports").iterdir()] == ["headroom.json"]
    Bundle.open(bundle.path)
    margins = [row.margin_bits(FP16) for row in report.rows]
    assert margins == sorted(margins)
    document = report.to_json()
    assert report.summary() == {
        "verdict": "fp16",
        "images": 6,
        "keep_fp32": [],
        "report_sha256": document["report_sha256"],
    }


def test_batches_of_any_size_give_the_same(bundle: Bundle, array: Path) -> None:
    one, four = (api.headroom(bundle, array, batch=batch) for batch in (1, 4))
    assert one.images == four.images
    assert one.weights_sha256 == four.weights_sha256
    figures = {row.name: row for row in one.rows}
    assert len(figures) == len(four.rows)
    for row_of_four in four.rows:
        assert row_of_four.max_abs == pytest.approx(figures[row_of_four.name].max_abs, rel=1e-3, abs=1e-6)
        assert row_of_four.rms == pytest.approx(figures[row_of_four.name].rms, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (3, 3), (4, 4), (6, 6), (9, 6)])
def test_a_limit_is_exact(limit: int, count: int, bundle: Bundle, array: Path) -> None:
    report = api.headroom(bundle, array, limit=limit)
    assert report.images.count == count
    assert f"only {count} image{'s' if count > 1 else ''}: give more, as varied as the model will see" in report.notes


def test_a_limit_leaves_images_of_every_sub_folder(bundle: Bundle, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        picture = tmp_path / "classes" / ("cat", "dog")[index // 3] / f"{index % 3}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(picture)
    done = cli("headroom", bundle.path, "--images", tmp_path / "classes", "--limit", "2", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["images"]["source"], document["images"]["count"]) == ("classes/", 2)
    assert {row["image"] for row in document["rows"] if row["image"]} == {"cat/0.png", "dog/0.png"}


class Countdown(InputSource):
    """Images made when they are asked for; how many batches are alive at once is counted."""

    name = "countdown"

    def __init__(self, batches: int) -> None:
        self.wanted = batches
        self.made: list[weakref.ref[np.ndarray]] = []
        self.most_alive = 0

    def batches(self, size: int, *, pixels: bool = False) -> Iterator[InputBatch]:
        for index in range(self.wanted):
            array = images(SIZE, size, index).numpy()
            self.made.append(weakref.ref(array))
            self.most_alive = max(self.most_alive, sum(made() is not None for made in self.made))
            yield InputBatch(array, None, tuple(f"{index}-{i}" for i in range(size)))
            del array


def test_no_batch_outlives_the_next(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Countdown(12)
    monkeypatch.setattr(measure, "open_inputs", lambda *_: source)
    assert api.headroom(bundle, "unused", batch=1).images.count == 12
    assert source.most_alive <= 2


def test_planted_values_make_the_verdict_and_its_blocks_the_cure(tmp_path: Path) -> None:
    block, weights = planted("mit")
    bundle = write_bundle(tmp_path / "large.evit", "mit", weights)
    report = api.headroom(bundle, write_images(tmp_path / "images.npy", "mit", 2))
    assert (report.verdict, report.keep_fp32, report.bf16_safe) == ("keep", (block,), True)
    assert report.summary()["keep_fp32"] == [block]
    model, batch = fused_of(SPECS["mit"], weights), images(SPECS["mit"].image_size, 2)
    with torch.no_grad():
        kept = in_precision(model, "fp16", load_report(bundle).keep_fp32)(batch)
        assert rms_relative(kept.float(), model(batch)) < 1e-2
        assert not in_precision(model, "fp16")(batch).isfinite().all()


def keys_scaled(block: str, factor: float) -> dict[str, torch.Tensor]:
    """Weights of `mit` with an attention's keys multiplied, which its result does not depend on."""
    name = f"{block}.context_module.main.qkv.conv.weight"
    weights = weights_of("mit")
    dim = SPECS["mit"].config["head_dim"]
    keys = torch.arange(len(weights[name])) % (3 * dim) // dim == 1
    return scaled(weights, {name: torch.where(keys, factor, 1.0)[:, None, None, None]})


def half_attention(qkv: torch.Tensor, dim: int, eps: float) -> torch.Tensor:
    """LiteMLA's formula in FP16 throughout, as a converted graph has it: qkv [B, h*3*d, H, W]."""
    x = qkv.half().reshape(len(qkv), -1, 3 * dim, qkv.shape[2] * qkv.shape[3])
    q, k, v = x[:, :, :dim].relu(), x[:, :, dim : 2 * dim].relu(), x[:, :, 2 * dim :]
    denominator = k.sum(-1, keepdim=True).transpose(-1, -2) @ q
    return ((v @ k.transpose(-1, -2)) @ q) / (denominator + torch.tensor(eps).half())


def test_a_naive_conversion_is_told_what_it_does(tmp_path: Path) -> None:
    """Sums beyond FP16 where every stored tensor fits it."""
    block = "stages.2.blocks.1"
    weights = keys_scaled(block, 2.0**12)
    bundle = write_bundle(tmp_path / "naive.evit", "mit", weights)
    report = api.headroom(bundle, write_images(tmp_path / "images.npy", "mit", 2))
    assert report.verdict == "fp16"
    assert {row.block for row in report.naive.overflows} == {block}
    assert {"context_module.main.numerator", "context_module.main.context"} <= {
        row.tensor for row in report.naive.overflows
    }
    seen: list[torch.Tensor] = []
    model = fused_of(SPECS["mit"], weights)
    attention = model.get_submodule(f"{block}.context_module.main.qkv")
    attention.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch = images(SPECS["mit"].image_size, 2)
    with torch.no_grad():
        expected = model(batch)
        assert not half_attention(seen[0], 16, 1e-5).isfinite().all()
        assert rms_relative(in_precision(model, "fp16")(batch).float(), expected) < 1e-2


@pytest.mark.parametrize(("eps", "breaks"), [(1e-15, True), (1e-5, False)])
def test_a_vanishing_denominator_is_found_in_a_model(eps: float, breaks: bool, tmp_path: Path) -> None:
    """Keys that no token has leave the eps alone to divide by, and 1e-15 is zero in FP16."""
    block = "stages.3.blocks.1"
    spec = dataclasses.replace(SPECS["mit"], config={**SPECS["mit"].config, "attention_eps": eps})
    bundle = write_bundle(tmp_path / "zero.evit", "mit", keys_scaled(block, 0.0), spec=spec)
    report = api.headroom(bundle, write_images(tmp_path / "images.npy", "mit", 2))
    zero = [row.name for row in report.naive.divides_by_zero]
    assert zero == ([f"{block} context_module.main.denominator"] if breaks else [])
    assert report.verdict == "fp16"


# Notes


def test_notes_say_what_a_reader_must_know(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "random.evit", "msa", weights_of("msa"), random_weights=True)
    many = images(SIZE, 20).numpy()
    many[3] = 0.25
    many[7, 1] = 40.0
    np.save(tmp_path / "many.npy", many)
    notes = api.headroom(bundle, tmp_path / "many.npy").notes
    assert [note.split(":")[0] for note in notes] == [
        "the weights are random",
        "1 of the 20 images are of one colour",
        "the images reach 40",
    ]


# What is refused


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def no_images(folder: Path) -> Path:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("no image")
    return folder / "texts"


def unreadable(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    Image.fromarray(np.arange(SIZE * SIZE * 3, dtype=np.uint8).reshape(SIZE, SIZE, 3)).save(folder / "pictures/a.png")
    (folder / "pictures" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder / "pictures"


def blank(folder: Path) -> Path:
    (folder / "blank").mkdir()
    for name, colour in (("a", (255, 0, 0)), ("b", (9, 9, 9))):
        Image.new("RGB", (SIZE, SIZE), colour).save(folder / "blank" / f"{name}.png")
    return folder / "blank"


def saved(array: np.ndarray) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        np.save(folder / "array.npy", array)
        return folder / "array.npy"

    return save


BAD_IMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "nowhere", "no such file or folder"),
    "empty-folder": (empty_folder, "is an empty folder"),
    "no-images": (no_images, "holds no image among its 1 files"),
    "unreadable": (unreadable, "b.png is no image that Pillow knows"),
    "one-colour": (blank, "each of the 2 images in blank/ is of one colour"),
    "one-blank": (saved(np.zeros((1, SIZE, SIZE, 3), np.uint8)), "the only image in array.npy is of one colour"),
    "nan": (saved(np.full((2, 3, SIZE, SIZE), np.nan, np.float32)), "has NaN or Inf in row 0"),
    "wrong-size": (saved(np.ones((2, 3, SIZE, SIZE + 1), np.float32)), "is float32 of shape"),
    "wrong-type": (saved(np.ones((2, 3, SIZE, SIZE))), "has dtype float64"),
    "no-rows": (saved(np.ones((0, 3, SIZE, SIZE), np.float32)), "is empty"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_that_say_nothing_are_refused_in_one_line(case: str, bundle: Bundle, tmp_path: Path) -> None:
    make, message = BAD_IMAGES[case]
    with pytest.raises(InputDataError) as caught:
        api.headroom(bundle, make(tmp_path))
    assert message in caught.value.summary
    assert "\n" not in str(caught.value)
    assert not (bundle.path / "reports" / "headroom.json").exists()


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"limit": 0}, {"margin_bits": -1.0}, {"margin_bits": float("nan")}], ids=str
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], bundle: Bundle, array: Path) -> None:
    with pytest.raises(UsageError):
        api.headroom(bundle, array, **options)


def test_a_model_that_fp32_cannot_carry_is_no_measurement(tmp_path: Path, array: Path) -> None:
    key = "stages.1.blocks.0.ffn.expand.weight"
    bundle = write_bundle(tmp_path / "huge.evit", "msa", scaled(weights_of("msa"), {key: 1e38}))
    with pytest.raises(InputDataError, match=r"stages.1.blocks.0 \S+ is (NaN|infinite) in FP32 already, image \d"):
        api.headroom(bundle, array)
    broken = scaled(weights_of("msa"), {key: float("nan")})
    bundle = write_bundle(tmp_path / "broken.evit", "msa", broken)
    with pytest.raises(InputDataError, match=r"stages.1.blocks.0 expand.weight is NaN in FP32 already: "):
        api.headroom(bundle, array)


# The file


def changed_file(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))

    return apply


def rehashed(**changes: Any) -> Callable[[Path], None]:
    def change(document: dict[str, Any]) -> None:
        document.update(changes)
        del document["report_sha256"]
        document["report_sha256"] = report_hash(document)

    return changed_file(change)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "removed": (lambda file: file.unlink(), "has no headroom report"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:1000]), "not readable as JSON"),
    "a-list": (lambda file: file.write_text("[1]"), "is no headroom report"),
    "another-document": (rehashed(schema="evit-deploy/verify"), "is no headroom report"),
    "another-version": (rehashed(schema_version=2), "of version 2, this tool reads 1"),
    "verdict-changed": (changed_file(lambda document: document.update(verdict="keep")), "has changed since"),
    "row-changed": (changed_file(lambda document: document["rows"][0].update(max_abs=0.5)), "has changed since"),
    "hash-removed": (changed_file(lambda document: document.pop("report_sha256")), "has changed since"),
    "a-folder": (lambda file: (file.unlink(), file.mkdir()), "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_report_is_refused(case: str, bundle: Bundle) -> None:
    store_report(report_of(row("one", 1.0)), bundle)
    damage, message = DAMAGES[case]
    damage(bundle.path / "reports" / "headroom.json")
    with pytest.raises(InputDataError) as caught:
        load_report(bundle)
    assert message in str(caught.value)
    assert "evit-deploy headroom" in caught.value.hint


def test_a_report_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match=r"nothing.json does not exist"):
        load_report(tmp_path / "nothing.json")


def test_a_failed_write_leaves_the_old_report(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = report_of(row("one", 1.0)), report_of(row("one", 2.0))
    store_report(old, bundle)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "sync_path", full)
    with pytest.raises(BundleError, match="No space left on device"):
        store_report(new, bundle)
    assert load_report(bundle) == old
    assert [entry.name for entry in (bundle.path / "reports").iterdir()] == ["headroom.json"]


def test_a_place_that_cannot_be_written_shows_before_the_work(
    bundle: Bundle, array: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "fused_model", lambda *_: pytest.fail("the work began"))
    (tmp_path / "elsewhere").mkdir()
    reports = bundle.path / "reports"
    reports.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="symbolic link"):
        api.headroom(bundle, array)
    reports.unlink()
    reports.write_text("a file")
    with pytest.raises(BundleError, match="cannot be written"):
        api.headroom(bundle, array)


def test_a_bundle_that_was_replaced_meanwhile_keeps_no_report(bundle: Bundle, tmp_path: Path) -> None:
    bundle.path.rename(tmp_path / "old.evit")
    write_bundle(bundle.path, "msa", weights_of("msa", seed=1))
    with pytest.raises(BundleError, match="was replaced while it was measured"):
        store_report(report_of(row("one", 1.0)), bundle)
    assert not (bundle.path / "reports" / "headroom.json").exists()


def test_the_folder_of_reports_is_made_once(bundle: Bundle) -> None:
    assert prepare_storage(bundle) == prepare_storage(bundle) == bundle.path / "reports"


# The command


@pytest.fixture
def large(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "large one.evit", "msa", planted("msa")[1])


def test_the_command_says_what_to_do(large: Bundle, array: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["headroom", str(large.path), "--images", str(array), "--rows", "3"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    facts = {line[:10].strip(): line[10:].strip() for line in lines[:10] if line}
    assert facts["FP16"].startswith(
        "not safe, keep 1 of 5 blocks in FP32: stages.1.blocks.0; because of stages.1.blocks.0 depthwise.weight ("
    )
    assert facts["BF16"].startswith("safe: every stored tensor keeps ")
    assert facts["next"] == (
        f"evit-deploy export '{large.path}' --precision fp16 --keep-fp32 auto "
        f"--output '{large.path.with_name('large one-fp16.evit')}'"
    )
    assert facts["report"] == f"{large.path}/reports/headroom.json"
    assert sum(line.startswith("stages.1.blocks.0  depthwise.weight ") for line in lines) == 1
    assert len([line for line in lines if "more tensors with more room: --rows 0 prints all" in line]) == 2
    assert len(lines) < 26
    assert main(["headroom", str(large.path), "--images", str(array), "--rows", "0"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert len(everything) > len(load_report(large).rows)


def test_a_type_can_be_required(large: Bundle, bundle: Bundle, array: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(place: Bundle, *options: str) -> int:
        return main(["headroom", str(place.path), "--images", str(array), "--json", *options])

    assert run(large, "--require", "fp16") == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out) == load_report(large).to_json()
    assert "FP16 is not safe: stages.1.blocks.0 depthwise.weight" in printed.err
    assert printed.err.count("\n") == len(printed.err.splitlines())
    assert "export with --keep-fp32 auto" in printed.err
    assert run(large, "--require", "bf16") == 0
    assert run(bundle, "--require", "fp16") == 0
    assert run(bundle, "--require", "fp16", "--margin-bits", "14") == 3
    assert run(bundle, "--require", "fp61") == 2
    assert "did you mean 'fp16'?" in capsys.readouterr().err


def test_images_must_be_named(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["headroom", str(bundle.path)]) == 2
    assert "--images" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_an_export_keeps_the_blocks_that_the_report_names(tmp_path: Path) -> None:
    """From the measurement to a graph that PyTorch with real FP16 values agrees with; without it there is none."""
    block, weights = planted("mit")
    source = write_bundle(tmp_path / "large.evit", "mit", weights)
    report = api.headroom(source, write_images(tmp_path / "images.npy", "mit", 2))
    target = tmp_path / "fp16.evit"
    options: dict[str, Any] = {"precision": "fp16", "simplify": False, "max_batch": 2}
    with pytest.raises(ParityError):
        api.export(source.path, target, **options)
    exported = api.export(source.path, target, keep_fp32=("auto",), **options).bundle
    assert exported.manifest["onnx"]["keep_fp32"] == [block]
    assert exported.manifest["headroom"] == report.summary()
