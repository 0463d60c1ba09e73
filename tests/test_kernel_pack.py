"""Kernel packs: what is packed comes back, and a file that somebody made up does no harm."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from evit_kernels import cache, pack
from evit_kernels.cache import unpack
from evit_kernels.entry import entry_bytes, file_name
from evit_kernels.pack import INDEX, PackError, read_index, read_pack, write_pack

from tests.made_up_kernels import kernel_of, launch_of

KERNELS = [kernel_of(launch_of(size), arch) for size in (64, 32) for arch in (80, 87)]
KEYS = tuple(sorted(kernel.key for kernel in KERNELS))
MEMBERS = {file_name(kernel.key): entry_bytes(kernel) for kernel in KERNELS}


def index(**changes: Any) -> bytes:
    document = {"format": pack.FORMAT, "version": pack.VERSION, "tool_version": "0.1.0", "keys": list(KEYS)}
    return json.dumps({**document, **changes}).encode()


def zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_pack(tmp_path / "kernels.zip", KERNELS, "0.1.0")
    return tmp_path / "kernels.zip"


def test_what_is_packed_comes_back(written: Path) -> None:
    assert read_index(written) == pack.PackIndex("0.1.0", KEYS)
    assert sorted(read_pack(written), key=lambda kernel: kernel.key) == sorted(KERNELS, key=lambda kernel: kernel.key)
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_it_fills_the_cache_of_a_machine_without_triton(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "installed_triton", lambda: None)
    folder = tmp_path / "cache"
    assert [kernel.key for kernel in unpack(written, folder)] == list(KEYS)
    assert {path.name for path in folder.iterdir()} == set(MEMBERS)
    assert cache.compiled(launch_of(32), 87, folder) == KERNELS[3]


def test_what_was_damaged_in_the_cache_is_replaced(written: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / file_name(KEYS[0])).write_bytes(b"{")
    unpack(written, tmp_path / "cache")
    assert cache.load(KEYS[0], tmp_path / "cache") is not None


def test_the_same_kernels_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_pack(tmp_path / "again.zip", KERNELS, "0.1.0")
    assert (tmp_path / "again.zip").read_bytes() == written.read_bytes()


def test_an_empty_pack_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no kernel to pack"):
        write_pack(tmp_path / "kernels.zip", [], "0.1.0")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_pack(written: Path) -> None:
    before = written.read_bytes()

    def interrupted() -> Any:
        yield KERNELS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pack(written, interrupted(), "0.1.0")
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


# Files that somebody made up


def refused(data: bytes, tmp_path: Path) -> str:
    """The message of the error; nothing may have reached the cache or any other place."""
    path = tmp_path / "in" / "made-up.zip"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(PackError) as caught:
        unpack(path, tmp_path / "cache")
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


MADE_UP: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a zip file"),
    "no-zip": (lambda: b"PK" + bytes(100), "not a zip file"),
    "no-index": (lambda: zipped(MEMBERS), "no item named 'index.json'"),
    "index-no-json": (lambda: zipped({INDEX: b"{", **MEMBERS}), "Expecting property name"),
    "index-a-list": (lambda: zipped({INDEX: b"[]", **MEMBERS}), "index.json is not that of"),
    "index-nested-deeply": (lambda: zipped({INDEX: b"[" * 100_000, **MEMBERS}), ""),
    "other-format": (lambda: zipped({INDEX: index(format="other"), **MEMBERS}), "index.json is not that of"),
    "other-version": (lambda: zipped({INDEX: index(version=2), **MEMBERS}), "index.json is not that of"),
    "no-tool-version": (lambda: zipped({INDEX: index(tool_version=None), **MEMBERS}), "no tool_version"),
    "no-keys": (lambda: zipped({INDEX: index(keys=[]), **MEMBERS}), "no list of different keys"),
    "a-key-twice": (lambda: zipped({INDEX: index(keys=[KEYS[0], KEYS[0]]), **MEMBERS}), "no list of different keys"),
    "a-key-that-is-a-path": (
        lambda: zipped({INDEX: index(keys=["../../evil"]), **MEMBERS}),
        "no list of different keys",
    ),
    "a-key-that-is-a-number": (lambda: zipped({INDEX: index(keys=[1]), **MEMBERS}), "no list of different keys"),
    "a-member-missing": (
        lambda: zipped({INDEX: index(), **{name: MEMBERS[name] for name in list(MEMBERS)[1:]}}),
        "no item named",
    ),
    "a-member-damaged": (
        lambda: zipped({INDEX: index(), **MEMBERS, file_name(KEYS[-1]): b"{}"}),
        f"{KEYS[-1]}.json: no ",
    ),
    "members-exchanged": (
        lambda: zipped({INDEX: index(), **dict(zip(MEMBERS, reversed(MEMBERS.values()), strict=True))}),
        "it is the entry of key",
    ),
    "a-bomb": (
        lambda: zipped({INDEX: index(keys=[KEYS[0]]), file_name(KEYS[0]): bytes(64 * 1024**2)}),
        "has more than",
    ),
    "an-index-bomb": (lambda: zipped({INDEX: bytes(64 * 1024**2)}), "index.json has more than"),
    "another-compression": (lambda: zipped({INDEX: index(), **MEMBERS}, zipfile.ZIP_BZIP2), "compressed as no pack is"),
}


@pytest.mark.parametrize("name", MADE_UP)
def test_a_made_up_pack_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    make, words = MADE_UP[name]
    assert words in refused(make(), tmp_path)


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil-evit.json", "a/../../evil.json", "\\..\\evil.json"])
def test_members_that_are_not_in_the_index_are_not_looked_at(name: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / "kernels.zip"
    path.parent.mkdir()
    path.write_bytes(zipped({name: b"evil", INDEX: index(), **MEMBERS}))
    unpack(path, tmp_path / "cache")
    assert {place.name for place in tmp_path.rglob("*") if place.is_file()} == {path.name, *MEMBERS}
    assert not Path("/tmp/evil-evit.json").exists()


def test_a_pack_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = {name: member + b" " * 5000 for name, member in MEMBERS.items()}
    data = zipped({INDEX: index(), **padded})
    limit = sum(map(len, padded.values())) - 1
    monkeypatch.setattr(pack, "MAX_TOTAL_BYTES", limit)
    assert len(data) < limit
    assert f"unpacks to more than {limit} bytes" in refused(data, tmp_path)


def test_a_file_that_is_too_large_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = zipped({INDEX: index(), **MEMBERS})
    monkeypatch.setattr(pack, "MAX_TOTAL_BYTES", len(data) - 1)
    assert "it has more than" in refused(data, tmp_path)


def encrypted(data: bytes) -> bytes:
    """The flag that says so, in every header."""
    changed = bytearray(data)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = changed.find(signature)
        while start >= 0:
            changed[start + offset] |= 1
            start = changed.find(signature, start + 4)
    return bytes(changed)


def test_an_encrypted_pack_is_refused(tmp_path: Path) -> None:
    assert "encrypted" in refused(encrypted(zipped({INDEX: index(), **MEMBERS})), tmp_path)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 8))):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def inserted(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + chance.randbytes(chance.randrange(1, 64)) + data[place:]


@pytest.mark.parametrize("damage", [cut, flipped, inserted])
def test_damage_is_a_pack_error_or_harmless(
    damage: Callable[[bytes, random.Random], bytes], written: Path, tmp_path: Path
) -> None:
    """Some bytes of a ZIP file mean nothing; whatever is read then is what was written."""
    whole, chance = written.read_bytes(), random.Random(0)
    path = tmp_path / "damaged.zip"
    refusals = 0
    for _ in range(300):
        path.write_bytes(damage(whole, chance))
        try:
            kernels = read_pack(path)
        except PackError:
            refusals += 1
        else:
            assert {kernel.key: kernel for kernel in kernels}.items() <= {k.key: k for k in KERNELS}.items()
    assert refusals > 30


@pytest.mark.parametrize("name", ["missing.zip", ""], ids=["missing", "a-folder"])
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing\.zip|Is a directory"):
        read_pack(tmp_path / name)
