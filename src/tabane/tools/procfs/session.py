"""A shell whose /proc is the cluster's: three processes, and how they find together and end.

    parent      the command that was typed: starts the others, waits, returns the shell's exit code
    server      serves /proc and takes the system calls (the parent's child)
    init        the first process of the shell's own pid and mount namespaces: mounts, starts the
                shell, reaps, and ends with it (the parent's other child)

Nothing can be left behind. The mounts exist in init's mount namespace only, which ends with its
last process; all of these are in init's pid namespace, and the kernel kills them when init ends.
Init and the server die with the parent (PR_SET_PDEATHSIG). When the server dies first, the kernel
answers for it, with errors; so nobody else may hold /dev/fuse open.

The shell's processes are alone in their pid namespace. That is why `kill -1`, and whatever else is
meant for many, reaches none but them.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

from tabane.errors import Unsupported
from tabane.tools.procfs import kernel
from tabane.tools.procfs.ahead import read_ahead
from tabane.tools.procfs.filter import Numbering, numbering
from tabane.tools.procfs.kernel import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID
from tabane.tools.procfs.supervisor import install

DEVICE = "/dev/fuse"
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGQUIT)
SERVER_NICE = -10
"""It does little, and every tool waits for it thousands of times."""
READER_NICE = 10
"""Where CPUs are short, what was typed comes first."""
SERVER_ENDED = "tabane: what serves this shell's /proc has ended: leave it, start another\n"
_MOUNT_OPTIONS = "rootmode=40000,user_id={uid},group_id={gid},default_permissions,allow_other"


class Plan(NamedTuple):
    """What to start. `overlays`: files below /proc that are mounted over others."""

    argv: list[str]
    environment: dict[str, str]
    overlays: Sequence[tuple[str, str]] = ()
    own_group: bool = False
    """Whether it is a shell at a terminal, which gets the foreground for itself."""


class Ended(NamedTuple):
    """How the shell ended: an exit code as shells tell it, and whether /proc was served all the
    while."""

    code: int
    served: bool


def run(plan: Plan, serve: Callable[[socket.socket], None]) -> Ended:
    """Start all three and wait for the shell. `serve` is called in the server, which ends with it;
    the others hand descriptors over to it at the meeting: see `receive`. To be called while there
    is but one thread. Raises `Unsupported`."""
    calls = numbering()
    _enter_user_namespace()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said, saying = os.pipe2(os.O_CLOEXEC)
    server = _fork(lambda: _be_server(ours, (theirs, said, saying), serve))
    ours.close()
    try:
        kernel.unshare(kernel.CLONE_NEWPID)
        init = _fork(lambda: _be_init(plan, theirs, (said, saying), calls))
    except OSError as error:
        _end(server)
        raise _unsupported("a pid namespace cannot be made", error) from None
    finally:
        theirs.close()
        os.close(saying)
    with open(said, "rb") as pipe:  # noqa: PTH123
        problem = pipe.read().decode(errors="replace")
    ended = _wait(init, server)
    if problem:
        raise Unsupported(problem)
    return ended


def open_device() -> int:
    """Raises `Unsupported`."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "load the kernel's module (modprobe fuse)"
        if error.errno == errno.EACCES:
            hint = f"run it as root, or let users open the device (chmod 666 {DEVICE})"
        raise _unsupported(f"{DEVICE} cannot be opened", error, hint) from None


def _enter_user_namespace() -> None:
    """Without root: one in which this user may mount, and is still who he is."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        return
    try:
        kernel.unshare(kernel.CLONE_NEWUSER)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    except OSError as error:
        hint = "run it as root, or allow user namespaces"
        raise _unsupported("a user namespace cannot be made", error, hint) from None


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _unsupported(what: str, error: OSError, hint: str = "run it as root") -> Unsupported:
    return Unsupported(f"tabane shell cannot work here: {what} ({error.strerror}): {hint}")


def _fork(work: Callable[[], int]) -> int:
    """A child that does this and ends; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        kernel.die_with_parent(signal.SIGKILL)
        if os.getppid() in (parent, 0):  # 0: it is in another pid namespace
            code = work()
    finally:
        os._exit(code)


# The server


def _be_server(
    meeting: socket.socket,
    others: tuple[socket.socket, int, int],
    serve: Callable[[socket.socket], None],
) -> int:
    theirs, said, saying = others
    theirs.close()
    os.close(said)
    os.close(saying)
    os.setsid()
    with suppress(OSError):  # without root it waits its turn like others
        os.setpriority(os.PRIO_PROCESS, 0, SERVER_NICE)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    serve(meeting)
    return 0


def receive(meeting: socket.socket) -> int | None:
    """The next descriptor that is handed over: first of the mounted /dev/fuse, then of the real
    procfs, then of the filter's listener; None when nobody can send any more."""
    data, fds, _, _ = socket.recv_fds(meeting, 16, 1)
    return fds[0] if data else None


def acknowledge(meeting: socket.socket) -> None:
    """What was received is in use: whoever handed it over may go on."""
    with suppress(OSError):
        meeting.send(b"ok")


def _hand_over(meeting: socket.socket, fd: int) -> None:
    """Returns when the server uses it; it is closed here. Raises `OSError`."""
    socket.send_fds(meeting, [b"fd"], [fd])
    os.close(fd)
    if not meeting.recv(16):
        raise OSError(errno.EPIPE, "the server of /proc has ended")


# Init and the shell


def _be_init(plan: Plan, meeting: socket.socket, pipe: tuple[int, int], calls: Numbering) -> int:
    said, saying = pipe
    os.close(said)
    try:
        _mount(plan, meeting)
        kernel.set_name("tabane")
        shell = os.fork()
        if not shell:
            _be_shell(plan, meeting, saying, calls)
    except (OSError, Unsupported) as error:
        _say(saying, error)
        return 1
    os.close(saying)
    meeting.close()
    _close_terminal()
    with suppress(OSError):  # without it the first listing takes longer
        _fork(_read_ahead)
    return _reap(shell)


def _read_ahead() -> int:
    os.nice(READER_NICE)
    read_ahead()
    return 0


def _mount(plan: Plan, meeting: socket.socket) -> None:
    fuse = open_device()
    options = _MOUNT_OPTIONS.format(uid=os.geteuid(), gid=os.getegid())
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    flags = MS_NOSUID | MS_NODEV
    kernel.mount("tabane", "/proc", "fuse.tabane", flags | MS_NOEXEC, f"fd={fuse},{options}")
    _hand_over(meeting, fuse)
    kernel.mount("proc", "/proc/tabane/local", "proc", flags | MS_NOEXEC)
    for source, target in plan.overlays:
        kernel.mount(source, target, "", MS_BIND)
    directory = os.open("/proc/tabane/local", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _hand_over(meeting, directory)


def _be_shell(plan: Plan, meeting: socket.socket, saying: int, calls: Numbering) -> NoReturn:
    try:
        if plan.own_group:
            take_foreground()
        _hand_over(meeting, install(calls))
        for number in (*TERMINAL_SIGNALS, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(plan.argv[0], plan.argv, plan.environment)
    except OSError as error:
        _say(saying, error)
    finally:
        os._exit(127)


def _say(saying: int, error: OSError | Unsupported) -> None:
    """To the parent: why there is no shell."""
    with suppress(OSError):
        os.write(saying, _explain(error).encode())


def _explain(error: OSError | Unsupported) -> str:
    if isinstance(error, Unsupported):
        return error.message
    what = f" ({error.filename})" if error.filename else ""
    reason = f"{error.strerror or error}{what}"
    if error.errno == errno.EBUSY:
        reason = "this is such a shell already, or a sandbox like it"
    return f"tabane shell cannot work here: {reason}"


def _close_terminal() -> None:
    """Init outlives no shell, but a pipe of its output must end with who writes into it."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)


def _reap(shell: int) -> int:
    """Wait for orphans too, until the shell has ended; its exit code."""
    for number in (*TERMINAL_SIGNALS, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pid, status = os.wait()
        if pid == shell:
            return _code_of(status)


def _code_of(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


# The parent


def _wait(init: int, server: int) -> Ended:
    """Until the shell has ended and nothing is left."""
    there = served = True
    before = {
        number: signal.signal(number, lambda number, frame: _kill(init))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    before |= {number: signal.signal(number, signal.SIG_IGN) for number in TERMINAL_SIGNALS}
    try:
        while True:
            pid, status = os.wait()
            if pid == init:
                break
            if pid == server:
                there = False
            if pid == server and status:
                served = False
                sys.stderr.write(SERVER_ENDED)
                sys.stderr.flush()
    finally:
        take_foreground(os.getpgrp())
        for number, handler in before.items():
            signal.signal(number, handler)
    if there:
        _end(server)
    return Ended(_code_of(status), served)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _end(pid: int) -> None:
    _kill(pid)
    os.waitpid(pid, 0)


def take_foreground(group: int | None = None) -> None:
    """Have the terminal, if there is one, for `group`, else for a group of this process's own."""
    if group is None:
        os.setpgid(0, 0)
        group = os.getpgrp()
    if not os.isatty(0):
        return
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        os.tcsetpgrp(0, group)
    except (OSError, termios.error):
        pass  # it is another session's terminal
    finally:
        signal.signal(signal.SIGTTOU, before)
