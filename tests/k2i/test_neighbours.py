"""A k2i of its own: what it answers to whom, at a port and at a unix socket."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tests.k2i.conftest import Start
from tests.k2i.test_cli import K2I, Service, serve

ASK = """
import os, socket, sys
path, target, uid = sys.argv[1], sys.argv[2], int(sys.argv[3])
if uid:
    os.setgroups([])
    os.setresuid(uid, uid, uid)
sock = socket.socket(socket.AF_UNIX)
sock.connect(path)
sock.sendall(f"GET {target} HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n".encode())
while block := sock.recv(1 << 16):
    sys.stdout.buffer.write(block)
"""
STRANGER = 54321


@pytest.fixture(scope="module")
def port() -> Iterator[Service]:
    yield from serve()


@pytest.fixture(scope="module")
def unix() -> Iterator[Path]:
    with TemporaryDirectory() as directory:  # not below pytest's own, which nobody else may enter
        Path(directory).chmod(0o755)
        path = Path(directory, "k2i.sock")
        with subprocess.Popen([K2I, "--unix", path], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == f"On {path}\n"
            try:
                yield path
            finally:
                process.terminate()
        assert not path.exists()


def ask(path: Path, target: str, uid: int = 0) -> tuple[int, Any]:
    command = [sys.executable, "-c", ASK, str(path), target, str(uid)]
    answer = subprocess.run(command, capture_output=True, check=True).stdout
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_port_shows_no_arguments_in_v2(port: Service, start: Start) -> None:
    child = start("", "secret")
    (row,) = port.get(f"/v2/processes?pid={child.pid}")["processes"]
    assert row["command"] == f"[{row['name']}]"
    assert row["dc"] == row["node"] == ""
    assert row["incarnation"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert "secret" in port.get(f"/v1/proc/{child.pid}")[0]["cmdline"]


def test_a_port_shows_no_open_files(port: Service) -> None:
    status, body = port.ask("/v2/files")
    assert status == 401
    assert "unix socket" in json.loads(body)["message"]


def test_a_port_answers_for_the_machine(port: Service) -> None:
    (host,) = port.get("/v2/host")["host"]
    assert host["hostname"] == socket.gethostname()
    assert port.get("/v2/mounts")["mounts"]
    assert port.ask("/v2/host?scope=cluster")[0] == 400
    assert port.ask("/v2/nothing")[0] == 404


@pytest.mark.real  # only root can be somebody else
def test_a_unix_socket_shows_everybody_what_is_theirs(unix: Path, start: Start) -> None:
    assert stat.S_IMODE(unix.stat().st_mode) == 0o666
    child = start("", "secret")
    for target in (f"/v2/processes?pid={child.pid}", f"/v1/proc/{child.pid}"):
        assert "secret" in str(ask(unix, target)[1])
        assert "secret" not in str(ask(unix, target, STRANGER)[1])
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=STRANGER, extra_groups=[]) as mine:
        files = ask(unix, "/v2/files", STRANGER)[1]["files"]
        assert {row["pid"] for row in files} == {mine.pid}  # who asks was root, and shows no files
        mine.communicate()
    assert ask(unix, f"/v2/files?pid={child.pid}")[1]["files"]
    own = ask(unix, f"/v2/processes?user={STRANGER}", STRANGER)[1]["processes"]
    assert any(row["command"].startswith(sys.executable) for row in own)
    whole = str(ask(unix, "/v1/proc", STRANGER)[1])
    assert "secret" not in whole
    assert str(child.pid) in whole


def test_a_socket_that_is_served_is_not_taken(unix: Path) -> None:
    done = subprocess.run([K2I, "--unix", unix], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"k2i: cannot listen on {unix}: Address already in use\n"
    assert ask(unix, "/v2/host")[0] == 200


def test_a_socket_left_behind_makes_room(tmp_path: Path) -> None:
    path = tmp_path / "k2i.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with subprocess.Popen([K2I, "--unix", path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == f"On {path}\n"
        process.terminate()


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("important")
    done = subprocess.run([K2I, "--unix", path], capture_output=True, text=True)
    assert done.returncode == 1
    assert path.read_text() == "important"
