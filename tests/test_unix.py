"""Unix sockets below directories whose names are longer than a socket's address."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tabane.unix import LONGEST, connect_unix, open_nothing, shortened


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    path = tmp_path / ("d" * 120) / "s.sock"
    path.parent.mkdir()
    return path


@pytest.mark.parametrize("timeout_s", [None, 0, 2.5])
def test_a_deep_socket_is_reached(deep: Path, timeout_s: float | None) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        with shortened(deep) as short:
            server.bind(short)
        server.listen()
        with connect_unix(deep, timeout_s) as sock:
            assert sock.gettimeout() == timeout_s
            taken, _ = server.accept()
            with taken:
                sock.send(b"x")
                assert taken.recv(10) == b"x"


def test_a_path_that_fits_is_shown_as_it_is(tmp_path: Path) -> None:
    longest = tmp_path / ("s" * (LONGEST - len(f"{tmp_path}/")))
    with socket.socket(socket.AF_UNIX) as server:
        with shortened(longest) as short:
            server.bind(short)
        assert server.getsockname() == str(longest)
    with shortened(tmp_path / (longest.name + "s")) as short:
        assert short.startswith("/proc/self/fd/")


def test_one_that_never_blocks_does_not_wait_for_room(deep: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        with shortened(deep) as short:
            server.bind(short)
        server.listen(0)
        with connect_unix(deep), pytest.raises(BlockingIOError):
            connect_unix(deep, timeout_s=0)


def test_nothing_is_left_open_when_nobody_listens(deep: Path) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(FileNotFoundError):
        connect_unix(deep)
    with pytest.raises(FileNotFoundError):
        connect_unix(deep.parent / "missing" / "s.sock")
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_nothing_is_at_its_end() -> None:
    descriptor = open_nothing()
    try:
        assert os.read(descriptor, 1) == b"" and not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)
