"""How an instance's machine ended, from the line that its guest said last. Pure but for one read.

`exit 3`, `signal 15`, `oom 9` (a signal, for want of memory), `failed WORDS` (the program was not
started). A guest is not trusted: what it says is believed about itself alone, and a line that means
nothing counts for none.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

from tabane.model import ExitStatus

FILE = "end"
MAX_BYTES = 512
WENT_DOWN = ExitStatus(255)
"""Of a machine that was reset without a word: its kernel panicked, and told that on the console."""


def read_end(directory: Path) -> str:
    """The line; empty when there is none."""
    with suppress(FileNotFoundError):
        with (directory / FILE).open("rb") as file:
            data = file.read(MAX_BYTES)
        return data.partition(b"\n")[0].decode(errors="replace")
    return ""


def tells_of_program(line: str) -> bool:
    """Whether the app's program was started, and has ended."""
    return line.startswith(("exit ", "signal ", "oom "))


def parse_end(line: str, machine: ExitStatus) -> ExitStatus:
    """How the app's program ended; `machine` is how its machine's process did."""
    word, _, rest = line.partition(" ")
    number = int(rest) if rest.isdecimal() and len(rest) <= len("255") else -1
    if word == "exit" and 0 <= number <= 255:
        return ExitStatus(number)
    if word in ("signal", "oom") and number in signal.valid_signals():
        return ExitStatus(signal=number, oom=word == "oom")
    if line.startswith("failed ") or machine == ExitStatus():
        return WENT_DOWN
    if not machine.signal and machine.code - 128 in signal.valid_signals():
        return ExitStatus(signal=machine.code - 128)
    return machine
