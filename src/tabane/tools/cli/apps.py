"""`tabane apps`, `show`, `scale`."""

from __future__ import annotations

from typing import Any

from tabane.errors import UsageError
from tabane.tools.cli.common import (
    Parser,
    app_key,
    complain,
    format_age,
    format_at,
    format_us,
    print_json,
    print_table,
    say,
    say_silent,
    whole,
)
from tabane.tools.cli.places import place_of, placed, placed_app, short
from tabane.tools.cli.why import describe_away
from tabane.tools.client import Cluster

LONGEST_SOURCE = 14
LONGEST_HOSTS = 18
SOME_PORTS = 2


def apps(argv: list[str]) -> int:
    parser = Parser("apps", "List apps. READY: of their instances how many are.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    answer = Cluster(args.root).get("/api/v1/apps")
    if args.json:
        print_json({**answer, "apps": [placed_app(app) for app in answer["apps"]]})
    else:
        headings = ("APP", "CLASS", "REV", "IMAGE", "DIGEST", "PORT", "HOSTS", "READY")
        whole_answer = not answer["silent"]
        print_table(headings, [_app_row(app, whole_answer) for app in answer["apps"]])
    for app in answer["apps"]:
        for problem in _port_problems(app):
            complain(f"apps: {short(placed_app(app)['app'])}: {problem}")
    return say_silent(answer["silent"])


def _app_row(app: dict[str, Any], whole_answer: bool) -> tuple[object, ...]:
    rests = whole_answer and not app["instances"] and not app["reactive"]["min"]
    return (
        short(placed_app(app)["app"]),
        app["class"],
        app["revision"],
        _tail(app["image"], LONGEST_SOURCE),
        _digits(app["digest"]),
        _ports(app),
        _hosts(app.get("hosts", [])),
        "at rest" if rests else f"{app['ready']}/{app['instances']}",
    )


def _ports(app: dict[str, Any]) -> str:
    """The one of HTTP, and those of TCP, as many as there is room for."""
    http = [str(app["port"])] if "port" in app else []
    ports = [*http, *(f"{tcp['port']}/tcp" for tcp in app.get("tcp", ()))]
    more = f",+{len(ports) - SOME_PORTS}" if len(ports) > SOME_PORTS else ""
    return ",".join(ports[:SOME_PORTS]) + more or "-"


def _port_problems(app: dict[str, Any]) -> list[str]:
    return [
        f"{node} takes no sessions at TCP port {tcp['port']}: {why}"
        for tcp in app.get("tcp", ())
        for node, why in tcp.get("problems", {}).items()
    ]


def _tail(text: str, longest: int) -> str:
    """Its end tells more than its beginning."""
    return text if len(text) <= longest else f"...{text[3 - longest :]}"


def _digits(digest: str) -> str:
    """Of a digest as many as people compare; `-` for the host's image, which has none."""
    return digest.removeprefix("sha256:")[:12] if ":" in digest else "-"


def _hosts(hosts: list[str]) -> str:
    """As many as there is room for, and how many more."""
    shown = ",".join(hosts) or "-"
    if len(shown) <= LONGEST_HOSTS:
        return shown
    more = f",+{len(hosts) - 1}" if len(hosts) > 1 else ""
    return _tail(hosts[0], LONGEST_HOSTS - len(more)) + more


def show(argv: list[str]) -> int:
    parser = Parser("show", "All about one app.")
    parser.add_argument("app")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    answer = Cluster(args.root).get(f"/api/v1/apps/{app_key(args.app)}")
    if args.json:
        rows = {kind: [*map(placed, answer[kind])] for kind in ("instances", "events", "wakes")}
        print_json({**answer, "app": placed_app(answer["app"]), **rows})
        return say_silent(answer["silent"])
    app = answer["app"]
    say(f"{app['namespace']}/{app['name']}  revision {app['revision']}  class {app['class']}")
    digest = "" if app["digest"] == app["image"] else f" ({_digits(app['digest'])})"
    say(f"  image     {app['image']}{digest}")
    say(f"  command   {' '.join(app.get('command', ())) or '(of the image)'}")
    for beside in app.get("containers", ()):
        command = " ".join(beside.get("command", ())) or "(of the image)"
        image = f"{beside.get('image', app['image'])} ({_digits(beside['digest'])})"
        say(f"  beside    {beside['name']}: {command}, in {image}")
    say(f"  port      {app.get('port') or '-'}   hosts {', '.join(app.get('hosts', ())) or '-'}")
    for tcp in app.get("tcp", ()):
        idle = f", idle for {tcp['session_idle']} at most" if "session_idle" in tcp else ""
        proxy = f", PROXY {tcp['proxy_protocol']}" if "proxy_protocol" in tcp else ""
        say(f"  tcp       {tcp['port']} to its {tcp['target']}{idle}{proxy}")
    for problem in _port_problems(app):
        say(f"  problem   {problem}")
    if rooms := app["services"].get("middlecon"):
        say(f"  services  middlecon: {', '.join(rooms)}")
    if app["services"].get("k2i"):
        say("  services  k2i: what of it runs on its node")
    for volume in app.get("volumes", ()):
        where = f"{volume['path']}, {volume['size']}, on {app['volumes_on']}"
        say(f"  volume    {volume['name']} at {where}{_silently(app, answer['silent'])}")
    for collect in app.get("collect", ()):
        asked = collect.get("url") or " ".join(collect["command"])
        say(f"  collects  {collect.get('name', collect['kind'])}: {asked}")
    for sentence in answer["advice"]:
        say(f"  note      {sentence}")
    for home in answer["homes"]:
        callers = f" of {home['callers']} callers" if home["callers"] else ""
        say(f"  home      {home['home']}   waiting sessions{callers} {home['waiting']}")
        for reason in home["placement"]:
            say(f"  next      {reason}")
        for away in home.get("away", ()):
            say(f"  away      {describe_away(away)}")
        if home["problem"]:
            say(f"  problem   {home['problem']}")
        if unsaved := home.get("unsaved"):
            say(f"  saved     {unsaved}")
        if home["trouble"]:
            say(f"  trouble   the last session that broke off: {home['trouble']}")
    _show_instances(answer["instances"])
    _show_events(answer["events"])
    _show_wakes(answer["wakes"])
    return say_silent(answer["silent"])


def _silently(app: dict[str, Any], silent: list[str]) -> str:
    return ", which does not answer" if app["volumes_on"] in silent else ""


def _show_instances(instances: list[dict[str, Any]]) -> None:
    print(f"\ninstances ({len(instances)})")
    headings = (
        "INSTANCE",
        "DC",
        "NODE",
        "STATE",
        "REVISION",
        "CLASS",
        "DRIVER",
        "TRUST",
        "ADDRESS",
        "PID",
        "AGE",
        "REASON",
    )
    rows = [
        (
            i["id"],
            *place_of(i),
            "paused" if i.get("paused") else i["state"],
            i["revision"],
            placed(i)["class"],
            i.get("driver", "-"),
            i.get("trust") or "-",
            i.get("address", "-"),
            i.get("pid", "-"),
            format_age(i["age_s"]),
            i.get("reason", "") or _leases(i),
        )
        for i in instances
    ]
    print_table(headings, rows)


def _leases(instance: dict[str, Any]) -> str:
    count = instance.get("leases", 0)
    return f"at work, by {count} lease{'s' if count > 1 else ''}" if count else ""


def _show_events(events: list[dict[str, Any]]) -> None:
    print(f"\nlatest events ({len(events)})")
    headings = ("AT", "DC", "NODE", "INSTANCE", "STATE", "REASON")
    rows = [
        (format_at(e["at"]), *place_of(e), e["instance"], e["state"], e.get("reason", ""))
        for e in events
    ]
    print_table(headings, rows)


def _show_wakes(wakes: list[dict[str, Any]]) -> None:
    print(f"\nlatest wakes ({len(wakes)})")
    headings = ("AT", "GATEWAY", "TRUST", "OPTION", "TOTAL_MS", "OUTCOME")
    rows = [
        (
            format_at(w["at"]),
            w["gateway"],
            w.get("trust") or "-",
            w["option"],
            format_us(w["total_us"]),
            w.get("outcome", "ok"),
        )
        for w in wakes
    ]
    print_table(headings, rows)


def scale(argv: list[str]) -> int:
    parser = Parser("scale", "Change how many instances an app has at least and at most.")
    parser.add_argument("app")
    parser.add_argument("--min", type=whole(0), metavar="N", help="in the whole cluster")
    parser.add_argument("--max", type=whole(1), metavar="N", help="in each data center")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    body = {name: value for name in ("min", "max") if (value := getattr(args, name)) is not None}
    if not body:
        raise UsageError("scale: give --min, --max, or both")
    answer = Cluster(args.root).post(f"/api/v1/apps/{app_key(args.app)}/scale", body)
    if args.json:
        print_json(placed_app(answer))
    else:
        reactive = answer["reactive"]
        say(f"{args.app}: min {reactive['min']}, max {reactive['max']}")
    return say_silent(f"data center {dc}" for dc in answer["unreachable"])
