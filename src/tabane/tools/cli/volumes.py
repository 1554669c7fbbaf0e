"""`tabane volume`: the volumes of all nodes."""

from __future__ import annotations

from tabane.errors import UsageError
from tabane.tools.cli.common import Parser, print_json, print_table, say, say_silent
from tabane.tools.cli.places import place_of, placed, short
from tabane.tools.cli.sizes import scaled
from tabane.tools.client import Cluster


def volume(argv: list[str]) -> int:
    parser = Parser("volume", "Durable storage of apps: what there is, and removing it for good.")
    parser.usage = "tabane volume ls [--json] | rm APP/VOLUME | rm --lost APP"
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--lost", action="store_true", help="give up those of a node that is lost")
    parser.add_argument("action", choices=("ls", "rm"))
    parser.add_argument("what", nargs="*", metavar="APP/VOLUME")
    args = parser.parse_args(argv)
    cluster = Cluster(args.root)
    if args.action == "rm":
        if len(args.what) > 1:
            raise UsageError("volume: name one at a time")
        return _remove(cluster, "".join(args.what), lost=args.lost)
    if args.what or args.lost:
        raise UsageError("volume: ls lists all, and takes no names")
    return _list(cluster, as_json=args.json)


def _remove(cluster: Cluster, what: str, *, lost: bool) -> int:
    parts = what.split("/")
    if len(parts) == (1 if lost else 2):
        parts.insert(0, "default")
    if not all(parts) or len(parts) != (2 if lost else 3):
        form = "--lost APP" if lost else "APP/VOLUME or NAMESPACE/APP/VOLUME"
        raise UsageError(f"volume: name what is to be removed as {form}")
    answer = cluster.delete(f"/api/v1/volumes/{'/'.join(parts)}")
    say(f"{'/'.join(parts[1:])}: {'given up' if lost else 'removed'} (it was on {answer['node']})")
    return 0


def _list(cluster: Cluster, *, as_json: bool) -> int:
    answer = cluster.get("/api/v1/volumes")
    if as_json:
        print_json({"volumes": [*map(placed, answer["volumes"])], "silent": answer["silent"]})
        return say_silent(answer["silent"])
    rows = [
        (
            *place_of(row),
            short(row["app"]),
            row["name"],
            scaled(row["size_bytes"]),
            scaled(row["disk_bytes"]),
            row["in_use"] or ("-" if row["deployed"] else "no app"),
        )
        for row in answer["volumes"]
    ]
    print_table(("DC", "NODE", "APP", "VOLUME", "SIZE", "ON DISK", "INSTANCE"), rows)
    return say_silent(answer["silent"])
