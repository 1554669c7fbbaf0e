"""`tabane wakes`, `tabane events`."""

from __future__ import annotations

import json
from typing import Any

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

PHASES = ("queue", "decide", "network", "filesystem", "engine", "boot", "ready", "first_byte")
MAX_RECORDS = 2000
LATEST = f"the latest N (nodes keep {MAX_RECORDS} at the most)"


def wakes(argv: list[str]) -> int:
    parser = Parser("wakes", "What each wake cost, in milliseconds by phase.")
    parser.add_argument("app", nargs="?", help="only this app's")
    parser.add_argument("-n", "--limit", type=whole(1), default=20, metavar="N", help=LATEST)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    key = None if args.app is None else app_key(args.app)
    cluster = Cluster(args.root)
    answer = cluster.get(f"/api/v1/wakes?limit={MAX_RECORDS if key else args.limit}")
    records = [wake for wake in answer["records"] if key in (None, wake["app"])][-args.limit :]
    if key and not records:
        cluster.get(f"/api/v1/apps/{key}")  # raises `NotFound` for a name nobody has
    if args.json:
        print_json({"wakes": [*map(placed, records)], "silent": answer["silent"]})
    else:
        headings = (
            "AT",
            "DC",
            "NODE",
            "APP",
            "OPTION",
            "TOTAL_MS",
            *(p.upper() for p in PHASES),
            "OUTCOME",
        )
        print_table(headings, [_wake_row(wake) for wake in records])
    return say_silent(answer["silent"])


def _wake_row(wake: dict[str, Any]) -> tuple[object, ...]:
    return (
        format_at(wake["at"]),
        *(name or "-" for name in place_of(wake)),
        short(wake["app"]),
        wake["option"],
        format_us(wake["total_us"]),
        *(format_us(wake["phases_us"].get(phase, 0)) for phase in PHASES),
        wake.get("outcome", "ok"),
    )


def events(argv: list[str]) -> int:
    parser = Parser("events", "What happened to instances.")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("-n", "--limit", type=whole(1), default=50, metavar="N", help=LATEST)
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args(argv)
    cluster = Cluster(args.root)
    path = f"/api/v1/events?limit={args.limit}"
    if not args.follow:
        return _print_events(cluster.get(path), args.json)
    with cluster.stream("/api/v1/events?follow=true") as lines:
        answer = cluster.get(path)
        code = _print_events(answer, args.json)
        for event in map(json.loads, lines):
            if "error" in event:
                from tabane.api.problems import parse_body

                raise parse_body(200, event)
            if event not in answer["records"]:
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
    where = " ".join((*place_of(event), short(event["app"]), event["instance"]))
    reason = f": {event['reason']}" if event.get("reason") else ""
    say(f"{format_at(event['at'])} {where} {event['state']}{reason}")
