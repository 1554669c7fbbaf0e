"""Why instances end: in words, and whether a new start would end the same way."""

from __future__ import annotations

import signal
from pathlib import Path

from tabane.errors import Corrupt, NotFound, TabaneError, Unsupported, UsageError
from tabane.model import App, ExitStatus
from tabane.node.records import last_line
from tabane.supervise import log_failure

HARMLESS_SIGNALS = frozenset(
    {0, signal.SIGCONT, signal.SIGSTOP, signal.SIGTSTP, signal.SIGCHLD, signal.SIGWINCH}
)
"""After these an end is a program's own; after any other it is what the sender may have wanted."""


def explain_end(app: App, status: ExitStatus, *, was_ready: bool, ordered: bool = False) -> str:
    """`ordered`: somebody had a signal sent to it."""
    if status.reason:
        return status.reason
    ended = f"was {status.describe()}" if status.signal else status.describe()
    reason = f"{f'container {status.container}' if status.container else 'the program'} {ended}"
    if not was_ready and app.takes_sessions:
        who = "the program" if status.container else "it"
        reason += f" before {who} listened on {_name_ports(app)}"
    return f"{reason}, after a signal by order" if ordered else reason


def describe_ready(app: App) -> str:
    """What its instances are waited for to do."""
    ports = f" on {_name_ports(app)}" if app.takes_sessions else ""
    return f"{app.reactive.ready}{ports}"


def _name_ports(app: App) -> str:
    *others, last = map(str, app.listens)
    return f"ports {', '.join(others)} and {last}" if others else f"port {last}"


def explain_timeout(app: App, seen: str) -> str:
    """`seen`: what it was found doing instead of becoming ready, if anything."""
    what = f"did not become ready ({describe_ready(app)})"
    reason = f"it {what} within {app.reactive.start_timeout_s:g} s"
    return f"{reason}: {seen}" if seen else reason


def with_last_line(reason: str, log: Path) -> str:
    """And what the program said last, if it said anything."""
    line = last_line(log)
    return f"{reason}; its last line: {line}" if line else reason


def explain_failure(doing: str, error: Exception) -> str:
    """What to tell of an instance that came to nothing by this. A mistake of ours is in the log."""
    if isinstance(error, TabaneError | OSError):
        return str(error)
    log_failure(doing, error)
    return f"its node made a mistake, and its log says which: {type(error).__name__}"


def would_repeat(error: Exception) -> bool:
    """Whether what could not be prepared cannot be next time either: another image or file is
    needed. One that is not here yet may come."""
    return isinstance(error, UsageError | Unsupported | Corrupt) and not isinstance(error, NotFound)
