"""What instances write, through a real holder, as it stands in their log files."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tabane.model import ExitStatus
from tabane.node.logfile import LINE_BYTES, parse_line
from tabane.node.spawner import HolderSpawner
from tabane.runtimes.api import Command


def texts(log: Path, stream: str = "stdout") -> bytes:
    """What a program wrote; a line without an end has one in the log."""
    found = b""
    for line in log.read_bytes().splitlines(keepends=True):
        parsed = parse_line(line)
        assert parsed is not None, line
        if parsed[1] == stream:
            found += parsed[3] + (b"\n" if parsed[2] else b"")
    return found


def sh(key: str, script: str, *argv: object, **more: Any) -> Command:
    return Command(key, ("sh", "-c", script, "sh", *map(str, argv)), **more)


def engine(directory: Path, left_behind: str, log: Path) -> Command:
    """Leaves `sh -c LEFT_BEHIND` behind, which writes to the engine's log."""
    pid_file = directory / "pid"
    script = 'echo engine; sh -c "$2" & echo $! > "$1"'
    return sh("a", script, pid_file, left_behind, pid_file=pid_file, log=log)


async def test_all_is_written_when_the_end_is_told(spawner: HolderSpawner, holder: Any) -> None:
    """The reason of an end quotes the last line, so it must be there already."""
    log = holder.directory / "log"
    for number in range(10):
        script = "seq 300; printf last; printf 'oops\\n' >&2; exit 1"
        await spawner.spawn(sh("a", script, log=log, log_bytes=1 << 30))
        finished = await spawner.finished("a")
        assert (finished.status, finished.output) == (ExitStatus(code=1), "")
        expected = b"".join(b"%d\n" % n for n in range(1, 301)) + b"last\n"
        assert texts(log) == expected * (number + 1)
        assert texts(log, "stderr") == b"oops\n" * (number + 1)


async def test_all_is_written_when_the_end_of_what_was_left_is_told(
    spawner: HolderSpawner, holder: Any, wait_until: Any, is_gone: Any
) -> None:
    """The holder learns of the last words and of the end at once."""
    fifo, log = holder.directory / "fifo", holder.directory / "log"
    os.mkfifo(fifo)
    await spawner.spawn(engine(holder.directory, f"read x < {fifo}; seq 300; printf last", log))
    await spawner.finished("a")
    (pid,) = holder.children()
    holder.process.send_signal(signal.SIGSTOP)
    fifo.write_text("go\n")
    wait_until(lambda: is_gone(pid))
    holder.process.send_signal(signal.SIGCONT)
    assert await spawner.exited("a") == ExitStatus()
    assert texts(log) == b"engine\n" + b"".join(b"%d\n" % n for n in range(1, 301)) + b"last\n"


async def test_a_line_has_its_time_and_stream(spawner: HolderSpawner, holder: Any) -> None:
    log = holder.directory / "log"
    await spawner.spawn(sh("a", "echo one; echo two >&2", log=log))
    await spawner.finished("a")
    lines = [parse_line(line) for line in log.read_bytes().splitlines()]
    assert sorted(line[1:] for line in lines if line) == [
        ("stderr", True, b"two"),
        ("stdout", True, b"one"),
    ]
    for line in lines:
        assert line is not None
        assert len(line[0]) == len("2026-01-31T23:59:59.123456789Z")


async def test_very_long_lines_come_in_parts(spawner: HolderSpawner, holder: Any) -> None:
    log = holder.directory / "log"
    script = "head -c 1000000 /dev/zero | tr '\\0' x; echo; echo end"
    await spawner.spawn(sh("a", script, log=log))
    await spawner.finished("a")
    assert texts(log) == b"x" * 1_000_000 + b"\nend\n"
    assert max(map(len, log.read_bytes().splitlines())) < LINE_BYTES + 60


async def test_a_log_is_rotated(spawner: HolderSpawner, holder: Any) -> None:
    log = holder.directory / "log"
    script = "for i in $(seq 40); do seq $((i * 100)) $((i * 100 + 99)); done"
    await spawner.spawn(sh("a", script, log=log, log_bytes=40_000, log_files=3))
    await spawner.finished("a")
    files = [log.with_name(name) for name in ("log.2", "log.1", "log")]
    assert sorted(holder.directory.glob("log*")) == sorted(files)
    numbers = [int(text) for file in files for text in texts(file).split()]
    assert numbers == list(range(numbers[0], 4100))
    assert numbers[0] > 100


async def test_what_was_left_behind_goes_on_writing(
    spawner: HolderSpawner, holder: Any, wait_until: Any
) -> None:
    log, first, second = (holder.directory / name for name in ("log", "first", "second"))
    os.mkfifo(first)
    os.mkfifo(second)
    left_behind = f"read x < {first}; echo $x; read y < {second}; printf $y; exit 3"
    await spawner.spawn(engine(holder.directory, left_behind, log))
    await spawner.finished("a")
    assert texts(log) == b"engine\n"
    first.write_text("instance\n")
    wait_until(lambda: texts(log) == b"engine\ninstance\n")
    second.write_text("bye\n")
    assert await spawner.exited("a") == ExitStatus(code=3)
    assert texts(log) == b"engine\ninstance\nbye\n"


async def test_what_is_written_while_no_agent_is_there_is_kept(
    spawner: HolderSpawner, holder: Any, wait_until: Any
) -> None:
    log, fifo = holder.directory / "log", holder.directory / "fifo"
    os.mkfifo(fifo)
    left_behind = f"read x < {fifo}; seq 20000"
    await spawner.spawn(engine(holder.directory, left_behind, log))
    await spawner.finished("a")
    spawner.close()
    fifo.write_text("go\n")
    wait_until(lambda: not holder.children())
    expected = b"engine\n" + b"".join(b"%d\n" % n for n in range(1, 20001))
    wait_until(lambda: texts(log) == expected)
    following = HolderSpawner(holder.control)
    await following.connect()
    assert await following.exited("a") == ExitStatus()
    following.close()


async def test_forgetting_keeps_what_was_written(
    spawner: HolderSpawner, holder: Any, wait_until: Any
) -> None:
    """Even of a writer that lives on, and of a line without an end."""
    log, before = holder.directory / "log", holder.descriptors()
    writer = "printf unfinished; trap '' PIPE; touch DONE; exec sleep 1000"
    done = holder.directory / "done"
    await spawner.spawn(sh("a", writer.replace("DONE", str(done)), log=log))
    wait_until(done.exists)
    await spawner.forget("a")
    assert texts(log) == b"unfinished\n"
    assert holder.descriptors() == before


async def test_output_that_cannot_be_written_is_said_once(
    spawner: HolderSpawner, holder: Any
) -> None:
    (holder.directory / "blocked").write_text("not a directory")
    await spawner.spawn(sh("a", "seq 100000", log=holder.directory / "blocked" / "log"))
    assert await spawner.exited("a") == ExitStatus()
    assert holder.log.read_text().count("output of a is lost") == 1


async def test_output_is_written_again_when_it_can_be(
    spawner: HolderSpawner, holder: Any, wait_until: Any
) -> None:
    blocked, first, second = (holder.directory / name for name in ("blocked", "first", "second"))
    blocked.write_text("not a directory")
    os.mkfifo(first)
    os.mkfifo(second)
    script = f"seq 2; read x < {first}; echo 3; read x < {second}; echo 4"
    await spawner.spawn(sh("a", script, log=blocked / "log"))
    said = f"holder: output of a is lost: [Errno 17] File exists: '{blocked}'\n"
    wait_until(lambda: said in holder.log.read_text())
    blocked.unlink()
    first.write_text("go on\n")
    wait_until((blocked / "log").exists)
    wait_until(lambda: texts(blocked / "log") == b"3\n")
    second.write_text("go on\n")
    assert await spawner.exited("a") == ExitStatus()
    assert texts(blocked / "log") == b"3\n4\n"
    assert holder.log.read_text() == said


async def test_a_quiet_program_leaves_no_log(spawner: HolderSpawner, holder: Any) -> None:
    log = holder.directory / "instance" / "log"
    await spawner.spawn(Command("a", ("true",), log=log))
    assert await spawner.exited("a") == ExitStatus()
    assert not log.parent.exists()


async def test_instances_logs_are_whole_when_the_node_ends(
    spawner: HolderSpawner, holder: Any, wait_until: Any
) -> None:
    log, done = holder.directory / "log", holder.directory / "done"
    await spawner.spawn(sh("a", f"printf unfinished; touch {done}; exec sleep 1000", log=log))
    wait_until(done.exists)
    (child,) = holder.children()
    assert holder.terminate() == 0
    os.kill(child, 9)
    assert texts(log) == b"unfinished\n"
