"""Files into and out of an instance, also where the image has no program for that.

A helper, started anew for each copy, opens the instance's namespaces, enters its mount and user
namespace and its root, becomes the user there, without capabilities unless that is root, and packs
or unpacks. So every path means what it means inside, no link leads out, and the kernel refuses
what it would refuse to the program. It stays out of the pid namespace: nothing inside can see or
trace it. What it will need is imported before it enters, and nothing after, since what lies
inside where modules and libraries are looked for is not ours.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import NotFound, TabaneError, UsageError
from tabane.model import Value
from tabane.runtimes import archive
from tabane.runtimes.api import Conversation, Transfer, User
from tabane.runtimes.inside import Piped, Place, start_piped
from tabane.runtimes.process import is_same, start_ticks

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION = 0x20080522
NAMES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID"),
    *("KILL", "SETGID", "SETUID"),
)
"""The first capabilities by number: only those have to do with files."""
ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


class Order(Value, frozen=True):
    """What the helper is told, as JSON on its command line."""

    pid: int
    began: int
    """Its start, by which a pid that was given to another is known."""
    user: User
    capabilities: int
    transfer: Transfer


# The agent's side


async def converse(place: Place, transfer: Transfer) -> Conversation:
    """Begin a copy (see `Driver.copy`)."""
    process = msgspec.json.decode((place.directory / "config.json").read_bytes())["process"]
    main = process["user"]
    user = transfer.user or User(main["uid"], main["gid"], tuple(main["additionalGids"]))
    capabilities = mask_of(process["capabilities"]["effective"]) if user.uid == 0 else 0
    order = Order(place.pid, start_ticks(place.pid), user, capabilities, transfer)
    words = msgspec.json.encode(order).decode()
    argv = (sys.executable, "-I", "-m", "tabane.runtimes.copying", words)
    child, streams = await start_piped(argv, stdin=transfer.inward, env=ENV)

    async def code() -> int:
        ended = await child.wait()
        return ended if ended >= 0 else 128 - ended

    async def end() -> None:
        with suppress(ProcessLookupError):
            child.terminate()
        try:
            async with asyncio.timeout(2.0):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()

    async def tell(number: int) -> None:
        """The helper is none of the instance's processes."""

    async def forget() -> None:
        """It leaves nothing."""

    return Piped(streams, code=code, end=end, tell=tell, forget=forget)


def mask_of(capabilities: list[str]) -> int:
    """Those of `NAMES` as the kernel's bits."""
    return sum(1 << bit for bit, name in enumerate(NAMES) if f"CAP_{name}" in capabilities)


# The helper's side


def main(argv: list[str]) -> int:
    """Enter, and copy; says what goes wrong in sentences on stderr."""
    order = msgspec.json.decode(argv[0], type=Order)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    code = 0

    def complain(text: str) -> None:
        nonlocal code
        code = 1
        sys.stderr.buffer.write(text.encode(errors="backslashreplace") + b"\n")
        sys.stderr.flush()

    try:
        enter(order)
        if order.transfer.inward:
            _take(order.transfer)
        else:
            archive.pack(order.transfer.path, _write_all, complain)
    except TabaneError as error:
        complain(error.message)
    except BrokenPipeError:
        return 1
    except OSError as error:
        complain(f"{error.filename or order.transfer.path}: {error.strerror}")
    return code


def enter(order: Order) -> None:
    """Become the user in the instance. There is no way back."""
    libc = ctypes.CDLL(None, use_errno=True)
    for encoding in ("ascii", "utf-8", "latin-1"):
        "".encode(encoding)
    place = f"/proc/{order.pid}"
    spaces = [
        (kind, os.open(f"{place}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))
        for kind, name in ((CLONE_NEWNS, "mnt"), (CLONE_NEWUSER, "user"))
    ]
    root = os.open(f"{place}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if not is_same(order.pid, order.began):
        raise NotFound("the instance has ended")
    # now, since a user namespace may forbid it inside
    os.setgroups([_outer_group(place, group) for group in order.user.groups])
    sys.path, sys.meta_path = [], []
    for kind, space in spaces:
        _check(libc.setns(space, kind))
        os.close(space)
    os.fchdir(root)
    os.chroot(".")
    os.close(root)
    os.setresgid(*(order.user.gid,) * 3)
    os.setresuid(*(order.user.uid,) * 3)
    _keep_capabilities(libc, order.capabilities)
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    os.umask(0o022)


def _outer_group(place: str, group: int) -> int:
    """What a group of the instance is out here."""
    for line in Path(place, "gid_map").read_text().splitlines():
        first, outer, count = map(int, line.split())
        if first <= group < first + count:
            return outer + group - first
    raise UsageError(f"group {group} does not exist in the instance")


def _keep_capabilities(libc: Any, mask: int) -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)(mask, mask, 0, 0, 0, 0)
    _check(libc.capset(header, sets))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"the instance cannot be entered: {os.strerror(number)}")


def _take(transfer: Transfer) -> None:
    """Unpack stdin. A directory that is there takes what comes; else, if that may have a new name,
    the one above it does."""
    target, name = Path(transfer.path), None
    if transfer.as_named and not target.is_dir():
        if transfer.path.endswith("/"):
            raise UsageError(f"{transfer.path}: there is no such directory")
        target, name = target.parent, target.name
    try:
        directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{target}: {error.strerror}") from None
    archive.unpack(sys.stdin.buffer, directory, name=name, trusted=True)


def _write_all(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
