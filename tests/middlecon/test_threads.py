"""The threads of the blocking client: interrupts, forks, the end of a program, the pool."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading

import pytest

from tabane.errors import Closed, UsageError
from tabane.middlecon import Cause, Change
from tabane.middlecon.blocking import connect
from tabane.middlecon.threads import Lane, LoopThread, Workers

WAIT_S = 60.0
"""No test waits so long, unless something is broken."""


def interrupt_when(ready):
    """Send this process a SIGINT once `ready` is set: it raises in the main thread."""

    def wait():
        assert ready.wait(WAIT_S)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_an_interrupted_call_leaves_nothing_hanging(hub):
    x, y = hub.client("x"), hub.client("y")
    started, gate = threading.Event(), threading.Event()

    @y.on_message(concurrent=True)
    def hang(message):
        started.set()
        assert message.data or gate.wait(WAIT_S)
        return b"back"

    interrupter = interrupt_when(started)
    with pytest.raises(KeyboardInterrupt):
        x.call("y", b"", timeout_s=WAIT_S)
    interrupter.join()
    gate.set()
    assert x.call("y", b"again") == b"back"
    assert not x._thread._waited


def test_an_interrupted_connect_leaves_nothing_behind(tmp_path, no_threads_left):
    ready = threading.Event()
    interrupter = interrupt_when(ready)
    with pytest.raises(KeyboardInterrupt):
        ready.set()
        connect(f"unix://{tmp_path}/none", timeout_s=WAIT_S)
    interrupter.join()


def test_the_loops_own_thread_is_refused(hub):
    x = hub.client("x")
    x.join("r")
    for action in (lambda: x.call("x", b""), lambda: x.hubs, x.close, lambda: x.join("r")):

        def attempt(action=action):
            with pytest.raises(UsageError, match="in another thread"):
                action()

        x._thread.run(attempt)
    assert x.connected


FORKING = """
import os, sys
from tabane.errors import Closed
from tabane.middlecon.blocking import connect

me = connect(sys.argv[1], name="parent")
room = me.join("r")
pid = os.fork()
if pid == 0:
    for action in (lambda: room.say(b""), lambda: room.members, lambda: me.join("s")):
        try:
            action()
        except Closed as error:
            assert "connect again in the child" in error.message
        else:
            raise SystemExit(1)
    me.close()
    with connect(sys.argv[1], name="child") as mine:
        assert mine.join("r").say(b"").failed["parent"].cause == "refused"
    print("child", flush=True)
    {leave}
assert os.waitpid(pid, 0)[1] == 0
assert me.join("r") is room and "parent" in room.members
print("parent", me.connected, flush=True)
if pid_2 := os.fork():
    os.kill(os.getpid(), 9)
sys.stdin.read()
"""


@pytest.mark.parametrize("leave", ["sys.exit()", "os._exit(0)"])
def test_a_forked_child_must_connect_anew_and_keeps_no_session_alive(hub, leave):
    hub.stop()
    hub.start(heartbeat_s=3600)  # so that only its end can end a session
    watcher, gone = hub.client("watcher").join("r", member=False), queue.SimpleQueue()
    watcher.on_presence(
        lambda presence: presence.change is Change.LEFT and gone.put(presence.member)
    )
    program = [sys.executable, "-X", "dev", "-W", "error", "-c", FORKING.format(leave=leave)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*program, hub.url], text=True, **pipes)
    try:
        assert [gone.get(timeout=WAIT_S) for _ in range(2)] == ["child", "parent"]
    finally:
        out, err = process.communicate(timeout=WAIT_S)
    assert (out, err) == ("child\nparent True\n", "")


EXITING = """
import sys, threading
from tabane.middlecon.blocking import connect

me = connect(sys.argv[1], name="program")
started = threading.Event()

def hang(message):
    started.set()
    threading.Event().wait()

me.join("r", on_message=hang)
started.wait()
"""


def test_the_end_of_a_program_that_does_not_close_is_a_goodbye(hub):
    me, came = hub.client("me"), queue.SimpleQueue()
    room = me.join("r", member=False)
    room.on_presence(came.put)
    program = [sys.executable, "-X", "dev", "-W", "error", "-c", EXITING, hub.url]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        came.get(timeout=WAIT_S)
        receipt = room.say(b"", timeout_s=WAIT_S)
    finally:
        out, _ = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (0, b"")
    assert receipt.failed["program"].cause is Cause.CLOSED


def test_jobs_that_raise_are_reported_and_end_no_worker(caplog, no_threads_left):
    workers, done = Workers("w", 1), queue.SimpleQueue()
    lane = Lane(workers)
    for number in (1, 0, 2):
        lane.submit(lambda number=number: done.put(2 // number))
    assert [done.get(timeout=WAIT_S) for _ in range(2)] == [2, 1]
    workers.close(WAIT_S)
    workers.submit(lambda: done.put("never"))
    assert "ZeroDivisionError" in caplog.text and done.empty()


def test_a_loop_that_cannot_be_reached_any_more_fails_what_waits(no_threads_left):
    async def nothing():
        pass

    thread = LoopThread("t", nothing, list)
    thread.stop()
    thread = LoopThread("t", nothing, list)
    thread.start()
    assert thread.run(os.getpid) == os.getpid()
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 / 0)
    thread.stop()
    thread.stop()
    with pytest.raises(Closed, match="t is closed"):
        thread.call(nothing)
