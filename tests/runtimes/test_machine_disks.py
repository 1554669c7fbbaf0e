"""Disks of machines, looked at with e2fsprogs' own tools."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tabane.errors import EngineError, Unsupported
from tabane.runtimes.machines import disks
from tabane.runtimes.machines.disks import (
    copy_sparse,
    disk_of,
    layer_disk,
    make_image_disk,
    measure,
)

PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


def check(disk: Path) -> None:
    done = subprocess.run(["e2fsck", "-fn", str(disk)], env={"PATH": PATH}, capture_output=True)
    assert done.returncode == 0, done.stdout


def look(disk: Path, request: str) -> str:
    argv = ["debugfs", "-R", request, str(disk)]
    done = subprocess.run(argv, env={"PATH": PATH}, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/name").write_text("in the image")
    (tree / "link").symlink_to("etc/name")
    os.link(tree / "etc/name", tree / "same")
    with (tree / "holes").open("wb") as file:
        file.truncate(8 << 20)
    return tree


async def test_an_images_disk_has_its_tree_and_nothing_else(tree: Path) -> None:
    await make_image_disk(tree)
    disk = disk_of(tree)
    check(disk)
    names = look(disk, "ls -p /")
    assert {line.split("/")[5] for line in names.split() if line} == {
        *(".", "..", "etc", "link", "same", "holes")
    }
    assert look(disk, "cat /etc/name") == "in the image"
    before = disk.stat()
    await make_image_disk(tree)
    assert disk.stat() == before, "it was there"


@pytest.mark.parametrize("harm", ["cut", "size", "gone"])
async def test_a_disk_that_is_not_whole_is_made_anew(tree: Path, harm: str) -> None:
    await make_image_disk(tree)
    disk = disk_of(tree)
    whole = disk.stat().st_size
    if harm == "cut":
        disk.chmod(0o644)
        os.truncate(disk, whole - 4096)
    elif harm == "size":
        disk.with_name(f"{disk.name}-size").write_text("nonsense")
    else:
        disk.unlink()
    await make_image_disk(tree)
    assert disk.stat().st_size == whole
    check(disk)


async def test_many_files_and_large_ones_fit(tmp_path: Path) -> None:
    tree = tmp_path / "many"
    tree.mkdir()
    for n in range(3000):
        (tree / f"{n:060}").write_bytes(b"x" * (n % 9000))
    (tree / "large").write_bytes(os.urandom(12 << 20))
    await make_image_disk(tree)
    check(disk_of(tree))
    blocks, _ = measure(tree)
    assert blocks * 4096 < 60 << 20


async def test_a_layer_has_its_quota_and_a_copy_keeps_its_holes(tmp_path: Path) -> None:
    for size in (1, 1 << 20, 100 << 20):
        empty = await layer_disk(size, tmp_path)
        assert await layer_disk(size, tmp_path) == empty
        copy = tmp_path / f"copy-{size}"
        copy_sparse(empty, copy)
        check(copy)
        assert copy.read_bytes() == empty.read_bytes()
        assert copy.stat().st_blocks * 512 < 2 << 20
        free = [line for line in look(copy, "stats").splitlines() if "Free blocks:" in line]
        assert int(free[0].split()[-1]) * 4096 >= size


async def test_what_mke2fs_says_is_the_reason(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "large").write_bytes(b"x" * (1 << 20))
    monkeypatch.setattr(disks, "measure", lambda tree: (200, 64))
    with pytest.raises(EngineError, match="mke2fs made no disk of it: ") as failure:
        await make_image_disk(tree)
    assert failure.value.status
    assert sorted(path.name for path in tree.parent.iterdir()) == ["tree"]


async def test_without_the_tools_it_is_said_what_to_install(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*argv: str) -> None:
        await original("/nonexistent/mke2fs", *argv[1:])

    original = disks._run
    monkeypatch.setattr(disks, "_run", run)
    with pytest.raises(Unsupported, match="install e2fsprogs"):
        await make_image_disk(tree)
