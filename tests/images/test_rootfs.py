"""Layers: packed the same everywhere, unpacked exactly, and never out of the tree."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tabane.errors import Corrupt, UsageError
from tabane.images.rootfs import unpack_layer, write_layer


def make_layer(*entries: dict[str, Any]) -> io.BytesIO:
    """A tar of entries given as `TarInfo` attributes; `data` is a file's content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            info = tarfile.TarInfo()
            data = entry.get("data", b"")
            attributes = {"mode": 0o755 if entry.get("type") == tarfile.DIRTYPE else 0o644} | entry
            for name, value in attributes.items():
                if name != "data":
                    setattr(info, name, value)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    file.seek(0)
    return file


def directory(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": tarfile.DIRTYPE, **more}


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> dict[str, Any]:
    return {"name": name, "type": kind, "linkname": target}


def listing(tree: Path) -> dict[str, str]:
    """Every file's content, `->` and target of links, `/` for directories."""
    found = {}
    for path in sorted(tree.rglob("*")):
        if path.is_symlink():
            text = f"-> {path.readlink()}"
        else:
            text = "/" if path.is_dir() else path.read_text()
        found[str(path.relative_to(tree))] = text
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    return tree


def test_there_and_back(tmp_path: Path, tree: Path) -> None:
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/file").write_bytes(b"content")
    (tree / "a/file").chmod(0o4750)
    os.link(tree / "a/file", tree / "a/hard")
    (tree / "soft").symlink_to("/etc/nothing")
    os.mkfifo(tree / "fifo")
    (tree / "ünïcode\udcff").write_text("odd name")
    os.setxattr(tree / "a/file", "user.note", b"\xff\x00bytes")
    for path, time in ((tree / "a/file", 1.5), (tree / "a", 99), (tree, 1234)):
        os.utime(path, (time, time))
    layer = io.BytesIO()
    write_layer(tree, layer)
    copy = tmp_path / "copy"
    copy.mkdir()
    layer.seek(0)
    unpack_layer(layer, copy)
    again = io.BytesIO()
    write_layer(copy, again)
    assert again.getvalue() == layer.getvalue()
    assert os.getxattr(copy / "a/file", "user.note") == b"\xff\x00bytes"
    assert (copy / "a/hard").stat().st_ino == (copy / "a/file").stat().st_ino
    assert stat.S_IMODE((copy / "a/file").stat().st_mode) == 0o4750
    assert ((copy / "a/file").stat().st_mtime, copy.stat().st_mtime) == (1, 1234)
    assert stat.S_ISFIFO((copy / "fifo").stat().st_mode)


def test_packing_does_not_depend_on_the_order_of_making(tmp_path: Path) -> None:
    layers = []
    for number, names in enumerate((("x", "y", "a"), ("a", "y", "x"))):
        tree = tmp_path / str(number)
        tree.mkdir()
        for name in names:
            (tree / name).write_text(name)
            os.utime(tree / name, (5, 5))
        os.utime(tree, (6, 6))
        file = io.BytesIO()
        write_layer(tree, file)
        layers.append(file.getvalue())
    assert layers[0] == layers[1]


@pytest.mark.real
def test_owners_are_kept_and_devices_left_out(tmp_path: Path, tree: Path) -> None:
    (tree / "mine").write_text("")
    os.chown(tree / "mine", 33, 65535)
    os.mknod(tree / "null", stat.S_IFCHR, os.makedev(1, 3))
    file = io.BytesIO()
    write_layer(tree, file)
    copy = tmp_path / "copy"
    copy.mkdir()
    file.seek(0)
    unpack_layer(file, copy)
    assert names(copy) == ["mine"]
    assert ((copy / "mine").stat().st_uid, (copy / "mine").stat().st_gid) == (33, 65535)
    os.chown(tree / "mine", 65536, 0)
    with pytest.raises(UsageError, match="ids in an image end at 65535"):
        write_layer(tree, io.BytesIO())


def test_devices_of_foreign_layers_are_left_out(tree: Path) -> None:
    device = {"name": "sda", "type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0}
    unpack_layer(make_layer(device, {"name": "kept", "data": b"x"}), tree)
    assert listing(tree) == {"kept": "x"}


def test_whiteouts(tree: Path) -> None:
    unpack_layer(
        make_layer(
            *({"name": name, "data": b"old"} for name in ("gone", "stays", "d/one", "d/two")),
            {"name": "deep/er/x", "data": b"old"},
        ),
        tree,
    )
    unpack_layer(
        make_layer(
            {"name": ".wh.gone"},
            {"name": ".wh.never-was"},
            {"name": "d/new", "data": b"new"},
            {"name": "d/.wh..wh..opq"},
            {"name": ".wh.deep"},
        ),
        tree,
    )
    assert listing(tree) == {"d": "/", "d/new": "new", "stays": "old"}


def test_later_entries_replace_earlier_ones(tree: Path) -> None:
    unpack_layer(
        make_layer(
            {"name": "a", "data": b"1"},
            {"name": "./a", "data": b"2"},
            directory("b"),
            {"name": "b/in", "data": b"x"},
            link("b", "a"),
            link("c", "a"),
            directory("c"),
            directory("kept", mode=0o700),
            {"name": "kept/in", "data": b"x"},
            directory("kept/", mode=0o711),
        ),
        tree,
    )
    expected = {"a": "2", "b": "-> a", "c": "/", "kept": "/", "kept/in": "x"}
    assert listing(tree) == expected
    assert stat.S_IMODE((tree / "kept").stat().st_mode) == 0o711


def test_merged_directories_are_followed_inside(tree: Path) -> None:
    """`lib -> usr/lib` of a lower layer: an upper layer's lib/x belongs into usr/lib."""
    unpack_layer(
        make_layer(directory("usr/lib"), link("lib", "usr/lib"), link("abs", "/usr")), tree
    )
    unpack_layer(make_layer({"name": "lib/x", "data": b"x"}, {"name": "abs/y", "data": b"y"}), tree)
    assert (tree / "usr/lib/x").read_text() == "x"
    assert (tree / "usr/y").read_text() == "y"
    assert (tree / "lib").is_symlink()


@pytest.mark.parametrize(
    "entries",
    [
        ({"name": "../escaped", "data": b"x"},),
        ({"name": "/../../escaped", "data": b"x"},),
        (link("out", ".."), {"name": "out/escaped", "data": b"x"}),
        (link("out", "../../../../.."), {"name": "out/escaped", "data": b"x"}),
        (link("out", "escaped"), {"name": "out", "data": b"x"}),
        (directory("d"), link("d", ".."), {"name": "d/escaped", "data": b"x"}),
        (directory("a/b/c"), link("a/b", "/"), {"name": "a/b/escaped", "data": b"x"}),
    ],
)
def test_nothing_leaves_the_tree(tmp_path: Path, tree: Path, entries: Any) -> None:
    unpack_layer(make_layer(*entries), tree)
    assert names(tmp_path) == ["tree"]
    assert any(path.is_file() for path in tree.rglob("*"))


@pytest.mark.parametrize(
    "entry",
    [
        {"name": ".wh..."},
        {"name": ".wh..", "data": b""},
        {"name": "d/.wh...", "data": b""},
        {"name": ".wh."},
        {"name": ".."},
        {"name": "d/.."},
        directory("file/below"),
        link("hard", "../outside", tarfile.LNKTYPE),
        link("hard", "missing", tarfile.LNKTYPE),
        link("hard", "..", tarfile.LNKTYPE),
        link("hard", "d", tarfile.LNKTYPE),
        link("circle/x", "y"),
        {"name": "x", "uid": 65536},
        {"name": "n" * 300},
    ],
)
def test_impossible_entries_are_refused(tmp_path: Path, tree: Path, entry: dict[str, Any]) -> None:
    (tmp_path / "outside").write_text("keep")
    (tree / "file").write_text("file")
    (tree / "d").mkdir()
    (tree / "circle").symlink_to("circle")
    with pytest.raises(Corrupt):
        unpack_layer(make_layer(entry), tree)
    assert (tmp_path / "outside").read_text() == "keep"
    assert (tree / "d").is_dir()


NAMES = st.lists(
    st.sampled_from(
        ["..", ".", "", "a", "b", "out", ".wh.a", ".wh...", ".wh..wh..opq", "sentinel"]
    ),
    min_size=1,
    max_size=4,
).map("/".join)
ENTRIES = st.builds(
    lambda name, kind, target: {"name": name, "type": kind, "linkname": target},
    NAMES,
    st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]),
    NAMES.map(lambda name: name[:90]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(entries=st.lists(ENTRIES, max_size=6))
def test_whatever_an_archive_says_the_outside_stays(tmp_path: Path, entries: list[Any]) -> None:
    box = tmp_path / "box"
    shutil.rmtree(box, ignore_errors=True)
    (box / "b/tree").mkdir(parents=True)
    (box / "sentinel").write_text("keep")
    (box / "b/sentinel").write_text("keep")
    before = {path: path.lstat().st_mtime_ns for path in (box / "sentinel", box / "b/sentinel")}
    try:
        unpack_layer(make_layer(*entries), box / "b/tree")
    except Corrupt:
        pass
    assert names(box) == ["b", "sentinel"]
    assert names(box / "b") == ["sentinel", "tree"]
    assert {path: path.lstat().st_mtime_ns for path in before} == before
    assert (box / "sentinel").stat().st_nlink == 1


@pytest.mark.parametrize("cut", [1, 600])
def test_a_layer_that_breaks_off(tree: Path, cut: int) -> None:
    whole = make_layer({"name": "a", "data": b"x" * 100}, {"name": "b", "data": b"y" * 700})
    with pytest.raises(Corrupt, match="cannot be read"):
        unpack_layer(io.BytesIO(whole.getvalue()[:cut]), tree)


@given(data=st.binary(min_size=1, max_size=2000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_noise_is_refused(tmp_path: Path, data: bytes) -> None:
    tree = tmp_path / "noise"
    tree.mkdir(exist_ok=True)
    with pytest.raises(Corrupt):
        unpack_layer(io.BytesIO(b"\x01" + data), tree)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_is_larger_than_memory_should_hold(tree: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, 1 << 30
    with pytest.raises(Corrupt, match="a header of 1073741824 bytes"):
        unpack_layer(io.BytesIO(info.tobuf()), tree)


def test_what_is_written_is_announced_before(tree: Path) -> None:
    announced: list[int] = []
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.size = 1000
        tar.addfile(info, io.BytesIO(bytes(1000)))
    layer.seek(0)

    def refuse(size: int) -> None:
        announced.append(size)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        unpack_layer(layer, tree, refuse)
    assert announced == [1512] and list(tree.iterdir()) == []


def test_attributes_that_overlay_would_believe_are_left_out(tree: Path) -> None:
    said = {
        "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.security.selinux": "x",
        "SCHILY.xattr.user.note": "kept",
    }
    unpack_layer(make_layer({"name": "file", "pax_headers": said}), tree)
    assert {name: os.getxattr(tree / "file", name) for name in os.listxattr(tree / "file")} == {
        "user.note": b"kept"
    }


def test_a_sparse_file_counts_as_what_it_would_be(tree: Path) -> None:
    """A terabyte of nothing in a kilobyte."""
    sparse = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,1"}
    announced: list[int] = []

    def refuse(size: int) -> None:
        announced.append(size)
        if size > 1 << 30:
            raise OSError("no more")

    layer = make_layer({"name": "disk.img", "data": b"x", "pax_headers": sparse})
    with pytest.raises(OSError, match="no more"):
        unpack_layer(layer, tree, refuse)
    assert announced == [(1 << 40) + 512] and list(tree.iterdir()) == []
