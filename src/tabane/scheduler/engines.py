"""Which engine runs an app on a node: a pure function from what the node has to a choice.

An app is never given a weaker class than it asks for: what does not fit is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable

from tabane.model import App, Class, Value


class EngineView(Value, frozen=True, omit_defaults=True):
    """A driver that works on a node."""

    name: str
    isolation: Class
    images: tuple[str, ...] = ("linux", "host")
    """Kinds of images it runs (`App.kind`)."""
    emulated: bool = False
    """It only emulates a processor there, and the node's operator does not allow that to all."""


def pick_engine(app: App, engines: Iterable[EngineView]) -> str:
    """The name of the first of a node's working engines (the preferred first) that runs `app`;
    empty when there is none."""
    return next((engine.name for engine in engines if not why_not(app, engine)), "")


def why_not(app: App, engine: EngineView) -> str:
    """What keeps an engine from running `app`, as the end of a sentence; empty: nothing."""
    if engine.isolation is not app.isolation:
        return f"runs class {engine.isolation}"
    if app.driver not in ("", engine.name):
        return f"is not {app.driver}, which the app names"
    if app.kind not in engine.images:
        return f"runs no {app.kind} images"
    if engine.emulated and not app.allow_emulation:
        return "could only emulate a processor, which neither app nor node allow (allow_emulation)"
    return ""


def explain_none(app: App, engines: Iterable[EngineView]) -> str:
    """Why `pick_engine` finds none, as the end of a sentence about the node."""
    engines = tuple(engines)
    if app.isolation not in (engine.isolation for engine in engines):
        return f"has no working driver for class {app.isolation}"
    if app.driver and app.driver not in (engine.name for engine in engines):
        return f"has no working driver {app.driver}"
    same = (engine for engine in engines if engine.isolation is app.isolation)
    return "; ".join(f"{engine.name} {why_not(app, engine)}" for engine in same)
