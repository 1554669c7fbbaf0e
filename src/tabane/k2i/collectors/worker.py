"""The process of one plugin: `python -m tabane.k2i.collectors.worker [--try] KIND`.

Reads the collector's settings as a line of JSON, then takes a reading for each further line and
answers it with a line of JSON. Ends when its stdin does, and with whoever started it. What the
plugin prints is no answer: it goes to stderr.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from typing import BinaryIO

import msgspec

from tabane.errors import TabaneError
from tabane.k2i.collectors.apart import Answer, Told
from tabane.k2i.collectors.api import Collector, Maker, Setting
from tabane.k2i.collectors.command import run_here
from tabane.k2i.collectors.dial import NodeDial
from tabane.k2i.collectors.registry import plugins
from tabane.model import Collect

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """See the module's text."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        maker: Maker = plugins()[argv[-1]].load()
    except Exception as error:
        _say(answers, Answer(error=f"it cannot be loaded: {_describe(error)}"))
        return 1
    if "--try" in argv:
        _say(answers, Answer())
        return 0
    collect = msgspec.json.decode(sys.stdin.buffer.readline(), type=Collect)
    try:
        collector = maker(Setting(collect, NodeDial(), run_here))
    except Exception as error:
        _say(answers, Answer(error=_describe(error)))
        return 1
    asyncio.run(_serve(collector, answers))
    return 0


async def _serve(collector: Collector, answers: BinaryIO) -> None:
    while await asyncio.to_thread(sys.stdin.buffer.readline):
        try:
            readings = await collector.collect()
            answer = Answer([Told(r.facts, r.pid, r.instance) for r in readings])
        except Exception as error:
            answer = Answer(error=_describe(error))
        _say(answers, answer)
    await collector.aclose()


def _say(answers: BinaryIO, answer: Answer) -> None:
    answers.write(msgspec.json.encode(answer) + b"\n")
    answers.flush()


def _describe(error: Exception) -> str:
    if isinstance(error, TabaneError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
