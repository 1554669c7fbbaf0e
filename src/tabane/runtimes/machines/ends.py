"""How an instance's machine ended, from the line that its guest said last. Pure but for one read.

`exit 3`, `signal 15`, `oom 9` (a signal, for want of memory), each maybe with the name of a
container beside the main one; `failed WORDS` (a program was not started). A guest is not trusted:
what it says is believed about itself alone, and a line that means nothing counts for none.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from tabane.model import ExitStatus

FILE = "end"
CUT = "cut"
"""There: why the node ended the machine."""
MAX_BYTES = 512
LOG_BYTES = 64 << 10
PANIC = "Kernel panic - "
"""What the kernel says then; lines without a reason follow."""
END = "---[ end"
"""In the last of them."""
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
    """How the first of the machine's programs to end has; `machine` is how its process did."""
    word, _, rest = line.partition(" ")
    digits, _, container = rest.partition(" ")
    number = int(digits) if digits.isdecimal() and len(digits) <= len("255") else -1
    if word == "exit" and 0 <= number <= 255:
        return ExitStatus(number, container=container)
    if word in ("signal", "oom") and number in signal.valid_signals():
        return ExitStatus(signal=number, oom=word == "oom", container=container)
    if line.startswith("failed ") or machine == ExitStatus():
        return WENT_DOWN
    if not machine.signal and machine.code - 128 in signal.valid_signals():
        return ExitStatus(signal=machine.code - 128)
    return machine


def last_words(log: Path) -> str:
    """What the console said last, or why the kernel panicked; empty when that cannot be read. Who
    writes it is not trusted: no more than its last lines are read."""
    with suppress(OSError), log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LOG_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
        panics = [line[line.index(PANIC) :] for line in lines if PANIC in line and END not in line]
        return (panics or lines or [""])[-1].strip()
    return ""


def find_panic(log: Path) -> str:
    """Why the guest's kernel panicked, as it said it on its console; empty when it did not."""
    words = last_words(log)
    return words if words.startswith(PANIC) else ""


def explain(status: ExitStatus, directory: Path, end: str, log: Path) -> ExitStatus:
    """`status` of a machine, with why it is none of its program's, if there is a reason. `end`: the
    line that its guest said last."""
    with suppress(FileNotFoundError):
        return replace(status, reason=f"its machine was ended: {(directory / CUT).read_text()}")
    if status == WENT_DOWN and not tells_of_program(end):
        panic = find_panic(log)
        return replace(status, reason=f"its machine went down: {panic or 'it did not say why'}")
    return status
