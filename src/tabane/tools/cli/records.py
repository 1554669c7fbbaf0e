"""`tabane wakes`, `tabane events`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tabane.tools.cli.common import (
    Parser,
    app_key,
    format_at,
    format_us,
    print_json,
    print_table,
    say,
    say_silent,
    whole,
)
from tabane.tools.cli.places import place_of, placed, short
from tabane.tools.client import Cluster

if TYPE_CHECKING:
    import argparse

PHASES = ("queue", "decide", "network", "filesystem", "open", "engine", "boot", "ready",
          "first_byte")  # fmt: skip
MAX_RECORDS = 2000
LATEST = f"the latest N (nodes keep {MAX_RECORDS} at the most)"


def wakes(argv: list[str]) -> int:
    parser = Parser("wakes", "What each wake cost, in milliseconds by phase.")
    parser.add_argument("app", nargs="?", help="only this app's")
    parser.add_argument("-n", "--limit", type=whole(1), default=20, metavar="N", help=LATEST)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    answer = _latest(Cluster(args.root), "wakes", args)
    if args.json:
        print_json({"wakes": [*map(placed, answer["records"])], "silent": answer["silent"]})
    else:
        headings = (
            "AT",
            "DC",
            "NODE",
            "APP",
            "TRUST",
            "OPTION",
            "TOTAL_MS",
            *(p.upper() for p in PHASES),
            "OUTCOME",
        )
        print_table(headings, [_wake_row(wake) for wake in answer["records"]])
    return say_silent(answer["silent"])


def _latest(cluster: Cluster, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """The latest records, of one app where one is named. Raises `NotFound` for a name of none."""
    if args.app is None:
        told: dict[str, Any] = cluster.get(f"/api/v1/{kind}?limit={args.limit}")
        return told
    key = app_key(args.app)
    answer = cluster.get(f"/api/v1/{kind}?limit={MAX_RECORDS}")
    records = [record for record in answer["records"] if record["app"] == key]
    if not records:
        cluster.get(f"/api/v1/apps/{key}")
    return {**answer, "records": records[-args.limit :]}


def _wake_row(wake: dict[str, Any]) -> tuple[object, ...]:
    return (
        format_at(wake["at"]),
        *(name or "-" for name in place_of(wake)),
        short(wake["app"]),
        wake.get("trust") or "-",
        wake["option"],
        format_us(wake["total_us"]),
        *(format_us(wake["phases_us"].get(phase, 0)) for phase in PHASES),
        f"{wake.get('outcome', 'ok')}{f': {note}' if (note := wake.get('note')) else ''}",
    )


def events(argv: list[str]) -> int:
    parser = Parser("events", "What happened to instances, and to the nodes' own processes.")
    parser.add_argument("app", nargs="?", help="only to this app's")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("-n", "--limit", type=whole(1), default=50, metavar="N", help=LATEST)
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args(argv)
    cluster = Cluster(args.root)
    if not args.follow:
        return _print_events(_latest(cluster, "events", args), args.json)
    with cluster.stream("/api/v1/events?follow=true") as lines:
        answer = _latest(cluster, "events", args)
        code = _print_events(answer, args.json)
        for event in map(json.loads, lines):
            if "error" in event:
                from tabane.api.problems import parse_body

                raise parse_body(200, event)
            is_meant = args.app is None or event["app"] == app_key(args.app)
            if is_meant and event not in answer["records"]:
                _print_event(event, args.json)
    return code


def _print_events(answer: dict[str, Any], as_json: bool) -> int:
    for event in answer["records"]:
        _print_event(event, as_json)
    return say_silent(answer["silent"])


def _print_event(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(placed(event)), flush=True)
        return
    what = (f"tabane-{part}",) if (part := event.get("part")) else _instance_of(event)
    where = " ".join((*place_of(event), *what))
    reason = f": {event['reason']}" if event.get("reason") else ""
    say(f"{format_at(event['at'])} {where} {event['state']}{reason}")


def _instance_of(event: dict[str, Any]) -> tuple[str, str]:
    return short(event["app"]), event["instance"]
