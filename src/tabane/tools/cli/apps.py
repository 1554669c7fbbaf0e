"""`tabane deploy`, `apps`, `show`, `rm`, `scale`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabane.clock import SYSTEM
from tabane.errors import UsageError
from tabane.tools.cli.common import (
    Parser,
    app_key,
    format_age,
    format_at,
    format_us,
    print_json,
    print_table,
    say,
    say_silent,
    whole,
)
from tabane.tools.client import Cluster


def deploy(argv: list[str]) -> int:
    parser = Parser("deploy", "Store an app. Returns when it is durable; a request will start it.")
    parser.add_argument("file", type=Path, help="the app file (TOML)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    from tabane import spec

    text = spec.read_text(args.file)
    app = spec.parse_app(text, file=str(args.file))
    cluster = Cluster(args.root)
    image = _send_image(cluster, app.source, args.file.resolve().parent)
    body = {"text": text, "file": str(args.file), "image": image}
    answer = cluster.post("/api/v1/apps", body)
    if args.json:
        print_json(answer)
    else:
        known = ", ".join(answer["known"]) or "none yet"
        say(f"{app.key} revision {answer['revision']} stored; known in {known}")
    return say_silent(answer["unreachable"])


def _send_image(cluster: Cluster, source: str, base: Path) -> str:
    """Fix the image to a digest, and see that the cluster has it."""
    if source == "host":
        return "host"
    from tabane.images import pack

    with pack(source, base) as packed:
        cluster.request("POST", "/api/v1/images", packed.chunks())
        return packed.digest


def apps(argv: list[str]) -> int:
    parser = Parser("apps", "List apps.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    answer = Cluster(args.root).get("/api/v1/apps")
    if args.json:
        print_json(answer)
    else:
        headings = ("APP", "REVISION", "CLASS", "IMAGE", "PORT", "HOSTS", "READY", "INSTANCES")
        print_table(headings, [_app_row(app) for app in answer["apps"]])
    return say_silent(answer["silent"])


def _app_row(app: dict[str, Any]) -> tuple[object, ...]:
    return (
        f"{app['namespace']}/{app['name']}",
        app["revision"],
        app["class"],
        app["image"],
        app.get("port") or "-",
        ",".join(app.get("hosts", ())) or "-",
        app["ready"],
        app["instances"],
    )


def show(argv: list[str]) -> int:
    parser = Parser("show", "All about one app.")
    parser.add_argument("app")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    answer = Cluster(args.root).get(f"/api/v1/apps/{app_key(args.app)}")
    if args.json:
        print_json(answer)
        return say_silent(answer["silent"])
    app = answer["app"]
    say(f"{app['namespace']}/{app['name']}  revision {app['revision']}  class {app['class']}")
    say(f"  image     {app['image']}")
    say(f"  command   {' '.join(app.get('command', ())) or '(of the image)'}")
    say(f"  port      {app.get('port') or '-'}   hosts {', '.join(app.get('hosts', ())) or '-'}")
    for home in answer["homes"]:
        say(f"  home      {home['home']}   waiting sessions {home['waiting']}")
        if home["reason"]:
            say(f"  problem   {home['failures']} failed starts; the last: {home['reason']}")
        if home["trouble"]:
            say(f"  trouble   the last session that broke off: {home['trouble']}")
    _show_instances(answer["instances"])
    _show_events(answer["events"])
    _show_wakes(answer["wakes"])
    return say_silent(answer["silent"])


def _show_instances(instances: list[dict[str, Any]]) -> None:
    print(f"\ninstances ({len(instances)})")
    headings = ("ID", "NODE", "STATE", "REVISION", "DRIVER", "ADDRESS", "PID", "AGE", "REASON")
    rows = [
        (
            i["id"],
            i["node"],
            i["state"],
            i["revision"],
            i.get("driver", "-"),
            i.get("address", "-"),
            i.get("pid", "-"),
            format_age(SYSTEM.wall() - i["created_at"]),
            i.get("reason", ""),
        )
        for i in instances
    ]
    print_table(headings, rows)


def _show_events(events: list[dict[str, Any]]) -> None:
    print(f"\nlatest events ({len(events)})")
    headings = ("AT", "NODE", "INSTANCE", "STATE", "REASON")
    rows = [
        (format_at(e["at"]), e["node"], e["instance"], e["state"], e.get("reason", ""))
        for e in events
    ]
    print_table(headings, rows)


def _show_wakes(wakes: list[dict[str, Any]]) -> None:
    print(f"\nlatest wakes ({len(wakes)})")
    headings = ("AT", "GATEWAY", "OPTION", "TOTAL_MS")
    rows = [
        (format_at(w["at"]), w["gateway"], w["option"], format_us(w["total_us"])) for w in wakes
    ]
    print_table(headings, rows)


def rm(argv: list[str]) -> int:
    parser = Parser("rm", "Remove an app; its instances are drained and stopped.")
    parser.add_argument("app")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    answer = Cluster(args.root).delete(f"/api/v1/apps/{app_key(args.app)}")
    if args.json:
        print_json(answer)
    else:
        say(f"{answer['name']} removed; known in {', '.join(answer['known']) or 'none yet'}")
    return say_silent(answer["unreachable"])


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
        print_json(answer)
    else:
        reactive = answer["reactive"]
        say(f"{args.app}: min {reactive['min']}, max {reactive['max']}")
    return say_silent(answer["unreachable"])
