"""A file system whose server does not answer, as of a machine that is gone: nobody waits for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from tests.real.conftest import GIVE_UP_S

from tabane.k2i import mounts
from tabane.k2i.files import read_files
from tabane.k2i.mounts import MountReader
from tabane.k2i.table import ProcessTable
from tabane.runtimes.mounts import mount, unmount
from tabane.security.identity import Principal

pytestmark = pytest.mark.real

T = TypeVar("T")


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Path]:
    """Where such a one is mounted: a FUSE whose server never reads. Whoever asks it goes on once
    its descriptor is closed."""
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount("fuse", tmp_path, f"fd={server},rootmode=40000,user_id=0,group_id=0")
    try:
        yield tmp_path
    finally:
        os.close(server)
        unmount(tmp_path)


def in_time(work: Callable[[], T]) -> T:
    """What it returns, on a thread that may be left behind: a dead file system cannot be given up
    by who waits for it."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(GIVE_UP_S)
    assert found, "it waits for the dead file system"
    return found[0]


def test_who_has_a_file_of_it_open_is_told(dead: Path) -> None:
    """By `lsof`, with what the kernel itself knows."""
    table = ProcessTable()
    descriptor = os.open(dead, os.O_PATH | os.O_CLOEXEC)
    try:
        own = [row for row in table.processes() if row.pid == os.getpid()]
        rows = in_time(lambda: read_files(Path("/proc"), own, Principal("token"), mapped=True))
    finally:
        os.close(descriptor)
        table.close()
    (row,) = [row for row in rows if row.fd == str(descriptor)]
    assert (row.path, row.type, row.inode) == (str(dead), "DIR", 1)
    assert {"REG"} == {row.type for row in rows if row.fd in ("txt", "mem")}


def test_df_of_a_file_on_it(dead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "DEADLINE_S", 0.01)
    reader = MountReader()
    before = threading.active_count()
    for _ in range(2):
        (found,) = in_time(lambda: reader.read_holding([f"{dead}/file"], looks=True))
        assert (found.problem, found.file) == (mounts.NO_ANSWER, f"{dead}/file")
    assert threading.active_count() == before + 1
