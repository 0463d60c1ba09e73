"""The kernel cache: where it is, what it gives back, and that nothing damaged comes out of it."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evit_kernels import cache, entry, pack
from evit_kernels.aot import CompiledKernel, KernelRefusedError
from evit_kernels.entry import entry_bytes, file_name, kernel_from_entry
from evit_kernels.launch import KernelLaunch

from tests.made_up_kernels import TRITON, kernel_of, launch_of, ptx_for, replace_compiler

LAUNCH = launch_of()
KERNEL = kernel_of(LAUNCH)


class Compiler:
    """Stands in for `compile_kernel`, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, launch: KernelLaunch, arch: int) -> CompiledKernel:
        self.calls += 1
        return kernel_of(launch, arch)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Triton is there, in the version that made-up kernels name."""
    stand_in = Compiler()
    replace_compiler(monkeypatch, stand_in)
    monkeypatch.setattr(cache, "installed_triton", lambda: TRITON)
    return stand_in


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "installed_triton", lambda: None)


# The folder


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({"EVIT_DEPLOY_KERNEL_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a", id="its-own-variable"),
        pytest.param({"EVIT_DEPLOY_KERNEL_CACHE": "~/a"}, "/home/me/a", id="tilde"),
        pytest.param({"XDG_CACHE_HOME": "/x"}, "/x/evit-deploy/kernels", id="xdg"),
        pytest.param({"EVIT_DEPLOY_KERNEL_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/evit-deploy/kernels", id="empty"),
        pytest.param({"XDG_CACHE_HOME": "x"}, "/home/me/.cache/evit-deploy/kernels", id="relative-xdg-is-ignored"),
        pytest.param({"XDG_CACHE_HOME": ""}, "/home/me/.cache/evit-deploy/kernels", id="empty-xdg"),
        pytest.param({}, "/home/me/.cache/evit-deploy/kernels", id="home"),
    ],
)
def test_the_folder(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVIT_DEPLOY_KERNEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(expected)


def test_the_folder_is_never_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIT_DEPLOY_KERNEL_CACHE", "kernels")
    with pytest.raises(ValueError, match="absolute path, got 'kernels'"):
        cache.cache_folder()
    monkeypatch.setenv("EVIT_DEPLOY_KERNEL_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where there is no home
    with pytest.raises(ValueError, match="EVIT_DEPLOY_KERNEL_CACHE"):
        cache.cache_folder()


# What is stored comes back


def test_a_kernel_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    path = cache.store(KERNEL, folder)
    assert path == folder / f"{KERNEL.key}.json"
    assert cache.load(KERNEL.key, folder) == KERNEL
    assert cache.load(kernel_of(launch_of(32)).key, folder) is None
    assert cache.load(KERNEL.key, tmp_path / "no such folder") is None


def test_an_entry_is_the_same_text_every_time() -> None:
    assert entry_bytes(KERNEL) == entry_bytes(kernel_of(launch_of()))
    assert kernel_from_entry(entry_bytes(KERNEL), KERNEL.key) == KERNEL


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "/x"])
def test_only_keys_become_file_names(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a kernel's key"):
        cache.load(key, tmp_path)


# What is damaged does not


def changed(**changes: Any) -> bytes:
    return json.dumps({**json.loads(entry_bytes(KERNEL)), **changes}).encode()


def without(name: str) -> bytes:
    document = json.loads(entry_bytes(KERNEL))
    del document[name]
    return json.dumps(document).encode()


WHOLE = entry_bytes(KERNEL)
OTHER = kernel_of(launch_of(32))
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "cut-by-one": WHOLE[:-1],
    "half": WHOLE[: len(WHOLE) // 2],
    "no-json": b"\x7fELF" + bytes(100),
    "no-utf-8": WHOLE.replace(b"planted", b"pl\xffnted"),
    "a-list": b"[]",
    "null": b"null",
    "nested-deeply": b"[" * 100_000,
    "a-long-number": b"9" * 100_000,
    "other-format": changed(format="other"),
    "other-version": changed(version=2),
    "of-another-key": entry_bytes(OTHER),
    "changed-ptx": WHOLE.replace(b"ret;", b"bra;"),
    "changed-hash": changed(ptx_sha256="0" * 64),
    "ptx-of-another-entry": entry_bytes(kernel_of(LAUNCH, ptx=ptx_for(LAUNCH, 80, "evil"))),
    "ptx-of-another-target": entry_bytes(kernel_of(LAUNCH, ptx=ptx_for(LAUNCH, 90))),
    "ptx-without-entry": entry_bytes(kernel_of(LAUNCH, ptx=".target sm_80")),
    "target-of-another-arch": entry_bytes(kernel_of(LAUNCH, ptx=ptx_for(LAUNCH, 90), target="sm_90")),
    "too-few-parameters": entry_bytes(kernel_of(LAUNCH, parameters=("p_x", "p_out"))),
    "unknown-dtype": entry_bytes(kernel_of(LAUNCH, dtype="fp64")),
    "spills": entry_bytes(kernel_of(LAUNCH, spill_bytes=4)),
    "much-shared-memory": entry_bytes(kernel_of(LAUNCH, shared_bytes=49153)),
    "negative": entry_bytes(kernel_of(LAUNCH, shared_bytes=-1)),
    "a-truth-for-a-number": entry_bytes(kernel_of(LAUNCH, threads=True)),
    "a-fraction": entry_bytes(kernel_of(LAUNCH, threads=128.0)),
    "a-number-for-a-text": changed(operator=3),
    "a-text-for-a-list": changed(parameters="p_x"),
    "a-number-for-a-name": changed(parameters=["p_x", 3, "p_out"]),
    **{f"without-{name}": without(name) for name in json.loads(WHOLE)},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_entry_counts_as_absent_and_is_replaced(name: str, tmp_path: Path, compiler: Compiler) -> None:
    path = tmp_path / file_name(KERNEL.key)
    path.write_bytes(DAMAGED[name])
    assert cache.load(KERNEL.key, tmp_path) is None
    assert cache.compiled(LAUNCH, 80, tmp_path) == KERNEL
    assert compiler.calls == 1
    assert path.read_bytes() == WHOLE
    assert cache.compiled(LAUNCH, 80, tmp_path) == KERNEL
    assert compiler.calls == 1


def test_an_entry_that_is_too_large_is_not_even_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KERNEL, tmp_path)
    monkeypatch.setattr(cache, "MAX_ENTRY_BYTES", len(WHOLE))
    assert cache.load(KERNEL.key, tmp_path) == KERNEL
    monkeypatch.setattr(cache, "MAX_ENTRY_BYTES", len(WHOLE) - 1)
    assert cache.load(KERNEL.key, tmp_path) is None


def test_an_entry_that_fits_its_key_and_not_its_launch_is_not_used(tmp_path: Path, compiler: Compiler) -> None:
    """The key of a forged entry can be right."""
    for forged in (
        kernel_of(LAUNCH, operator="other"),
        kernel_of(LAUNCH, dtype="fp32"),
        kernel_of(LAUNCH, parameters=("p_out", "n_rows", "p_x")),
        kernel_of(LAUNCH, arch=90, target="sm_90", ptx=ptx_for(LAUNCH, 90), key=KERNEL.key),
    ):
        cache.store(forged, tmp_path)
        assert cache.load(KERNEL.key, tmp_path) == forged
        assert cache.find(LAUNCH, 80, tmp_path) is None
        assert cache.compiled(LAUNCH, 80, tmp_path) == KERNEL


# Compiling


def test_a_hit_compiles_nothing(tmp_path: Path, compiler: Compiler) -> None:
    first = cache.compiled(LAUNCH, 80, tmp_path)
    assert cache.compiled(launch_of(extras={"n_rows": 99}), 80, tmp_path) == first
    assert compiler.calls == 1
    cache.compiled(LAUNCH, 90, tmp_path)
    cache.compiled(launch_of(32), 80, tmp_path)
    assert compiler.calls == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_the_usual_folder_is_used_without_one(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVIT_DEPLOY_KERNEL_CACHE", str(tmp_path / "there"))
    cache.compiled(LAUNCH, 80)
    assert [path.name for path in (tmp_path / "there").iterdir()] == [file_name(KERNEL.key)]
    assert cache.find(LAUNCH, 80) == KERNEL


def test_a_kernel_of_another_triton_is_compiled_again(tmp_path: Path, compiler: Compiler) -> None:
    cache.store(kernel_of(LAUNCH, triton_version="3.6.0"), tmp_path)
    assert cache.find(LAUNCH, 80, tmp_path) is None
    assert cache.compiled(LAUNCH, 80, tmp_path).triton_version == TRITON
    assert compiler.calls == 1


@pytest.mark.usefixtures("no_triton")
def test_without_triton_any_version_will_do(tmp_path: Path) -> None:
    kernel = kernel_of(LAUNCH, triton_version="3.6.0")
    cache.store(kernel, tmp_path)
    assert cache.compiled(LAUNCH, 80, tmp_path) == kernel


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("damage", [None, b"{}"], ids=["absent", "damaged"])
def test_without_triton_and_without_an_entry(damage: bytes | None, tmp_path: Path) -> None:
    if damage is not None:
        (tmp_path / file_name(kernel_of(LAUNCH, 87).key)).write_bytes(damage)
    with pytest.raises(cache.KernelMissingError) as caught:
        cache.compiled(LAUNCH, 87, tmp_path)
    for words in ("planted in fp16 for sm_87", str(tmp_path), "kernels pack --arch 87 --dtype fp16", "kernels unpack"):
        assert words in str(caught.value)


@pytest.mark.parametrize("version", [TRITON, None], ids=["triton", "no-triton"])
def test_an_unknown_architecture(version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "installed_triton", lambda: version)
    with pytest.raises(ValueError, match="unknown architecture 75, known: 80"):
        cache.compiled(LAUNCH, 75, tmp_path)


def test_a_refused_kernel_is_not_kept(tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(launch: KernelLaunch, arch: int) -> CompiledKernel:
        raise KernelRefusedError("it spills")

    replace_compiler(monkeypatch, refuse)
    with pytest.raises(KernelRefusedError):
        cache.compiled(LAUNCH, 80, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_that_of_the_triton_that_is_imported() -> None:
    triton = pytest.importorskip("triton", reason="Triton is published for Linux only")
    assert cache.installed_triton() == triton.__version__


def test_triton_that_cannot_be_imported_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert cache.installed_triton() is None


# Writing


def fail(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("where", "name"), [(os, "replace"), (Path, "write_bytes")], ids=["replace", "write"])
def test_a_write_that_fails_leaves_what_was_there(
    where: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.store(KERNEL, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        with pytest.raises(OSError, match="No space left"):
            cache.store(kernel_of(LAUNCH, registers=99), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert cache.load(KERNEL.key, tmp_path) == KERNEL


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert cache.load(KERNEL.key, tmp_path / "file") is None
    with pytest.raises(OSError, match="file"):
        cache.store(KERNEL, tmp_path / "file")


def test_many_writers_and_readers_of_one_entry(tmp_path: Path) -> None:
    """A reader finds one writer's kernel or the other's, whole."""
    kernels = [kernel_of(LAUNCH, registers=count) for count in (40, 50)]
    cache.store(kernels[0], tmp_path)
    wrong: list[object] = []

    def repeat(action: Callable[[], object]) -> None:
        for _ in range(50):
            found = action()
            if isinstance(found, Path):
                continue
            if found not in kernels:
                wrong.append(found)

    threads = [threading.Thread(target=repeat, args=(lambda k=kernel: cache.store(k, tmp_path),)) for kernel in kernels]
    threads += [threading.Thread(target=repeat, args=(lambda: cache.load(KERNEL.key, tmp_path),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [path.name for path in tmp_path.iterdir()] == [file_name(KERNEL.key)]


def test_the_limit_leaves_room_for_real_kernels() -> None:
    assert entry.MAX_ENTRY_BYTES >= 16 * 1024**2


class TestWhatAReleaseCarries:
    """A pack in the package stands behind the folder of the cache."""

    @pytest.fixture
    def shipped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "published.zip"
        pack.write_pack(path, [kernel_of(LAUNCH, triton_version="3.0.0")], "0.1.0")
        monkeypatch.setattr(cache, "SHIPPED_PACK", path)
        return path

    @pytest.mark.parametrize("version", [TRITON, None], ids=["another-triton", "no-triton"])
    def test_it_is_found_whatever_triton_is_there(
        self, version: str | None, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache, "installed_triton", lambda: version)
        found = cache.compiled(LAUNCH, 80, tmp_path / "cache")
        assert found.triton_version == "3.0.0"
        assert not (tmp_path / "cache").exists(), "nothing is compiled or copied"

    def test_the_cache_comes_first(self, shipped: Path, tmp_path: Path, compiler: Compiler) -> None:
        cache.store(KERNEL, tmp_path / "cache")
        found = cache.find(LAUNCH, 80, tmp_path / "cache")
        assert found is not None
        assert found.triton_version == TRITON

    def test_what_it_lacks_is_compiled(self, shipped: Path, tmp_path: Path, compiler: Compiler) -> None:
        cache.compiled(LAUNCH, 90, tmp_path / "cache")
        assert compiler.calls == 1

    @pytest.mark.usefixtures("compiler")
    def test_a_damaged_one_is_not_used_and_said(
        self, shipped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shipped.write_bytes(shipped.read_bytes()[:100])
        with caplog.at_level(logging.WARNING):
            assert cache.find(LAUNCH, 80, tmp_path / "cache") is None
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("the kernel pack of this release is not used: ")
        assert str(shipped) in line

    def test_a_checkout_has_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "SHIPPED_PACK", tmp_path / "absent.zip")
        assert cache.find(LAUNCH, 80, tmp_path / "cache") is None
