"""Trees come out of an archive as they went in; an archive that wants more than that is refused."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tabane.errors import UsageError
from tabane.runtimes import archive
from tabane.testing.talks import make_archive

MTIME_NS = 1_234_567_890_123_456_789


def pack(path: Path | str) -> tuple[bytes, list[str]]:
    out, said = io.BytesIO(), list[str]()
    archive.pack(str(path), out.write, said.append)
    return out.getvalue(), said


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def unpack(data: bytes, target: Path, name: str | None = None, *, trusted: bool = False) -> None:
    with opened(target) as directory:
        archive.unpack(io.BytesIO(data), directory, name=name, trusted=trusted)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "deep" / "deeper").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o500)
    (root / "file").write_bytes(b"words")
    (root / "deep" / "b\udcff\n").write_bytes(bytes(100_000))
    (root / "deep" / ("long" * 50)).write_text("long")
    (root / "link").symlink_to("/etc/passwd")
    (root / "file").chmod(0o640)
    for path in (root / "file", root / "deep"):
        os.utime(path, ns=(MTIME_NS, MTIME_NS))
    return root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


def describe(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        seen = path.lstat()
        what = path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        found[str(path.relative_to(root))] = (stat.filemode(seen.st_mode), seen.st_mtime_ns, what)
    return found


def test_a_tree_comes_out_as_it_went_in(tree: Path, target: Path) -> None:
    data, said = pack(tree)
    assert said == []
    unpack(data, target)
    assert describe(target / "tree") == describe(tree)
    unpack(data, target)  # over itself
    assert describe(target / "tree") == describe(tree)


@pytest.mark.parametrize("name", ["renamed", "file"])
def test_it_gets_the_name_it_is_given(tree: Path, target: Path, name: str) -> None:
    unpack(pack(tree)[0], target, name)
    assert describe(target / name) == describe(tree)
    unpack(pack(f"{tree}/.")[0], target, f"{name}2")
    assert describe(target / f"{name}2") == describe(tree)


def test_what_is_in_a_directory_goes_into_another(tree: Path, target: Path) -> None:
    before = target.stat().st_mode
    unpack(pack(f"{tree}/.")[0], target)
    assert describe(target) == describe(tree)
    assert target.stat().st_mode == before


def test_a_file_and_a_link_that_is_named(tree: Path, target: Path) -> None:
    unpack(pack(tree / "file")[0], target, "other")
    assert (target / "other").read_bytes() == b"words"
    (tree / "to-file").symlink_to("file")
    unpack(pack(tree / "to-file")[0], target)
    assert not (target / "to-file").is_symlink()
    assert (target / "to-file").read_bytes() == b"words"


def test_other_programs_read_it(tree: Path, target: Path) -> None:
    with (tree / "holes").open("wb") as file:
        file.truncate(50 << 20)
        file.seek(10 << 20)
        file.write(b"in the middle")
    data, _ = pack(tree)
    assert len(data) < 1 << 20
    subprocess.run(["tar", "-x", "-C", str(target)], input=data, check=True)
    assert describe(target / "tree") == describe(tree)


def test_holes_stay_holes(tmp_path: Path, target: Path) -> None:
    for name, pieces in (
        ("start", [0]),
        ("end", [9_999_990]),
        ("none", []),
        ("two", [5000, 7 << 20]),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10_000_000)
            for offset in pieces:
                file.seek(offset)
                file.write(b"0123456789")
        data, _ = pack(tmp_path / name)
        assert len(data) < 100_000
        unpack(data, target)
        assert (target / name).read_bytes() == (tmp_path / name).read_bytes()
        assert (target / name).stat().st_blocks < 100


def test_what_other_programs_made_is_read(tree: Path, target: Path) -> None:
    os.link(tree / "file", tree / "deep" / "same")
    for kind in ("gnu", "pax", "ustar"):
        (tree / "deep" / ("long" * 50)).unlink(missing_ok=True)
        done = subprocess.run(
            ["tar", "-c", f"--format={kind}", "-C", str(tree.parent), "tree"],
            capture_output=True,
            check=True,
        )
        (target / kind).mkdir()
        unpack(done.stdout, target / kind)
        for path, (mode, _, what) in describe(tree).items():  # type: ignore[misc]
            assert describe(target / kind / "tree")[path][::2] == (mode, what)  # type: ignore[index]


def test_what_cannot_be_packed_is_said(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    with opened(tree) as directory:
        listener.bind(f"/proc/self/fd/{directory}/socket")
    data, said = pack(tree)
    listener.close()
    assert said == [
        f"tree/{name} is neither a file nor a directory: left out" for name in ("pipe", "socket")
    ]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert "tree/file" in tar.getnames()
    for missing in (tree / "nothing", tree / "pipe"):
        with pytest.raises(UsageError):
            pack(missing)


def test_a_file_of_proc_has_a_size(target: Path) -> None:
    unpack(pack("/proc/self/status")[0], target)
    assert (target / "status").read_text().startswith("Name:")


# Hostile archives


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def made_of(*entries: tarfile.TarInfo, last: str = "x/ok") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info in entries:
            tar.addfile(info)
        tar.addfile(entry(last))
    return out.getvalue()


EVIL = {
    "absolute": [entry("/tmp/tabane-evil")],
    "above": [entry("../evil")],
    "above, deeper": [entry("x/../../evil")],
    "through a link out": [entry("x", tarfile.SYMTYPE, ".."), entry("x/evil")],
    "through an absolute link": [entry("x", tarfile.SYMTYPE, "OUTSIDE"), entry("x/evil")],
    "a directory over a link": [
        entry("x", tarfile.SYMTYPE, "OUTSIDE"),
        entry("x", tarfile.DIRTYPE),
    ],
    "a hard link to outside": [entry("x", tarfile.LNKTYPE, "../secret")],
    "a hard link through a link": [
        entry("l", tarfile.SYMTYPE, ".."),
        entry("x", tarfile.LNKTYPE, "l/secret"),
    ],
    "a device": [entry("x", tarfile.CHRTYPE)],
    "a block device": [entry("x", tarfile.BLKTYPE)],
    "a pipe": [entry("x", tarfile.FIFOTYPE)],
    "a link that was there": [entry("there/evil")],
}


@pytest.mark.parametrize("what", EVIL)
@pytest.mark.parametrize("name", [None, "x"])
def test_nothing_is_made_outside(what: str, name: str | None, tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "outside" / "target"
    target.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    (target / "there").symlink_to(outside)
    for info in EVIL[what]:
        info.linkname = info.linkname.replace("OUTSIDE", str(outside))
    before = describe(outside)
    with pytest.raises((UsageError, OSError)):
        unpack(made_of(*EVIL[what]), target, name)
    after = {path: seen for path, seen in describe(outside).items() if path[:7] != "target/"}
    assert after | {"target": before["target"]} == {
        path: seen for path, seen in before.items() if path[:7] != "target/"
    }
    assert not Path("/tmp/tabane-evil").exists()
    assert not [path for path in target.rglob("*") if path.name.startswith(".tabane-")]


def test_nothing_is_written_through_what_was_there(tmp_path: Path, target: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (target / "link").symlink_to(secret)
    os.link(secret, target / "hard")
    unpack(make_archive({"link": b"new", "hard": b"new"}), target)
    assert secret.read_text() == "secret"
    assert (target / "link").read_text() == (target / "hard").read_text() == "new"


def test_what_is_no_file_is_not_replaced(target: Path) -> None:
    os.mkfifo(target / "pipe")
    with pytest.raises(UsageError, match="not replaced"):
        unpack(make_archive({"pipe": b"new"}), target)
    (target / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        unpack(make_archive({"directory": b"new"}), target)
    (target / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        unpack(make_archive({"file/below": b"new"}), target)


def test_set_user_id_bits_are_for_the_trusted(target: Path) -> None:
    data = make_archive({"x": b"#!"}, mode=0o6755)
    unpack(data, target)
    assert stat.S_IMODE((target / "x").stat().st_mode) == 0o755
    unpack(data, target, trusted=True)
    assert stat.S_IMODE((target / "x").stat().st_mode) == 0o6755


@pytest.mark.parametrize("size", [0, 100, 511, 513, 1500])
def test_what_breaks_off_is_not_taken_for_whole(size: int, target: Path) -> None:
    data = make_archive({"x": bytes(3000)})[:size]
    if size == 0:
        with pytest.raises(UsageError):
            unpack(data, target)
        return
    with pytest.raises(UsageError):
        unpack(data, target)
    assert not list(target.iterdir())


@pytest.mark.parametrize("data", [b"garbage" * 200, b"\x1f\x8b" + bytes(600)])
def test_garbage(data: bytes, target: Path) -> None:
    with pytest.raises(UsageError):
        unpack(data, target)
    assert not list(target.iterdir())


def test_a_description_cannot_fill_the_memory(target: Path) -> None:
    header = entry("x", tarfile.XHDTYPE)
    header.size = 8 << 30
    with pytest.raises(UsageError, match="too many"):
        unpack(header.tobuf(tarfile.GNU_FORMAT) + bytes(10_000), target)
    sparse = entry("GNUSparseFile.0/x")
    sparse.size = 1 << 20
    fields = {"major": "1", "minor": "0", "name": "x", "realsize": "100"}
    sparse.pax_headers = {f"GNU.sparse.{key}": value for key, value in fields.items()}
    for plan, words in ((b"99999999\n", "too many"), (b"1" * 2000, "plan"), (b"-1\n", "too many")):
        with pytest.raises(UsageError, match=words):
            unpack(sparse.tobuf(tarfile.PAX_FORMAT) + plan + bytes(10_000), target)
    piece = b"1\n90\n20\n".ljust(512, b"\0")
    with pytest.raises(UsageError, match="beyond its end"):
        unpack(sparse.tobuf(tarfile.PAX_FORMAT) + piece + bytes(10_000), target)
