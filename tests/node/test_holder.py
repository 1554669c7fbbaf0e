"""A real holder and its spawner: engines, what they leave behind, and bad company."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tabane.errors import Closed, EngineError, NotFound
from tabane.model import ExitStatus
from tabane.node import holder as module
from tabane.node.spawner import HolderSpawner, connect_holder
from tabane.runtimes.api import Command, Finished


def sh(key: str, script: str, *argv: object, **more: Any) -> Command:
    return Command(key, ("sh", "-c", script, "sh", *map(str, argv)), **more)


def engine(key: str, directory: Path, left_behind: str, **more: Any) -> Command:
    """Leaves `sh -c LEFT_BEHIND` behind, and its pid in a file."""
    pid_file = directory / f"{key}.pid"
    script = 'sh -c "$2" & echo $! > "$1"'
    return sh(key, script, pid_file, left_behind, pid_file=pid_file, **more)


def make_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


async def run(spawner: HolderSpawner, command: Command) -> tuple[ExitStatus, str]:
    """To its end, and forgotten."""
    await spawner.spawn(command)
    finished = await spawner.finished(command.key)
    assert await spawner.exited(command.key) == finished.status
    await spawner.forget(command.key)
    return finished.status, finished.output


async def again(holder: Any) -> HolderSpawner:
    """The next agent's spawner."""
    spawner = HolderSpawner(holder.control)
    await spawner.connect()
    return spawner


async def test_a_command_its_pid_its_status_and_its_output(spawner: HolderSpawner) -> None:
    pid = await spawner.spawn(sh("a", "echo $$; echo problem >&2; exit 3"))
    finished = await spawner.finished("a")
    assert finished.status == ExitStatus(code=3)
    assert finished.output == f"{pid}\nproblem\n"
    assert await spawner.exited("a") == ExitStatus(code=3)
    assert spawner.known() == ("a",)
    await spawner.forget("a")
    assert spawner.known() == ()


async def test_the_environment_is_the_given_one_or_the_holders(spawner: HolderSpawner) -> None:
    _, inherited = await run(spawner, sh("a", "env"))
    assert "TABANE_FROM_CONFIG=yes" in inherited.splitlines()
    _, given = await run(spawner, Command("a", ("env",), env={"PATH": "/x", "COLOUR": "blue"}))
    assert given.splitlines() == ["PATH=/x", "COLOUR=blue"]


async def test_a_command_reads_nothing_and_has_its_own_session(spawner: HolderSpawner) -> None:
    script = "cat; cut -d' ' -f1,6 /proc/$$/stat; exec ls /proc/self/fd"
    _, output = await run(spawner, sh("a", script))
    ids, *descriptors = output.splitlines()
    pid, session = ids.split()
    assert pid == session
    assert descriptors == ["0", "1", "2", "3"], "and 3 is the directory itself"


async def test_a_signal_reaches_the_command(spawner: HolderSpawner) -> None:
    await spawner.spawn(Command("a", ("sleep", "1000")))
    assert await spawner.signal("a", 0)
    assert await spawner.signal("a", signal.SIGTERM)
    assert await spawner.exited("a") == ExitStatus(signal=signal.SIGTERM)
    assert not await spawner.signal("a", signal.SIGTERM)
    assert not await spawner.signal("unknown", signal.SIGTERM)


async def test_a_signal_that_is_none_is_said(spawner: HolderSpawner) -> None:
    await spawner.spawn(Command("a", ("sleep", "1000")))
    with pytest.raises(EngineError, match="cannot send signal 4711 to a: Invalid argument"):
        await spawner.signal("a", 4711)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("/no/such/engine", "run"), r"No such file or directory \(/no/such/engine\)"),
        (("no-such-engine",), r"No such file or directory \(no-such-engine\)"),
        (("/etc",), r"Permission denied \(/etc\)"),
        ((), "IndexError"),
        (("true", "\0"), "ValueError: embedded null byte"),
    ],
)
async def test_what_cannot_start_is_said(
    spawner: HolderSpawner, holder: Any, argv: tuple[str, ...], problem: str
) -> None:
    before = holder.descriptors()
    log = holder.directory / "log"
    for command in (Command("web", argv), Command("web", argv, log=log)):
        with pytest.raises(EngineError, match=f"^cannot start .* for web: {problem}") as caught:
            await spawner.spawn(command)
        assert caught.value.argv == argv
    assert spawner.known() == ()
    assert holder.descriptors() == before


async def test_one_command_at_a_time_has_a_key(spawner: HolderSpawner, holder: Any) -> None:
    fifo = make_fifo(holder.directory / "fifo")
    await spawner.spawn(engine("a", holder.directory, f"read x < {fifo}; exit 4"))
    await spawner.finished("a")
    with pytest.raises(EngineError, match="a is running already"):
        await spawner.spawn(Command("a", ("true",)))
    fifo.write_text("go\n")
    assert await spawner.exited("a") == ExitStatus(code=4)
    await spawner.spawn(Command("a", ("false",)))
    assert await spawner.exited("a") == ExitStatus(code=1)


async def test_waiting_for_an_unknown_key_is_refused(spawner: HolderSpawner) -> None:
    for wait in (spawner.finished, spawner.exited):
        with pytest.raises(NotFound, match="no process nobody"):
            await wait("nobody")
    await spawner.forget("nobody")


async def test_who_waits_for_what_is_forgotten_is_told(spawner: HolderSpawner) -> None:
    pid = await spawner.spawn(Command("a", ("sleep", "1000")))
    waiting = asyncio.gather(spawner.finished("a"), spawner.exited("a"), return_exceptions=True)
    await asyncio.sleep(0)
    await spawner.forget("a")
    assert [type(error) for error in await waiting] == [NotFound, NotFound]
    os.kill(pid, signal.SIGKILL)
    assert await run(spawner, sh("a", "exit 2")) == (ExitStatus(code=2), "")


async def test_what_an_engine_leaves_behind_is_watched(spawner: HolderSpawner, holder: Any) -> None:
    fifo = make_fifo(holder.directory / "fifo")
    command = engine("a", holder.directory, f"read x < {fifo}; exit 7")
    await spawner.spawn(command)
    assert (await spawner.finished("a")).status == ExitStatus()
    assert await spawner.signal("a", 0)
    assert command.pid_file is not None
    assert holder.children() == {int(command.pid_file.read_text())}
    exited = asyncio.ensure_future(spawner.exited("a"))
    await asyncio.sleep(0)
    assert not exited.done()
    fifo.write_text("go\n")
    assert await exited == ExitStatus(code=7)


async def test_a_signal_reaches_what_was_left_behind(spawner: HolderSpawner, holder: Any) -> None:
    await spawner.spawn(engine("a", holder.directory, "exec sleep 1000"))
    await spawner.finished("a")
    assert await spawner.signal("a", signal.SIGKILL)
    assert await spawner.exited("a") == ExitStatus(signal=signal.SIGKILL)


async def test_an_end_while_no_agent_was_there_is_told_to_the_next(
    spawner: HolderSpawner, holder: Any, wait_until: Any
) -> None:
    fifo = make_fifo(holder.directory / "fifo")
    await spawner.spawn(engine("a", holder.directory, f"read x < {fifo}; exit 7"))
    await spawner.finished("a")
    spawner.close()
    fifo.write_text("go\n")
    wait_until(lambda: not holder.children())
    following = await again(holder)
    assert following.known() == ("a",)
    assert (await following.finished("a")).status == ExitStatus()
    assert await following.exited("a") == ExitStatus(code=7)
    following.close()


FORK = """
import os, sys
pid = os.fork()
if not pid:
    os._exit(5)
with open(sys.argv[1], "w") as file:
    file.write(f"{pid}\\n")
"""
"""Unlike a shell, it never waits for its child by itself."""


async def test_one_that_ends_with_its_engine_is_not_missed(
    spawner: HolderSpawner, holder: Any
) -> None:
    async def race(key: str) -> None:
        pid_file = holder.directory / f"{key}.pid"
        argv = (sys.executable, "-ISc", FORK, str(pid_file))
        await spawner.spawn(Command(key, argv, pid_file=pid_file))
        assert await spawner.exited(key) == ExitStatus(code=5)
        assert await spawner.finished(key) == Finished(ExitStatus())

    for _ in range(10):
        await asyncio.gather(*(race(f"a{number}") for number in range(10)))


FORK_TWICE = """
import os, sys
if not os.fork():
    pid = os.fork()
    if not pid:
        os._exit(6)
    with open(sys.argv[1], "w") as file:
        file.write(f"{pid}\\n")
    os._exit(0)
os.wait()
open(sys.argv[2]).read()
"""


async def test_one_that_ended_long_before_its_engine_is_not_missed(
    spawner: HolderSpawner, holder: Any, wait_until: Any
) -> None:
    """A daemon that forks twice is the holder's child while its engine still runs."""
    pid_file, fifo = holder.directory / "pid", make_fifo(holder.directory / "fifo")
    argv = (sys.executable, "-ISc", FORK_TWICE, str(pid_file), str(fifo))
    pid = await spawner.spawn(Command("a", argv, pid_file=pid_file))
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    wait_until(lambda: holder.children() == {pid})
    await run(spawner, Command("other", ("true",)))
    fifo.write_text("go\n")
    assert await spawner.exited("a") == ExitStatus(code=6)


async def test_an_engine_that_fails_leaves_nothing_to_wait_for(
    spawner: HolderSpawner, holder: Any
) -> None:
    pid_file = holder.directory / "pid"
    await spawner.spawn(sh("a", "echo broken >&2; exit 9", pid_file=pid_file))
    assert await spawner.exited("a") == ExitStatus(code=9)
    assert (await spawner.finished("a")).output == "broken\n"
    assert not await spawner.signal("a", signal.SIGKILL)
    await spawner.spawn(Command("a", ("true",)))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "No such file or directory"),
        ("", "invalid literal"),
        ("web", "invalid literal"),
        ("0", "0 is no process"),
        ("-1", "-1 is no process"),
        ("4194305", "No such process"),
    ],
)
async def test_a_pid_file_that_names_no_process_is_said(
    spawner: HolderSpawner, holder: Any, text: str | None, problem: str
) -> None:
    pid_file = holder.directory / "pid"
    if text is not None:
        pid_file.write_text(text)
    await spawner.spawn(Command("a", ("true",), pid_file=pid_file))
    assert await spawner.exited("a") == ExitStatus(code=255)
    output = (await spawner.finished("a")).output
    assert output.startswith(f"pid file {pid_file}: ")
    assert problem in output
    assert not await spawner.signal("a", signal.SIGKILL)


async def test_children_that_are_nobodys_are_reaped(
    spawner: HolderSpawner, holder: Any, wait_until: Any
) -> None:
    await run(spawner, sh("a", "for i in 1 2 3 4 5; do (true &) ; done"))
    wait_until(lambda: not holder.children())
    await run(spawner, Command("b", ("true",)))


BAD_REQUESTS = (
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"7",
    b'"text"',
    b"{}",
    b'{"id": 1}',
    b'{"id": 1, "do": "spawn"}',
    b'{"id": 1, "do": "spawn", "with": []}',
    b'{"id": 1, "do": "spawn", "with": {}}',
    b'{"id": 1, "do": "spawn", "with": {"key": "x", "argv": 7}}',
    b'{"id": 1, "do": "spawn", "with": {"key": "x", "argv": []}}',
    b'{"id": 1, "do": "spawn", "with": {"key": "x", "argv": [1, 2]}}',
    b'{"id": 1, "do": "spawn", "with": {"key": ["x"], "argv": ["true"]}}',
    b'{"id": 1, "do": "spawn", "with": {"key": "x", "argv": ["true"], "env": {"A": 1}}}',
    b'{"id": 1, "do": "spawn", "with": {"key": "x", "argv": ["true"], "log": 3}}',
    b'{"id": 1, "do": "spawn", "with": {"key": "x", "argv": ["true"], "more": 3}}',
    b'{"id": 1, "do": "signal", "with": {"key": "x", "number": "TERM"}}',
    b'{"id": 1, "do": "reap", "with": {}}',
    b'{"id": 1, "do": 3, "with": {}}',
    b'{"id": {"a": []}, "do": "forget", "with": {"key": null}, "and": "more"}',
    b"[" * 100_000,
)


async def test_bad_requests_are_answered_and_harm_nobody(
    spawner: HolderSpawner, holder: Any
) -> None:
    before = len(holder.descriptors())
    with connect_holder(holder.control) as sock:
        sock.setblocking(True)
        sock.sendall(b"\n".join((*BAD_REQUESTS, b"")))
        answers = sock.makefile("rb")
        assert json.loads(answers.readline()) == {"re": 0}
        found = [json.loads(answers.readline()) for _ in BAD_REQUESTS]
        answers.close()
    assert sum("error" in answer for answer in found) >= len(BAD_REQUESTS) - 2
    assert (await run(spawner, sh("a", "echo alive")))[1] == "alive\n"
    assert len(holder.descriptors()) == before


async def test_a_request_without_an_end_is_cut(spawner: HolderSpawner, holder: Any) -> None:
    with connect_holder(holder.control) as sock, pytest.raises(ConnectionError):
        sock.setblocking(True)
        sock.sendall(b"x" * (2 * module.REQUEST_BYTES))
    assert (await run(spawner, sh("a", "echo alive")))[1] == "alive\n"


async def test_requests_in_pieces_and_many_at_once(spawner: HolderSpawner, holder: Any) -> None:
    request = json.dumps({"id": 5, "do": "forget", "with": {"key": "x"}}).encode() + b"\n"
    with connect_holder(holder.control) as sock:
        sock.setblocking(True)
        for byte in request:
            sock.send(bytes([byte]))
        sock.sendall(request * 2000)
        answers = sock.makefile("rb")
        assert json.loads(answers.readline()) == {"re": 0}
        found = [json.loads(answers.readline()) for _ in range(2001)]
        answers.close()
    assert found == [{"re": 5}] * 2001


async def test_a_client_that_never_reads_blocks_nobody_and_is_dropped(
    spawner: HolderSpawner, holder: Any
) -> None:
    with connect_holder(holder.control) as lazy:
        report_bytes = 6 * module.OUTPUT_BYTES
        for _ in range(module.OUTBOX_BYTES // report_bytes + 3):
            zeros = f"head -c {module.OUTPUT_BYTES} /dev/zero"
            _, output = await run(spawner, sh("a", zeros))
            assert output == "\0" * module.OUTPUT_BYTES
        lazy.setblocking(True)
        received = 0
        while data := lazy.recv(1 << 20):
            received += len(data)
        assert received < module.OUTBOX_BYTES


async def test_no_more_output_is_gathered_than_is_returned(spawner: HolderSpawner) -> None:
    _, output = await run(spawner, sh("a", "yes | head -c 1000000"))
    assert output == "y\n" * (module.OUTPUT_BYTES // 2)


async def test_an_engine_that_leaves_a_writer_without_a_log_is_not_waited_for(
    spawner: HolderSpawner,
) -> None:
    """`yes` gets SIGPIPE when the engine's output is taken and closed."""
    status, _ = await run(spawner, sh("a", "yes & exit 0"))
    assert status == ExitStatus()


async def test_thousands_of_jobs_leave_nothing(spawner: HolderSpawner, holder: Any) -> None:
    before = holder.descriptors()

    async def worker(name: str, commands: int, log: Path | None) -> None:
        for _ in range(commands):
            assert await run(spawner, Command(name, ("true",), log=log)) == (ExitStatus(), "")

    logs = [None, holder.directory / "log"] * 10
    await asyncio.gather(*(worker(f"a{n}", 100, log) for n, log in enumerate(logs)))
    assert holder.descriptors() == before
    assert spawner.known() == ()
    assert not holder.children()


async def test_when_the_holder_is_gone_every_wait_fails(
    spawner: HolderSpawner, holder: Any, wait_until: Any, is_gone: Any
) -> None:
    pids = [await spawner.spawn(Command(key, ("sleep", "1000"))) for key in ("a", "b")]
    waits = (spawner.finished("a"), spawner.exited("b"), spawner.exited("b"))
    waiting = asyncio.gather(*waits, return_exceptions=True)
    await asyncio.sleep(0)
    os.kill(holder.process.pid, signal.SIGKILL)
    assert [type(error) for error in await waiting] == [Closed] * 3
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for ask in (
        spawner.forget("a"),
        spawner.signal("a", 0),
        spawner.spawn(Command("c", ("true",))),
    ):
        with pytest.raises(Closed, match="the connection to the holder is closed"):
            await ask
    holder.process.wait()
    with pytest.raises(Closed, match="holder"):
        await spawner.connect()


async def test_a_request_under_way_fails_when_the_holder_goes(
    spawner: HolderSpawner, holder: Any
) -> None:
    os.kill(holder.process.pid, signal.SIGSTOP)
    asked = asyncio.ensure_future(spawner.signal("a", 0))
    await asyncio.sleep(0)
    os.kill(holder.process.pid, signal.SIGKILL)
    with pytest.raises(Closed):
        await asked


def test_closing_an_unconnected_spawner_is_nothing(tmp_path: Path) -> None:
    HolderSpawner(tmp_path / "holder.sock").close()


async def test_no_holder_no_connection(tmp_path: Path) -> None:
    for path in (tmp_path / "holder.sock", tmp_path / "nowhere" / "holder.sock"):
        with pytest.raises(Closed, match=f"no holder answers at {path}: No such file"):
            await HolderSpawner(path).connect()


async def test_a_holder_takes_the_place_of_one_that_was_killed(holder: Any) -> None:
    holder.start()
    holder.process.kill()
    holder.process.wait()
    assert holder.control.is_socket()
    holder.start()
    spawner = await again(holder)
    assert spawner.known() == ()
    assert (await run(spawner, sh("a", "echo alive")))[1] == "alive\n"
    spawner.close()
    assert holder.terminate() == 0


async def test_the_holder_may_open_as_many_files_as_is_allowed(spawner: HolderSpawner) -> None:
    _, output = await run(spawner, sh("a", "ulimit -Sn; ulimit -Hn"))
    soft, hard = output.split()
    assert soft == hard


def test_the_socket_is_for_root_only(holder: Any) -> None:
    holder.start()
    assert holder.control.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="AF_UNIX path too long"), socket.socket(socket.AF_UNIX) as s:
        s.connect(str(holder.control))
    assert holder.terminate() == 0
