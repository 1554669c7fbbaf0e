"""Conversations with instances in tests: run a command to its end, copy a few files."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Iterable
from typing import NamedTuple

from tabane.runtimes.api import (
    Conversation,
    Driver,
    Execution,
    Handle,
    Output,
    TerminalSize,
    Transfer,
    User,
)

PATIENCE_S = 60.0


class Ended(NamedTuple):
    code: int
    stdout: bytes
    stderr: bytes


async def run_inside(
    driver: Driver,
    handle: Handle,
    argv: tuple[str, ...],
    *,
    given: Iterable[bytes] | None = None,
    user: User | None = None,
    workdir: str = "",
    terminal: TerminalSize | None = None,
    container: str = "",
) -> Ended:
    """Run a command; `given` is its input."""
    has_input = given is not None or terminal is not None
    execution = Execution(
        argv, user, workdir, stdin=has_input, terminal=terminal, container=container
    )
    return await hear_out(await driver.exec(handle, execution), given)


async def hear_out(talk: Conversation, given: Iterable[bytes] | None = None) -> Ended:
    """Give it its input, hear all it says, and close it."""

    async def give() -> None:
        if given is not None:
            for block in given:
                await talk.write(block)
            await talk.end_input()

    try:
        async with asyncio.timeout(PATIENCE_S):
            giving = asyncio.create_task(give())
            outputs = [read_all(output) for output in (talk.stdout, talk.stderr) if output]
            stdout, *stderr = await asyncio.gather(*outputs)
            giving.cancel()
            await asyncio.wait([giving])
            return Ended(await talk.wait(), stdout, b"".join(stderr))
    finally:
        await talk.aclose()


async def read_all(output: Output) -> bytes:
    said = b""
    while block := await output.read():
        said += block
    return said


async def hear(talk: Conversation, words: bytes) -> bytes:
    """Read until it has said `words`; returns all it said."""
    said = b""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while words not in said:
                block = await talk.stdout.read()
                assert block, f"it ended without {words!r}: {said!r}"
                said += block
    except TimeoutError:
        raise AssertionError(f"it did not say {words!r}, only {said!r}") from None
    return said


async def put(driver: Driver, handle: Handle, path: str, archive: bytes, **more: object) -> Ended:
    transfer = Transfer(path, inward=True, **more)  # type: ignore[arg-type]
    return await hear_out(await driver.copy(handle, transfer), [archive])


async def fetch(driver: Driver, handle: Handle, path: str, **more: object) -> Ended:
    transfer = Transfer(path, inward=False, **more)  # type: ignore[arg-type]
    return await hear_out(await driver.copy(handle, transfer))


def make_archive(files: dict[str, bytes], *more: tarfile.TarInfo, mode: int = 0o640) -> bytes:
    """Files by name, and other entries after them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), mode, 1_000_000_000
            tar.addfile(info, io.BytesIO(data))
        for info in more:
            tar.addfile(info)
    return out.getvalue()


def read_archive(archive: bytes) -> dict[str, tuple[bytes, int]]:
    """Contents and modes of its files, by name."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for info in tar:
            if info.isreg():
                file = tar.extractfile(info)
                assert file is not None
                found[info.name] = (file.read(), info.mode)
    return found
