"""What can be said to a fake instance: a few commands, and copies, all in memory."""

from __future__ import annotations

import asyncio

from tabane.runtimes.api import Execution, TerminalSize, Transfer

INTERRUPT, END = b"\x03", b"\x04"


class Line:
    """An `Output` that is written to in this process."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._is_over = False
        self._changed = asyncio.Event()

    def say(self, data: bytes) -> None:
        self._said += data
        self._changed.set()

    def finish(self) -> None:
        self._is_over = True
        self._changed.set()

    async def read(self) -> bytes:
        while not self._said and not self._is_over:
            self._changed.clear()
            await self._changed.wait()
        said = bytes(self._said)
        self._said.clear()
        return said


class FakeTalk:
    """A `Conversation` that says `words` and ends with `code`; with no code it says what it is told
    (`cat`) until its input ends."""

    def __init__(self, words: bytes = b"", error: bytes = b"", code: int | None = 0) -> None:
        self.stdout = Line()
        self.stderr: Line | None = Line()
        self.sizes: list[TerminalSize] = []
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.stdout.say(words)
        self.stderr.say(error)
        if code is not None:
            self.end(code)

    def end(self, code: int) -> None:
        if not self._code.done():
            self._code.set_result(code)
        for line in (self.stdout, self.stderr):
            if line is not None:
                line.finish()

    async def write(self, data: bytes) -> None:
        if not self._code.done():
            self.stdout.say(data)

    async def end_input(self) -> None:
        self.end(0)

    async def resize(self, size: TerminalSize) -> None:
        self.sizes.append(size)

    async def signal(self, number: int) -> None:
        self.end(128 + number)

    async def wait(self) -> int:
        return await asyncio.shield(self._code)

    async def aclose(self) -> None:
        self.end(129)


class FakeTerminal(FakeTalk):
    """`cat` at a terminal: what is typed is echoed, and said again at a line's end."""

    def __init__(self, words: bytes = b"", code: int | None = 0) -> None:
        super().__init__(words, code=code)
        self.stderr = None
        self._line = b""

    async def write(self, data: bytes) -> None:
        for byte in (data[i : i + 1] for i in range(len(data))):
            if byte == INTERRUPT:
                self.end(130)
            elif byte == END:
                self.end(0)
            else:
                shown = byte.replace(b"\n", b"\r\n")
                self._line += shown
                self.stdout.say(shown)
            if byte == b"\n":
                self.stdout.say(self._line)
                self._line = b""

    async def end_input(self) -> None:
        await self.write(END)


class FakeMeasure(FakeTerminal):
    """Tells its size when it is given a line."""

    def __init__(self, size: TerminalSize) -> None:
        super().__init__(code=None)
        self._size = size

    async def write(self, data: bytes) -> None:
        await super().write(data.rstrip(b"\n"))
        if data.endswith(b"\n"):
            self.stdout.say(f"\r\n{self._size.rows} {self._size.columns}\r\n".encode())
            self.end(0)


def begin(execution: Execution) -> FakeTalk:
    """A command of the fake's."""
    size = execution.terminal
    program, *words = execution.argv
    make = FakeTerminal if size is not None else FakeTalk
    if program == "cat":
        return make(code=None if size is not None or execution.stdin else 0)
    if program == "sh" and size is not None:
        return FakeMeasure(size)
    if program == "sh":
        return run_script(words[-1])
    if program == "echo":
        return make(" ".join(words).encode() + (b"\r\n" if size is not None else b"\n"))
    missing = f"{program}: not found\n".encode()
    return FakeTalk(error=missing, code=127)


def run_script(script: str) -> FakeTalk:
    """Commands between `;` and `&`: `echo` and `exit`; others do nothing."""
    said, code = b"", 0
    for program, *words in (command.split() for command in script.replace("&", ";").split(";")):
        if program == "echo":
            said += " ".join(words).encode() + b"\n"
        elif program == "exit":
            code = int(words[0])
    return FakeTalk(said, code=code)


class FakeCopy(FakeTalk):
    """An archive comes in and is kept, or goes out as it came."""

    def __init__(self, archives: dict[str, bytes], transfer: Transfer) -> None:
        kept = archives.get(transfer.path.rstrip("/"))
        if transfer.inward:
            super().__init__(code=None)
        elif kept is None:
            super().__init__(error=f"{transfer.path}: there is no such file\n".encode(), code=1)
        else:
            super().__init__(kept)
        self._archives = archives
        self._transfer = transfer
        self._taken = b""

    async def write(self, data: bytes) -> None:
        self._taken += data

    async def end_input(self) -> None:
        self._archives[self._transfer.path.rstrip("/")] = self._taken
        self.end(0)
