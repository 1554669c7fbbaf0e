"""`tabane exec` at a real terminal, in any data center, and when it breaks off."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import LocalCluster, wait_for

from tabane.clock import SYSTEM
from tabane.runtimes.api import TerminalSize
from tabane.runtimes.terminal import set_size

pytestmark = pytest.mark.real

PATIENCE_S = 60.0
FAR = "ishikari"


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


@pytest.fixture(scope="module")
def awake(cluster: LocalCluster) -> dict[str, Any]:
    """An instance in the data center that is not asked first."""
    cluster.deploy("far")
    return cluster.wake("far", at=FAR)


class AtTerminal:
    """A command whose terminal is here."""

    def __init__(self, cluster: LocalCluster, argv: tuple[str, ...], env: dict[str, str]) -> None:
        self.master, self.slave = pty.openpty()
        set_size(self.master, TerminalSize(24, 80))
        self.before = termios.tcgetattr(self.slave)
        self.said = b""
        command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(cluster.root), *argv]
        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=os.environ | env,
            start_new_session=True,
            preexec_fn=self._take_terminal,
        )

    def _take_terminal(self) -> None:
        import fcntl

        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def hear(self, words: bytes) -> bytes:
        """Wait for words; returns all since the last."""
        deadline = SYSTEM.now() + PATIENCE_S
        while words not in self.said:
            left_s = deadline - SYSTEM.now()
            ready, _, _ = select.select([self.master], [], [], max(0, left_s))
            assert ready, f"it did not say {words!r}, only {self.said!r}"
            self.said += os.read(self.master, 65536)
        said, self.said = self.said, b""
        return said

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ECHO

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextmanager
def at_terminal(cluster: LocalCluster, *argv: str, **env: str) -> Iterator[AtTerminal]:
    terminal = AtTerminal(cluster, argv, env)
    try:
        yield terminal
    finally:
        terminal.close()


def running(word: str) -> list[Path]:
    """Processes of this machine that have a word on their command line, ours left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if word.encode() in words and b"tabane.tools.cli" not in words:
            found.append(path)
    return found


def test_a_shell(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    with at_terminal(cluster, "exec", "-it", "far", "sh", TERM="vt220") as there:
        there.hear(b"# ")
        assert there.is_raw()
        there.type(b"stty size; echo $TERM; tty\r")
        said = there.hear(b"/dev/pts/")
        assert b"24 80\r\nvt220\r\n" in said
        set_size(there.master, TerminalSize(51, 133))
        there.type(b"\r")
        there.hear(b"# ")
        seen = b""
        while b"51 133" not in seen:  # it travels beside the keys
            there.type(b"stty size; echo do''ne\r")
            seen = there.hear(b"done\r\n")
        there.type(b"sh -c 'echo run''ning; exec sleep 1011'\r")
        there.hear(b"running\r\n")
        there.type(b"\x1a")
        there.hear(b"Stopped")
        there.type(b"kill -9 %1; sh -c 'echo run''ning; exec sleep 1011'\r")
        there.hear(b"running\r\n")
        there.type(b"\x03")
        there.hear(b"# ")
        there.type(
            b"stty raw -echo; echo n''ow; head -c 4 | od -An -tx1; stty sane; exit 9; exit 9\r"
        )
        there.hear(b"now")
        there.type(b"\x1b\x03\x04\xff")
        there.hear(b"1b 03 04 ff")
        assert there.process.wait(PATIENCE_S) == 9
        assert termios.tcgetattr(there.slave) == there.before


def test_ctrl_d_ends_a_command_and_ctrl_c_another(
    cluster: LocalCluster, awake: dict[str, Any]
) -> None:
    with at_terminal(cluster, "exec", "-it", "far", "cat") as there:
        wait_for(there.is_raw)
        there.type(b"hi\r")
        there.hear(b"hi\r\nhi\r\n")
        there.type(b"\x04")
        assert there.process.wait(PATIENCE_S) == 0
    with at_terminal(cluster, "exec", "-it", "far", "sleep", "1012") as there:
        wait_for(lambda: running("1012"))
        there.type(b"\x03")
        assert there.process.wait(PATIENCE_S) == 128 + signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("options", ["-it", "-i"])
def test_who_is_killed_leaves_nothing_there(
    cluster: LocalCluster, awake: dict[str, Any], number: int, options: str
) -> None:
    script = "trap '' HUP; sleep 1013 & cat; wait"
    with at_terminal(cluster, "exec", options, "far", "sh", "-c", script) as there:
        wait_for(lambda: running("1013"), "its process")
        there.process.send_signal(number)
        there.process.wait(PATIENCE_S)
        if number != signal.SIGKILL:
            assert termios.tcgetattr(there.slave) == there.before
        wait_for(lambda: not running("1013"), "its end")


def test_t_needs_a_terminal(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    ended = cluster.tabane("exec", "-it", "far", "ls", stdin="")
    assert ended.code == 125
    assert "-t needs a terminal" in ended.err


def test_output_comes_as_it_is_written(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    script = "echo one; read word; echo $word >&2; read word"
    command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(cluster.root)]
    command += ["exec", "-i", "far", "sh", "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == b"one\n"
        process.stdin.write(b"two\n")
        process.stdin.flush()
        assert process.stderr.readline() == b"two\n"
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 1


def test_much_output_costs_no_memory(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    """300 MB to who does not read: the writer waits. Then all of it comes."""
    command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(cluster.root)]
    command += ["exec", "far", "head", "-c", "300000000", "/dev/zero"]
    agents = [cluster.part("agentd", node) for node in ("tokyo/tokyo-1", awake["node"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.read(1) == b"\0"
        wait_for(lambda: running("300000000"))
        peaks = [peak_kib(pid) for pid in agents]
        its_own = peak_kib(process.pid)
        count = 1
        while block := process.stdout.read(1 << 20):
            count += len(block)
        assert count == 300_000_000
        grown = [peak_kib(pid) - peak for pid, peak in zip(agents, peaks, strict=True)]
        assert max(grown) < 30_000
        assert its_own < 100_000
        assert process.wait(PATIENCE_S) == 0


def peak_kib(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


def test_nothing_is_kept_open(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    """Of commands, copies and logs, whose clients stay or leave, near and far."""
    agents = [cluster.part("agentd", node) for node in ("tokyo/tokyo-1", awake["node"])]

    def descriptors() -> list[int]:
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in agents]

    def use() -> None:
        for options in ("-i", "-it"):
            with at_terminal(cluster, "exec", options, "far", "cat") as there:
                there.type(b"hi\r")
                there.hear(b"hi\r\nhi\r\n")
        for argv in (("logs", "-f", "far"), ("exec", "far", "sleep", "1016")):
            with at_terminal(cluster, *argv):
                wait_for(lambda argv=argv: argv[0] == "logs" or running("1016"))
        assert cluster.tabane("cp", "far:/etc/hosts", "/dev/null").code == 2
        assert cluster.tabane("exec", "-i", "far", "cat", stdin="x").out == "x"
        assert cluster.tabane("exec", "far", "nosuch").code == 127

    use()
    before = descriptors()
    for _ in range(3):
        use()
    wait_for(lambda: all(now <= was for now, was in zip(descriptors(), before, strict=True)))
    wait_for(lambda: not running("1016"))


def test_through_another_node(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    """Only the first node's socket can be reached."""
    hidden = []
    for node in cluster.addresses:
        if node != "tokyo/tokyo-1":
            path = cluster.root / "nodes" / node / "api.sock"
            hidden.append(path.rename(path.with_name("hidden.sock")))
    try:
        ended = cluster.tabane("exec", "-i", "far", "sh", "-c", "cat; exit 3", stdin="far away")
        assert ended == (3, "far away", "")
        with at_terminal(cluster, "exec", "-it", "far", "sh") as there:
            there.hear(b"# ")
            there.type(b"exit 4\r")
            assert there.process.wait(PATIENCE_S) == 4
        with at_terminal(cluster, "exec", "-it", "far", "sleep", "1014") as there:
            wait_for(lambda: running("1014"))
            there.process.kill()
            wait_for(lambda: not running("1014"), "its end")
        assert cluster.tabane("logs", "far").code == 0
        assert cluster.tabane("exec", "far", "nosuch").code == 127
    finally:
        for path in hidden:
            path.rename(path.with_name("api.sock"))


def test_an_agent_that_ends_is_said_and_ends_the_command(
    cluster: LocalCluster, awake: dict[str, Any]
) -> None:
    with at_terminal(cluster, "exec", "-it", "far", "sh", "-c", "sleep 1015 & cat") as there:
        wait_for(lambda: running("1015") and there.is_raw())
        cluster.kill("agentd", awake["node"])
        there.hear(b"broke off: it or its agent ended or restarted")
        assert there.process.wait(PATIENCE_S) == 125
        assert termios.tcgetattr(there.slave) == there.before
        wait_for(lambda: not running("1015"), "its end")
    wait_for(lambda: cluster.answers(awake["node"]), "its agent")
    wait_for(lambda: cluster.instances("far", "ready"), "the instance, which went on")
    assert cluster.instances("far", "ready")[0]["id"] == awake["id"]
    assert cluster.tabane("exec", "far", "echo", "again").out == "again\n"
