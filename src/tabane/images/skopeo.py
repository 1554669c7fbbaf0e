"""Running skopeo: one command at a time, its patience bounded, its failures in our words."""

from __future__ import annotations

import asyncio
import os
import shutil
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tabane.clock import SYSTEM, Clock, sleep_until
from tabane.errors import TimedOut, Unreachable, Unsupported
from tabane.images.troubles import explain
from tabane.references import Reference
from tabane.supervise import Supervisor

PAUSES_S = (1.0, 3.0)
"""Before a registry that cannot be reached, or broke off, is asked again; then it is given up.
skopeo's own retries leave out answers that break off."""
STALL_S = 60.0
"""A registry with which nothing goes on for so long has stalled."""
LOOK_S = 0.25
"""How often it is looked whether something goes on."""
POLICY = Path("/etc/containers/policy.json")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")

Look = Callable[[int], int]
"""How far a process has come; what is the same for too long is at a stand."""


async def run(
    argv: tuple[str, ...],
    reference: Reference,
    auth: str,
    directory: Path,
    *,
    look: Look = lambda pid: 0,
    clock: Clock = SYSTEM,
) -> bytes:
    """The output of a command, `argv` from its name on, that is about `reference`, run in
    `directory`, again after trouble of the network. `auth`: an auth file's text. Cancelling it
    kills skopeo.

    Raises `NotFound`, `Denied`, `Unreachable`, `TimedOut`, `Busy`, `Corrupt`, `NoRoom`, or
    `EngineError`, and `Unsupported` without skopeo.
    """
    if shutil.which("skopeo") is None:
        raise Unsupported(f"{reference} needs skopeo on this node: install its Debian package")
    for pause_s in PAUSES_S:
        try:
            return await _attempt(argv, reference, auth, directory, look, clock)
        except Unreachable:
            await sleep_until(clock, clock.now() + pause_s)
    return await _attempt(argv, reference, auth, directory, look, clock)


async def _attempt(
    argv: tuple[str, ...],
    reference: Reference,
    auth: str,
    directory: Path,
    look: Look,
    clock: Clock,
) -> bytes:
    async with Supervisor("skopeo", on_failure=lambda *_: None) as tasks:
        with _auth_file(auth) as (option, descriptors):
            words = (*_before(argv), *option, *argv[1:])
            start = _start(words, directory, descriptors)
            program = await tasks.begin("start", start, _kill)
        try:
            talk = tasks.start("talk", program.communicate())
            while not talk.done():
                await _watch(talk, lambda: look(program.pid), reference, clock)
        except BaseException:
            await _kill(program)
            raise
        output: bytes
        output, said = talk.result()
    if program.returncode:
        raise explain(said.decode(errors="replace"), reference, ("skopeo", *argv))
    return output


def _before(argv: tuple[str, ...]) -> tuple[str, ...]:
    """Without a policy for signatures skopeo would take nothing at all."""
    policy = () if POLICY.exists() else ("--insecure-policy",)
    return ("skopeo", *policy, argv[0])


async def _start(argv: tuple[str, ...], directory: Path, descriptors: tuple[int, ...]) -> Process:
    return await asyncio.create_subprocess_exec(
        *(*DIES_WITH_US, *argv),
        cwd=directory,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        pass_fds=descriptors,
    )


async def _watch(
    talk: asyncio.Task[tuple[bytes, bytes]],
    look: Callable[[], int],
    reference: Reference,
    clock: Clock,
) -> None:
    """Until it has ended, or made a step."""
    before, since = look(), clock.now()
    while not talk.done():
        await asyncio.wait({talk}, timeout=LOOK_S)
        if look() != before:
            return
        if clock.now() - since > STALL_S:
            raise TimedOut(f"{reference}: its registry has been silent for {STALL_S:g} s")


async def _kill(program: Process) -> None:
    with suppress(ProcessLookupError):
        program.kill()
    await program.wait()


@contextmanager
def _auth_file(text: str) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Logins in memory only: skopeo's option for them, and what it inherits."""
    if not text:
        yield (), ()
        return
    descriptor = os.memfd_create("auth.json")
    try:
        os.write(descriptor, text.encode())
        yield ("--authfile", f"/proc/self/fd/{descriptor}"), (descriptor,)
    finally:
        os.close(descriptor)
