"""Which engine runs an app on a node: a pure function from what the node has to a choice.

An app is never given a weaker class than it asks for: what does not fit is refused with a reason.
An app of class `auto` gets, by `POLICY`, a class that is fit for the callers its instance is for:
of those that are there and whose starts keep to its wake budget, the cheapest.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from tabane.model import App, Class, Trust, Value
from tabane.runtimes.wishes import refusal

POLICY = {
    Trust.TRUSTED: (Class.CONTAINER, Class.UNIKERNEL, Class.SANDBOX, Class.MICROVM, Class.VM),
    Trust.ANONYMOUS: (Class.UNIKERNEL, Class.SANDBOX, Class.MICROVM, Class.VM),
}
"""What may run for whom, the cheapest first. Who is not known shares no kernel unguarded."""
TABLES = {
    "volumes": "[[volumes]]",
    "services": "[services]",
    "pods": "[[containers]]",
    "exec": "[health] command",
    "limit": "cpu_min or memory_min",
}
"""How an app file calls what an app needs (`App.needs`)."""


class EngineView(Value, frozen=True, omit_defaults=True):
    """A driver that works on a node."""

    name: str
    isolation: Class
    images: tuple[str, ...] = ("linux", "host")
    """Kinds of images it runs (`App.kind`)."""
    emulated: bool = False
    """It only emulates a processor there, and the node's operator does not allow that to all."""
    features: tuple[str, ...] = ()
    """What it can do that not all can and apps may need (`App.needs`)."""
    layer_in_memory: bool = False
    """What its instances write to their own layer takes the node's memory."""
    wake_s: float | None = None
    """The median of its latest cold starts there; None: none yet."""
    broken: str = ""
    """Why it does not work there; empty: it does."""
    refuses: dict[str, str] = msgspec.field(default_factory=dict)
    """What of an app's file it can never give, and why (`tabane.runtimes.wishes`)."""


def pick_engine(app: App, engines: Iterable[EngineView]) -> str:
    """The name of the first of a node's engines (the preferred first) that runs `app`;
    empty when there is none."""
    fit = [engine for engine in engines if not why_not(app, engine)]
    if app.isolation is Class.AUTO:
        fit.sort(key=lambda engine: POLICY[_trust(app)].index(engine.isolation))
        fit = _within_budget(fit, app.reactive.wake_budget_s)
    return fit[0].name if fit else ""


def _within_budget(engines: list[EngineView], budget_s: float | None) -> list[EngineView]:
    """Those that keep to it, as far as is known; when none does, the fastest."""
    if budget_s is None or not engines:
        return engines
    kept = [engine for engine in engines if (engine.wake_s or 0.0) <= budget_s]
    return kept or [min(engines, key=lambda engine: engine.wake_s or 0.0)]


def _trust(app: App) -> Trust:
    return app.trust or Trust.ANONYMOUS


def why_not(app: App, engine: EngineView) -> str:
    """What keeps an engine from running `app`, as the end of a sentence; empty: nothing."""
    if app.isolation is Class.AUTO:
        if engine.isolation not in POLICY[_trust(app)]:
            return f"runs class {engine.isolation}, which is not for {_trust(app)} callers"
    elif engine.isolation is not app.isolation:
        return f"runs class {engine.isolation}"
    if app.driver not in ("", engine.name):
        return f"is not {app.driver}, which the app names"
    if app.kind not in engine.images:
        return f"runs no {app.kind} images"
    if engine.broken:
        return f"does not work: {engine.broken}"
    if lacking := [need for need in app.needs() if need not in engine.features]:
        return f"runs no app with {' and '.join(TABLES[need] for need in lacking)}"
    if reason := refusal(app, engine.refuses):
        return reason
    if engine.emulated and not app.allow_emulation:
        return "could only emulate a processor, which neither app nor node allow (allow_emulation)"
    return ""


def explain_none(app: App, engines: Iterable[EngineView]) -> str:
    """Why `pick_engine` finds none, as the end of a sentence about the node."""
    engines = tuple(engines)
    if app.isolation is Class.AUTO:
        reasons = "; ".join(f"{engine.name} {why_not(app, engine)}" for engine in engines)
        return f"has nothing for {_trust(app)} callers ({reasons or 'no driver works there'})"
    if app.isolation not in (engine.isolation for engine in engines):
        return f"has no working driver for class {app.isolation}"
    if app.driver and app.driver not in (engine.name for engine in engines):
        return f"has no working driver {app.driver}"
    meant = [engine for engine in engines if _is_meant(app, engine)]
    fit = [engine for engine in meant if app.kind in engine.images]
    return "; ".join(f"{engine.name} {why_not(app, engine)}" for engine in fit or meant)


def passed_over(app: App, engines: Iterable[EngineView]) -> str:
    """Why an app of class `auto` gets nothing cheaper than `pick_engine` says: a clause for each
    reason. Empty for other apps, and where there is nothing cheaper."""
    engines = tuple(engines)
    picked = next((each for each in engines if each.name == pick_engine(app, engines)), None)
    if app.isolation is not Class.AUTO or picked is None:
        return ""
    budget_s, policy = app.reactive.wake_budget_s, POLICY[_trust(app)]
    dearer = policy[policy.index(picked.isolation) :]
    reasons: dict[str, list[str]] = {}
    for engine in (each for each in engines if each.isolation not in dearer):
        reason = why_not(app, engine) or _too_slow(engine, budget_s)
        reasons.setdefault(reason, []).append(engine.name)
    if slow := _too_slow(picked, budget_s):
        reasons.setdefault(f"{slow}, and nothing is faster", []).append(picked.name)
    return "; ".join(f"{_each_of(names)} {reason}" for reason, names in reasons.items())


def _too_slow(engine: EngineView, budget_s: float | None) -> str:
    if budget_s is None or (engine.wake_s or 0.0) <= budget_s:
        return ""
    return f"took {engine.wake_s or 0.0:.3g} s to start, more than its wake budget"


def _each_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"each of {', '.join(names)}"


def misfit(app: App, engines: Iterable[EngineView]) -> str:
    """Why no engine of the app's class, or the one it names, ever runs its image, on whatever node;
    empty: there is one. As the end of a sentence about the image."""
    engines = tuple(engines)
    asked = [one for one in engines if _is_meant(app, one)]
    if any(app.kind in one.images for one in asked):
        return ""
    who = f"driver {app.driver}" if app.driver else f"class {app.isolation}"
    runs = ", ".join(sorted({kind for one in asked for kind in one.images})) or "no"
    fitting = sorted({one.isolation for one in engines if app.kind in one.images})
    hint = f": class {' or '.join(fitting)} does" if fitting else ""
    return f"is a {app.kind} image, and {who} runs {runs} images{hint}"


def _is_meant(app: App, engine: EngineView) -> bool:
    is_class = app.isolation in (Class.AUTO, engine.isolation)
    return is_class and app.driver in ("", engine.name)
