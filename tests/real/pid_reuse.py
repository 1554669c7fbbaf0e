"""Pids that are really given to another process, in a pid namespace of the program's own.

Run below `unshare --pid --fork --mount-proc`. Prints one JSON object: by attempt, what came of it
and of the process that got the pid, `[error code, "unharmed", nice value, limit of core files]`.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tabane.errors import TabaneError
from tabane.k2i import kernel
from tabane.k2i.control import Control
from tabane.k2i.kernel import Alone, Held, hold, look
from tabane.k2i.orders import Action, Affinity, Gpid, Limit, Limits, Nice, Order, Pause, Signal
from tabane.k2i.permission import Here, check_identity
from tabane.k2i.procfs import parse_stat
from tabane.model import NodeName
from tabane.security.audit import AuditLog
from tabane.security.identity import Principal
from tabane.supervise import Supervisor

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
THREADED = """
import os, threading
def wait():
    os.write(1, b"%d" % threading.get_native_id())
    os.read(0, 1)
thread = threading.Thread(target=wait); thread.start(); thread.join()
while os.path.exists(f"/proc/self/task/{thread.native_id}"): pass
os.write(1, b"ended")
os.read(0, 2)
"""
Child = subprocess.Popen[bytes]


def ticks_of(pid: int) -> int:
    return parse_stat(Path(f"/proc/{pid}/stat").read_bytes()).starttime


def sleeper() -> Child:
    """It writes no core files, so that a change of that limit is seen."""
    child = subprocess.Popen(["sleep", "1000"])
    resource.prlimit(child.pid, resource.RLIMIT_CORE, (77, 100))
    return child


def end(child: Child) -> None:
    child.kill()
    child.wait()


def take(pid: int, ticks: int) -> Child:
    """A process that has exactly this pid, and started at another tick than the one before. The
    kernel may need a moment until it gives the pid away."""
    while True:
        LAST_PID.write_text(str(pid - 1))
        child = sleeper()
        if child.pid == pid and ticks_of(pid) != ticks:
            return child
        end(child)


class Swap:
    """A process, and another that gets its pid when `swap` is called."""

    def __init__(self) -> None:
        self.first = sleeper()
        self.pid = self.first.pid
        self.gpid = Gpid("", "", "now", self.pid, ticks_of(self.pid))
        self.second: Child | None = None

    def swap(self) -> None:
        end(self.first)
        self.second = take(self.pid, self.gpid.start_ticks)

    def close(self, error: str) -> list[str | int]:
        """What became of the second, which must be there."""
        assert self.second is not None
        nice = os.getpriority(os.PRIO_PROCESS, self.pid)
        core = resource.prlimit(self.pid, resource.RLIMIT_CORE)[0]
        self.second.terminate()
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        end(self.second)
        return [error, "unharmed" if status == signal.SIGTERM else f"status {status}", nice, core]


def attempt(how: Callable[[Swap, Held], None]) -> list[str | int]:
    """Hold the first, check that it is the one, and then do that."""
    swap, code = Swap(), ""
    with hold(swap.pid) as held:
        check_identity(swap.gpid, look(held, Alone()))
        try:
            how(swap, held)
        except TabaneError as error:
            code = error.code
    return swap.close(code)


def signal_late(swap: Swap, held: Held) -> None:
    swap.swap()
    kernel.send_signal(held, signal.SIGKILL)


def nice_late(swap: Swap, held: Held) -> None:
    swap.swap()
    kernel.set_nice(held, lambda nice: 5)


def nice_in_the_window(swap: Swap, held: Held) -> None:
    def choose(nice: int) -> int:
        swap.swap()
        return 5

    kernel.set_nice(held, choose)


def limit_in_the_window(swap: Swap, held: Held) -> None:
    def choose(name: str, now: tuple[int, int]) -> tuple[int, int]:
        swap.swap()
        return (5, 100)

    kernel.set_limits(held, ["core"], choose)


def thread_in_the_window() -> list[str | int]:
    """Only a thread ends, and its id becomes the pid of another process."""
    child = subprocess.Popen(
        [sys.executable, "-c", THREADED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert child.stdin and child.stdout
    tid = int(child.stdout.read(20))
    ticks = parse_stat(Path(f"/proc/{child.pid}/task/{tid}/stat").read_bytes()).starttime
    others: list[Child] = []

    def apply(each: int) -> None:
        assert child.stdin and child.stdout
        if each == tid:
            child.stdin.write(b"x")
            assert child.stdout.read(20) == b"ended"
            others.append(take(tid, ticks))
        os.setpriority(os.PRIO_PROCESS, each, 5)

    code = ""
    with hold(child.pid) as held:
        try:
            kernel.for_all_threads(held, apply)
        except TabaneError as error:
            code = error.code
    nice = os.getpriority(os.PRIO_PROCESS, tid)
    for process in (*others, child):
        end(process)
    return [code, nice]


ACTIONS: list[Action] = [
    Signal(signal.SIGKILL),
    Pause(),
    Nice(5),
    Affinity((0,)),
    Limits({"core": Limit(5)}),
]


async def orders_too_late(directory: Path) -> list[list[str | int]]:
    """The whole way, for one that has had its pid taken since it was listed."""
    audit = AuditLog(directory / "audit.log")
    found = []
    async with Supervisor("test") as tasks:
        control = Control(Here(NodeName(""), "now"), audit, tasks)
        for action in ACTIONS:
            swap = Swap()
            swap.swap()
            (outcome,) = await control.obey(Order((swap.gpid,), action), Principal("peer", 0))
            found.append(swap.close(outcome.error))
    audit.close()
    return found


def main() -> None:
    results = {
        "orders": asyncio.run(orders_too_late(Path(sys.argv[1]))),
        "signal late": attempt(signal_late),
        "nice late": attempt(nice_late),
        "nice in the window": attempt(nice_in_the_window),
        "limit in the window": attempt(limit_in_the_window),
        "thread in the window": thread_in_the_window(),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
