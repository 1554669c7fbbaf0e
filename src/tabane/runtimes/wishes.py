"""What of an app's file an engine can never give, whatever the machine: one table of each driver's
(`Capabilities.refuses`), by which it refuses a start and placement looks for another before that.
Pure."""

from __future__ import annotations

from collections.abc import Mapping

from tabane.errors import Unsupported
from tabane.model import App


def wishes(app: App) -> tuple[str, ...]:
    """The names under which `Capabilities.refuses` may have a reason."""
    capabilities = app.security.capabilities
    asked = {
        "capabilities": capabilities,
        "workdir": app.workdir,
        "port": app.takes_sessions,
        "tcp": app.tcp,
    }
    return (*capabilities, *(name for name, wanted in asked.items() if wanted))


def refusal(app: App, refuses: Mapping[str, str]) -> str:
    """Why an engine that `refuses` these cannot run `app`, as the rest of a sentence that begins
    with its name; empty: nothing is in the way."""
    reasons = (refuses[wish] for wish in wishes(app) if wish in refuses)
    return ", and ".join(dict.fromkeys(reasons))


def check_wishes(app: App, driver: str, refuses: Mapping[str, str]) -> None:
    """Raises `Unsupported` with the reason."""
    if reason := refusal(app, refuses):
        raise Unsupported(f"{app.key}: {driver} {reason}")
