"""The client and the server of the contract tests, which both go by the table."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tabane.errors import Closed, EngineError, ProtocolError, TimedOut, UsageError
from tabane.runtimes.firecracker import client
from tabane.runtimes.firecracker.client import Api, wait_for_api
from tabane.runtimes.firecracker.contract import AFTER, CALLS
from tabane.runtimes.firecracker.machine import (
    SAVED,
    Plan,
    jailer_argv,
    load_requests,
    snapshot_request,
)
from tabane.runtimes.machines.saved import MEMORY, STATE
from tabane.supervise import Supervisor

PLAN = Plan(128 << 20, 1)


@asynccontextmanager
async def firecracker(directory: Path, **faults: str) -> AsyncIterator[Api]:
    """The stand-in as a program of its own, in a directory that is its jail."""
    (directory / "faults.json").write_text(json.dumps(faults))
    for name in ("firecracker.log", "metrics", "vmlinux", "initramfs"):
        (directory / name).touch()
    module = ("-m", "tabane.testing.firecracker", str(directory), "firecracker")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *module, "--api-sock", "/api.sock"),
        cwd=directory,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        await wait_for_api(directory / "api.sock")
        yield Api(directory / "api.sock")
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()


MACHINE = {"vcpu_count": 1, "mem_size_mib": 128}
BOOT = {"kernel_image_path": "/vmlinux", "boot_args": "tabane.none"}


async def test_a_life(tmp_path: Path) -> None:
    async with firecracker(tmp_path) as api:
        assert (await api.call("GET", "/"))["state"] == "Not started"
        assert await api.call("GET", "/version") == {"firecracker_version": "1.17.0"}
        assert await api.call("PUT", "/machine-config", MACHINE) is None
        assert await api.call("GET", "/machine-config") == MACHINE
        with pytest.raises(EngineError, match="without /boot-source"):
            await api.call("PUT", "/actions", {"action_type": "InstanceStart"})


async def test_what_comes_too_early_or_too_late_is_refused(tmp_path: Path) -> None:
    """The client leaves that to the server, since only it knows the machine's state."""
    bodies = {
        "PATCH /vm": {"state": "Paused"},
        "PUT /snapshot/create": {"snapshot_path": "/a", "mem_file_path": "/b"},
        "PUT /actions": {"action_type": "SendCtrlAltDel"},
    }
    async with firecracker(tmp_path) as api:
        for key, body in bodies.items():
            with pytest.raises(EngineError, match="before starting") as refusal:
                await api.call(*key.split(" "), body)
            assert refusal.value.status == 400
        for key in (key for key, call in CALLS.items() if call.legal == AFTER):
            if not CALLS[key].body:
                with pytest.raises(EngineError, match="before starting"):
                    await api.call(*key.split(" "))


async def test_a_snapshot_wants_a_fresh_process(tmp_path: Path) -> None:
    state, memory = tmp_path / SAVED / STATE, tmp_path / SAVED / MEMORY
    state.parent.mkdir()
    state.write_text(json.dumps({"/machine-config": MACHINE, "/vsock": {}}))
    memory.touch()
    os.truncate(memory, PLAN.memory_bytes)
    async with firecracker(tmp_path) as api:
        await api.call("PUT", "/machine-config", MACHINE)
        with pytest.raises(EngineError, match="after configuring"):
            await api.call(*load_requests(PLAN)[-1])
    async with firecracker(tmp_path) as api:
        for request in load_requests(PLAN):
            await api.call(*request)
        assert (await api.call("GET", "/"))["state"] == "Running"
        with pytest.raises(EngineError, match="after starting"):
            await api.call("PUT", "/boot-source", BOOT)
        state.unlink()
        memory.unlink()
        await api.call("PATCH", "/vm", {"state": "Paused"})
        await api.call(*snapshot_request())
        assert state.exists() and memory.stat().st_size == PLAN.memory_bytes


async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    async with firecracker(tmp_path) as api:
        with pytest.raises(EngineError, match="No such file"):
            await api.call("PUT", "/boot-source", {"kernel_image_path": "/nothing"})


async def test_what_is_not_in_the_contract_is_not_said(tmp_path: Path) -> None:
    api = Api(tmp_path / "nobody.sock")
    with pytest.raises(UsageError, match="has no call PUT /nothing"):
        await api.call("PUT", "/nothing", {})
    with pytest.raises(UsageError, match="PUT /vsock: guest_cid is not in 3"):
        await api.call("PUT", "/vsock", {"guest_cid": 2, "uds_path": "/v"})
    with pytest.raises(UsageError, match="more than 51200"):
        await api.call("PUT", "/mmds", {"text": "x" * 60000})
    with pytest.raises(Closed, match=re.escape(f"no Firecracker answers at {tmp_path}")):
        await api.call("GET", "/")


@asynccontextmanager
async def saying(path: Path, answer: bytes) -> AsyncIterator[Api]:
    """A server that answers everything with these bytes, and hangs up unless there are none."""
    over = asyncio.Event()
    tasks = Supervisor("server")

    async def answer_one(server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(server)
        with connection:
            connection.setblocking(False)
            await loop.sock_recv(connection, 1 << 16)
            await loop.sock_sendall(connection, answer)
            if not answer:
                await over.wait()

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.setblocking(False)
        serving = tasks.start("answer", answer_one(server))
        yield Api(path)
        over.set()
        await serving
        await tasks.aclose()


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"not HTTP at all\r\n\r\n", ProtocolError, "is no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", Closed, "in the middle of an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", ProtocolError, "is no JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", ProtocolError, "is missing"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", EngineError, "status 500"),
        (b"", TimedOut, "did not answer GET / within"),
    ],
)
async def test_bad_answers(
    tmp_path: Path,
    answer: bytes,
    error: type[Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not answer:
        monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.05)
    async with saying(tmp_path / "api.sock", answer) as api:
        with pytest.raises(error, match=words):
            await api.call("GET", "/")


def test_the_jailers_command_line() -> None:
    argv = jailer_argv(
        ("/usr/bin/jailer", "/usr/bin/firecracker"),
        "abc",
        Path("/run/abc"),
        user=300_000,
        network="/proc/7/ns/net",
    )
    assert " ".join(argv) == (
        "/usr/bin/jailer --id abc --exec-file /usr/bin/firecracker --uid 300000 --gid 300000 "
        "--chroot-base-dir /run/abc/jail --netns /proc/7/ns/net --resource-limit no-file=1024 "
        "--new-pid-ns -- --api-sock /api.sock"
    )
