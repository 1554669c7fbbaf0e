"""`tabane why`: where an app would run next and why, what keeps it from it, why a wake was slow."""

from __future__ import annotations

from typing import Any

from tabane.tools.cli.common import (
    Parser,
    app_key,
    format_age,
    format_at,
    format_us,
    print_json,
    say,
    say_silent,
)
from tabane.tools.cli.places import placed
from tabane.tools.client import Cluster

SLOWEST = 3
"""Phases of a wake that are named."""
LATEST = 3
DOWN = {"freezing": "frozen", "stopping": "stopped", "failed": "lost"}


def why(argv: list[str]) -> int:
    parser = Parser("why", "Where an app would run next, and why; and why its wakes took so long.")
    parser.add_argument("app")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    answer = Cluster(args.root).get(f"/api/v1/apps/{app_key(args.app)}")
    if args.json:
        wakes = [*map(placed, answer["wakes"])]
        print_json({"homes": answer["homes"], "wakes": wakes, "silent": answer["silent"]})
        return say_silent(answer["silent"])
    for home in answer["homes"]:
        _explain(home)
    if (down := _latest_down(answer["events"])) is not None:
        what = f"{down['instance']} on {down['node']} was {DOWN[down['state']]}"
        print()
        say(f"{format_at(down['at'])}  {what}: {down['reason']}")
    wakes = answer["wakes"][-LATEST:]
    print("\nlatest wakes" if wakes else "\nit was not woken yet")
    for wake in reversed(wakes):
        say(f"  {_describe(wake)}")
    return say_silent(answer["silent"])


def _explain(home: dict[str, Any]) -> None:
    """What one data center's home of the app decides."""
    where = home["home"].partition("/")[0]
    callers = f" for {home['callers']} callers" if home["callers"] else ""
    chosen = f"would run on {home['next']}" if home["next"] else "would be refused"
    say(f"in {where} the next instance{callers} {chosen}")
    for reason in home["placement"]:
        say(f"  {reason}")
    for away in home.get("away", ()):
        say(f"  {describe_away(away)}")
    if home["waiting"]:
        say(f"  {home['waiting']} sessions wait for it: {home['waits_for']}")
    if home["problem"]:
        say(f"  it {home['problem']}")
    if unsaved := home.get("unsaved"):
        say(f"  of checkpoints: {unsaved}")
    if home["trouble"]:
        say(f"  the last session that broke off: {home['trouble']}")


def describe_away(away: dict[str, Any]) -> str:
    """An instance that is put away, and what the next session has of it."""
    where = f"{away['instance']} is put away on {away['node']}"
    if away["problem"]:
        return f"{where}, and left alone for now: {away['problem']}"
    return f"{where}, idle for {format_age(away['idle_s'])}, and goes on with the next session"


def _latest_down(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last time that one of its instances went down the ladder, or off it, for a reason."""
    went = (event for event in events if event["state"] in DOWN and event.get("reason"))
    return max(went, key=lambda event: float(event["at"]), default=None)


def _describe(wake: dict[str, Any]) -> str:
    """A wake in one line: what it cost, and which phases most of it."""
    phases = sorted(wake["phases_us"].items(), key=lambda phase: -phase[1])[:SLOWEST]
    most = ", ".join(f"{name} {format_us(took)}" for name, took in phases if took)
    outcome = wake.get("outcome", "ok")
    ended = f"; {outcome}" if outcome != "ok" else ""
    cost = f"{wake['option']}  {format_us(wake['total_us'])} ms: {most}"
    return f"{format_at(wake['at'])}  {cost}{ended}"
