"""Files that are no checkpoint, damaged, absurd or hostile are each refused with a line of their own."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evit_deploy.checkpoint import load_checkpoint
from evit_deploy.constants import MAX_CHECKPOINT_BYTES
from evit_deploy.errors import CheckpointError
from evit_deploy.models.random_weights import random_state_dict
from tests.checkpoints import (
    SMALL_MSA,
    save_pt,
    save_safetensors,
    small_weights,
)


class RunsCode:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom file permissions bind; root is not bound."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def zip_bytes(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def saved_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def entries_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


class TestUntrustedFiles:
    def _refused(self, path: Path, words: str) -> CheckpointError:
        with pytest.raises(CheckpointError, match=words) as caught:
            load_checkpoint(path)
        assert path.name in caught.value.summary
        assert "\n" not in str(caught.value)
        return caught.value

    @pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
    def test_code_is_not_run(self, form: str, tmp_path: Path) -> None:
        path, target = tmp_path / "evil.pt", tmp_path / "was-run"
        content = {"state_dict": {"x": torch.zeros(1)}, "extra": RunsCode(target)}
        if form == "pickle":
            path.write_bytes(pickle.dumps({"x": RunsCode(target)}, protocol=2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        self._refused(
            path, r"would run code or make objects when loaded: it refers to \w+\.system; nothing of it was run"
        )
        assert not target.exists()

    def test_a_whole_module_is_not_weights(self, tmp_path: Path) -> None:
        path = save_pt(tmp_path / "module.pt", nn.Linear(2, 2))
        assert "state_dict" in self._refused(path, "holds the Python object torch.nn.modules.linear.Linear").hint

    @pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
    def test_truncated(self, form: str, kept: float, tmp_path: Path) -> None:
        path = tmp_path / "cut.pt"
        if form == "safetensors":
            save_safetensors(path, small_weights("msra-m0"))
        else:
            torch.save(small_weights("msra-m0"), path, _use_new_zipfile_serialization=form == "zip")
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        self._refused(path, "is truncated")

    def test_one_changed_byte_of_a_weight_is_noticed(self, tmp_path: Path) -> None:
        weights = small_weights("msra-m0")
        path = save_pt(tmp_path / "flipped.pt", weights)
        data = bytearray(path.read_bytes())
        position = data.find(weights["head.linear.weight"].numpy().tobytes()[:64])
        data[position + 5] ^= 1
        path.write_bytes(data)
        self._refused(path, "is truncated or damaged: Bad CRC-32 for file 'flipped/data/")

    def test_files_without_checksums_are_taken(self, tmp_path: Path) -> None:
        try:
            torch.serialization.set_crc32_options(False)
            path = save_pt(tmp_path / "unchecked.pt", small_weights("msra-m0"))
        finally:
            torch.serialization.set_crc32_options(True)
        assert load_checkpoint(path).spec.name == "msra-m0"

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
    def test_damaged_bytes_give_an_error_or_the_same_model(self, form: str, seed: int, tmp_path: Path) -> None:
        weights = random_state_dict(SMALL_MSA, 0)
        path = tmp_path / "damaged.pt"
        if form == "safetensors":
            save_safetensors(path, weights)
        else:
            torch.save({"model": weights}, path, _use_new_zipfile_serialization=form == "zip")
        data = path.read_bytes()
        chooser = random.Random(seed)
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(chooser.choice([1, 4, 32])):
                position = (
                    chooser.randrange(min(len(data), 20_000))
                    if chooser.random() < 0.7
                    else -chooser.randrange(1, 9_000)
                )
                damaged[position] = chooser.randrange(256)
            path.write_bytes(damaged)
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointError as error:
                assert "damaged.pt" in error.summary  # noqa: PT017 - either outcome is right
            else:
                assert [v.shape for v in checkpoint.state_dict.values()] == [v.shape for v in weights.values()]

    @pytest.mark.parametrize(
        ("name", "data", "words"),
        [
            ("empty.pt", b"", "is empty"),
            ("text.pt", b"hello\nworld\n", "is a text file"),
            ("page.pt", b"<!DOCTYPE html><html>", "is a web page"),
            ("pointer.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
            ("noise.pt", bytes(range(1, 200)), "is no checkpoint: it begins with 01 02"),
            ("array.pt", zip_bytes({"x.npy": b"1"}), "is a zip archive that torch.save did not write"),
            ("plain.pt", pickle.dumps({"a": 1}, protocol=2), "is a pickle that torch.save did not write"),
            ("text.safetensors", b"hello\nworld\n", "is a text file"),
            ("junk.safetensors", struct.pack("<Q", 20) + b"{not json at all....", "is truncated or damaged"),
            ("claim.safetensors", struct.pack("<Q", 10**12) + b"{}", "claims a header of 1,000,000,000,000 bytes"),
            (
                "cut.safetensors",
                struct.pack("<Q", 5000) + b"{}",
                "is truncated: its header has 5,000 bytes, the file 10",
            ),
        ],
    )
    def test_other_files(self, name: str, data: bytes, words: str, tmp_path: Path) -> None:
        path = tmp_path / name
        path.write_bytes(data)
        self._refused(path, words)

    @pytest.mark.parametrize("name", ["model.onnx", "model.pt"])
    def test_an_onnx_file(self, name: str, tmp_path: Path) -> None:
        import onnx

        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
        onnx.save(onnx.helper.make_model(graph), tmp_path / name)
        self._refused(tmp_path / name, "is an ONNX model, not a checkpoint")

    def test_a_torchscript_archive(self, tmp_path: Path) -> None:
        path = tmp_path / "scripted.pt"
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
        self._refused(path, "is a TorchScript archive, which carries code")

    def test_a_folder_and_nothing(self, tmp_path: Path) -> None:
        self._refused(tmp_path, "is a folder, not a checkpoint file")
        self._refused(tmp_path / "none.pt", "does not exist")

    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.pt")
        self._refused(tmp_path / "pipe.pt", "is not a regular file")

    def test_symlinks_lead_to_their_file_or_to_an_error(self, tmp_path: Path) -> None:
        save_pt(tmp_path / "real.pt", small_weights("msra-m0"))
        (tmp_path / "link.pt").symlink_to("real.pt")
        assert load_checkpoint(tmp_path / "link.pt").origin["path"] == "link.pt"
        (tmp_path / "dangling.pt").symlink_to("nothing.pt")
        self._refused(tmp_path / "dangling.pt", "does not exist")
        (tmp_path / "circle.pt").symlink_to("circle.pt")
        self._refused(tmp_path / "circle.pt", "cannot be read: Too many levels of symbolic links")

    def test_no_permission(self) -> None:
        with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to everyone but its owner
            Path(folder).chmod(0o755)
            path = save_pt(Path(folder) / "secret.pt", small_weights("msra-m0"))
            path.chmod(0)
            with without_privileges():
                self._refused(path, "cannot be read: Permission denied")

    @pytest.mark.parametrize("name", ["sparse.pt", "sparse.safetensors"])
    def test_an_absurd_size(self, name: str, tmp_path: Path) -> None:
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(MAX_CHECKPOINT_BYTES + 1)
        self._refused(path, f"has {MAX_CHECKPOINT_BYTES + 1:,} bytes; the limit is {MAX_CHECKPOINT_BYTES:,} bytes")

    def test_a_zip_bomb(self, tmp_path: Path) -> None:
        entries = entries_of(saved_bytes({"x": torch.zeros(1000, 1000)}))
        path = tmp_path / "bomb.pt"
        path.write_bytes(zip_bytes(entries, zipfile.ZIP_DEFLATED))
        self._refused(path, "has a compressed entry 'archive/")

    @pytest.mark.parametrize(
        ("claimed", "words"),
        [(2**32 - 2, "claims to unpack to"), (10**8, "is damaged|compressed entry")],
        ids=["beyond-the-limit", "beyond-the-file"],
    )
    def test_an_archive_that_claims_more_than_it_has(self, claimed: int, words: str, tmp_path: Path) -> None:
        entries = entries_of(saved_bytes({f"x{i}": torch.zeros(4) for i in range(4)}))
        data = bytearray(zip_bytes(entries))
        position = data.find(b"PK\x01\x02")
        while position >= 0:  # every size in the central directory
            struct.pack_into("<II", data, position + 20, claimed, claimed)
            position = data.find(b"PK\x01\x02", position + 4)
        path = tmp_path / "claim.pt"
        path.write_bytes(data)
        self._refused(path, words)

    def test_entries_that_overlap(self, tmp_path: Path) -> None:
        data = zip_bytes({"archive/data.pkl": b"x" * 3000, "archive/data/0": b"y" * 3000})
        data = data.replace(b"y" * 3000, b"")  # the second entry now lies over the directory
        path = tmp_path / "overlap.pt"
        path.write_bytes(data)
        self._refused(path, "is damaged|is truncated or damaged")

    @pytest.mark.parametrize("elements", [10**9, 2**31 - 1], ids=["4GB", "8GB"])
    def test_a_declared_storage_larger_than_the_data(self, elements: int, tmp_path: Path) -> None:
        entries = entries_of(saved_bytes({"x": torch.zeros(4)}))
        declared = b"J" + struct.pack("<i", elements)  # a pickled integer in place of the 4
        entries["archive/data.pkl"] = (
            entries["archive/data.pkl"]
            .replace(b"K\x04t", declared + b"t", 1)
            .replace(b"K\x04\x85", declared + b"\x85", 1)
        )
        path = tmp_path / "large.pt"
        path.write_bytes(zip_bytes(entries))
        self._refused(path, "declares a tensor larger than the data it stores")

    def test_a_safetensors_file_that_claims_more_than_it_has(self, tmp_path: Path) -> None:
        header = json.dumps({"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
        path = tmp_path / "claim.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + np.zeros(4, np.float32).tobytes())
        self._refused(path, "is truncated or damaged")
