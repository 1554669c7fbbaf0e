"""Mounts and their sizes, also where nobody answers."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from tabane.k2i import mounts
from tabane.k2i.mounts import MountReader, parse_mount, sizes


def test_mounts_are_as_full_as_df_shows() -> None:
    command = ["df", "-a", "-k", "--output=target,size,iused,itotal", "/dev/shm"]
    _, line = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    target, size, _, inodes = line.split()
    found = [mount for mount in MountReader().read() if mount.mount_point == target][-1]
    assert (found.size_kib, found.inodes) == (int(size), int(inodes))
    assert found.used_kib is not None
    assert found.available_kib is not None
    assert found.used_kib + found.available_kib == found.size_kib
    assert found.problem == ""


def test_a_line_of_mountinfo() -> None:
    found = parse_mount(r"36 35 98:0 /mnt1 /a\040b\134c ro,noatime master:1 - ext3 /dev/r\011t rw")
    assert (found.mount_point, found.device) == ("/a b\\c", "/dev/r\tt")
    assert (found.device_id, found.root, found.type, found.read_only) == (
        "98:0",
        "/mnt1",
        "ext3",
        True,
    )


def test_a_full_file_system_is_full() -> None:
    stat = os.statvfs_result((4096, 4096, 100, 5, 0, 10, 3, 3, 0, 255))
    found = sizes(stat)
    assert (found["used_kib"], found["available_kib"], found["used_percent"]) == (380, 0, 100)
    assert (found["inodes_used"], found["inodes_free"]) == (7, 3)


def test_one_that_does_not_answer_costs_its_deadline_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, asked = threading.Event(), []
    real = os.statvfs

    def statvfs(path: str) -> os.statvfs_result:
        if path != "/far":
            return real(path)
        asked.append(path)
        answered.wait()
        return real("/")

    (tmp_path / "self").mkdir()
    lines = "1 1 0:1 / /far rw - nfs4 host:/x rw\n2 1 0:2 / / rw - ext4 /dev/x rw\n"
    (tmp_path / "self" / "mountinfo").write_text(lines)
    monkeypatch.setattr(mounts, "DEADLINE_S", 0.01)
    monkeypatch.setattr(mounts.os, "statvfs", statvfs)
    reader = MountReader(root=tmp_path)
    try:
        for _ in range(3):
            far, near = reader.read()
            assert (far.problem, far.size_kib) == (mounts.NO_ANSWER, None)
            assert near.problem == ""
        assert asked == ["/far"]
    finally:
        answered.set()
    for thread in threading.enumerate():
        if thread.name == "look at /far":
            thread.join()
    monkeypatch.setattr(mounts, "DEADLINE_S", 60)
    assert reader.read()[0].problem == ""


def test_what_may_not_be_looked_at_says_why(
    tmp_path: Path,
) -> None:
    (tmp_path / "self").mkdir()
    lines = b"1 1 0:1 / /not-there-\xff rw - ext4 /dev/x rw\n2 1 0:2 / /home rw - autofs auto rw\n"
    (tmp_path / "self" / "mountinfo").write_bytes(lines)
    missing, automatic = MountReader(root=tmp_path).read()
    assert (missing.mount_point, missing.problem) == (
        "/not-there-\\xff",
        "No such file or directory",
    )
    assert (automatic.size_kib, automatic.problem) == (None, "")
    assert (missing.hidden, automatic.hidden) == (True, False)


MOUNTS = b"""\
1 1 0:1 / / rw - ext4 /dev/root rw
2 1 0:2 / /srv rw - tmpfs below rw
3 1 0:3 / /srv rw - tmpfs above rw
4 1 0:4 / /srv/a\\040b rw - tmpfs blank rw
"""


@pytest.mark.parametrize(
    ("file", "device"),
    [
        ("/", "/dev/root"),
        ("/srvx", "/dev/root"),
        ("/srv", "above"),
        ("/srv/x/../y", "above"),
        ("/srv/a b/c", "blank"),
        ("/srv/a b/../..", "/dev/root"),
    ],
)
def test_where_a_file_would_be(file: str, device: str, tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_bytes(MOUNTS)
    (found,) = MountReader(root=tmp_path).read_holding([file], looks=False)
    assert (found.device, found.file) == (device, file)


def test_where_files_are(tmp_path: Path) -> None:
    """Also through links, as df has it."""
    link, missing = tmp_path / "link", tmp_path / "missing"
    link.symlink_to("/dev/shm")
    files = [str(tmp_path), str(link), str(missing), f"{link}/missing"]
    here, shm, none, also_none = MountReader().read_holding(files, looks=True)
    for found in (here, shm):
        command = ["df", "--output=target", found.file]
        _, target = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        assert (found.mount_point, found.problem) == (target, "")
    for found in (none, also_none):
        assert (found.problem, found.mount_point) == ("No such file or directory", "")
        assert (found.size_kib, found.hidden) == (None, True)


def test_a_process_below_no_mount(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_bytes(b"2 1 0:2 / /srv rw - tmpfs none rw\n")
    (found,) = MountReader(root=tmp_path).read_holding(["/etc"], looks=False)
    assert (found.problem, found.file) == ("it is on no mount", "/etc")


def test_too_many_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    waiting = mounts.Waiting()
    monkeypatch.setattr(mounts, "DEADLINE_S", 0.001)
    try:
        for n in range(2 * mounts.MOST_LATE):
            assert waiting.run(f"file {n}", over.wait) == mounts.NO_ANSWER
        late = [one for one in threading.enumerate() if one.name.startswith("look at file")]
        assert len(late) == mounts.MOST_LATE
    finally:
        over.set()
    for thread in late:
        thread.join()
    monkeypatch.setattr(mounts, "DEADLINE_S", 60)
    assert waiting.run("file 0", lambda: "done") == "done"
