"""Control by way of a k2i of its own: at a unix socket, for those whose names it knows."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tabane.security.audit import read_lines

from .conftest import Start
from .test_cli import K2I, Service, serve


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


class K2i:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "k2i.sock"
        self.audit = directory / "audit.log"

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = UnixConnection(self.path)
        headers = {"content-type": "application/json"}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        said = json.loads(answer.read())
        connection.close()
        return answer.status, said

    def life(self, pid: int) -> dict[str, Any]:
        """What says which process has this pid."""
        _, said = self.ask("GET", f"/v2/processes?pid={pid}")
        (row,) = said["processes"]
        return {key: row[key] for key in ("dc", "node", "incarnation", "start_ticks")}


@pytest.fixture
def k2i(tmp_path: Path) -> Iterator[K2i]:
    k2i = K2i(tmp_path)
    command = [K2I, "--unix", k2i.path, "--audit", k2i.audit]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == f"On {k2i.path}\n"
        try:
            yield k2i
        finally:
            process.terminate()


def test_a_row_of_the_table_is_an_address(k2i: K2i, start: Start) -> None:
    child = start()
    life = k2i.life(child.pid)
    body = {**life, "signal": "TERM"}
    status, said = k2i.ask("POST", f"/v2/processes/{child.pid}/signal", {**body, "dry_run": True})
    assert (status, child.poll()) == (200, None)
    assert said["target"]["pid"] == child.pid
    assert k2i.ask("POST", f"/v2/processes/{child.pid}/signal", body)[0] == 200
    assert child.wait() == -signal.SIGTERM
    status, said = k2i.ask("POST", f"/v2/processes/{child.pid}/signal", body)
    assert (status, said["error"]) == (404, "not_found")
    outcomes = [(line.outcome, line.uid, line.pid) for line in read_lines(k2i.audit)]
    mine = (os.geteuid(), os.getpid())
    assert outcomes == [(what, *mine) for what in ("would", "doing", "done", "refused")]


def test_another_start_of_the_machine(k2i: K2i, start: Start) -> None:
    child = start()
    body = {**k2i.life(child.pid), "incarnation": "before", "signal": 9}
    status, said = k2i.ask("POST", f"/v2/processes/{child.pid}/signal", body)
    assert (status, said["error"]) == (410, "stale")
    assert child.poll() is None


def test_bad_bodies_have_a_sentence(k2i: K2i) -> None:
    status, said = k2i.ask("POST", "/v2/processes/7/signal", {"signal": 9})
    assert (status, said["error"]) == (400, "usage")
    assert said["message"].startswith("body.")


def test_there_are_no_instances(k2i: K2i) -> None:
    body = {"incarnation": "i", "counter": 1}
    status, said = k2i.ask("POST", "/v2/instances/abc/pause", body)
    assert (status, said["error"]) == (404, "not_found")


def test_a_port_obeys_nobody(start: Start) -> None:
    child = start()
    services: Iterator[Service] = serve()
    service = next(services)
    for path in (f"/v2/processes/{child.pid}/signal", "/v2/processes/signal"):
        status, said = service.ask(path, "POST")
        assert status == 403
        assert b"start it with `--unix PATH --audit FILE`" in said
    for _ in services:
        pass
    assert child.poll() is None


@pytest.mark.parametrize(
    ("audit", "problem"),
    [
        (["--unix", "{}/k2i.sock", "--audit", "{}"], "{} cannot be written (Is a directory): name"),
        (["--audit", "{}/audit.log"], "only at a unix socket is it known who asks: add --unix"),
    ],
)
def test_orders_are_taken_only_where_they_can_be_written_down(
    tmp_path: Path, audit: list[str], problem: str
) -> None:
    command = [K2I, "--port", "0", *(word.format(tmp_path) for word in audit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"k2i: --audit: {problem.format(tmp_path)}")
    assert list(tmp_path.iterdir()) == []


def test_without_an_audit_log_nobody_is_obeyed(tmp_path: Path, start: Start) -> None:
    child = start()
    k2i = K2i(tmp_path)
    command = [K2I, "--unix", k2i.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        body = {**k2i.life(child.pid), "signal": 9}
        status, said = k2i.ask("POST", f"/v2/processes/{child.pid}/signal", body)
        process.terminate()
    assert (status, said["error"]) == (403, "denied")
    assert "`--unix PATH --audit FILE`" in said["message"]
    assert child.poll() is None
