"""How far an image has come, on stderr: a bar on a terminal, else a line for each step of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tabane.tools.cli.common import complain, printable
from tabane.tools.cli.sizes import scaled

STEPS = {
    "begin": "waiting for an image",
    "resolve": "looking it up in",
    "pull": "pulling from",
    "copy": "copying from",
    "push": "pushing to",
    "send": "sending to",
}
"""What a node tells (`Progress.step`), or a command itself."""

Tell = Callable[[Mapping[str, Any]], None]


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[Tell]:
    """Show what is told, as nodes tell it; `quiet`: nothing."""
    if quiet:
        yield lambda told: None
    elif not sys.stderr.isatty():
        yield _Lines().tell
    else:
        with _bars() as tell:
            yield tell


def describe(told: Mapping[str, Any]) -> str:
    step = STEPS.get(str(told["step"]), str(told["step"]))
    return printable(f"{step} {told.get('where', '')}".strip())


class _Lines:
    """A line for each step."""

    def __init__(self) -> None:
        self._last = ""

    def tell(self, told: Mapping[str, Any]) -> None:
        what, total = describe(told), told.get("total_bytes", 0)
        if what != self._last:
            complain(f"{what} ({scaled(total)}B)" if total else what)
        self._last = what


@contextmanager
def _bars() -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        one = bars.add_task("", total=None)

        def tell(told: Mapping[str, Any]) -> None:
            what, total = describe(told), told.get("total_bytes") or None
            if what != bars.tasks[0].description:
                bars.reset(one, description=what)
            bars.update(one, completed=told.get("done_bytes", 0), total=total)

        yield tell
