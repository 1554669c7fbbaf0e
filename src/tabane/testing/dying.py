"""What is left when a process is killed, or a disk is full, at any of its file operations.

Work runs in a child, over and over: first it is killed before its first operation that changes
something below a directory, then before its second, and so on, until it comes to its end. Python
tells an audit hook of every operation before it is done.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

LOOKING = frozenset({"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr"})
NEEDING_ROOM = frozenset({"open", "os.mkdir", "os.rename"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def in_child(work: Callable[[], object]) -> int:
    """Do it in a child; returns how that ended, as `os.waitstatus_to_exitcode`: 0 when it returned,
    1 when it raised, which is shown then."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_each_step(below: Path, work: Callable[[], object]) -> Iterator[int]:
    """Yields after each time that `work` was killed, and once it came to its end, how often it was
    done. Raises what tells that it failed."""
    for step in count(1):

        def work_until(step: int = step) -> None:
            _at_step(step, below, _kill)
            work()

        status = in_child(work_until)
        assert status in (0, -signal.SIGKILL), f"it failed, killed at step {step}: see above"
        yield step
        if status == 0:
            return


def fail_at_each_write(
    below: Path, work: Callable[[], object], prepare: Callable[[], object]
) -> int:
    """`work` has to cope with a disk that is full at one of its writes: the first, the second, ...,
    each time after `prepare`. Returns how many there were. Raises what tells that it failed."""
    for step in count(1):
        prepare()
        reader, writer = os.pipe()

        def work_until(step: int = step, writer: int = writer) -> None:
            _at_step(step, below, lambda: _fail(writer), is_write=True)
            work()

        status = in_child(work_until)
        os.close(writer)
        has_failed = os.read(reader, 1) != b""
        os.close(reader)
        assert status == 0, f"it failed, with a full disk at write {step}: see above"
        if not has_failed:
            return step - 1
    raise AssertionError


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(writer: int) -> None:
    os.write(writer, b"x")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _at_step(step: int, below: Path, act: Callable[[], None], *, is_write: bool = False) -> None:
    """Once, before the operation of that number in this process."""
    lock, done, prefix = Lock(), count(1), f"{below}/"

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event.partition(".")[0] not in ("open", "os", "shutil") or not arguments:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(prefix):
            return
        if not _changes(event, arguments) or (is_write and event not in NEEDING_ROOM):
            return
        with lock:
            is_now = next(done) == step
        if is_now:
            act()

    sys.addaudithook(hear)


def _changes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether it does more than to look at something."""
    if event == "open":
        return bool((arguments[2] or 0) & WRITING)
    return event not in LOOKING
