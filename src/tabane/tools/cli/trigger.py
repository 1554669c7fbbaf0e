"""`tabane trigger`: what wakes apps beside their callers."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from urllib.parse import quote

from tabane.errors import UsageError
from tabane.tools.cli.common import Parser, app_key, print_json, print_table, say
from tabane.tools.cli.places import short
from tabane.tools.client import Cluster

UTC = "UTC"


def trigger(argv: list[str]) -> int:
    parser = Parser("trigger", "Timers and rooms that wake apps: what there is; try one out.")
    parser.usage = "tabane trigger ls [--json] | fire APP TRIGGER"
    parser.add_argument("--json", action="store_true")
    parser.add_argument("action", choices=("ls", "fire"))
    parser.add_argument("what", nargs="*", metavar="APP TRIGGER")
    args = parser.parse_args(argv)
    cluster = Cluster(args.root)
    if args.action == "fire":
        if len(args.what) != 2:
            raise UsageError("trigger: name an app and one of its triggers")
        return _fire(cluster, *args.what, as_json=args.json)
    if args.what:
        raise UsageError("trigger: ls lists all, and takes no names")
    return _list(cluster, as_json=args.json)


def _fire(cluster: Cluster, app: str, name: str, *, as_json: bool) -> int:
    answer = cluster.post(f"/api/v1/apps/{app_key(app)}/triggers/{quote(name, safe='')}/fire")
    if as_json:
        print_json(answer)
    else:
        say(f"{short(answer['app'])} {answer['trigger']}: {answer['outcome']}")
    return 0


def _list(cluster: Cluster, *, as_json: bool) -> int:
    answer = cluster.get("/api/v1/triggers")
    if as_json:
        print_json(answer)
        return 0
    rows = [
        (
            short(row["app"]),
            row["name"],
            _plan(row),
            row["request"],
            _when(row.get("next")),
            _when(row.get("last")),
            _outcome(row),
        )
        for row in answer["triggers"]
    ]
    print_table(("APP", "TRIGGER", "WHEN", "REQUEST", "NEXT", "LAST", "OUTCOME"), rows)
    return 0


def _plan(row: dict[str, Any]) -> str:
    """Of a timer its line, and where that is meant if elsewhere than in UTC."""
    if not row["cron"]:
        return f"room {row['room']}"
    zone = row.get("timezone", UTC)
    return row["cron"] if zone == UTC else f"{row['cron']} {zone}"


def _when(moment: float | None) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M") if moment else "-"


def _outcome(row: dict[str, Any]) -> str:
    return "under way" if row.get("pending") else row.get("outcome") or "-"
